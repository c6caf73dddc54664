//! What can go wrong between two ends that do not trust each other.

/// The peer broke the protocol: the connection is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Not the magic number that had to stand here.
    #[error("wrong magic number {found:#x} where {place} begins")]
    Magic {
        /// What should have begun here.
        place: &'static str,
        /// What stood there.
        found: u64,
    },
    /// A length above its limit.
    #[error("{what} of {length} bytes, above the limit of {limit}")]
    TooLong {
        /// The item.
        what: &'static str,
        /// Its announced length.
        length: u64,
        /// What would have been accepted.
        limit: u64,
    },
    /// More items than the limit allows.
    #[error("more than {limit} {what}")]
    TooMany {
        /// The items.
        what: &'static str,
        /// How many would have been accepted.
        limit: usize,
    },
    /// An item whose inner lengths do not add up, or that is not text where it must be.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// An item that has no business here.
    #[error("unexpected {what} ({number:#x})")]
    Unexpected {
        /// The item.
        what: &'static str,
        /// Its number on the wire.
        number: u32,
    },
    /// A reply to a request that is not under way.
    #[error("reply to an unknown request ({0:#x})")]
    UnknownCookie(u64),
    /// Data or a hole outside what was asked for, or twice.
    #[error("reply covers {offset}+{length}, which was not asked for or had been answered")]
    Stray {
        /// Where it begins, in bytes.
        offset: u64,
        /// How long it is, in bytes.
        length: u64,
    },
    /// A reply that ended before everything was answered.
    #[error("reply ended with only {answered} of {asked} bytes answered")]
    Incomplete {
        /// Bytes answered.
        answered: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// An extent of no length, which would make a reader stand still for ever.
    #[error("block status with an extent of no length")]
    EmptyExtent,
}

/// No session came about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The server broke the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The server does not speak the fixed newstyle handshake.
    #[error("the server does not speak the fixed newstyle handshake")]
    NotFixedNewstyle,
    /// No export of this name.
    #[error("the server has no export {name:?} ({message})")]
    UnknownExport {
        /// The name asked for.
        name: String,
        /// What the server said, escaped.
        message: String,
    },
    /// Contexts need structured replies, which the server does not have.
    #[error("the server has no structured replies, so nothing can be asked about its blocks")]
    NoStructuredReplies,
    /// A context, such as a dirty bitmap, that the export does not have.
    #[error("the export {export:?} has no context {context:?}")]
    UnknownContext {
        /// The export.
        export: String,
        /// The first context that is missing.
        context: String,
    },
    /// An option was refused for another reason.
    #[error("the server refused option {option} with reply {reply:#x} ({message})")]
    Refused {
        /// The option's number.
        option: u32,
        /// The reply's number.
        reply: u32,
        /// What the server said, escaped.
        message: String,
    },
    /// The caller's own arguments cannot be sent.
    #[error("{0} cannot be sent: it is too long, or there are too many")]
    Argument(&'static str),
}

/// A request that must not be sent; the connection stays good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Outside the disk, or empty.
    #[error("request for {offset}+{length} does not lie inside the disk of {size_bytes} bytes")]
    OutsideDisk {
        /// Where it begins, in bytes.
        offset: u64,
        /// How long it is, in bytes.
        length: u64,
        /// The disk's size.
        size_bytes: u64,
    },
    /// Longer than the server accepts.
    #[error("request of {length} bytes, above the server's limit of {limit}")]
    TooLong {
        /// The length asked for.
        length: u32,
        /// The limit.
        limit: u32,
    },
    /// Too many are under way already.
    #[error("more than {} requests under way", crate::limits::REQUESTS_IN_FLIGHT_MAX)]
    TooMany,
    /// Block status without an agreed context.
    #[error("no context was agreed on")]
    NoContext,
}

/// A list of ranges that cannot be read in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A range begins before the one in front of it ends, or ends before it begins.
    #[error("range {start}..{end} does not follow the one in front of it")]
    OutOfOrder {
        /// Begin, in bytes.
        start: u64,
        /// End, in bytes.
        end: u64,
    },
    /// A range goes beyond the disk.
    #[error("range {start}..{end} ends beyond the disk")]
    OutsideDisk {
        /// Begin, in bytes.
        start: u64,
        /// End, in bytes.
        end: u64,
    },
}
