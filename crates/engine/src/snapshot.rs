//! One run: takes a snapshot of a running VM.
//!
//! `snapshot::run` decides what comes next; this carries it out and reports back. What must be undone is held by
//! [`Carrier`], whose `Drop` thaws and undoes if the run ends in a panic; what a killed process leaves is in the
//! journal, and the guest thaws by itself.

mod error;
mod facts;

pub use error::SnapshotError;

use crate::copy::{Source, Tally};
use crate::guest::Guest;
use crate::journal::{Journal, Note};
use crate::register::{Register, VmEntry, VmLock};
use crate::watch::{Cancel, Watch};
use crate::{claim, definition, fresh_id, now_ms};
use facts::{Facts, disk_facts};
use repository::{Manifest, Part, Repository, Role, SnapshotId, Writer};
use snapshot::receipt::{CopyEvidence, CopyMethod, Point, Receipt};
use snapshot::run::{Action, Event, Run, State};
use snapshot::{Level, Reason, Request, Verdict, judge, required_unmet};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vm::machine;
use vm::monitor::{Monitor, MonitorError};
use vm::point::{self, Outcome, Plan, Prepared, UndoError};
use vm::unix::Peer;

/// How long QEMU may take to end after it closed its monitor, and between two looks at that.
const END_TIMEOUT: Duration = Duration::from_secs(5);
const END_LOOK: Duration = Duration::from_millis(20);
/// How long QEMU may take to stop the virtual CPUs, in which it flushes every disk.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

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

/// Takes a snapshot. Every way out thaws the guest and leaves either a complete snapshot or none.
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
    let mut claimed = claim::connect(register, &entry)?;
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
    let Known { facts, writer, definition, plan, receipt, guest } = known;
    let carrier = Carrier {
        request,
        watch,
        cancel,
        began,
        run: Run::new(request, guest.can_freeze()),
        guest,
        monitor: claimed.monitor,
        journal: claimed.journal,
        qmp: entry.qmp,
        hung_up: false,
        owes: Owes { thaw: false, release: plan.is_some() },
        plan,
        facts,
        parts: definition.parts,
        definition: definition.json,
        writer: Some(writer),
        receipt,
        verdict: None,
        sealed: None,
        failure: None,
        left: None,
        _lock: claimed.lock,
    };
    carrier.carry_out()
}

/// What is known before anything but the claim is put into QEMU.
struct Known {
    facts: Facts,
    writer: Writer,
    definition: definition::Kept,
    plan: Option<Plan>,
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
    let facts = Facts::gather(monitor, repository, request)?;
    let writer = repository.begin()?;
    let definition = definition::keep(&machine::definition(monitor)?, &writer)?;
    let plan = facts.plan(register, repository, run)?;
    let mut receipt = facts.receipt(request, run);
    receipt.reasons.extend(definition.reasons.iter().cloned());
    let guest = Guest::find(entry, request, monitor, &mut receipt);
    Ok(Known { facts, writer, definition, plan, receipt, guest })
}

/// What must still be done whatever happens.
#[derive(Clone, Copy, Debug, Default)]
struct Owes {
    thaw: bool,
    release: bool,
}

/// Carries one run out.
struct Carrier<'a> {
    request: &'a Request,
    watch: &'a dyn Watch,
    cancel: &'a Cancel,
    began: Instant,
    run: Run,
    guest: Guest,
    monitor: Monitor,
    journal: Journal,
    qmp: PathBuf,
    /// QEMU closed the monitor.
    hung_up: bool,
    plan: Option<Plan>,
    facts: Facts,
    parts: Vec<Part>,
    definition: serde_json::Value,
    writer: Option<Writer>,
    receipt: Receipt,
    verdict: Option<Verdict>,
    sealed: Option<(SnapshotId, Manifest)>,
    failure: Option<SnapshotError>,
    left: Option<String>,
    owes: Owes,
    _lock: VmLock,
}

impl Carrier<'_> {
    fn carry_out(mut self) -> Result<Taken, SnapshotError> {
        // A copy, because `Prepared` borrows it while `self` goes on changing.
        let plan = self.plan.clone();
        let mut prepared = match &plan {
            None => None,
            Some(plan) => Some(self.prepare(plan)?),
        };
        self.receipt.phases_ms.prepare = millis(self.began.elapsed());
        let mut action = self.run.next(Event::Begin);
        while let Some(wanted) = action {
            // The table says where an interruption means something; elsewhere it is heard before the next action.
            if self.cancel.is_set()
                && let Some(instead) = self.run.next(Event::Interrupted)
            {
                self.fail(SnapshotError::Interrupted);
                action = Some(instead);
                continue;
            }
            let event = self.perform(wanted, &mut prepared);
            action = self.run.next(event);
        }
        if let Some(unused) = prepared {
            unused.abandon();
        }
        self.finish()
    }

    /// Does everything slow in QEMU, with the journal written first.
    fn prepare<'p>(&mut self, plan: &'p Plan) -> Result<Prepared<'p>, SnapshotError> {
        let plan_noted = Some(plan.clone());
        let note = Note { run: self.receipt.run.clone(), plan: plan_noted, outcome: Outcome::Dropped };
        self.journal.write(&note)?;
        match point::prepare(&mut self.monitor, plan) {
            Ok(prepared) => Ok(prepared),
            Err(error) => {
                self.release(Outcome::Dropped);
                Err(error.into())
            }
        }
    }

    fn perform(&mut self, action: Action, prepared: &mut Option<Prepared<'_>>) -> Event {
        let began = Instant::now();
        match action {
            Action::Freeze => {
                self.watch.step("freezing the guest");
                self.owes.thaw = true;
                self.receipt.order.freeze_sent_ms = Some(now_ms());
                let frozen = self.guest.freeze(self.request, &self.receipt.run, self.cancel);
                self.receipt.phases_ms.freeze = millis(began.elapsed());
                match frozen {
                    Ok(()) => {
                        self.receipt.order.frozen_before_point = true;
                        Event::Frozen
                    }
                    Err(cause) => {
                        self.receipt.reasons.push(Reason::new("freeze_failed", &self.request.vm, &cause));
                        if self.request.require > Level::Crash {
                            self.fail(SnapshotError::Freeze { cause, thawed: false });
                        }
                        Event::FreezeFailed
                    }
                }
            }
            Action::Cut => self.cut(prepared.take(), began),
            Action::Thaw => {
                self.watch.step("thawing the guest");
                self.thaw();
                self.receipt.phases_ms.thaw = millis(began.elapsed());
                Event::ThawEnded
            }
            Action::Judge => self.judge(),
            Action::Copy => {
                self.watch.step("copying disk data");
                let copied = self.copy();
                self.receipt.phases_ms.copy = millis(began.elapsed());
                match copied {
                    Ok(()) => Event::Copied,
                    Err(error) => {
                        let interrupted = self.cancel.is_set();
                        self.fail(if interrupted { SnapshotError::Interrupted } else { error });
                        Event::CopyFailed
                    }
                }
            }
            Action::Seal => match self.seal(began) {
                Ok(()) => Event::Sealed,
                Err(error) => {
                    self.fail(error.into());
                    Event::SealFailed
                }
            },
            Action::Release => {
                self.release(Outcome::Kept);
                Event::Cleared
            }
            Action::Undo => {
                self.watch.step("cleaning up");
                if let Some(unused) = prepared.take() {
                    unused.abandon();
                }
                self.release(Outcome::Dropped);
                Event::Cleared
            }
        }
    }

    fn cut(&mut self, prepared: Option<Prepared<'_>>, began: Instant) -> Event {
        let Some(prepared) = prepared else {
            return Event::PointTaken; // no disk was wanted: the receipt says that there is no point
        };
        self.watch.step("taking the point");
        let at_ms = now_ms();
        match prepared.cut(&mut self.monitor, STOP_TIMEOUT) {
            Ok(cut) => {
                // The cut is over and its `cont` answered: if the VM is found paused from now on, its owner did it.
                if let Some(plan) = &mut self.plan {
                    plan.running = false;
                }
                self.receipt.order.point_before_thaw = true;
                self.receipt.phases_ms.point = millis(began.elapsed());
                self.receipt.point = Some(Point {
                    at_ms,
                    vcpus_stopped: true,
                    stopped_ms: cut.stopped.map_or(0.0, |stopped| stopped.as_secs_f64() * 1000.0),
                    disks: self.facts.wanted.iter().map(|wanted| wanted.disk.name.clone()).collect(),
                });
                Event::PointTaken
            }
            Err(error) => {
                self.fail(error.into());
                Event::PointFailed
            }
        }
    }

    fn thaw(&mut self) {
        let ended = self.guest.thaw(&self.receipt.run);
        self.owes.thaw = false;
        if let Some(SnapshotError::Freeze { thawed, .. }) = &mut self.failure {
            *thawed = ended.answered || ended.unknown;
        }
        self.receipt.order.thaw_answered = ended.answered;
        self.receipt.guest = ended.report;
        self.receipt.stock = ended.stock;
        self.receipt.reasons.extend(ended.reasons);
    }

    fn judge(&mut self) -> Event {
        let verdict = judge(&self.receipt);
        let (reached, required) = (verdict.level, self.request.require);
        if let Some(reason) = required_unmet(&self.receipt, &verdict) {
            self.fail(SnapshotError::RequiredApplication(reason));
        } else if reached < required {
            self.fail(SnapshotError::BelowRequired { reached, required, reasons: verdict.reasons.clone() });
        } else {
            self.verdict = Some(verdict);
            return Event::LevelReached;
        }
        Event::LevelMissed
    }

    fn copy(&mut self) -> Result<(), SnapshotError> {
        let Some(plan) = &self.plan else { return Ok(()) };
        let exports = point::export(&mut self.monitor, plan)?;
        let failed = |disk: &str| {
            let disk = disk.to_owned();
            move |source| SnapshotError::Copy { disk, source }
        };
        let mut sources = Vec::new();
        for (export, wanted) in exports.iter().zip(&self.facts.wanted) {
            let source = Source::open(&plan.socket, export).map_err(failed(&wanted.disk.name))?;
            sources.push(source);
        }
        let total_bytes = sources.iter().map(Source::read_bytes).sum();
        let mut tally = Tally { watch: self.watch, done_bytes: 0, total_bytes };
        let writer = self.writer.as_ref().expect("it is there until the seal");
        for ((source, wanted), planned) in sources.into_iter().zip(&self.facts.wanted).zip(&plan.disks) {
            let name = &wanted.disk.name;
            let size_bytes = source.size_bytes();
            let disk = writer.disk(size_bytes, wanted.parent.as_ref())?;
            let (root, stats) = source.store(disk, &mut tally, self.cancel).map_err(failed(name))?;
            let method = match (&wanted.base, &wanted.parent) {
                (Some(_), _) => CopyMethod::Bitmap,
                (None, Some(_)) => CopyMethod::Compared,
                (None, None) => CopyMethod::Full,
            };
            if let Some(evidence) = self.receipt.disks.iter_mut().find(|disk| disk.name == *name) {
                evidence.copy = Some(CopyEvidence {
                    method,
                    read_bytes: stats.read_bytes,
                    changed_bytes: stats.changed_bytes,
                    stored_bytes: stats.stored_bytes,
                });
            }
            let facts = disk_facts(&wanted.disk, &planned.bitmap);
            self.parts.push(Part { name: name.clone(), role: Role::Disk, size_bytes, root, facts });
        }
        Ok(())
    }

    fn seal(&mut self, began: Instant) -> Result<(), repository::Error> {
        self.watch.step("sealing the snapshot");
        let verdict = self.verdict.as_ref().expect("it was judged before the copy");
        self.receipt.phases_ms.seal = millis(began.elapsed());
        let manifest = Manifest {
            vm: self.request.vm.clone(),
            parent: self.facts.parent,
            created_at_ms: self.receipt.point.as_ref().map_or_else(now_ms, |point| point.at_ms),
            description: self.request.description.clone(),
            level: verdict.level.to_string(),
            parts: std::mem::take(&mut self.parts),
            definition: std::mem::take(&mut self.definition),
            receipt: serde_json::to_value(&self.receipt).expect("a receipt has no key that is not text"),
        };
        let writer = self.writer.take().expect("it is sealed once");
        let id = writer.commit(manifest.clone())?;
        self.receipt.phases_ms.seal = millis(began.elapsed());
        self.sealed = Some((id, manifest));
        Ok(())
    }

    /// Takes what the run put into QEMU out again. A failure is told, and tried again by the next run.
    fn release(&mut self, outcome: Outcome) {
        let Some(plan) = &self.plan else { return };
        if !self.owes.release {
            return;
        }
        self.owes.release = false;
        let note = Note { run: self.receipt.run.clone(), plan: Some(plan.clone()), outcome };
        let noted = if outcome == Outcome::Kept { self.journal.write(&note) } else { Ok(()) };
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

    /// Whether the VM has ended: nobody listens at its monitor's socket any more, and who made it is gone. One that closed
    /// its monitor is given a moment for it.
    fn ended(&self) -> bool {
        let gone = |kind| matches!(kind, io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
        let patience = Instant::now() + if self.hung_up { END_TIMEOUT } else { Duration::ZERO };
        loop {
            // Either alone may mislead: the socket's file may be removed, and a process may have made it for another.
            if UnixStream::connect(&self.qmp).is_err_and(|error| gone(error.kind()))
                && self.monitor.peer().is_none_or(Peer::has_ended)
            {
                return true;
            }
            if Instant::now() >= patience {
                return false;
            }
            std::thread::sleep(END_LOOK);
        }
    }

    fn fail(&mut self, error: SnapshotError) {
        self.failure.get_or_insert(error);
    }

    fn finish(mut self) -> Result<Taken, SnapshotError> {
        debug_assert!(matches!(self.run.state(), State::Kept | State::Abandoned), "{:?}", self.run.state());
        match (self.sealed.take(), self.verdict.take()) {
            (Some((id, manifest)), Some(verdict)) => {
                let receipt = std::mem::take(&mut self.receipt);
                Ok(Taken { id, manifest, receipt, verdict, left: self.left.take() })
            }
            _ => {
                let failure = self.failure.take().unwrap_or(SnapshotError::Interrupted);
                // Whatever failed first: that the VM has ended explains it, and what to do about it.
                let explained = failure.is_of_the_vm() && self.ended();
                Err(if explained { SnapshotError::Ended(failure.to_string()) } else { failure })
            }
        }
    }
}

impl Drop for Carrier<'_> {
    /// A panic, or an early return: nobody is left to tell.
    fn drop(&mut self) {
        if self.owes.thaw {
            self.thaw();
        }
        if self.owes.release {
            self.release(Outcome::Dropped);
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
