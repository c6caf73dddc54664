//! The program in the guest.

fn main() {
    // First of all: a worker is this same program, and must become nothing else.
    guest_agent::quiesce::worker::main_if_worker();
}
