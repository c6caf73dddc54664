//! The way of a run, as types: `Prepared::quiesce` → `Quiesced::freeze` → `Frozen::thaw`. The wrong order does not
//! compile, and a run that stops anywhere leaves nothing frozen and nothing locked.

use super::Refusal;
use super::evidence::{Evidence, ms};
use super::record::{Record, Recorded, Records, Written};
use super::shared::Shared;
use crate::freeze::counters::{Counters, counters};
use crate::freeze::crew::Crew;
use crate::freeze::developer::is_developers_machine;
use crate::freeze::facts::View;
use crate::freeze::gather::Gatherer;
use crate::freeze::guard::{Guard, Heard};
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::{Freeze, Ledger, Phase, SUPERBLOCKS_MAX};
use crate::freeze::plan::{Plan, plan};
use crate::freeze::reach::{MountDevices, Reached, mount_devices, reach, superblock_of};
use crate::freeze::writers::writers;
use crate::logging;
use crate::quiesce::Applications;
use guest_protocol::stillpoint::{
    ApplicationPolicy, FilesystemState, GuestReport, Reason, State, ThawCause, Want,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A flush round as quick as this needs no other after it.
const ROUND_FAST: Duration = Duration::from_millis(50);
/// Most flush rounds: a guest that dirties faster than it writes never converges.
const ROUNDS_MAX: usize = 6;
/// Longest time for the flush rounds between the quiesce and the freeze, while locks may be held.
const LAST_FLUSH_MAX: Duration = Duration::from_secs(5);
/// Longer than any flush round: the first one always counts as progress.
const FLUSH_LONGEST: Duration = Duration::from_secs(1 << 20);
/// Longest time for looking at other processes.
const WRITERS_MAX: Duration = Duration::from_secs(2);
/// Longest time for checking and resuming the applications.
const RESUME_MAX: Duration = Duration::from_secs(10);
/// Longest time for the flush after the thaw that shows whether an unfreezable file system was written to.
const PROOF_MAX: Duration = Duration::from_secs(10);
/// How long after the lease's end the guard may take to begin; then the agent thaws by itself.
const GUARD_LATE: Duration = Duration::from_millis(300);
/// How often the end of a thaw is looked for. The answers come from another process too, through memory.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

/// What a run is to do.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) id: String,
    pub(super) plain: bool,
    pub(super) lease_ms: u64,
    pub(super) prepare: Duration,
    pub(super) quiesce: Duration,
    pub(super) budget: Duration,
    pub(super) want: Want,
    pub(super) policies: Vec<ApplicationPolicy>,
    /// qemu-ga's freeze-list.
    pub(super) only: Option<Vec<String>>,
}

/// A run that did not come to freeze, with everything undone.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) refusal: Refusal,
    pub(super) report: GuestReport,
    pub(super) cause: Phase,
}

/// A superblock that will be frozen.
#[derive(Debug)]
struct Held {
    /// Where it is in the plan.
    planned: usize,
    step: usize,
}

/// Everything that a run holds. Dropping it ends the guard and the applications' workers.
struct Run {
    shared: Arc<Shared>,
    order: Order,
    /// Removed with the rest, after `Frozen` has thawed.
    record: Written,
    applications: Applications,
    evidence: Evidence,
    held: Vec<Held>,
    ledger: Arc<Ledger>,
    crew: Crew,
    guard: Guard,
}

impl Run {
    /// Undoes a run that has frozen nothing (yet, or any more).
    fn stopped(mut self, refusal: Refusal, cause: Phase) -> Box<Stopped> {
        self.guard.end();
        self.applications.resume(Instant::now() + RESUME_MAX);
        self.evidence.applications(&self.applications);
        self.evidence.reason(Reason::new(refusal.code, "", refusal.message.clone()));
        Box::new(Stopped { refusal, report: self.evidence.report, cause })
    }

    /// Flushes in rounds until one is fast, none gets faster, or another one would not end in time; answers how long
    /// each superblock took in the last round.
    fn flush(&mut self, deadline: Instant) -> Vec<Option<Duration>> {
        let mut last = vec![Some(Duration::ZERO); self.held.len()];
        let mut before = FLUSH_LONGEST;
        for _ in 0..ROUNDS_MAX {
            let begun = Instant::now();
            let shared = &self.shared;
            last = self.crew.flush(deadline, || shared.is_stopped());
            let took = begun.elapsed();
            self.evidence.report.flush_rounds_ms.push(ms(took));
            let converges = took < before * 4 / 5;
            if took <= ROUND_FAST
                || !converges
                || Instant::now() + took >= deadline
                || self.shared.is_stopped()
            {
                break;
            }
            before = took;
        }
        last
    }

    /// How long FIFREEZE will take, judged by the last flush: the steps follow one another, within a step it is the
    /// slowest. `None`: some file system could not even be flushed in time.
    fn predicted(&self, last: &[Option<Duration>]) -> Option<Duration> {
        let mut steps: BTreeMap<usize, Duration> = BTreeMap::new();
        for (held, took) in self.held.iter().zip(last) {
            let slowest = steps.entry(held.step).or_default();
            *slowest = (*slowest).max((*took)?);
        }
        Some(steps.values().sum())
    }
}

/// What is known about the guest's file systems: facts, plan, and a folder open on each.
pub(super) struct Surveyed {
    pub(super) plan: Plan,
    mounts: MountDevices,
    reached: Vec<Result<Reached, String>>,
}

/// Looks at the guest without changing anything.
pub(super) fn survey(only: Option<&[String]>) -> Result<Surveyed, Refusal> {
    let facts = Gatherer::new("/")
        .gather()
        .map_err(|error| Refusal { code: "mounts_unreadable", message: error.to_string() })?;
    let mut plan = plan(&facts);
    if let Some(only) = only {
        plan.only(only);
    }
    if plan.superblocks.len() > SUPERBLOCKS_MAX {
        let message =
            format!("{} file systems, at most {SUPERBLOCKS_MAX} can be frozen", plan.superblocks.len());
        return Err(Refusal { code: "too_many_filesystems", message });
    }
    let mounts = mount_devices(&facts);
    let reached = plan.superblocks.iter().map(|superblock| reach(superblock, &mounts)).collect();
    Ok(Surveyed { plan, mounts, reached })
}

impl Surveyed {
    pub(super) fn evidence(&self, id: &str, lease_ms: u64) -> Evidence {
        let mut evidence = Evidence::new(id, lease_ms, &self.plan);
        for (at, reached) in self.reached.iter().enumerate() {
            match reached {
                Ok(reached) => evidence.place(at, &reached.place),
                Err(failure) => evidence.unreachable(at, failure),
            }
        }
        evidence
    }

    /// Folders for a flush, those that were reached.
    pub(super) fn folders(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.reached.iter().enumerate().filter_map(|(at, reached)| Some((at, &reached.as_ref().ok()?.folder)))
    }
}

/// Everything slow and harmless is done; the guard is armed.
#[must_use]
pub(super) struct Prepared {
    run: Run,
}

impl Prepared {
    /// Finds applications and file systems, lets applications write out, starts the guard, flushes in rounds.
    pub(super) fn prepare(shared: &Arc<Shared>, order: Order, statedir: &Path) -> Result<Self, Box<Stopped>> {
        let begun = Instant::now();
        let deadline = begun + order.prepare;
        let early = |refusal: Refusal, cause| {
            Box::new(Stopped {
                refusal,
                report: Evidence::new(&order.id, order.lease_ms, &Plan::default()).report,
                cause,
            })
        };
        if is_developers_machine() {
            let message = "a program that cargo started or that lies in its build folder freezes nothing: this is a developer's machine";
            return Err(early(
                Refusal { code: "developers_machine", message: message.to_owned() },
                Phase::Failed,
            ));
        }
        shared.enter(State::Preparing).map_err(|why| early(aborted(why), why))?;
        let surveyed = survey(order.only.as_deref()).map_err(|refusal| early(refusal, Phase::Failed))?;
        let mut evidence = surveyed.evidence(&order.id, order.lease_ms);
        let failed = |mut evidence: Evidence, refusal: Refusal| {
            evidence.reason(Reason::new(refusal.code, "", refusal.message.clone()));
            Box::new(Stopped { refusal, report: evidence.report, cause: Phase::Failed })
        };
        let Surveyed { plan, mounts, reached } = surveyed;
        if let Err(refusal) = state_stays_writable(statedir, &plan) {
            return Err(failed(evidence, refusal));
        }
        let mut held = Vec::new();
        let mut folders = Vec::new();
        let mut recorded = Vec::new();
        for (planned, reached) in reached.into_iter().enumerate() {
            let Ok(reached) = reached else { continue };
            let pid = if let View::Process(pid) = reached.place.view { Some(pid) } else { None };
            recorded.push(Recorded {
                report: evidence.report.filesystems[planned].clone(),
                pid,
                mountpoint: reached.place.mountpoint,
            });
            held.push(Held { planned, step: plan.steps[planned] });
            folders.push(Arc::new(reached.folder));
        }
        let record = Record {
            id: order.id.clone(),
            plain: order.plain,
            boot_id: evidence.report.boot_id.clone(),
            lease_ms: order.lease_ms,
            filesystems: recorded,
        };
        let machinery = || -> std::io::Result<(Written, Arc<Ledger>, Crew, Guard)> {
            let (ledger, written) = Records::new(statedir).create(&record)?;
            let ledger = Arc::new(ledger);
            let crew = Crew::start(&folders, &ledger)?;
            let guard = Guard::start(&ledger, &folders)?;
            Ok((written, ledger, crew, guard))
        };
        let (record, ledger, crew, guard) = match machinery() {
            Ok(machinery) => machinery,
            Err(error) => {
                return Err(failed(evidence, Refusal { code: "guard_failed", message: error.to_string() }));
            }
        };
        // Discovered also where nothing is to be quiesced: what is there counts.
        let mut applications = Applications::discover(&order.policies, deadline);
        {
            let mut inner = shared.lock();
            inner.abort = Some(applications.abort_flag());
            inner.ledger = Some(Arc::clone(&ledger));
            inner.bell = Some(guard.renewed());
        }
        if order.want == Want::Application {
            applications.prepare(deadline);
        }
        let names =
            held.iter().map(|held| &plan.superblocks[held.planned]).map(|s| (s.device, s.name())).collect();
        let except: BTreeSet<u32> =
            applications.pids().into_iter().chain([std::process::id(), guard.pid()]).collect();
        let (unknown, all) =
            writers(Path::new("/proc"), &mounts, &names, &except, Instant::now() + WRITERS_MAX);
        evidence.report.unknown_writers = unknown;
        if !all {
            evidence.reason(Reason::new("writers_incomplete", "/proc", "not every process was looked at"));
        }
        let shared = Arc::clone(shared);
        let mut run = Run { shared, order, record, applications, evidence, held, ledger, crew, guard };
        run.flush(deadline.max(Instant::now() + ROUND_FAST));
        run.evidence.report.prepare_ms = ms(begun.elapsed());
        match run.shared.enter(State::Quiescing) {
            Ok(()) => Ok(Self { run }),
            Err(why) => Err(run.stopped(aborted(why), why)),
        }
    }

    /// Takes locks and records positions.
    pub(super) fn quiesce(self) -> Result<Quiesced, Box<Stopped>> {
        let mut run = self.run;
        let begun = Instant::now();
        let per_application = run.order.quiesce;
        let wanted = run.order.want == Want::Application;
        if wanted {
            run.applications.quiesce(per_application, begun + per_application);
        }
        run.evidence.report.quiesce_ms = ms(begun.elapsed());
        if let Err(why) = run.shared.enter(State::Freezing) {
            return Err(run.stopped(aborted(why), why));
        }
        match run.applications.required_failure().filter(|_| wanted) {
            None => Ok(Quiesced { run }),
            Some(reason) => {
                let message = format!("{}: {} ({})", reason.subject, reason.message, reason.code);
                Err(run.stopped(Refusal { code: "required_application", message }, Phase::Failed))
            }
        }
    }
}

/// The state folder must stay writable while frozen, and must not be what is frozen.
pub(super) fn state_stays_writable(statedir: &Path, plan: &Plan) -> Result<(), Refusal> {
    let folder: PathBuf = statedir.to_owned();
    match superblock_of(&folder) {
        Ok(Some(device)) if plan.superblocks.iter().any(|superblock| superblock.device == device) => {
            Err(Refusal {
                code: "statedir_would_freeze",
                message: format!(
                    "{} lies on a file system that would be frozen; use a folder on tmpfs",
                    folder.display()
                ),
            })
        }
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Refusal { code: "statedir_unusable", message: format!("{}: {error}", folder.display()) })
        }
    }
}

/// Applications hold still.
#[must_use = "dropping it resumes the applications"]
pub(super) struct Quiesced {
    run: Run,
}

impl Quiesced {
    /// Flushes once more and freezes, what lies on others first.
    pub(super) fn freeze(self) -> Result<Frozen, Box<Stopped>> {
        let mut run = self.run;
        // qemu-ga's own freeze knows no budget, and a host that uses it cannot raise one.
        let allowed = if run.order.plain { u64::MAX } else { run.applications.budget_ms() };
        let budget = run.order.budget.min(Duration::from_millis(allowed));
        let last = run.flush(Instant::now() + LAST_FLUSH_MAX);
        match run.predicted(&last) {
            Some(predicted) if predicted <= budget => {}
            predicted => {
                let found =
                    predicted.map_or("cannot be told".to_owned(), |time| format!("is {} ms", ms(time)));
                let message = format!(
                    "by the last flush, the time that the freeze would take {found}; {} ms are allowed",
                    ms(budget)
                );
                return Err(run.stopped(Refusal { code: "freeze_would_stall", message }, Phase::Failed));
            }
        }
        let before = run.held.iter().enumerate().map(|(at, _)| counters(run.ledger.device(at))).collect();
        if let Err(error) = run.record.records().mark() {
            return Err(
                run.stopped(Refusal { code: "statedir_unusable", message: error.to_string() }, Phase::Failed)
            );
        }
        // From here to the last FITHAW: no log, no file, no process, no application.
        logging::hold();
        run.shared.set_frozen(true);
        let mut frozen = Frozen { run: Some(run), before };
        match frozen.freeze_all(budget) {
            Ok(()) => Ok(frozen),
            Err((refusal, why)) => {
                frozen.release(why);
                Err(frozen.finish(Some(refusal)))
            }
        }
    }
}

/// File systems are frozen by us. Leaving the scope thaws them, on return and on panic.
#[must_use = "the guest stays frozen until this is thawed"]
pub(super) struct Frozen {
    /// Gone once released and reported.
    run: Option<Run>,
    before: Vec<Option<Counters>>,
}

impl Frozen {
    fn run(&mut self) -> &mut Run {
        self.run.as_mut().unwrap_or_else(|| unreachable!("the run is taken only by `finish`, which consumes"))
    }

    fn freeze_all(&mut self, budget: Duration) -> Result<(), (Refusal, Phase)> {
        let run = self.run();
        let lease_ns = run.order.lease_ms.saturating_mul(1_000_000);
        run.ledger.renew(boottime_ns().saturating_add(lease_ns));
        run.guard.arm().map_err(|error| {
            (Refusal { code: "guard_failed", message: error.to_string() }, Phase::GuardGone)
        })?;
        let deadline = Instant::now() + budget;
        let steps: BTreeSet<usize> = run.held.iter().map(|held| held.step).collect();
        for step in steps {
            let which: Vec<usize> = (0..run.held.len()).filter(|at| run.held[*at].step == step).collect();
            let done = run.crew.freeze(&which, deadline, || run.ledger.phase() != Phase::Armed);
            match run.ledger.phase() {
                Phase::Armed if done => {}
                Phase::Armed => {
                    let message = format!("freezing took longer than the {} ms that are allowed", ms(budget));
                    return Err((Refusal { code: "freeze_over_budget", message }, Phase::Failed));
                }
                why => return Err((aborted(why), why)),
            }
        }
        run.evidence.report.frozen_at_ms = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(ms);
        let failed = (0..run.held.len()).find(|at| run.ledger.frozen(*at) == Freeze::Failed);
        if let Some(at) = failed
            && run.order.plain
        {
            let error = std::io::Error::from_raw_os_error(run.ledger.errno(at));
            let name = run.evidence.report.filesystems[run.held[at].planned].mountpoint.clone();
            return Err((
                Refusal { code: "freeze_failed", message: format!("failed to freeze {name}: {error}") },
                Phase::Failed,
            ));
        }
        run.shared.enter(State::Frozen).map_err(|why| (aborted(why), why))
    }

    /// How many superblocks we froze.
    pub(super) fn count(&mut self) -> u64 {
        self.run().ledger.frozen_count()
    }

    /// First FIFREEZE called to last returned.
    pub(super) fn freeze_ms(&mut self) -> u64 {
        let run = self.run();
        run.evidence.times(&run.ledger);
        run.evidence.report.freeze_ms
    }

    /// Waits until the freeze is to end, and answers why. Opens, starts, logs and allocates nothing.
    pub(super) fn wait(&mut self) -> Phase {
        let run = self.run();
        loop {
            if run.shared.is_stopped()
                && let Some(why) = run.shared.lock().stop
            {
                return run.ledger.end(why);
            }
            match run.guard.heard() {
                Heard::Dead => return run.ledger.end(Phase::GuardGone),
                Heard::LeaseEnded => return run.ledger.phase(),
                Heard::Nothing => {}
            }
            // The guard thaws at the deadline; the agent too, a little later, in case the guard hangs.
            let late =
                run.ledger.deadline_ns().saturating_add(u64::try_from(GUARD_LATE.as_nanos()).unwrap_or(0));
            let left = late.saturating_sub(boottime_ns());
            if left == 0 {
                return run.ledger.end(Phase::LeaseEnded);
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left / 1_000_000_000).unwrap_or(i64::MAX),
                tv_nsec: i64::try_from(left % 1_000_000_000).unwrap_or(0) as _,
            };
            let (line, wake) = (run.guard.line(), run.shared.wake());
            let mut watched = [PollFd::new(&line, PollFlags::IN), PollFd::new(&wake, PollFlags::IN)];
            // Interrupted or not: everything is looked at again.
            let _polled = poll(&mut watched, Some(&timeout)).is_ok();
        }
    }

    /// Thaws everything, resumes the applications, and reports.
    pub(super) fn thaw(mut self, why: Phase) -> Box<Stopped> {
        self.release(why);
        self.finish(None)
    }

    /// Thaws everything that we froze; returns when it is thawed. A FIFREEZE that is still in the kernel is waited for.
    fn release(&mut self, why: Phase) {
        let Some(run) = &mut self.run else { return };
        let cause = run.ledger.end(why);
        // Entering `Thawing` cannot fail: see `Shared::enter`.
        let _entered = run.shared.enter(State::Thawing).is_ok();
        run.crew.thaw();
        let mut patience = Instant::now() + GUARD_LATE;
        let mut guard_dead = cause == Phase::GuardGone;
        // The guard may have thawed what our own thread has not yet come back from freezing: its word is waited for.
        let settled = |at| run.ledger.settled(at) && run.ledger.frozen(at) != Freeze::Called;
        while !(0..run.held.len()).all(settled) {
            guard_dead |= run.guard.heard() == Heard::Dead;
            if guard_dead || Instant::now() >= patience {
                // What the guard took upon itself and has not done is done here too. A FITHAW that only waits for a
                // FIFREEZE in the kernel loses nothing by it.
                run.crew.thaw_for_guard();
                patience = Instant::now() + GUARD_LATE;
            }
            thread::sleep(SETTLE_LOOK);
        }
        run.shared.set_frozen(false);
        run.record.records().unmark();
        logging::release();
    }

    fn finish(mut self, refusal: Option<Refusal>) -> Box<Stopped> {
        let Some(mut run) = self.run.take() else { unreachable!("finished once") };
        let cause = run.ledger.phase();
        run.applications.resume(Instant::now() + RESUME_MAX);
        run.guard.end();
        run.evidence.applications(&run.applications);
        run.evidence.times(&run.ledger);
        let unfrozen = (0..run.held.len()).any(|at| run.ledger.frozen(at) == Freeze::Unsupported);
        // Nobody asks for the proof of a run that failed.
        let flushed = if unfrozen && refusal.is_none() {
            run.crew.flush(Instant::now() + PROOF_MAX, || false)
        } else {
            Vec::new()
        };
        for (at, held) in run.held.iter().enumerate() {
            let unwritten = flushed.get(at).is_some_and(Option::is_some)
                && self.before[at].is_some()
                && self.before[at] == counters(run.ledger.device(at));
            run.evidence.filesystem(held.planned, &run.ledger, at, unwritten);
        }
        run.evidence.report.thawed_by = match cause {
            _ if run.ledger.frozen_count() == 0 => ThawCause::NothingFrozen,
            _ if refusal.is_some() && matches!(cause, Phase::Failed | Phase::Host | Phase::GuardGone) => {
                ThawCause::FailedFreeze
            }
            Phase::Armed | Phase::Host => ThawCause::Host,
            Phase::LeaseEnded => ThawCause::LeaseEnded,
            Phase::AgentGone => ThawCause::AgentGone,
            Phase::Failed | Phase::GuardGone => ThawCause::FailedFreeze,
        };
        if cause == Phase::GuardGone {
            run.evidence.reason(Reason::new(
                "guard_died",
                "",
                "the guard process ended or hung; the agent thawed at once",
            ));
        }
        if cause == Phase::LeaseEnded {
            run.evidence.reason(Reason::new(
                "lease_ended",
                "",
                "the lease ended before the host asked for the thaw",
            ));
        }
        // Those two have said so above.
        if let Some(refusal) =
            refusal.as_ref().filter(|_| !matches!(cause, Phase::GuardGone | Phase::LeaseEnded))
        {
            run.evidence.reason(Reason::new(refusal.code, "", refusal.message.clone()));
        }
        let refusal = refusal.unwrap_or_else(|| aborted(cause));
        Box::new(Stopped { refusal, report: run.evidence.report, cause })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Early return or panic: nobody is left to tell.
        self.release(Phase::Failed);
    }
}

/// How many superblocks a thaw of ours found frozen.
pub(super) fn thawed_count(report: &GuestReport) -> i64 {
    let held = report.filesystems.iter().filter(|fs| fs.state == FilesystemState::Held).count();
    i64::try_from(held).unwrap_or(i64::MAX)
}

fn aborted(why: Phase) -> Refusal {
    let (code, message) = match why {
        Phase::Armed | Phase::Host => ("aborted", "the host asked for a thaw before the freeze was done"),
        Phase::LeaseEnded => ("lease_ended", "the lease ended"),
        Phase::AgentGone => ("agent_stopping", "the agent was told to stop"),
        Phase::Failed => ("freeze_failed", "the freeze failed"),
        Phase::GuardGone => ("guard_died", "the guard process ended"),
    };
    Refusal { code, message: message.to_owned() }
}
