//! What can go wrong with a repository, precise enough for each case to have its own advice.

use repository_format::{FormatError, SnapshotId};
use std::path::PathBuf;
use std::sync::Arc;

/// A failure. `Display` is the cause in one line, without secrets; [`Error::to_do`] is the advice.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// There is no `config` object.
    #[error("{} holds no repository", .place.display())]
    NotARepository {
        /// The folder.
        place: PathBuf,
    },
    /// `init` found a repository.
    #[error("{} already holds a repository", .place.display())]
    AlreadyARepository {
        /// The folder.
        place: PathBuf,
    },
    /// `init` found files that are not a repository's, or those of an interrupted `init`.
    #[error("{} is not empty and holds no complete repository", .place.display())]
    FolderNotEmpty {
        /// The folder.
        place: PathBuf,
    },
    /// No key slot opens with the secret.
    #[error("no key of this repository opens with this {secret}")]
    WrongSecret {
        /// `passphrase` or `key file`.
        secret: &'static str,
    },
    /// The key file cannot be used.
    #[error("the key file {} cannot be used: {cause}", .path.display())]
    KeyFile {
        /// As given.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// An empty passphrase protects nothing.
    #[error("the passphrase is empty")]
    EmptyPassphrase,
    /// A later program made it.
    #[error("the repository has format {found}; this program knows format {}", repository_format::FORMAT)]
    UnknownFormat {
        /// Its format.
        found: u64,
    },
    /// An object's bytes are not what was written.
    #[error("{object} is damaged: {cause}")]
    Damaged {
        /// Which object, and where in it.
        object: String,
        /// What was noticed.
        cause: FormatError,
    },
    /// A block that decrypts but does not have the checksum that its leaf gives.
    #[error("the block at {offset} does not have the checksum that was recorded for it")]
    WrongBlock {
        /// Byte offset on the disk.
        offset: u64,
    },
    /// An object that others need is not there.
    #[error("{object} is missing")]
    Missing {
        /// Its name.
        object: String,
    },
    /// No space, or a quota.
    #[error("the store is full: {doing} failed")]
    StoreFull {
        /// What was tried.
        doing: String,
    },
    /// The store failed in another way.
    #[error("{doing} failed: {cause}")]
    Store {
        /// What was tried.
        doing: String,
        /// The store's words.
        cause: Arc<str>,
    },
    /// The store does not keep what the format needs of it.
    #[error("the store cannot hold a repository: {cause}")]
    StoreUnfit {
        /// What the probe found.
        cause: String,
    },
    /// No snapshot has such an id.
    #[error("no snapshot has an id that begins with {prefix:?}")]
    NoSuchSnapshot {
        /// As given.
        prefix: String,
    },
    /// Several snapshots have.
    #[error("{} snapshots have an id that begins with {prefix:?}", matches.len())]
    AmbiguousSnapshot {
        /// As given.
        prefix: String,
        /// All that match.
        matches: Vec<SnapshotId>,
    },
    /// An offset or length that is no multiple of 4 KiB, or reaches beyond the disk.
    #[error(
        "the range of {length} bytes at {offset} does not fit a disk of {size_bytes} bytes in blocks of 4096"
    )]
    BadRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Of the disk.
        size_bytes: u64,
    },
    /// More than 16 PiB.
    #[error("a disk of {size_bytes} bytes is larger than the format allows")]
    DiskTooLarge {
        /// Its size.
        size_bytes: u64,
    },
    /// A manifest of more than 64 MiB, or a file that cannot be kept whole.
    #[error("{what} is larger than the format allows")]
    TooLarge {
        /// What.
        what: &'static str,
    },
    /// The manifest names a parent that is gone, or that does not hold the disks that were compared with.
    #[error("the snapshot that this one was compared with was deleted meanwhile")]
    ParentGone,
    /// The writer took longer than its lease may last, or a collection revoked it.
    #[error("the writer's lease has ended before the snapshot was complete")]
    LeaseEnded,
    /// The system gave no randomness.
    #[error("the system has no random numbers: {cause}")]
    NoRandomness {
        /// The system's words.
        cause: String,
    },
}

impl Error {
    /// What a person can do about it, as a sentence without a full stop.
    pub fn to_do(&self) -> &'static str {
        match self {
            Error::NotARepository { .. } => {
                "check the path, or make a repository there with `stillpoint init`"
            }
            Error::AlreadyARepository { .. } => "use it as it is, or choose another folder",
            Error::FolderNotEmpty { .. } => {
                "choose an empty folder; if an earlier `init` was interrupted here, empty this one first"
            }
            Error::WrongSecret { .. } => {
                "check the passphrase or key file; without one of them nothing can be read"
            }
            Error::KeyFile { .. } => "give a file with one AGE-SECRET-KEY-1 line, as age-keygen writes it",
            Error::EmptyPassphrase => "give a passphrase, or use a key file",
            Error::UnknownFormat { .. } => "use a newer version of this program",
            Error::Damaged { object, .. } if object == "config" || object.starts_with("keys/") => {
                "restore the object from a copy of the repository, which cannot be opened without it"
            }
            Error::Damaged { .. } | Error::WrongBlock { .. } | Error::Missing { .. } => {
                "run `stillpoint verify` to see what is affected; restore the object from a copy of the repository"
            }
            Error::StoreFull { .. } => {
                "make room where the repository lives; its earlier snapshots are unharmed"
            }
            Error::Store { .. } => {
                "check the repository's owner, disk or network and repeat; earlier snapshots are unharmed"
            }
            Error::StoreUnfit { .. } => "use a store that shows a new object to every reader at once",
            Error::NoSuchSnapshot { .. } => "list them with `stillpoint snapshots`",
            Error::AmbiguousSnapshot { .. } => "give more characters of the id",
            Error::BadRange { .. } | Error::DiskTooLarge { .. } | Error::TooLarge { .. } => {
                "report this as a bug, with the disk's size"
            }
            Error::ParentGone => "take the snapshot again; it will be compared with one that still exists",
            Error::LeaseEnded => "take the snapshot again; a run must end within 24 hours",
            Error::NoRandomness { .. } => "check the system's random number generator",
        }
    }

    pub(crate) fn damaged(object: impl Into<String>) -> impl FnOnce(FormatError) -> Error {
        let object = object.into();
        move |cause| Error::Damaged { object, cause }
    }
}
