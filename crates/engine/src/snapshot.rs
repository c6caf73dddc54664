//! One run: takes a snapshot of a VM, running or shut off.
//!
//! `snapshot::conduct` leads it and holds what must be undone, after a panic too; [`Carrier`] is its hands, with a
//! real guest, QEMU and repository. What a killed process leaves is in the journal, and the guest thaws by itself.

mod archive;
mod error;
mod facts;
mod shut_off;

pub use error::SnapshotError;

use crate::guest::Guest;
use crate::journal::{Journal, Note};
use crate::register::{Register, RegisterError, VmEntry, VmLock};
use crate::seen::Seen;
use crate::watch::{Cancel, Watch};
use crate::{claim, definition, fresh_id, now_ms};
use archive::Archive;
use facts::Facts;
use qmp::block::Node;
use qmp::machine::QueryStatus;
use repository::{Manifest, Repository, SnapshotId, Writer};
use snapshot::conduct::{Ended, Hands, Kept, conduct};
use snapshot::receipt::{Point, Receipt};
use snapshot::run::Action;
use snapshot::{Request, Verdict};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vm::machine;
use vm::monitor::{Monitor, MonitorError};
use vm::point::{self, Outcome, Plan, Prepared, Reserve, UndoError};
use vm::unix::{Peer, nobody_listens};

/// How long QEMU may take to end after it closed its monitor, and between two looks at that.
const END_TIMEOUT: Duration = Duration::from_secs(5);
const END_LOOK: Duration = Duration::from_millis(20);
/// How long QEMU may take to stop the virtual CPUs, in which it flushes every disk.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long those whom the freeze held back have QEMU and the processors to themselves, before the copy takes its part of both. What it
/// is for was measured with 150 ms: `docs/performance.md`.
const HEAD_START: Duration = Duration::from_millis(100);

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Taken {
    /// Its id.
    pub id: SnapshotId,
    /// As stored.
    pub manifest: Manifest,
    /// The evidence.
    pub receipt: Receipt,
    /// What it is worth.
    pub verdict: Verdict,
    /// What could not be cleaned up afterwards; the next run tries again.
    pub left: Option<String>,
}

/// Takes a snapshot, of a VM that is shut off from its images. Every way out thaws the guest and leaves either a complete
/// snapshot or none.
///
/// # Errors
/// See [`SnapshotError`].
pub fn take(
    register: &Register,
    repository: &Repository,
    request: &Request,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<Taken, SnapshotError> {
    let entry = register.get(&request.vm)?;
    watch.step("preparing");
    let began = Instant::now();
    let mut claimed = match claim::connect(register, &entry) {
        Err(SnapshotError::Monitor(nobody)) if nobody.is_nobody() => {
            return match Seen::last(register, &entry.name)? {
                Some(seen) => shut_off::take(register, repository, request, seen, watch, cancel),
                None => Err(nobody.into()),
            };
        }
        connected => connected?,
    };
    let run = fresh_id();
    // Without disks nothing is put into QEMU, and nobody is in the way.
    if !request.no_data {
        claimed.claim(register, &run)?;
    }
    let known = match know(register, repository, request, &entry, &run, &mut claimed.monitor) {
        Ok(known) => known,
        Err(error) => {
            if !request.no_data {
                claimed.give_up(&run);
            }
            return Err(error);
        }
    };
    let Known { facts, writer, definition, plan, reserve, receipt, guest } = known;
    let can_freeze = guest.can_freeze();
    // A copy, because `Prepared` borrows it while the other goes on changing.
    let planned = plan.clone();
    let carrier = Carrier {
        request,
        watch,
        cancel,
        began,
        archive: Archive::new(request, watch, cancel, facts, writer, definition),
        guest,
        monitor: claimed.monitor,
        journal: claimed.journal,
        qmp: entry.qmp,
        hung_up: false,
        plan,
        planned: planned.as_ref(),
        prepared: None,
        reserve,
        left: None,
        _lock: claimed.lock,
    };
    let (carrier, outcome) = conduct(carrier, request, receipt, can_freeze);
    let Kept { receipt, verdict } = outcome.map_err(|failure| carrier.explain(failure.into()))?;
    let (id, manifest) = carrier.archive.sealed.expect("a run that was kept was sealed");
    Ok(Taken { id, manifest, receipt, verdict, left: carrier.left })
}

/// What is known before anything but the claim is put into QEMU.
struct Known {
    facts: Facts,
    writer: Writer,
    definition: definition::Kept,
    plan: Option<Plan>,
    reserve: Option<Reserve>,
    receipt: Receipt,
    guest: Guest,
}

fn know(
    register: &Register,
    repository: &Repository,
    request: &Request,
    entry: &VmEntry,
    run: &str,
    monitor: &mut Monitor,
) -> Result<Known, SnapshotError> {
    let seen = Seen::now(machine::definition(monitor)?, machine::drives(monitor)?);
    // Only a snapshot of the VM while it is shut off would lack it.
    let _kept = seen.keep(register, &entry.name);
    let wanted = facts::wanted(&seen.drives, request)?;
    let nodes = machine::nodes(monitor)?;
    let facts = Facts::choose(&seen.drives, wanted, &nodes, repository, request)?;
    let reserve = if facts.wanted.is_empty() { None } else { reserve(register, &nodes, monitor)? };
    let writer = repository.begin()?;
    let definition = definition::keep(&seen.definition, &writer)?;
    let running = monitor.run(&QueryStatus {})?.running;
    let plan = facts.plan(register, repository, run, running)?;
    let mut receipt = facts.receipt(request, run);
    receipt.reasons.extend(definition.reasons.iter().cloned());
    let guest = Guest::find(entry, request, monitor, &mut receipt);
    Ok(Known { facts, writer, definition, plan, reserve, receipt, guest })
}

/// What scratch must leave free for the VM's own images, if they share its file system.
fn reserve(register: &Register, nodes: &[Node], monitor: &Monitor) -> Result<Option<Reserve>, SnapshotError> {
    let folder = register.scratch();
    let reserve = Reserve::of(&folder, &machine::written_files(nodes, monitor.peer()))
        .map_err(|source| RegisterError::Io { path: folder, source })?;
    reserve.iter().try_for_each(Reserve::look)?;
    Ok(reserve)
}

/// Carries one run out.
struct Carrier<'a> {
    request: &'a Request,
    watch: &'a dyn Watch,
    cancel: &'a Cancel,
    began: Instant,
    archive: Archive<'a>,
    guest: Guest,
    monitor: Monitor,
    journal: Journal,
    qmp: PathBuf,
    /// QEMU closed the monitor.
    hung_up: bool,
    plan: Option<Plan>,
    planned: Option<&'a Plan>,
    /// Until the cut.
    prepared: Option<Prepared<'a>>,
    /// Where scratch could take the room of the VM's own images.
    reserve: Option<Reserve>,
    left: Option<String>,
    _lock: VmLock,
}

impl Hands for Carrier<'_> {
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
        if let Some(words) = told(action) {
            self.watch.step(words);
        }
    }

    /// Everything slow in QEMU, with the journal written first.
    fn prepare(&mut self, run: &str) -> Result<(), SnapshotError> {
        let Some(plan) = self.planned else { return Ok(()) };
        let note = Note { run: run.to_owned(), plan: Some(plan.clone()), outcome: Outcome::Dropped };
        self.journal.write(&note)?;
        self.prepared = Some(point::prepare(&mut self.monitor, plan)?);
        Ok(())
    }

    fn freeze(&mut self, run: &str) -> Result<(), String> {
        self.guest.freeze(self.request, run, self.cancel)
    }

    fn cut(&mut self) -> Result<Option<Point>, SnapshotError> {
        let Some(prepared) = self.prepared.take() else { return Ok(None) };
        let at_ms = now_ms();
        let guest = &mut self.guest;
        let cut = prepared.cut(&mut self.monitor, STOP_TIMEOUT, || guest.send_thaw_ahead())?;
        // The cut is over and its `cont` answered: if the VM is found paused from now on, its owner did it.
        if let Some(plan) = &mut self.plan {
            plan.running = false;
        }
        Ok(Some(Point {
            at_ms,
            vcpus_stopped: cut.stood,
            stopped_ms: cut.stopped.map_or(0.0, |stopped| stopped.as_secs_f64() * 1000.0),
            disks: self.archive.disks(),
            ..Point::default()
        }))
    }

    fn thaw(&mut self, run: &str) -> Ended {
        self.guest.thaw(run)
    }

    fn copy(&mut self, receipt: &mut Receipt) -> Result<(), SnapshotError> {
        self.archive.keep_variables(receipt)?;
        let Some(plan) = &self.plan else { return Ok(()) };
        if self.guest.can_freeze() {
            std::thread::sleep(HEAD_START);
        }
        let exports = point::export(&mut self.monitor, plan)?;
        let bitmaps: Vec<_> = plan.disks.iter().map(|disk| Some(&disk.bitmap[..])).collect();
        let (mut short, mut broken) = (None, false);
        let stored = self.archive.store(&plan.socket, &exports, &bitmaps, receipt, || {
            let looked = self.reserve.as_ref().map_or(Ok(()), Reserve::look);
            short = short.take().or(looked.err());
            // Not the copy is stopped, which may hang in the store, but what makes scratch grow; the copy ends with its export.
            // Where that fails it is tried again, here and at the end of the run.
            broken = broken
                || short.is_some() && point::release(&mut self.monitor, plan, Outcome::Dropped).is_ok();
        });
        short.map_or(stored, |short| Err(short.into()))
    }

    fn seal(&mut self, receipt: &Receipt, verdict: &Verdict) -> Result<(), SnapshotError> {
        self.archive.seal(receipt, verdict)
    }

    fn release(&mut self, run: &str, kept: bool) {
        // What was never cut starts nothing.
        self.prepared = None;
        let Some(plan) = &self.plan else { return };
        let outcome = if kept { Outcome::Kept } else { Outcome::Dropped };
        let note = Note { run: run.to_owned(), plan: Some(plan.clone()), outcome };
        let noted = if kept { self.journal.write(&note) } else { Ok(()) };
        let undo = |monitor: &mut Monitor| {
            point::release(monitor, plan, outcome)
                .and_then(|()| point::unclaim(monitor, note.tag()).map_err(UndoError::from))
        };
        let mut released = undo(&mut self.monitor);
        if let Err(UndoError::Monitor(error)) = &released
            && error.is_broken()
            && self.monitor.reconnect(END_TIMEOUT).is_ok()
        {
            released = undo(&mut self.monitor);
        }
        let cleared = if released.is_ok() { self.journal.clear() } else { Ok(()) };
        self.hung_up =
            matches!(released, Err(UndoError::Monitor(MonitorError::Closed { .. } | MonitorError::Io(_))));
        let failed = match released {
            // Everything in QEMU went with it. The note stays: bitmaps that it kept in images are for the next run.
            Err(_) if self.hung_up && self.ended() => point::undo::release_files(plan).err(),
            released => released.err(),
        };
        let failed = failed.map(|e| e.to_string());
        self.left = failed.or_else(|| noted.and(cleared).err().map(|e| e.to_string()));
    }
}

/// What a watcher is told when an action begins. Nothing while the guest may be frozen: a terminal that is held (Ctrl-S) would hold
/// the run, and so the thaw.
fn told(action: Action) -> Option<&'static str> {
    match action {
        Action::Freeze => Some("freezing the guest"),
        Action::Copy => Some("copying disk data"),
        Action::Seal => Some("sealing the snapshot"),
        Action::Undo => Some("cleaning up"),
        Action::Cut | Action::Thaw | Action::Judge | Action::Release => None,
    }
}

impl Carrier<'_> {
    /// Whether the VM has ended: nobody listens at its monitor's socket any more, and who made it is gone. One that closed
    /// its monitor is given a moment for it.
    fn ended(&self) -> bool {
        let patience = Instant::now() + if self.hung_up { END_TIMEOUT } else { Duration::ZERO };
        loop {
            // Either alone may mislead: the socket's file may be removed, and a process may have made it for another.
            if nobody_listens(&self.qmp) && self.monitor.peer().is_none_or(Peer::has_ended) {
                return true;
            }
            if Instant::now() >= patience {
                return false;
            }
            std::thread::sleep(END_LOOK);
        }
    }

    /// Whatever failed first: that the VM has ended explains it, and what to do about it.
    fn explain(&self, failure: SnapshotError) -> SnapshotError {
        let explained = failure.is_of_the_vm() && self.ended();
        if explained { SnapshotError::Ended(failure.to_string()) } else { failure }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_anything_between_freeze_and_thaw() {
        assert_eq!([Action::Cut, Action::Thaw].map(told), [None, None]);
    }
}
