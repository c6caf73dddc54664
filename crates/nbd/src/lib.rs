//! The NBD protocol, both ends, as pure code.
//!
//! Fixed newstyle handshake, structured replies and metadata contexts, as in the NBD project's `doc/proto.md`.
//! No I/O, clock or threads: the caller owns sockets and buffers. A decoder is shown the bytes that have arrived so
//! far and answers with a [`Decoded`]: how many it consumed, or how many it must be shown at least. So payload is
//! parsed where it lies, and no byte of a disk is copied here.
//!
//! Client: [`ClientHandshake`] leads to a [`Session`], which opens a [`ClientTransmission`].
//! Server: [`ServerHandshake`] leads to a [`ServerSession`]; [`RequestDecoder`] yields requests, which the session
//! judges into [`Command`]s; `encode_*` writes the answers.

mod bytes;
mod client_handshake;
mod client_transmission;
mod coverage;
mod encode;
mod error;
mod extents;
pub mod limits;
mod plan;
mod server_handshake;
mod server_transmission;
mod wire;

pub use client_handshake::{ClientHandshake, Session};
pub use client_transmission::{Body, ClientTransmission, Reply};
pub use encode::{
    DATA_HEADER_BYTES, encode_data_header, encode_done, encode_error, encode_hole, encode_simple,
    encode_status,
};
pub use error::{HandshakeError, PlanError, ProtocolError, RequestError};
pub use extents::{Extent, StatusExtents};
pub use plan::{Piece, PlannedReads, allocation_status, plan_reads, split_at_holes};
pub use server_handshake::{Export, ServerHandshake, ServerSession, ServerStep};
pub use server_transmission::{Command, Request, RequestDecoder};
pub use wire::{ErrorCode, allocation, bitmap, transmission_flags};

/// The context that tells holes and zeroes from data: [`allocation`] has its flags.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The context of one of QEMU's dirty bitmaps: [`bitmap`] has its flags.
pub fn dirty_bitmap_context(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

/// What a decoder made of the bytes that it was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded<T> {
    /// Nothing consumed: show at least this many bytes, from the same place on.
    More(usize),
    /// So many bytes are done with, and this is what they said.
    Ready(usize, T),
}
