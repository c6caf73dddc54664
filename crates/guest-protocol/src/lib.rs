//! The qemu-ga wire and our own commands beside it, as pure code.
//!
//! No I/O, clock, threads or randomness: bytes come in as arguments, and what should be done comes out.

pub mod answers;
pub mod arguments;
pub mod base64;
pub mod client;
pub mod command;
pub mod connection;
pub mod error;
pub mod json;
pub mod members;
pub mod stillpoint;

pub use client::Client;
pub use command::{COMMANDS, Call, Command};
pub use connection::Connection;
pub use error::{Class, Error};
