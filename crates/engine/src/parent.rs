//! What a snapshot is compared with: one earlier snapshot of the same VM.
//!
//! The best is one whose bitmaps are still there for the most disks, then one that holds the most of them, then the
//! newest. A disk that the parent does not hold is stored in full (and mostly recognised by the repository).

use repository::{Error, Manifest, Part, Repository, Role, SnapshotId};

/// Key under which a part remembers the bitmap that began at its point.
pub(crate) const BITMAP_FACT: &str = "bitmap";

/// How many of a VM's snapshots are looked through, newest first. A bitmap older than that is worth little: nearly
/// everything will have been written since.
const SNAPSHOTS_MAX: usize = 64;

/// Without what a guest may have made large: many manifests are held at once here.
fn disks_only(manifest: Manifest) -> Manifest {
    Manifest { receipt: serde_json::Value::Null, definition: serde_json::Value::Null, ..manifest }
}

/// A disk that is wanted now, and the bitmaps on it that can be relied on.
#[derive(Clone, Debug)]
pub(crate) struct Tracked {
    pub(crate) disk: String,
    pub(crate) size_bytes: u64,
    pub(crate) usable_bitmaps: Vec<String>,
}

/// An earlier snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    pub(crate) snapshot: SnapshotId,
    pub(crate) manifest: Manifest,
}

impl Parent {
    /// Chooses among the VM's newest snapshots. Damaged ones are passed over: they can be no parent.
    pub(crate) fn choose(
        repository: &Repository,
        vm: &str,
        wanted: &[Tracked],
    ) -> Result<Option<Self>, Error> {
        let all = repository.snapshots()?;
        let newest = all.iter().rev().filter(|(_, summary)| summary.vm == vm && summary.damage.is_none());
        let read = newest.take(SNAPSHOTS_MAX).filter_map(|(id, _)| {
            Some(Self { snapshot: *id, manifest: disks_only(repository.manifest(id).ok()?) })
        });
        let count = |keeps: &dyn Fn(&Tracked) -> bool| wanted.iter().filter(|disk| keeps(disk)).count();
        let worth = |parent: &Self| {
            (count(&|disk| parent.bitmap(disk).is_some()), count(&|disk| parent.part(&disk.disk).is_some()))
        };
        // Newest first, and `max_by_key` keeps the last of equals: so backwards.
        let candidates: Vec<Self> = read.collect();
        Ok(candidates.into_iter().rev().filter(|parent| worth(parent).1 > 0).max_by_key(worth))
    }

    /// The parent's copy of a disk.
    pub(crate) fn part(&self, disk: &str) -> Option<&Part> {
        self.manifest.parts.iter().find(|part| part.role == Role::Disk && part.name == disk)
    }

    /// The bitmap that recorded every write to a disk since this snapshot. A disk that was resized is compared in
    /// full: what a bitmap says of the new part differs between versions of QEMU.
    pub(crate) fn bitmap(&self, disk: &Tracked) -> Option<String> {
        let part = self.part(&disk.disk).filter(|part| part.size_bytes == disk.size_bytes)?;
        let bitmap = part.facts.get(BITMAP_FACT).filter(|bitmap| disk.usable_bitmaps.contains(bitmap))?;
        // A name that two disks share cannot tell one from the other, if they were exchanged since.
        let named = |part: &&Part| part.facts.get(BITMAP_FACT) == Some(bitmap);
        (self.manifest.parts.iter().filter(named).count() == 1).then(|| bitmap.clone())
    }
}
