//! The program in the guest.

fn main() {
    // First of all: a worker and a guard are this same program, and must become nothing else.
    guest_agent::freeze::guard::main_if_guard();
    guest_agent::quiesce::worker::main_if_worker();
}
