//! Bytes at rest: the code half of `docs/format/repository.md`.
//!
//! Pure: bytes come in as arguments, randomness and time too. Nothing here reads a file or a clock.

mod address;
mod checksum;
mod config;
mod frame;
mod identifier;
mod keys;
mod manifest;
mod node;
mod node_frame;
mod payload;
mod sealed;
mod tree;

pub use address::{FrameAddress, NodeAddress, PackName};
pub use checksum::{Checksum, Checksums, is_zero};
pub use config::{Config, FORMAT, KEY_SLOT_BYTES, read_key_slot, write_key_slot};
pub use frame::{FrameKind, open_frame, seal_frame};
pub use identifier::{Identifier, LeaseId, RepositoryId, SlotId, SnapshotId};
pub use keys::{IndexKey, Keys, MasterKey};
pub use manifest::{Condemned, DiskRoot, LeaseNote, Manifest, ManifestFile, Part, Role, from_json, to_json};
pub use node::{Entry, Inner, Leaf, Node, NodeError};
pub use node_frame::{NodeFrame, NodeFrameBuilder};
pub use payload::{Compressor, decompress};
pub use sealed::{open_object, seal_object};
pub use tree::{children_blocks, level_for, node_blocks};

/// Bytes of one block, the unit of comparison and of storage.
pub const BLOCK_BYTES: usize = 4096;
/// Most blocks of one data frame: 128 KiB.
pub const FRAME_BLOCKS_MAX: usize = 32;
/// Blocks of a leaf, and children of a higher node.
pub const FANOUT: usize = 64;
/// Highest level of a root: 16 PiB.
pub const LEVEL_MAX: u8 = 6;
/// Largest plaintext of a node frame. Writers stay near 64 KiB; a leaf has at most 1808 bytes.
pub const NODE_FRAME_BYTES_MAX: usize = 256 << 10;
/// Most nodes of one node frame, so that a child's number is one byte.
pub const NODE_FRAME_NODES_MAX: usize = 255;
/// Largest plaintext of a sealed object: a receipt of 1 MiB and a VM definition fit many times.
pub const OBJECT_BYTES_MAX: usize = 64 << 20;
/// No frame reaches beyond this offset of its pack.
pub const PACK_BYTES_MAX: u64 = 1 << 30;
/// Size at which a writer closes a pack: few objects on a bucket, and few in memory at once.
pub const PACK_BYTES_TARGET: usize = 32 << 20;
/// What AEAD adds to a payload.
pub const TAG_BYTES: usize = 16;

/// Why bytes at rest were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The AEAD tag does not fit: altered, moved, cut, or sealed by another key.
    #[error("it was altered, cut or exchanged: its authentication does not fit")]
    Authentication,
    /// The compressed body does not decompress to what was promised.
    #[error("its compressed content is damaged")]
    Compression,
    /// A larger plaintext than the format allows.
    #[error("it holds more than the format allows")]
    TooLarge,
    /// A node or node frame that breaks the format's rules.
    #[error("a tree node is malformed: {0}")]
    Node(#[from] NodeError),
    /// JSON that does not have the shape that is documented.
    #[error("its JSON is not what the format says: {0}")]
    Json(String),
    /// An identifier, pack name or other text with another spelling than documented.
    #[error("malformed name")]
    Name,
    /// A format number that this program does not know.
    #[error("it has format {found}; this program knows format {FORMAT}")]
    UnknownFormat {
        /// The number found.
        found: u64,
    },
    /// The unlocked key slot belongs to another repository, or is no key slot.
    #[error("its key slot belongs to another repository")]
    ForeignKeySlot,
}
