//! The qemu-ga wire and our own commands beside it, as pure code.
//!
//! No I/O, clock, threads or randomness: bytes come in as arguments, and what should be done comes out.

pub mod error;
pub mod stillpoint;

pub use error::{Class, Error};
