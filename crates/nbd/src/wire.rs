//! The numbers of `doc/proto.md`.

pub(crate) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, both directions.
pub(crate) mod handshake {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1;
    pub(crate) const NO_ZEROES: u16 = 2;
}

pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERROR: u32 = 1 << 31;
    pub(crate) const UNSUPPORTED: u32 = ERROR + 1;
    pub(crate) const INVALID: u32 = ERROR + 3;
    pub(crate) const UNKNOWN: u32 = ERROR + 6;
    pub(crate) const TOO_BIG: u32 = ERROR + 9;
}

pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What an export says that it can do.
pub mod transmission_flags {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Nothing can be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// READ may ask for a reply in one piece.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see the same bytes.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Status flags of `base:allocation`.
pub mod allocation {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 2;
}

/// Status flags of `qemu:dirty-bitmap:NAME`.
pub mod bitmap {
    /// Written since the bitmap was made.
    pub const DIRTY: u32 = 1;
}

pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
    pub(crate) const RESIZE: u16 = 8;
}

pub(crate) mod command_flags {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const DONT_FRAGMENT: u16 = 1 << 2;
    pub(crate) const REQUEST_ONE: u16 = 1 << 3;
}

pub(crate) mod chunk {
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR_BIT: u16 = 1 << 15;
    pub(crate) const ERROR: u16 = ERROR_BIT + 1;
    pub(crate) const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

pub(crate) const REQUEST_BYTES: usize = 28;
pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;
pub(crate) const CHUNK_HEADER_BYTES: usize = 20;
pub(crate) const OPTION_HEADER_BYTES: usize = 16;
pub(crate) const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// An error number of the protocol (Linux's errno values, whatever the peer runs on).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorCode(pub u32);

impl ErrorCode {
    /// EPERM: the export is read-only.
    pub const NOT_PERMITTED: Self = Self(1);
    /// EIO: the storage failed.
    pub const IO: Self = Self(5);
    /// ENOMEM.
    pub const NO_MEMORY: Self = Self(12);
    /// EINVAL: the request makes no sense, or lies outside the disk.
    pub const INVALID: Self = Self(22);
    /// ENOSPC.
    pub const NO_SPACE: Self = Self(28);
    /// EOVERFLOW: the reply does not fit into one chunk.
    pub const OVERFLOW: Self = Self(75);
    /// ENOTSUP.
    pub const NOT_SUPPORTED: Self = Self(95);
    /// ESHUTDOWN: the server is being stopped.
    pub const SHUTDOWN: Self = Self(108);
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = match *self {
            Self::NOT_PERMITTED => "operation not permitted",
            Self::IO => "input/output error",
            Self::NO_MEMORY => "out of memory",
            Self::INVALID => "invalid argument",
            Self::NO_SPACE => "no space left",
            Self::OVERFLOW => "value too large",
            Self::NOT_SUPPORTED => "not supported",
            Self::SHUTDOWN => "server is shutting down",
            Self(other) => return write!(f, "error {other}"),
        };
        f.write_str(word)
    }
}
