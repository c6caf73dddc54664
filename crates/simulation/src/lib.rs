//! A seeded world in which whole runs are led by the product's own deciding code, and everything may go wrong.
//!
//! **The product's own**: `snapshot::conduct` with its table and `judge`; `engine::guest` and `vm::agent`, which hold the
//! conversation with an agent, time-outs and second attempts included; both halves of `guest-protocol`; the agent's ledger
//! and the making of its report; `vm::point`'s plan and its way back.
//!
//! **Models**: the guest's processes and kernel (the head of `guest.rs` says where the line is), QEMU's block graph, the byte
//! channel, the store (a manifest and its packs; the real repository has its own fault tests), the clock.
//!
//! One thread, a virtual clock and one generator of random numbers: a seed decides everything, and repeats it.

mod guest;
mod hands;
mod line;
mod qemu;
pub mod schedule;
mod simulate;
mod world;

pub use simulate::{Simulated, simulate};
pub use world::Sabotage;
