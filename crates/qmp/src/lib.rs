//! What Stillpoint says to QEMU's monitor, as pure code.
//!
//! No I/O, clock, threads or randomness: bytes come in as arguments, and requests come out as bytes. Only the
//! commands that we use are here. Answers tolerate unknown fields and events, because one program talks to every
//! QEMU from 7.2 on; what a QEMU can do is looked up in its schema ([`schema`]), never in its version number.

pub mod bitmap;
pub mod block;
pub mod command;
pub mod export;
pub mod job;
pub mod machine;
pub mod pci;
pub mod qom;
pub mod schema;
pub mod session;
pub mod transaction;
pub mod wire;

pub use command::{Command, Nothing};
pub use session::Session;
pub use wire::{CommandError, Event, Greeting, WireError};
