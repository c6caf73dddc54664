//! The server's half of the transmission: what a client asks for, and whether it may.

use crate::Decoded;
use crate::bytes::Bytes;
use crate::error::ProtocolError;
use crate::limits::{READ_BYTES_MAX, REFUSED_WRITE_BYTES_MAX};
use crate::server_handshake::{ServerSession, skip};
use crate::wire::{ErrorCode, REQUEST_BYTES, REQUEST_MAGIC, command, command_flags};

/// A request as it came, unjudged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// The command's number.
    pub command: u16,
    /// The client's name for it; goes into the reply.
    pub cookie: u64,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u32,
}

/// A request that can be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send what the disk holds.
    Read {
        /// Where on the disk, in bytes.
        offset: u64,
        /// How much, in bytes; 1 to [`READ_BYTES_MAX`], inside the disk.
        length: u32,
        /// Whether the reply may come in several chunks, with holes. If not: one data chunk (or a simple reply).
        fragments: bool,
    },
    /// Say what each agreed context knows.
    BlockStatus {
        /// Where on the disk, in bytes.
        offset: u64,
        /// How much, in bytes; at least 1, inside the disk.
        length: u32,
        /// Exactly one extent, not longer than asked. QEMU always wants this; 7.2 forgives a server that sends
        /// more extents, the protocol does not.
        one: bool,
    },
    /// Nothing to do on a read-only disk; answer success.
    Flush,
    /// The client leaves: answer what is under way, then close. There is no reply to this one.
    Disconnect,
}

/// Cuts the stream of a client into requests.
#[derive(Debug, Default)]
pub struct RequestDecoder {
    /// Payload of a WRITE that is thrown away.
    skip: u32,
}

impl RequestDecoder {
    /// Begins behind the handshake.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads one request from the front of `buffer`; `None` while a refused WRITE's payload goes by.
    ///
    /// # Errors
    /// The client broke the protocol: hang up.
    pub fn decode(&mut self, buffer: &[u8]) -> Result<Decoded<Option<Request>>, ProtocolError> {
        if self.skip > 0 {
            return Ok(skip(&mut self.skip, buffer, None));
        }
        let mut bytes = Bytes(buffer);
        let Some(magic) = bytes.u32() else { return Ok(Decoded::More(REQUEST_BYTES)) };
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::Magic { place: "a request", found: u64::from(magic) });
        }
        let fields = (bytes.u16(), bytes.u16(), bytes.u64(), bytes.u64(), bytes.u32());
        let (Some(flags), Some(command), Some(cookie), Some(offset), Some(length)) = fields else {
            return Ok(Decoded::More(REQUEST_BYTES));
        };
        if command == command::WRITE {
            if length > REFUSED_WRITE_BYTES_MAX {
                return Err(ProtocolError::TooLong {
                    what: "a write",
                    length: u64::from(length),
                    limit: u64::from(REFUSED_WRITE_BYTES_MAX),
                });
            }
            self.skip = length;
        }
        Ok(Decoded::Ready(REQUEST_BYTES, Some(Request { flags, command, cookie, offset, length })))
    }
}

impl ServerSession {
    /// Decides whether a request can be carried out on this read-only disk.
    ///
    /// # Errors
    /// The code to answer with; the connection stays good.
    pub fn judge(&self, request: &Request) -> Result<Command, ErrorCode> {
        let Request { flags, offset, length, .. } = *request;
        let allowed_flags = match request.command {
            command::READ => command_flags::DONT_FRAGMENT | command_flags::FUA,
            command::BLOCK_STATUS => command_flags::REQUEST_ONE | command_flags::FUA,
            _ => command_flags::FUA,
        };
        match request.command {
            command::DISCONNECT => return Ok(Command::Disconnect),
            command::WRITE | command::TRIM | command::WRITE_ZEROES | command::RESIZE => {
                return Err(ErrorCode::NOT_PERMITTED);
            }
            _ if flags & !allowed_flags != 0 => return Err(ErrorCode::INVALID),
            command::FLUSH => return Ok(Command::Flush),
            command::READ | command::BLOCK_STATUS => {}
            _ => return Err(ErrorCode::INVALID),
        }
        let end = offset.checked_add(u64::from(length));
        if length == 0 || end.is_none_or(|end| end > self.size_bytes) {
            return Err(ErrorCode::INVALID);
        }
        if request.command == command::BLOCK_STATUS {
            if self.contexts.is_empty() {
                return Err(ErrorCode::INVALID);
            }
            let one = flags & command_flags::REQUEST_ONE != 0;
            return Ok(Command::BlockStatus { offset, length, one });
        }
        if length > READ_BYTES_MAX {
            return Err(ErrorCode::OVERFLOW);
        }
        let fragments = self.structured && flags & command_flags::DONT_FRAGMENT == 0;
        Ok(Command::Read { offset, length, fragments })
    }
}
