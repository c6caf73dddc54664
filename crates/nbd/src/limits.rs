//! The largest of everything that a peer may send or ask for.

/// One READ, and one data chunk of its reply. The protocol's own default when no block sizes are agreed.
pub const READ_BYTES_MAX: u32 = 32 << 20;
/// One WRITE that is still read and thrown away when refused; a peer that announces more is hung up on.
pub const REFUSED_WRITE_BYTES_MAX: u32 = READ_BYTES_MAX;
/// Names of exports and contexts, and messages for people: the protocol's limit for strings.
pub const STRING_BYTES_MAX: usize = 4096;
/// Data of one option sent to a server: an export's name and a handful of contexts' names.
pub const OPTION_BYTES_MAX: usize = 64 << 10;
/// Data of one option that a server still reads and throws away, answering that it was too big.
pub const OPTION_SKIPPED_BYTES_MAX: u32 = 1 << 20;
/// Options in one handshake: clients need about five, or one more for each export they look at.
pub const OPTIONS_MAX: u32 = 4096;
/// Replies to one option: a server lists each export or context in one reply.
pub const OPTION_REPLIES_MAX: u32 = 65_536;
/// Contexts agreed on in one session.
pub const CONTEXTS_MAX: usize = 16;
/// Contexts that a server lists in one handshake.
pub const CONTEXTS_LISTED_MAX: usize = 4096;
/// Extents in one BLOCK_STATUS chunk that a client accepts. QEMU sends at most 128 Ki.
pub const STATUS_EXTENTS_MAX: usize = 1 << 20;
/// Requests a client has under way at once.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 64;
/// Separate stretches of one READ's reply that have arrived; more than this is a peer that plays.
pub const STRETCHES_PER_READ_MAX: usize = 4096;
/// An error chunk: code, length of message, message and offset.
pub const ERROR_CHUNK_BYTES_MAX: usize = STRING_BYTES_MAX + 14;
/// The largest disk: offsets stay within a signed 64-bit number, as in QEMU and the kernel.
pub const DISK_BYTES_MAX: u64 = i64::MAX as u64;
