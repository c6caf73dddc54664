//! Bytes to send: options, and a server's replies.

use crate::error::ProtocolError;
use crate::limits::STRING_BYTES_MAX;
use crate::wire::{
    CHUNK_HEADER_BYTES, ErrorCode, OPTION_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk,
};

/// Length of what [`encode_data_header`] returns.
pub const DATA_HEADER_BYTES: usize = CHUNK_HEADER_BYTES + 8;

/// A length that its own limit keeps far below 4 GiB.
pub(crate) fn length32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Appends a 32-bit length and the bytes.
pub(crate) fn counted(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&length32(bytes.len()).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Appends a client's option.
pub(crate) fn option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    counted(out, data);
}

/// Appends a server's reply to an option.
pub(crate) fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    counted(out, data);
}

/// A simple reply; after a successful READ without structured replies the payload follows it.
pub fn encode_simple(cookie: u64, error: Option<ErrorCode>) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut out = [0; SIMPLE_REPLY_BYTES];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, |code| code.0).to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

fn chunk_header(cookie: u64, kind: u16, last: bool, length: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let mut out = [0; CHUNK_HEADER_BYTES];
    out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&(if last { chunk::DONE } else { 0 }).to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&length.to_be_bytes());
    out
}

/// What stands before `length` bytes of data, which begin at `offset` of the disk and must follow at once.
///
/// # Errors
/// `TooLong` if the chunk's length does not fit its 32-bit field.
pub fn encode_data_header(
    cookie: u64,
    offset: u64,
    length: u32,
    last: bool,
) -> Result<[u8; DATA_HEADER_BYTES], ProtocolError> {
    let payload = length.checked_add(8).ok_or(ProtocolError::TooLong {
        what: "a data chunk",
        length: u64::from(length),
        limit: u64::from(u32::MAX) - 8,
    })?;
    let mut out = [0; DATA_HEADER_BYTES];
    let (header, place) = out.split_at_mut(CHUNK_HEADER_BYTES);
    header.copy_from_slice(&chunk_header(cookie, chunk::OFFSET_DATA, last, payload));
    place.copy_from_slice(&offset.to_be_bytes());
    Ok(out)
}

/// Appends: so many zeroes from `offset` on.
pub fn encode_hole(out: &mut Vec<u8>, cookie: u64, offset: u64, length: u32, last: bool) {
    out.extend_from_slice(&chunk_header(cookie, chunk::OFFSET_HOLE, last, 12));
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

/// Appends what context number `context` says: (length, flags) from the request's offset on.
///
/// The caller gives at least one extent, none of them empty, and exactly one if the client asked for one.
pub fn encode_status(out: &mut Vec<u8>, cookie: u64, context: u32, extents: &[(u32, u32)], last: bool) {
    let length = length32(extents.len() * 8 + 4);
    out.extend_from_slice(&chunk_header(cookie, chunk::BLOCK_STATUS, last, length));
    out.extend_from_slice(&context.to_be_bytes());
    for (extent_length, flags) in extents {
        out.extend_from_slice(&extent_length.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
    }
}

/// Appends the end of a request that failed; `offset` says where on the disk, if that is known.
///
/// The message is cut to the protocol's limit for strings.
pub fn encode_error(out: &mut Vec<u8>, cookie: u64, code: ErrorCode, message: &str, offset: Option<u64>) {
    let message = &message[..message.floor_char_boundary(STRING_BYTES_MAX)];
    let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    let length = length32(6 + message.len() + if offset.is_some() { 8 } else { 0 });
    out.extend_from_slice(&chunk_header(cookie, kind, true, length));
    out.extend_from_slice(&code.0.to_be_bytes());
    out.extend_from_slice(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

/// Appends the end of a request that needs no more than that.
pub fn encode_done(out: &mut Vec<u8>, cookie: u64) {
    out.extend_from_slice(&chunk_header(cookie, chunk::NONE, true, 0));
}
