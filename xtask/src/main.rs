//! The project's own commands: setup, test, demo, bench, check.
fn main() {}
