//! A snapshot in the making: lease first, manifest last.

use crate::disk_writer::DiskWriter;
use crate::frame_index::Dedup;
use crate::objects::{lease_name, manifest_name, revoked_name};
use crate::packs::Packs;
use crate::repository::{new_id, now_ms, random};
use crate::workers::Workers;
use crate::{Error, Repository};
use repository_format::{
    Condemned, DiskRoot, FORMAT, Identifier, LeaseId, LeaseNote, Manifest, ManifestFile, PackName,
    SnapshotId, from_json, to_json,
};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A writer must end within this time; collection waits three times as long before it acts against one.
const LEASE_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Writes one snapshot. Dropped without `commit` it leaves packs that nothing refers to, and nothing visible.
pub struct Writer {
    repository: Repository,
    lease: Lease,
    packs: Arc<Packs>,
    workers: Workers,
    roots: Mutex<Roots>,
}

#[derive(Default)]
struct Roots {
    /// Roots of older snapshots, whose trees the new ones share.
    parents: Vec<DiskRoot>,
    finished: Vec<DiskRoot>,
}

impl Writer {
    pub(crate) fn begin(repository: &Repository) -> Result<Writer, Error> {
        let lease = Lease::announce(repository)?;
        // After the lease: what is condemned later waits for this writer (format document, section 7).
        let condemned = condemned_packs(repository)?;
        let keys = &repository.frames.keys;
        let dedup = Dedup::open(repository.cache_folder.as_deref(), keys.index.clone(), condemned);
        let packs = Arc::new(Packs::new(Arc::clone(&repository.frames), lease.id, dedup));
        let workers = Workers::start(&packs);
        Ok(Writer { repository: repository.clone(), lease, packs, workers, roots: Mutex::default() })
    }

    /// Begins a disk that reads as its parent did, or as zeroes; its size may differ from the parent's.
    /// Several disks may be written at once, from several threads.
    ///
    /// The manifest must then name the snapshot that holds `parent` as its own parent.
    ///
    /// # Errors
    /// `DiskTooLarge`; the store's, when the parent's tree cannot be read.
    pub fn disk(&self, size_bytes: u64, parent: Option<&DiskRoot>) -> Result<DiskWriter<'_>, Error> {
        if let Some(parent) = parent {
            self.roots().parents.push(*parent);
        }
        DiskWriter::new(self, size_bytes, parent)
    }

    /// Keeps a small file: kernel, initrd, firmware. Stored once, however often it is given.
    ///
    /// # Errors
    /// The store's.
    pub fn blob(&self, bytes: &[u8]) -> Result<DiskRoot, Error> {
        let mut disk = self.disk(bytes.len() as u64, None)?;
        disk.write(0, bytes)?;
        disk.finish().map(|(root, _)| root)
    }

    /// Makes everything durable, then the manifest, last: from then on the snapshot exists.
    ///
    /// # Errors
    /// `ParentGone`, `LeaseEnded`, `TooLarge`, the store's. No snapshot is left behind, unless the store failed while it was
    /// being taken back as well.
    pub fn commit(self, manifest: Manifest) -> Result<SnapshotId, Error> {
        let stored_bytes = self.packs.finish()?;
        self.check_parents(&manifest)?;
        let snapshot = SnapshotId(Identifier::new(manifest.created_at_ms, random()?));
        let file = ManifestFile { format: FORMAT, snapshot, lease: self.lease.id, stored_bytes, manifest };
        let name = manifest_name(snapshot);
        let sealed = to_json(&file).map_err(Error::damaged(&name)).and_then(|plaintext| {
            self.repository.put_sealed(&name, "the manifest", &plaintext)?;
            self.lease.check()
        });
        if let Err(error) = sealed {
            // The put may have failed after the object became visible.
            return Err(match self.repository.objects().delete(&name) {
                Ok(()) => error,
                Err(_) => {
                    Error::Store { doing: format!("taking back {name}"), cause: Arc::from(error.to_string()) }
                }
            });
        }
        Ok(snapshot)
    }

    /// A parent must be visible after our lease was put, or its packs might be collected under our feet.
    fn check_parents(&self, manifest: &Manifest) -> Result<(), Error> {
        let roots = self.roots();
        let mut foreign = roots
            .parents
            .iter()
            .filter(|root| root.node.is_some() && !roots.finished.contains(root))
            .peekable();
        if foreign.peek().is_none() {
            return Ok(());
        }
        let parent = match self.repository.visible_file(manifest.parent.ok_or(Error::ParentGone)?) {
            Err(Error::NoSuchSnapshot { .. }) => return Err(Error::ParentGone),
            parent => parent?.manifest,
        };
        let held = |root: &&DiskRoot| parent.parts.iter().any(|part| part.root == **root);
        if foreign.all(|root| held(&root)) { Ok(()) } else { Err(Error::ParentGone) }
    }

    pub(crate) fn packs(&self) -> &Arc<Packs> {
        &self.packs
    }

    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    pub(crate) fn finished(&self, root: DiskRoot) {
        self.roots().finished.push(root);
    }

    fn roots(&self) -> std::sync::MutexGuard<'_, Roots> {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The announcement of a writer; taken back when the writer ends in whatever way it can notice.
struct Lease {
    id: LeaseId,
    repository: Repository,
    began: Instant,
    began_ms: u64,
}

impl Lease {
    fn announce(repository: &Repository) -> Result<Lease, Error> {
        let id = LeaseId(new_id()?);
        let began_ms = id.0.at_ms();
        let lease = Lease { id, repository: repository.clone(), began: Instant::now(), began_ms };
        let name = lease_name(id);
        let note = to_json(&LeaseNote { created_at_ms: began_ms }).map_err(Error::damaged(&name))?;
        repository.put_sealed(&name, "the lease", &note)?;
        Ok(lease)
    }

    /// Whether the manifest that was just put stays visible.
    fn check(&self) -> Result<(), Error> {
        // The monotonic clock stands still while a machine sleeps; the other may be set. The later one counts.
        let slept = Duration::from_millis(now_ms().saturating_sub(self.began_ms));
        let revoked = self.repository.objects().length(&revoked_name(self.id))?.is_some();
        if revoked || self.began.elapsed().max(slept) > LEASE_AGE_MAX {
            Err(Error::LeaseEnded)
        } else {
            Ok(())
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // One that stays is harmless: a lease that a manifest names is never revoked, and any other only
        // makes collection wait.
        self.repository.objects().delete(&lease_name(self.id)).unwrap_or_default();
    }
}

fn condemned_packs(repository: &Repository) -> Result<HashSet<PackName>, Error> {
    let mut packs = HashSet::new();
    for name in repository.objects().list("condemned")? {
        match repository.get_sealed(&name) {
            Ok(plaintext) => {
                packs.extend(from_json::<Condemned>(&plaintext).map_err(Error::damaged(&name))?.packs)
            }
            // The collection has ended since it was listed; its packs are gone, and the store says so.
            Err(Error::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(packs)
}
