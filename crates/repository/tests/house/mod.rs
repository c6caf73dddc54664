//! Plumbing of the repository's tests: a repository in a temporary folder, disks as vectors, stores that misbehave.
#![allow(dead_code, reason = "each test program uses its own part")]
#![expect(clippy::unwrap_used, reason = "plumbing of tests")]

use object_store::PutPayload;
use repository::{
    DiskRoot, DiskStats, Error, LocalObjects, Manifest, Objects, Options, Part, Repository, Role, Secret,
    SnapshotId, Writer, create_key_file,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// A temporary folder that holds a key file, a cache and, after `init`, a repository.
pub(crate) struct House {
    pub(crate) folder: TempDir,
}

impl House {
    pub(crate) fn new() -> House {
        let folder = tempfile::tempdir().unwrap();
        create_key_file(&folder.path().join("key")).unwrap();
        House { folder }
    }

    pub(crate) fn secret(&self) -> Secret {
        Secret::KeyFile(self.folder.path().join("key"))
    }

    pub(crate) fn place(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    pub(crate) fn options(&self) -> Options {
        Options { cache: Some(self.folder.path().join("cache")) }
    }

    pub(crate) fn init(&self) -> Repository {
        Repository::init(&self.place(), &self.secret()).unwrap();
        self.open()
    }

    pub(crate) fn open(&self) -> Repository {
        Repository::open_with(&self.place(), &self.secret(), &self.options()).unwrap()
    }

    pub(crate) fn init_in(&self, objects: Arc<dyn Objects>) -> Repository {
        Repository::init_in(objects, &self.secret(), &self.options()).unwrap()
    }

    /// All objects' files.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.place()];
        while let Some(folder) = folders.pop() {
            for entry in folder.read_dir().unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() { folders.push(entry) } else { files.push(entry) }
            }
        }
        files.sort();
        files
    }
}

pub(crate) fn manifest(parent: Option<SnapshotId>, roots: &[DiskRoot]) -> Manifest {
    let parts = roots.iter().enumerate().map(|(number, root)| Part {
        name: format!("disk{number}"),
        role: Role::Disk,
        size_bytes: root.size_bytes,
        root: *root,
        facts: BTreeMap::new(),
    });
    Manifest {
        vm: "db1".into(),
        parent,
        created_at_ms: 1_700_000_000_000,
        description: None,
        level: "application".into(),
        parts: parts.collect(),
        definition: serde_json::json!({ "memory_mib": 512 }),
        receipt: serde_json::json!({ "reasons": [] }),
    }
}

/// Writes a whole disk in pieces of 1 MiB, as the engine does.
pub(crate) fn write_all(
    writer: &Writer,
    content: &[u8],
    parent: Option<&DiskRoot>,
) -> Result<(DiskRoot, DiskStats), Error> {
    let mut disk = writer.disk(content.len() as u64, parent)?;
    for (number, piece) in content.chunks(1 << 20).enumerate() {
        disk.write((number << 20) as u64, piece)?;
    }
    disk.finish()
}

/// A snapshot of one disk.
pub(crate) fn snapshot(
    repository: &Repository,
    content: &[u8],
    parent: Option<SnapshotId>,
) -> Result<(SnapshotId, DiskStats), Error> {
    let root =
        parent.map(|id| repository.manifest(&id).map(|manifest| manifest.parts[0].root)).transpose()?;
    let writer = repository.begin()?;
    let (root, stats) = write_all(&writer, content, root.as_ref())?;
    Ok((writer.commit(manifest(parent, &[root]))?, stats))
}

pub(crate) fn read_all(repository: &Repository, id: SnapshotId) -> Result<Vec<u8>, Error> {
    let root = repository.manifest(&id)?.parts[0].root;
    let disk = repository.disk(&root);
    let mut content = vec![0xa5; usize::try_from(disk.size_bytes()).unwrap()];
    for (number, piece) in content.chunks_mut(1 << 20).enumerate() {
        disk.read_at((number << 20) as u64, piece)?;
    }
    Ok(content)
}

/// Bytes that no compression makes smaller, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn damage_of(repository: &Repository) -> Vec<repository::Damage> {
    repository.verify(None, &mut |_, _| ()).unwrap().damage
}

/// What a failing store does to the write that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing arrives.
    Lost,
    /// The object arrives whole, but the answer is a failure.
    Unanswered,
}

/// A store that fails at one of its writes (puts and deletes), and at all later ones.
#[derive(Debug)]
pub(crate) struct Failing {
    pub(crate) inner: Arc<dyn Objects>,
    pub(crate) fault: Fault,
    pub(crate) writes: AtomicU64,
    pub(crate) fails_at: AtomicU64,
    pub(crate) names: Mutex<Vec<String>>,
    pub(crate) recovers: AtomicBool,
    /// What begins so cannot be read, as on a bad sector; with nothing after it, the store is gone.
    pub(crate) unreadable: Mutex<Option<String>>,
}

impl Failing {
    pub(crate) fn new(inner: Arc<dyn Objects>, fault: Fault, recovers: bool) -> Failing {
        let (writes, fails_at) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
        Failing {
            inner,
            fault,
            writes,
            fails_at,
            names: Mutex::default(),
            recovers: AtomicBool::new(recovers),
            unreadable: Mutex::default(),
        }
    }

    /// From now on nothing that begins with `name` can be read.
    pub(crate) fn lose(&self, name: &str) {
        *self.unreadable.lock().unwrap() = Some(name.to_string());
    }

    fn read<T>(&self, name: &str, operation: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        match &*self.unreadable.lock().unwrap() {
            Some(lost) if name.starts_with(lost) => {
                Err(Error::Store { doing: format!("reading {name}"), cause: "Input/output error".into() })
            }
            _ => operation(),
        }
    }

    /// Fails at the `number`th write from now, counted from 0.
    pub(crate) fn arm(&self, number: u64) {
        self.fails_at.store(self.writes.load(Ordering::SeqCst) + number, Ordering::SeqCst);
    }

    pub(crate) fn disarm(&self) {
        self.fails_at.store(u64::MAX, Ordering::SeqCst);
    }

    fn write(&self, name: &str, operation: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let number = self.writes.fetch_add(1, Ordering::SeqCst);
        self.names.lock().unwrap().push(name.to_string());
        let fails_at = self.fails_at.load(Ordering::SeqCst);
        let fails =
            if self.recovers.load(Ordering::SeqCst) { number == fails_at } else { number >= fails_at };
        if !fails {
            return operation();
        }
        if self.fault == Fault::Unanswered {
            operation()?;
        }
        Err(Error::StoreFull { doing: format!("writing {name}") })
    }
}

impl Objects for Failing {
    fn put(&self, name: &str, bytes: PutPayload) -> Result<(), Error> {
        self.write(name, || self.inner.put(name, bytes))
    }

    fn get(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        self.read(name, || self.inner.get(name, limit))
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, Error> {
        self.read(name, || self.inner.get_range(name, range))
    }

    fn length(&self, name: &str) -> Result<Option<u64>, Error> {
        self.inner.length(name)
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, Error> {
        self.inner.list(folder)
    }

    fn delete(&self, name: &str) -> Result<(), Error> {
        self.write(name, || self.inner.delete(name))
    }
}

pub(crate) fn local(place: &Path) -> Arc<dyn Objects> {
    Arc::new(LocalObjects::create(place).unwrap())
}
