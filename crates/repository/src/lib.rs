//! The snapshot store: writer, reader, verify, delete.
//!
//! Every call blocks. Object access is asynchronous inside; do not call from within an async task, use
//! a blocking thread. The bytes at rest are those of `docs/format/repository.md`.

mod background;
mod cache;
mod disk_writer;
mod error;
mod frame_index;
mod frames;
mod local;
mod objects;
mod packs;
mod reader;
mod repository;
mod secret;
mod tree_writer;
mod verify;
mod workers;
mod writer;

pub use background::give_way;
pub use disk_writer::{DiskStats, DiskWriter};
pub use error::Error;
pub use local::LocalObjects;
pub use objects::Objects;
pub use reader::{DataRanges, DiskReader};
pub use repository::{Options, Repository, Summary};
pub use repository_format::{DiskRoot, LeaseId, Manifest, Part, RepositoryId, Role, SlotId, SnapshotId};
pub use secret::{Secret, create_key_file};
pub use verify::{Damage, VerifyReport};
pub use writer::Writer;
