//! What the repository asks of a store: named objects, written once.

use crate::Error;
use object_store::PutPayload;
use repository_format::{LeaseId, SlotId, SnapshotId};
use std::fmt::Debug;
use std::ops::Range;

/// A store of named objects. Names are paths with `/`.
///
/// A `put` is atomic, durable when it returns, and seen by every later `get` and `list`.
/// Tests put misbehaving stores here.
pub trait Objects: Send + Sync + Debug {
    /// Writes a whole object.
    ///
    /// # Errors
    /// `StoreFull` or `Store`; the object may or may not be there afterwards, but never in part.
    fn put(&self, name: &str, bytes: PutPayload) -> Result<(), Error>;

    /// Reads a whole object of at most `limit` bytes.
    ///
    /// # Errors
    /// `Missing`, `Store`, or `Damaged` above the limit.
    fn get(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error>;

    /// Reads a part of an object; shorter than asked when the object ends before.
    ///
    /// # Errors
    /// `Missing` or `Store`.
    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, Error>;

    /// Bytes of an object, or `None` if there is none.
    ///
    /// # Errors
    /// `Store`.
    fn length(&self, name: &str) -> Result<Option<u64>, Error>;

    /// Names of all objects under a folder, in no order.
    ///
    /// # Errors
    /// `Store`.
    fn list(&self, folder: &str) -> Result<Vec<String>, Error>;

    /// Deletes an object; one that is not there is no error.
    ///
    /// # Errors
    /// `Store`.
    fn delete(&self, name: &str) -> Result<(), Error>;
}

pub(crate) const CONFIG: &str = "config";
pub(crate) const CONFIG_BYTES_MAX: u64 = 4096;
/// An age header with one stanza, and 64 bytes.
pub(crate) const KEY_SLOT_FILE_BYTES_MAX: u64 = 16 << 10;
/// A sealed object of the largest plaintext, stored plain.
pub(crate) const OBJECT_FILE_BYTES_MAX: u64 = repository_format::OBJECT_BYTES_MAX as u64 + 1024;

pub(crate) fn manifest_name(snapshot: SnapshotId) -> String {
    format!("manifests/{snapshot}")
}

pub(crate) fn deleted_name(snapshot: SnapshotId) -> String {
    format!("deleted/{snapshot}")
}

pub(crate) fn lease_name(lease: LeaseId) -> String {
    format!("leases/{lease}")
}

pub(crate) fn revoked_name(lease: LeaseId) -> String {
    format!("revoked/{lease}")
}

pub(crate) fn slot_name(slot: SlotId) -> String {
    format!("keys/{slot}")
}

/// The identifiers in a folder; other names are not ours to judge, and are ignored.
pub(crate) fn list_ids<T: std::str::FromStr + Ord>(
    objects: &dyn Objects,
    folder: &str,
) -> Result<Vec<T>, Error> {
    let names = objects.list(folder)?;
    let ids = names.iter().filter_map(|name| name.strip_prefix(folder)?.strip_prefix('/')?.parse().ok());
    let mut ids: Vec<T> = ids.collect();
    ids.sort();
    Ok(ids)
}
