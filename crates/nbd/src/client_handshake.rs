//! The client's half of the handshake: structured replies, contexts, then the export.

use crate::bytes::{Bytes, message, text};
use crate::error::{HandshakeError, ProtocolError};
use crate::limits::{
    CONTEXTS_LISTED_MAX, CONTEXTS_MAX, DISK_BYTES_MAX, OPTION_BYTES_MAX, OPTION_REPLIES_MAX, READ_BYTES_MAX,
    STRING_BYTES_MAX,
};
use crate::wire::{
    NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_HEADER_BYTES, OPTION_REPLY_MAGIC, handshake, info, option, reply,
    transmission_flags,
};
use crate::{Decoded, encode};

/// What client and server agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Size of the disk.
    pub size_bytes: u64,
    /// What the export can do: [`transmission_flags`].
    pub flags: u16,
    /// Whether the server answers in structured replies.
    pub structured: bool,
    /// The longest READ that the server accepts.
    pub read_bytes_max: u32,
    /// Agreed contexts with the numbers that stand for them in replies, in the order asked for.
    pub contexts: Vec<(u32, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    Structured,
    Contexts,
    Go,
    Over,
}

/// Opens an export, or lists its contexts. Source: "Fixed newstyle negotiation" in `doc/proto.md`.
#[derive(Debug)]
pub struct ClientHandshake {
    export: String,
    wanted: Vec<String>,
    list_only: bool,
    state: State,
    replies: u32,
    structured: bool,
    contexts: Vec<(u32, String)>,
    size_and_flags: Option<(u64, u16)>,
    read_bytes_max: u32,
}

impl ClientHandshake {
    /// Will open `export` (`""` is the server's default one) with all of `contexts`, or fail.
    ///
    /// # Errors
    /// `Argument` if a name or their number is above its limit.
    pub fn open(export: &str, contexts: &[&str]) -> Result<Self, HandshakeError> {
        if export.len() > STRING_BYTES_MAX {
            return Err(HandshakeError::Argument("the export's name"));
        }
        let bytes: usize = contexts.iter().map(|context| context.len() + 4).sum();
        let too_long = contexts.iter().any(|context| context.len() > STRING_BYTES_MAX);
        if too_long || contexts.len() > CONTEXTS_MAX || bytes + export.len() + 8 > OPTION_BYTES_MAX {
            return Err(HandshakeError::Argument("the list of contexts"));
        }
        Ok(Self {
            export: export.to_owned(),
            wanted: contexts.iter().map(|&context| context.to_owned()).collect(),
            list_only: false,
            state: State::Greeting,
            replies: 0,
            structured: false,
            contexts: Vec::new(),
            size_and_flags: None,
            read_bytes_max: READ_BYTES_MAX,
        })
    }

    /// Will list the contexts that `export` has, and leave. In the [`Session`] that comes out only these are set.
    ///
    /// # Errors
    /// `Argument` if the name is too long.
    pub fn list_contexts(export: &str) -> Result<Self, HandshakeError> {
        Ok(Self { list_only: true, ..Self::open(export, &[])? })
    }

    /// Takes what has arrived; appends to `out` what must be sent. The session comes out once, at the end.
    ///
    /// # Errors
    /// Any means that the connection is of no use any more.
    pub fn decode(
        &mut self,
        buffer: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Decoded<Option<Session>>, HandshakeError> {
        if self.state == State::Greeting {
            return self.greeting(buffer, out);
        }
        let mut bytes = Bytes(buffer);
        let header = (bytes.u64(), bytes.u32(), bytes.u32(), bytes.u32());
        let (Some(magic), Some(number), Some(kind), Some(length)) = header else {
            return Ok(Decoded::More(OPTION_REPLY_HEADER_BYTES));
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(ProtocolError::Magic { place: "an option's reply", found: magic }.into());
        }
        let length = length as usize;
        if length > OPTION_BYTES_MAX {
            return Err(ProtocolError::TooLong {
                what: "an option's reply",
                length: length as u64,
                limit: OPTION_BYTES_MAX as u64,
            }
            .into());
        }
        let total = OPTION_REPLY_HEADER_BYTES + length;
        let Some(data) = bytes.take(length) else { return Ok(Decoded::More(total)) };
        if number != self.option() {
            return Err(ProtocolError::Unexpected { what: "reply to an option", number }.into());
        }
        self.replies += 1;
        if self.replies > OPTION_REPLIES_MAX {
            let limit = OPTION_REPLIES_MAX as usize;
            return Err(ProtocolError::TooMany { what: "replies to one option", limit }.into());
        }
        Ok(Decoded::Ready(total, self.reply(kind, data, out)?))
    }

    fn greeting(
        &mut self,
        buffer: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Decoded<Option<Session>>, HandshakeError> {
        let mut bytes = Bytes(buffer);
        let (Some(first), Some(second), Some(flags)) = (bytes.u64(), bytes.u64(), bytes.u16()) else {
            return Ok(Decoded::More(18));
        };
        if first != NBD_MAGIC {
            return Err(ProtocolError::Magic { place: "the greeting", found: first }.into());
        }
        if second != OPTION_MAGIC || flags & handshake::FIXED_NEWSTYLE == 0 {
            return Err(HandshakeError::NotFixedNewstyle);
        }
        let answer = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        out.extend_from_slice(&u32::from(answer).to_be_bytes());
        self.ask(State::Structured, out);
        Ok(Decoded::Ready(18, None))
    }

    /// The option that is waited for.
    fn option(&self) -> u32 {
        match self.state {
            State::Greeting | State::Structured => option::STRUCTURED_REPLY,
            State::Contexts if self.list_only => option::LIST_META_CONTEXT,
            State::Contexts => option::SET_META_CONTEXT,
            State::Go => option::GO,
            State::Over => 0,
        }
    }

    fn ask(&mut self, state: State, out: &mut Vec<u8>) {
        self.state = state;
        self.replies = 0;
        let mut data = Vec::new();
        match state {
            State::Greeting | State::Structured | State::Over => {}
            State::Contexts => {
                encode::counted(&mut data, self.export.as_bytes());
                data.extend_from_slice(&encode::length32(self.wanted.len()).to_be_bytes());
                for context in &self.wanted {
                    encode::counted(&mut data, context.as_bytes());
                }
            }
            State::Go => {
                encode::counted(&mut data, self.export.as_bytes());
                // No information is asked for by number: a client that asks for block sizes promises to obey
                // them, and QEMU then stops serving reads that do not fit its own storage's alignment.
                data.extend_from_slice(&0u16.to_be_bytes());
            }
        }
        encode::option(out, self.option(), &data);
    }

    fn reply(
        &mut self,
        kind: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Session>, HandshakeError> {
        if kind & reply::ERROR != 0 {
            return self.refusal(kind, data, out);
        }
        match (self.state, kind) {
            (State::Structured, reply::ACK) => {
                self.structured = true;
                self.after_structured(out)?;
            }
            (State::Contexts, reply::META_CONTEXT) => self.context(data)?,
            (State::Contexts, reply::ACK) if self.list_only => {
                encode::option(out, option::ABORT, &[]);
                return Ok(Some(self.session(0, 0)));
            }
            (State::Contexts, reply::ACK) => {
                let agreed = |name: &String| self.contexts.iter().any(|(_, context)| context == name);
                if let Some(missing) = self.wanted.iter().find(|name| !agreed(name)) {
                    return Err(HandshakeError::UnknownContext {
                        export: self.export.clone(),
                        context: missing.clone(),
                    });
                }
                let place = |name: &String| self.wanted.iter().position(|wanted| wanted == name);
                self.contexts.sort_by_key(|(_, name)| place(name));
                self.ask(State::Go, out);
            }
            (State::Go, reply::INFO) => self.info(data)?,
            (State::Go, reply::ACK) => {
                let (size_bytes, flags) =
                    self.size_and_flags.ok_or(ProtocolError::Malformed("description of the export"))?;
                return Ok(Some(self.session(size_bytes, flags)));
            }
            (_, number) => {
                return Err(ProtocolError::Unexpected { what: "kind of reply", number }.into());
            }
        }
        Ok(None)
    }

    fn session(&mut self, size_bytes: u64, flags: u16) -> Session {
        self.state = State::Over;
        Session {
            size_bytes,
            flags,
            structured: self.structured,
            read_bytes_max: self.read_bytes_max,
            contexts: std::mem::take(&mut self.contexts),
        }
    }

    fn after_structured(&mut self, out: &mut Vec<u8>) -> Result<(), HandshakeError> {
        let about_contexts = self.list_only || !self.wanted.is_empty();
        if about_contexts && !self.structured {
            return Err(HandshakeError::NoStructuredReplies);
        }
        self.ask(if about_contexts { State::Contexts } else { State::Go }, out);
        Ok(())
    }

    fn refusal(
        &mut self,
        kind: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Session>, HandshakeError> {
        if self.state == State::Structured {
            self.after_structured(out)?;
            return Ok(None);
        }
        let message = message(data);
        if kind == reply::UNKNOWN {
            return Err(HandshakeError::UnknownExport { name: self.export.clone(), message });
        }
        Err(HandshakeError::Refused { option: self.option(), reply: kind, message })
    }

    fn context(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let mut bytes = Bytes(data);
        let (Some(id), Some(name)) = (bytes.u32(), text(bytes.0)) else {
            return Err(ProtocolError::Malformed("context").into());
        };
        let asked = self.list_only || self.wanted.iter().any(|wanted| wanted == name);
        // Listed contexts carry no number of their own.
        let twice = !self.list_only && self.contexts.iter().any(|(other, seen)| *other == id || seen == name);
        if !asked || twice {
            return Err(ProtocolError::Unexpected { what: "context", number: id }.into());
        }
        let limit = if self.list_only { CONTEXTS_LISTED_MAX } else { CONTEXTS_MAX };
        if self.contexts.len() == limit {
            return Err(ProtocolError::TooMany { what: "contexts", limit }.into());
        }
        self.contexts.push((id, name.to_owned()));
        Ok(())
    }

    fn info(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let mut bytes = Bytes(data);
        let malformed = ProtocolError::Malformed("description of the export");
        match bytes.u16() {
            Some(info::EXPORT) => {
                let (Some(size), Some(flags), true) = (bytes.u64(), bytes.u16(), bytes.is_empty()) else {
                    return Err(malformed.into());
                };
                if flags & transmission_flags::HAS_FLAGS == 0 {
                    return Err(malformed.into());
                }
                if size > DISK_BYTES_MAX {
                    let limit = DISK_BYTES_MAX;
                    return Err(ProtocolError::TooLong { what: "a disk", length: size, limit }.into());
                }
                self.size_and_flags = Some((size, flags));
            }
            Some(info::BLOCK_SIZE) => {
                let sizes = (bytes.u32(), bytes.u32(), bytes.u32());
                let (Some(min), Some(_preferred), Some(max)) = sizes else { return Err(malformed.into()) };
                if !min.is_power_of_two() || max < min {
                    return Err(malformed.into());
                }
                self.read_bytes_max = max.min(READ_BYTES_MAX);
            }
            Some(_) => {}
            None => return Err(malformed.into()),
        }
        Ok(())
    }
}
