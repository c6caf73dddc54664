//! The server's half of the handshake: what a client may learn and choose before the transmission begins.

use crate::bytes::{Bytes, text};
use crate::error::ProtocolError;
use crate::limits::{
    CONTEXTS_MAX, OPTION_BYTES_MAX, OPTION_SKIPPED_BYTES_MAX, OPTIONS_MAX, READ_BYTES_MAX, STRING_BYTES_MAX,
};
use crate::wire::{NBD_MAGIC, OPTION_HEADER_BYTES, OPTION_MAGIC, handshake, info, option, reply};
use crate::{Decoded, encode};

/// One disk on offer. All exports are read-only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its name; `""` is what a client gets that names none.
    pub name: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// [`crate::transmission_flags`].
    pub flags: u16,
    /// Names of the contexts it can answer for.
    pub contexts: Vec<String>,
    /// The block size that it serves best, a power of two of at least 512 bytes.
    pub preferred_bytes: u32,
}

/// What was agreed on, at the server's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSession {
    /// Which of the exports, by its place in the list.
    pub export: usize,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Whether replies are structured.
    pub structured: bool,
    /// Agreed contexts: their places in [`Export::contexts`], which are also their numbers on the wire.
    pub contexts: Vec<usize>,
}

/// Where the handshake stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerStep {
    /// It goes on.
    Continue,
    /// The client left, politely: send what is to be sent and close.
    Abort,
    /// The transmission begins.
    Done(ServerSession),
}

/// Answers options until the client opens an export. Source: "Fixed newstyle negotiation" in `doc/proto.md`.
#[derive(Debug)]
pub struct ServerHandshake {
    greeted: bool,
    no_zeroes: bool,
    structured: bool,
    /// For which export, and which of its contexts.
    contexts: Option<(usize, Vec<usize>)>,
    options: u32,
    skip: u32,
}

impl ServerHandshake {
    /// Begins by appending the greeting to `out`.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        Self { greeted: false, no_zeroes: false, structured: false, contexts: None, options: 0, skip: 0 }
    }

    /// Takes what has arrived; appends to `out` what must be sent.
    ///
    /// # Errors
    /// The client broke the protocol, or named no export by the one option that has no way to refuse: hang up.
    pub fn decode(
        &mut self,
        buffer: &[u8],
        exports: &[Export],
        out: &mut Vec<u8>,
    ) -> Result<Decoded<ServerStep>, ProtocolError> {
        if self.skip > 0 {
            return Ok(skip(&mut self.skip, buffer, ServerStep::Continue));
        }
        let mut bytes = Bytes(buffer);
        if !self.greeted {
            let Some(flags) = bytes.u32() else { return Ok(Decoded::More(4)) };
            let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
            if flags & !known != 0 {
                return Err(ProtocolError::Unexpected { what: "handshake flags", number: flags });
            }
            self.greeted = true;
            self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
            return Ok(Decoded::Ready(4, ServerStep::Continue));
        }
        let (Some(magic), Some(number), Some(length)) = (bytes.u64(), bytes.u32(), bytes.u32()) else {
            return Ok(Decoded::More(OPTION_HEADER_BYTES));
        };
        if magic != OPTION_MAGIC {
            return Err(ProtocolError::Magic { place: "an option", found: magic });
        }
        if length as usize > OPTION_BYTES_MAX {
            if length > OPTION_SKIPPED_BYTES_MAX || number == option::EXPORT_NAME {
                let limit = OPTION_BYTES_MAX as u64;
                return Err(ProtocolError::TooLong { what: "an option", length: u64::from(length), limit });
            }
            self.count()?;
            self.skip = length;
            encode::option_reply(out, number, reply::TOO_BIG, b"option too long");
            return Ok(Decoded::Ready(OPTION_HEADER_BYTES, ServerStep::Continue));
        }
        let total = OPTION_HEADER_BYTES + length as usize;
        let Some(data) = bytes.take(length as usize) else { return Ok(Decoded::More(total)) };
        self.count()?;
        Ok(Decoded::Ready(total, self.option(number, data, exports, out)?))
    }

    fn count(&mut self) -> Result<(), ProtocolError> {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(ProtocolError::TooMany { what: "options", limit: OPTIONS_MAX as usize });
        }
        Ok(())
    }

    fn option(
        &mut self,
        number: u32,
        data: &[u8],
        exports: &[Export],
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolError> {
        let mut answer = |kind, text: &str| encode::option_reply(out, number, kind, text.as_bytes());
        match number {
            option::EXPORT_NAME => return self.export_name(data, exports, out),
            option::ABORT => {
                answer(reply::ACK, "");
                return Ok(ServerStep::Abort);
            }
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                answer(reply::INVALID, "this option has no data");
            }
            option::LIST => {
                for export in exports {
                    let mut data = Vec::new();
                    encode::counted(&mut data, export.name.as_bytes());
                    encode::option_reply(out, number, reply::SERVER, &data);
                }
                encode::option_reply(out, number, reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY => {
                self.structured = true;
                answer(reply::ACK, "");
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(number, data, exports, out);
            }
            option::INFO | option::GO => return Ok(self.info_or_go(number, data, exports, out)),
            _ => answer(reply::UNSUPPORTED, "no such option here"),
        }
        Ok(ServerStep::Continue)
    }

    /// The oldest option: no reply but the export itself, and hanging up is the only refusal.
    fn export_name(
        &mut self,
        data: &[u8],
        exports: &[Export],
        out: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolError> {
        let found = text(data).and_then(|name| find(exports, name));
        let (place, export) = found.ok_or(ProtocolError::Malformed("name of an export"))?;
        out.extend_from_slice(&export.size_bytes.to_be_bytes());
        out.extend_from_slice(&export.flags.to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(ServerStep::Done(self.session(place, export)))
    }

    fn session(&mut self, place: usize, export: &Export) -> ServerSession {
        let contexts = match self.contexts.take() {
            Some((chosen_for, contexts)) if chosen_for == place => contexts,
            _ => Vec::new(),
        };
        ServerSession { export: place, size_bytes: export.size_bytes, structured: self.structured, contexts }
    }

    fn info_or_go(&mut self, number: u32, data: &[u8], exports: &[Export], out: &mut Vec<u8>) -> ServerStep {
        let Some((name, wanted)) = parse_info(data) else {
            encode::option_reply(out, number, reply::INVALID, b"malformed request for an export");
            return ServerStep::Continue;
        };
        let Some((place, export)) = find(exports, name) else {
            encode::option_reply(out, number, reply::UNKNOWN, b"no such export");
            return ServerStep::Continue;
        };
        let mut data = info::EXPORT.to_be_bytes().to_vec();
        data.extend_from_slice(&export.size_bytes.to_be_bytes());
        data.extend_from_slice(&export.flags.to_be_bytes());
        encode::option_reply(out, number, reply::INFO, &data);
        if wanted.contains(&info::NAME) {
            let mut data = info::NAME.to_be_bytes().to_vec();
            data.extend_from_slice(export.name.as_bytes());
            encode::option_reply(out, number, reply::INFO, &data);
        }
        let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, export.preferred_bytes, READ_BYTES_MAX] {
            data.extend_from_slice(&size.to_be_bytes());
        }
        encode::option_reply(out, number, reply::INFO, &data);
        encode::option_reply(out, number, reply::ACK, &[]);
        if number == option::INFO {
            return ServerStep::Continue;
        }
        ServerStep::Done(self.session(place, export))
    }

    fn meta_context(&mut self, number: u32, data: &[u8], exports: &[Export], out: &mut Vec<u8>) {
        let set = number == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, an earlier choice is void.
            self.contexts = None;
        }
        let mut refuse = |kind, text: &str| encode::option_reply(out, number, kind, text.as_bytes());
        if !self.structured {
            return refuse(reply::INVALID, "contexts need structured replies");
        }
        let Some((name, queries)) = parse_queries(data) else {
            return refuse(reply::INVALID, "malformed list of contexts");
        };
        let Some((place, export)) = find(exports, name) else {
            return refuse(reply::UNKNOWN, "no such export");
        };
        let matches = |context: &str| match (set, queries.is_empty()) {
            (true, _) => queries.contains(&context),
            (false, true) => true,
            (false, false) => queries.iter().any(|query| listed_by(query, context)),
        };
        let mut chosen = Vec::new();
        for (id, context) in export.contexts.iter().enumerate().take(CONTEXTS_MAX) {
            if matches(context) {
                chosen.push(id);
                let mut data = encode::length32(if set { id } else { 0 }).to_be_bytes().to_vec();
                data.extend_from_slice(context.as_bytes());
                encode::option_reply(out, number, reply::META_CONTEXT, &data);
            }
        }
        encode::option_reply(out, number, reply::ACK, &[]);
        if set {
            self.contexts = Some((place, chosen));
        }
    }
}

/// Throws away up to `left` bytes of `buffer`.
pub(crate) fn skip<T>(left: &mut u32, buffer: &[u8], then: T) -> Decoded<T> {
    if buffer.is_empty() {
        return Decoded::More(1);
    }
    let now = u32::try_from(buffer.len()).unwrap_or(u32::MAX).min(*left);
    *left -= now;
    Decoded::Ready(now as usize, then)
}

fn find<'e>(exports: &'e [Export], name: &str) -> Option<(usize, &'e Export)> {
    exports.iter().enumerate().find(|(_, export)| export.name == name)
}

/// A query that ends in a colon lists everything below it, such as `base:` or `qemu:dirty-bitmap:`.
fn listed_by(query: &str, context: &str) -> bool {
    query == context || query.ends_with(':') && context.starts_with(query)
}

fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut bytes = Bytes(data);
    let name = text(bytes.counted()?)?;
    let count = bytes.u16()?;
    let wanted = (0..count).map(|_| bytes.u16()).collect::<Option<Vec<_>>>()?;
    bytes.is_empty().then_some((name, wanted))
}

fn parse_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut bytes = Bytes(data);
    let name = text(bytes.counted()?)?;
    let count = bytes.u32()?;
    let mut queries = Vec::new();
    // Each query takes at least its length field, so the data's own limit bounds this loop.
    for _ in 0..count {
        queries.push(text(bytes.counted()?)?);
    }
    bytes.is_empty().then_some((name, queries))
}

const _: () = assert!(STRING_BYTES_MAX < OPTION_BYTES_MAX);
