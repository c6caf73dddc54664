//! A run on a VM that is shut off: its images are read where they lie.
//!
//! Nobody can be asked what the VM is made of, so it is as it was last seen. Nobody is kept from starting it either: a
//! snapshot during which an image was written to is none.

use super::archive::Archive;
use super::facts::{Facts, wanted};
use super::{SnapshotError, Taken};
use crate::journal::Journal;
use crate::register::{Register, VmLock};
use crate::seen::Seen;
use crate::watch::{Cancel, Watch};
use crate::{definition, fresh_id, now_ms};
use repository::Repository;
use snapshot::conduct::{Ended, Hands, Kept, conduct};
use snapshot::receipt::{Point, Receipt};
use snapshot::run::Action;
use snapshot::{Reason, Request, Verdict};
use std::path::Path;
use std::time::{Duration, Instant};
use vm::at_rest::{Chains, Images};
use vm::disks::Disk;
use vm::point::undo::release_files;
use vm::untouched::{Touched, Untouched};

/// Takes a snapshot from the images.
pub(super) fn take(
    register: &Register,
    repository: &Repository,
    request: &Request,
    seen: Seen,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<Taken, SnapshotError> {
    let began = Instant::now();
    let lock = register.lock(&request.vm)?;
    let run = fresh_id();
    let Seen { at_ms, definition, mut drives } = seen;
    let mut disks = wanted(&drives, request)?;
    for (number, disk) in disks.iter_mut().enumerate() {
        disk.node = format!("disk{number}");
    }
    let chains = Chains::of(&disks)?;
    // Before anything is read.
    let untouched = look(&disks)?;
    // Nobody has the images open, so the QEMU of a run that died has ended, and its scratch is of no more use. The note stays:
    // bitmaps that QEMU kept in images are for the next run beside one.
    let left = Journal::of(register, &request.vm).read()?.and_then(|note| note.plan);
    let left = left.and_then(|plan| release_files(&plan).err()).map(|error| error.to_string());
    let mut images = if disks.is_empty() {
        None
    } else {
        Some(Images::open(&register.scratch().join(format!("at-rest-{}", request.vm)), &chains)?)
    };
    let nodes = images.as_mut().map_or(Ok(Vec::new()), Images::nodes)?;
    // An image may have been resized since.
    for disk in &mut disks {
        let node = nodes.iter().find(|node| node.node_name.as_ref() == Some(&disk.node));
        disk.size_bytes = node.map_or(disk.size_bytes, |node| node.image.virtual_size);
        let known = drives.disks.iter_mut().filter(|known| known.name == disk.name);
        known.for_each(|known| known.size_bytes = disk.size_bytes);
    }
    let facts = Facts::choose(&drives, disks, &nodes, repository, request)?;
    let writer = repository.begin()?;
    let definition = definition::keep(&definition, &writer)?;
    let mut receipt = facts.receipt(request, &run);
    receipt.reasons.extend(definition.reasons.iter().cloned());
    let age = Duration::from_millis(now_ms().saturating_sub(at_ms));
    receipt.reasons.push(Reason::new(
        "as_last_seen",
        &request.vm,
        format!("disks and definition are those of {} ago, when it was last seen running", ago(age)),
    ));
    let hands = Resting {
        watch,
        cancel,
        began,
        archive: Archive::new(request, watch, cancel, facts, writer, definition),
        images,
        untouched,
        _lock: lock,
    };
    let (hands, outcome) = conduct(hands, request, receipt, false);
    let Kept { receipt, verdict } = outcome?;
    let (id, manifest) = hands.archive.sealed.expect("a run that was kept was sealed");
    Ok(Taken { id, manifest, receipt, verdict, left })
}

/// In words, for people.
fn ago(age: Duration) -> String {
    let minutes = age.as_secs() / 60;
    match minutes {
        0 => "less than a minute".to_owned(),
        1..120 => format!("{minutes} min"),
        120..2880 => format!("{} h", minutes / 60),
        _ => format!("{} days", minutes / 1440),
    }
}

/// Looks at every file of the disks, each with the disk that it belongs to.
fn look(disks: &[Disk]) -> Result<Vec<(String, Untouched)>, SnapshotError> {
    let mut untouched = Vec::new();
    for disk in disks {
        for layer in &disk.layers {
            let look = Untouched::since_now(Path::new(&layer.file));
            let look = look.map_err(|why| SnapshotError::Image { disk: disk.name.clone(), why })?;
            untouched.push((disk.name.clone(), look));
        }
    }
    Ok(untouched)
}

/// Carries one run out.
struct Resting<'a> {
    watch: &'a dyn Watch,
    cancel: &'a Cancel,
    began: Instant,
    archive: Archive<'a>,
    /// Absent if no disk is wanted.
    images: Option<Images>,
    untouched: Vec<(String, Untouched)>,
    _lock: VmLock,
}

impl Resting<'_> {
    fn still(&self) -> Result<(), SnapshotError> {
        self.untouched.iter().try_for_each(|(disk, untouched)| {
            untouched.still().map_err(|why| match why {
                Touched::InUse(_) | Touched::Changed(_) => SnapshotError::Started(why),
                why => SnapshotError::Image { disk: disk.clone(), why },
            })
        })
    }
}

impl Hands for Resting<'_> {
    type Error = SnapshotError;

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn wall_ms(&self) -> u64 {
        now_ms()
    }

    fn interrupted(&self) -> bool {
        self.cancel.is_set()
    }

    fn begins(&mut self, action: Action) {
        match action {
            Action::Copy => self.watch.step("copying disk data from the images: the VM is shut off"),
            Action::Seal => self.watch.step("sealing the snapshot"),
            _ => {}
        }
    }

    fn prepare(&mut self, _run: &str) -> Result<(), SnapshotError> {
        Ok(())
    }

    fn freeze(&mut self, _run: &str) -> Result<(), String> {
        Err("the VM is shut off".to_owned())
    }

    /// Nothing is cut: what does not change is the same at every instant.
    fn cut(&mut self) -> Result<Option<Point>, SnapshotError> {
        if self.images.is_none() {
            return Ok(None);
        }
        let at_ms = now_ms();
        self.still()?;
        let unseen = self.untouched.iter().filter(|(_, file)| !file.shows_every_writer());
        let mut writers_unseen: Vec<String> = unseen.map(|(disk, _)| disk.clone()).collect();
        writers_unseen.dedup();
        Ok(Some(Point {
            at_ms,
            shut_off: true,
            writers_unseen,
            disks: self.archive.disks(),
            ..Point::default()
        }))
    }

    fn thaw(&mut self, _run: &str) -> Ended {
        Ended::default()
    }

    fn copy(&mut self, receipt: &mut Receipt) -> Result<(), SnapshotError> {
        self.archive.keep_variables(receipt)?;
        let Some(images) = &mut self.images else { return Ok(()) };
        let wanted = &self.archive.facts.wanted;
        let exports = images.serve(wanted.iter().map(|wanted| (&wanted.disk, wanted.base.as_deref())))?;
        // No bitmap begins here: that would take writing to the images.
        let bitmaps = vec![None; exports.len()];
        let stored = self.archive.store(&images.socket(), &exports, &bitmaps, receipt, || ());
        // A start explains whatever went wrong, and makes void whatever did not.
        self.still()?;
        stored
    }

    fn seal(&mut self, receipt: &Receipt, verdict: &Verdict) -> Result<(), SnapshotError> {
        self.archive.seal(receipt, verdict)
    }

    fn release(&mut self, _run: &str, _kept: bool) {
        self.images = None;
    }
}
