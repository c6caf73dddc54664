//! Deduplication of aligned windows of 128 KiB, through an index that may be lost at any time.
//!
//! A hit is used only if its entry's own keyed check is right, the pack is not condemned, and the store was seen to
//! have the pack after this writer's lease was put: section 7 of the format document says why that is enough.

use crate::Objects;
use redb::{Builder, ConcurrencyMode, Database, ReadableDatabase, TableDefinition};
use repository_format::{FrameAddress, IndexKey, PackName};
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Digest of the checksums of a window's 32 blocks.
pub(crate) type WindowKey = [u8; 16];

/// Pack (20), offset (4), length (4), keyed check (8).
const VALUE_BYTES: usize = 36;
const CHECKED_BYTES: usize = 28;
const TABLE: TableDefinition<'_, &[u8; 16], &[u8; VALUE_BYTES]> = TableDefinition::new("windows");
const CACHE_BYTES: usize = 16 << 20;
const DATABASE: &str = "windows.redb";
/// So many windows are written at once, 512 MiB of data: each time costs an fsync, and those who share its file system wait for it.
/// A writer that is killed before stores as much once more, next time.
const UNWRITTEN_MAX: usize = 4096;

/// The index as one writer may use it.
pub(crate) struct Dedup {
    key: IndexKey,
    database: Option<Database>,
    condemned: HashSet<PackName>,
    /// Bytes of packs that were looked for since the lease was put; `None` is not there.
    packs: Mutex<HashMap<PackName, Option<u64>>>,
    /// Of durable packs, and not in the database yet.
    unwritten: Mutex<HashMap<WindowKey, FrameAddress>>,
}

impl Dedup {
    /// Without a folder, or with one that cannot be used, nothing is found and nothing remembered.
    pub(crate) fn open(folder: Option<&Path>, key: IndexKey, condemned: HashSet<PackName>) -> Dedup {
        let database = folder.and_then(|folder| quietly(|| open_database(folder)));
        Dedup { key, database, condemned, packs: Mutex::default(), unwritten: Mutex::default() }
    }

    pub(crate) fn window_key(&self, checksums: &[u8]) -> WindowKey {
        let mut key = [0; 16];
        key.copy_from_slice(&self.key.digest(checksums)[..16]);
        key
    }

    pub(crate) fn find(&self, objects: &dyn Objects, key: &WindowKey) -> Option<FrameAddress> {
        let database = self.database.as_ref()?;
        if let Some(address) = self.unwritten().get(key) {
            return Some(*address);
        }
        let value = quietly(|| {
            let table = database.begin_read().ok()?.open_table(TABLE).ok()?;
            Some(*table.get(key).ok()??.value())
        })?;
        let address = decode(&value);
        let end = u64::from(address.offset) + u64::from(address.length);
        let usable = value == self.encode(key, &address)
            && !self.condemned.contains(&address.pack)
            && self.pack_length(objects, address.pack).is_some_and(|length| end <= length);
        usable.then_some(address)
    }

    /// Call only for frames whose pack is durable.
    pub(crate) fn remember(&self, windows: &[(WindowKey, FrameAddress)]) {
        if self.database.is_none() {
            return;
        }
        let mut unwritten = self.unwritten();
        unwritten.extend(windows.iter().copied());
        if unwritten.len() >= UNWRITTEN_MAX {
            self.write(&mut unwritten);
        }
    }

    fn unwritten(&self) -> MutexGuard<'_, HashMap<WindowKey, FrameAddress>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, unwritten: &mut HashMap<WindowKey, FrameAddress>) {
        let windows = std::mem::take(unwritten);
        let Some(database) = self.database.as_ref().filter(|_| !windows.is_empty()) else { return };
        let written = quietly(|| {
            // Durable, because a database that several processes write knows nothing less.
            let transaction = database.begin_write().ok()?;
            {
                let mut table = transaction.open_table(TABLE).ok()?;
                for (key, address) in &windows {
                    table.insert(key, &self.encode(key, address)).ok()?;
                }
            }
            transaction.commit().ok()
        });
        // Not remembered: the next writer stores these windows once more.
        let (Some(()) | None) = written;
    }

    fn pack_length(&self, objects: &dyn Objects, pack: PackName) -> Option<u64> {
        let mut packs = self.packs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(length) = packs.get(&pack) {
            return *length;
        }
        let length = objects.length(&pack.object()).ok().flatten();
        packs.insert(pack, length);
        length
    }

    fn encode(&self, key: &WindowKey, address: &FrameAddress) -> [u8; VALUE_BYTES] {
        let mut value = [0; VALUE_BYTES];
        value[..20].copy_from_slice(&address.pack.to_bytes());
        value[20..24].copy_from_slice(&address.offset.to_le_bytes());
        value[24..CHECKED_BYTES].copy_from_slice(&address.length.to_le_bytes());
        let check = self.key.digest(&[&key[..], &value[..CHECKED_BYTES]].concat());
        value[CHECKED_BYTES..].copy_from_slice(&check[..VALUE_BYTES - CHECKED_BYTES]);
        value
    }
}

impl Drop for Dedup {
    fn drop(&mut self) {
        let mut unwritten = std::mem::take(&mut *self.unwritten());
        self.write(&mut unwritten);
    }
}

/// Removes the index; writers that have it open go on with what they have.
pub(crate) fn forget(folder: &Path) {
    // It may not be there; and a file that cannot be removed cannot have been written by us.
    std::fs::remove_file(folder.join(DATABASE)).ok();
}

fn decode(value: &[u8; VALUE_BYTES]) -> FrameAddress {
    let (pack, rest) = value.split_at(20);
    let number = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().expect("4 bytes"));
    let pack = PackName::from_bytes(pack.try_into().expect("20 bytes"));
    FrameAddress { pack, offset: number(0), length: number(4) }
}

fn open_database(folder: &Path) -> Option<Database> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).ok()?;
    let path = folder.join(DATABASE);
    // Made here so that its mode is private from the first moment.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    drop(file.ok()?);
    let open = || {
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES).set_concurrency_mode(ConcurrencyMode::MultiWriter);
        builder.create(&path).ok()
    };
    let database = open().or_else(|| {
        // Damaged, or of another version: a cache is made anew.
        std::fs::remove_file(&path).ok()?;
        open()
    })?;
    let transaction = database.begin_write().ok()?;
    transaction.open_table(TABLE).ok()?;
    transaction.commit().ok()?;
    Some(database)
}

/// A damaged file makes redb panic in places. A cache must not end a backup.
fn quietly<T>(work: impl FnOnce() -> Option<T>) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok().flatten()
}
