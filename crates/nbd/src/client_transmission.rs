//! The client's half of the transmission: requests by cookie, replies in whatever order they come.

use crate::Decoded;
use crate::bytes::{Bytes, message};
use crate::client_handshake::Session;
use crate::coverage::Coverage;
use crate::error::{ProtocolError, RequestError};
use crate::extents::StatusExtents;
use crate::limits::{ERROR_CHUNK_BYTES_MAX, REQUESTS_IN_FLIGHT_MAX, STATUS_EXTENTS_MAX};
use crate::wire::{
    CHUNK_HEADER_BYTES, ErrorCode, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk, command,
};

/// A reply, or one chunk of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply<'b> {
    /// The request's cookie.
    pub cookie: u64,
    /// What this chunk says.
    pub body: Body<'b>,
    /// Whether this was the last of its request: the cookie is forgotten, and everything asked for was answered
    /// (or [`Body::Failed`] was among the chunks).
    pub finished: bool,
}

/// What a chunk says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body<'b> {
    /// Bytes of the disk, from `offset` on; they lie in the caller's buffer.
    Data {
        /// Where on the disk, in bytes.
        offset: u64,
        /// The data; never empty.
        bytes: &'b [u8],
    },
    /// Zeroes, which were not sent.
    Hole {
        /// Where on the disk, in bytes.
        offset: u64,
        /// How many; never 0.
        length: u32,
    },
    /// What one context says.
    Status {
        /// The context's number, as in [`Session::contexts`].
        context: u32,
        /// The extents, from the request's offset on.
        extents: StatusExtents<'b>,
    },
    /// The request failed.
    Failed {
        /// Why.
        code: ErrorCode,
        /// What the server said, escaped; often empty.
        message: String,
        /// Where on the disk, if the server said so.
        offset: Option<u64>,
    },
    /// Nothing more.
    Nothing,
}

#[derive(Debug)]
struct InFlight {
    cookie: u64,
    command: u16,
    offset: u64,
    length: u32,
    failed: bool,
    answered: Coverage,
    contexts_answered: Vec<u32>,
}

impl InFlight {
    fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }

    /// Notes an answered stretch, if it is one that was asked for.
    fn answer(&mut self, offset: u64, length: u64) -> Result<(), ProtocolError> {
        let end = offset.checked_add(length).filter(|&end| end <= self.end());
        match end {
            Some(end) if length > 0 && offset >= self.offset => self.answered.add(offset, end),
            _ => Err(ProtocolError::Stray { offset, length }),
        }
    }
}

/// Encodes requests and decodes replies of one connection after its handshake.
#[derive(Debug)]
pub struct ClientTransmission {
    session: Session,
    in_flight: Vec<InFlight>,
    cookie: u64,
}

impl ClientTransmission {
    /// Begins where the handshake ended.
    pub fn new(session: Session) -> Self {
        Self { session, in_flight: Vec::new(), cookie: 0 }
    }

    /// What was agreed on.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// How many requests are under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Appends a READ to `out`; returns its cookie.
    ///
    /// # Errors
    /// The request is not sent; the connection stays good.
    pub fn read(&mut self, offset: u64, length: u32, out: &mut Vec<u8>) -> Result<u64, RequestError> {
        if length > self.session.read_bytes_max {
            return Err(RequestError::TooLong { length, limit: self.session.read_bytes_max });
        }
        self.request(command::READ, offset, length, out)
    }

    /// Appends a BLOCK_STATUS to `out`; returns its cookie. Each agreed context answers in a chunk of its own.
    ///
    /// # Errors
    /// The request is not sent; the connection stays good.
    pub fn block_status(&mut self, offset: u64, length: u32, out: &mut Vec<u8>) -> Result<u64, RequestError> {
        if self.session.contexts.is_empty() {
            return Err(RequestError::NoContext);
        }
        self.request(command::BLOCK_STATUS, offset, length, out)
    }

    /// Appends a TRIM to `out`; returns its cookie.
    ///
    /// # Errors
    /// The request is not sent; the connection stays good.
    pub fn trim(&mut self, offset: u64, length: u32, out: &mut Vec<u8>) -> Result<u64, RequestError> {
        self.request(command::TRIM, offset, length, out)
    }

    /// Appends the polite end to `out`. There is no reply to it.
    pub fn disconnect(&mut self, out: &mut Vec<u8>) {
        self.cookie += 1;
        encode_request(out, command::DISCONNECT, self.cookie, 0, 0);
    }

    fn request(
        &mut self,
        command: u16,
        offset: u64,
        length: u32,
        out: &mut Vec<u8>,
    ) -> Result<u64, RequestError> {
        let size_bytes = self.session.size_bytes;
        let end = offset.checked_add(u64::from(length));
        if length == 0 || end.is_none_or(|end| end > size_bytes) {
            return Err(RequestError::OutsideDisk { offset, length: u64::from(length), size_bytes });
        }
        if self.in_flight.len() >= REQUESTS_IN_FLIGHT_MAX {
            return Err(RequestError::TooMany);
        }
        self.cookie += 1;
        encode_request(out, command, self.cookie, offset, length);
        self.in_flight.push(InFlight {
            cookie: self.cookie,
            command,
            offset,
            length,
            failed: false,
            answered: Coverage::default(),
            contexts_answered: Vec::new(),
        });
        Ok(self.cookie)
    }

    /// Reads one reply or chunk from the front of `buffer`.
    ///
    /// It never asks to be shown more than the longest request under way needs, so that a hostile server cannot
    /// make the caller's buffer grow.
    ///
    /// # Errors
    /// The server broke the protocol: the connection is of no use any more.
    pub fn decode<'b>(&mut self, buffer: &'b [u8]) -> Result<Decoded<Reply<'b>>, ProtocolError> {
        let mut bytes = Bytes(buffer);
        match bytes.u32() {
            None => Ok(Decoded::More(SIMPLE_REPLY_BYTES)),
            Some(SIMPLE_REPLY_MAGIC) => self.simple(bytes),
            Some(STRUCTURED_REPLY_MAGIC) if self.session.structured => self.chunk(bytes),
            Some(found) => Err(ProtocolError::Magic { place: "a reply", found: u64::from(found) }),
        }
    }

    fn position(&self, cookie: u64) -> Result<usize, ProtocolError> {
        let same = |request: &InFlight| request.cookie == cookie;
        self.in_flight.iter().position(same).ok_or(ProtocolError::UnknownCookie(cookie))
    }

    fn simple<'b>(&mut self, mut bytes: Bytes<'b>) -> Result<Decoded<Reply<'b>>, ProtocolError> {
        let (Some(error), Some(cookie)) = (bytes.u32(), bytes.u64()) else {
            return Ok(Decoded::More(SIMPLE_REPLY_BYTES));
        };
        let place = self.position(cookie)?;
        let request = &self.in_flight[place];
        if error != 0 {
            self.in_flight.swap_remove(place);
            let body = Body::Failed { code: ErrorCode(error), message: String::new(), offset: None };
            return Ok(Decoded::Ready(SIMPLE_REPLY_BYTES, Reply { cookie, body, finished: true }));
        }
        // The answer to a TRIM has nothing to structure.
        if request.command == command::TRIM {
            self.in_flight.swap_remove(place);
            let reply = Reply { cookie, body: Body::Nothing, finished: true };
            return Ok(Decoded::Ready(SIMPLE_REPLY_BYTES, reply));
        }
        if request.command != command::READ || self.session.structured {
            let number = u32::from(request.command);
            return Err(ProtocolError::Unexpected { what: "simple reply to command", number });
        }
        let (offset, length) = (request.offset, request.length as usize);
        let total = SIMPLE_REPLY_BYTES + length;
        let Some(data) = bytes.take(length) else { return Ok(Decoded::More(total)) };
        self.in_flight.swap_remove(place);
        let body = Body::Data { offset, bytes: data };
        Ok(Decoded::Ready(total, Reply { cookie, body, finished: true }))
    }

    fn chunk<'b>(&mut self, mut bytes: Bytes<'b>) -> Result<Decoded<Reply<'b>>, ProtocolError> {
        let header = (bytes.u16(), bytes.u16(), bytes.u64(), bytes.u32());
        let (Some(flags), Some(kind), Some(cookie), Some(length)) = header else {
            return Ok(Decoded::More(CHUNK_HEADER_BYTES));
        };
        let place = self.position(cookie)?;
        let request = &mut self.in_flight[place];
        let limit = payload_bytes_max(request, kind)?;
        let length = length as usize;
        if length > limit {
            return Err(ProtocolError::TooLong {
                what: "a chunk",
                length: length as u64,
                limit: limit as u64,
            });
        }
        let total = CHUNK_HEADER_BYTES + length;
        let Some(payload) = bytes.take(length) else { return Ok(Decoded::More(total)) };
        let finished = flags & chunk::DONE != 0;
        let body = read_body(request, kind, payload, &self.session.contexts)?;
        match &body {
            Body::Failed { .. } => request.failed = true,
            Body::Nothing if !finished => return Err(ProtocolError::Malformed("empty chunk")),
            _ => {}
        }
        if finished {
            complete(request, self.session.contexts.len())?;
            self.in_flight.swap_remove(place);
        }
        Ok(Decoded::Ready(total, Reply { cookie, body, finished }))
    }
}

fn encode_request(out: &mut Vec<u8>, command: u16, cookie: u64, offset: u64, length: u32) {
    out.reserve(REQUEST_BYTES);
    out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out.extend_from_slice(&0u16.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

/// The longest payload of such a chunk, if such a chunk may answer such a request at all.
fn payload_bytes_max(request: &InFlight, kind: u16) -> Result<usize, ProtocolError> {
    match (request.command, kind) {
        (_, chunk::NONE) => Ok(0),
        (command::READ, chunk::OFFSET_DATA) => Ok(request.length as usize + 8),
        (command::READ, chunk::OFFSET_HOLE) => Ok(12),
        (command::BLOCK_STATUS, chunk::BLOCK_STATUS) => Ok(STATUS_EXTENTS_MAX * 8 + 4),
        (_, kind) if kind & chunk::ERROR_BIT != 0 => Ok(ERROR_CHUNK_BYTES_MAX),
        (_, kind) => Err(ProtocolError::Unexpected { what: "kind of chunk", number: u32::from(kind) }),
    }
}

fn read_body<'b>(
    request: &mut InFlight,
    kind: u16,
    payload: &'b [u8],
    contexts: &[(u32, String)],
) -> Result<Body<'b>, ProtocolError> {
    let mut bytes = Bytes(payload);
    match kind {
        chunk::NONE => Ok(Body::Nothing),
        chunk::OFFSET_DATA => {
            let offset = bytes.u64().ok_or(ProtocolError::Malformed("data chunk"))?;
            request.answer(offset, bytes.0.len() as u64)?;
            Ok(Body::Data { offset, bytes: bytes.0 })
        }
        chunk::OFFSET_HOLE => {
            let (Some(offset), Some(length), true) = (bytes.u64(), bytes.u32(), bytes.is_empty()) else {
                return Err(ProtocolError::Malformed("hole chunk"));
            };
            request.answer(offset, u64::from(length))?;
            Ok(Body::Hole { offset, length })
        }
        chunk::BLOCK_STATUS => {
            let context = bytes.u32().ok_or(ProtocolError::Malformed("block status"))?;
            let agreed = contexts.iter().any(|(id, _)| *id == context);
            if !agreed || request.contexts_answered.contains(&context) {
                return Err(ProtocolError::Unexpected { what: "context", number: context });
            }
            request.contexts_answered.push(context);
            let extents = StatusExtents::new(bytes.0, request.offset, request.end())?;
            Ok(Body::Status { context, extents })
        }
        _ => {
            let malformed = ProtocolError::Malformed("error chunk");
            let (Some(code), Some(length)) = (bytes.u32(), bytes.u16()) else { return Err(malformed) };
            let Some(text) = bytes.take(usize::from(length)) else { return Err(malformed) };
            let offset = if kind == chunk::ERROR_OFFSET { Some(bytes.u64().ok_or(malformed)?) } else { None };
            Ok(Body::Failed { code: ErrorCode(code), message: message(text), offset })
        }
    }
}

/// Whether everything was answered by the time the server calls it done.
fn complete(request: &InFlight, contexts: usize) -> Result<(), ProtocolError> {
    let (answered, asked) = match request.command {
        command::READ => (request.answered.total(), u64::from(request.length)),
        command::BLOCK_STATUS => (request.contexts_answered.len() as u64, contexts as u64),
        _ => return Ok(()),
    };
    if request.failed || answered == asked {
        return Ok(());
    }
    Err(ProtocolError::Incomplete { answered, asked })
}
