//! The program in the guest.

fn main() {}
