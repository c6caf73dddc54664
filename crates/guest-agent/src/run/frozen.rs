//! The guest is frozen: a value whose end is the thaw.

use super::Refusal;
use super::evidence::{ms, thaw_cause};
use super::walk::{Run, Stopped, aborted, expect_within};
use crate::errno;
use crate::freeze::counters::{Counters, counters};
use crate::freeze::grace::{self, ShortGrace};
use crate::freeze::guard::Heard;
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::{Freeze, Phase};
use crate::logging;
use guest_protocol::stillpoint::{FilesystemState, GuestReport, Reason, State};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeSet;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longest time for the flush after the thaw that shows whether an unfreezable file system was written to.
const PROOF_MAX: Duration = Duration::from_secs(10);
/// How long after the lease's end the guard may take to begin; then the agent thaws by itself.
const GUARD_LATE: Duration = Duration::from_millis(300);
/// How often the end of a thaw is looked for. The answers come from another process too, through memory.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

/// File systems are frozen by us. Leaving the scope thaws them, on return and on panic.
#[must_use = "the guest stays frozen until this is thawed"]
pub(super) struct Frozen {
    /// Gone once released and reported.
    run: Option<Run>,
    /// What each superblock's disk had written when all was flushed. Empty until then, and so only where a refusal follows.
    before: Vec<Option<Counters>>,
}

impl Frozen {
    /// Freezes everything, or undoes it.
    pub(super) fn begin(run: Run, budget: Duration) -> Result<Self, Box<Stopped>> {
        if let Err(error) = run.record.records().mark() {
            return Err(
                run.stopped(Refusal { code: "statedir_unusable", message: error.to_string() }, Phase::Failed)
            );
        }
        // From here to the last FITHAW: no log, no file, no process, no application.
        logging::hold();
        run.shared.set_frozen(true);
        let mut frozen = Frozen { run: Some(run), before: Vec::new() };
        match frozen.freeze_all(budget) {
            Ok(()) => Ok(frozen),
            Err((refusal, why)) => {
                frozen.release(why);
                Err(frozen.finish(Some(refusal)))
            }
        }
    }

    fn run(&mut self) -> &mut Run {
        self.run.as_mut().unwrap_or_else(|| unreachable!("the run is taken only by `finish`, which consumes"))
    }

    fn freeze_all(&mut self, budget: Duration) -> Result<(), (Refusal, Phase)> {
        let Self { run: Some(run), before } = self else {
            unreachable!("taken only by `finish`, which consumes")
        };
        let lease_ns = run.order.lease_ms.saturating_mul(1_000_000);
        run.ledger.renew(boottime_ns().saturating_add(lease_ns));
        // From here to the thaw the lease says when the agent is due.
        run.ledger.expect_agent(0);
        run.guard.arm().map_err(|error| {
            (Refusal { code: "guard_failed", message: error.to_string() }, Phase::GuardGone)
        })?;
        let deadline = Instant::now() + budget;
        let over_budget = || {
            let message = format!("freezing took longer than the {} ms that are allowed", ms(budget));
            Refusal { code: "freeze_over_budget", message }
        };
        // Last of all, so that little comes in before FIFREEZE.
        let flushed = run.flush_remainder(deadline);
        match run.ledger.phase() {
            Phase::Armed if flushed => {}
            Phase::Armed => return Err((over_budget(), Phase::Failed)),
            why => return Err((aborted(why), why)),
        }
        *before = (0..run.held.len()).map(|at| counters(run.ledger.device(at))).collect();
        // Until all are frozen: a thaw waits for no grace period.
        let _short = ShortGrace::begin(Path::new(grace::SWITCH), &run.ledger);
        let steps: BTreeSet<usize> = run.held.iter().map(|held| held.step).collect();
        for step in steps {
            let which: Vec<usize> = (0..run.held.len()).filter(|at| run.held[*at].step == step).collect();
            let done = run.crew.freeze(&which, deadline, || run.ledger.phase() != Phase::Armed);
            match run.ledger.phase() {
                Phase::Armed if done => {}
                Phase::Armed => return Err((over_budget(), Phase::Failed)),
                why => return Err((aborted(why), why)),
            }
        }
        run.evidence.report.frozen_at_ms = SystemTime::now().duration_since(UNIX_EPOCH).ok().map(ms);
        let failed = (0..run.held.len()).find(|at| run.ledger.frozen(*at) == Freeze::Failed);
        if let Some(at) = failed
            && run.order.plain
        {
            let error = std::io::Error::from_raw_os_error(run.ledger.errno(at));
            let name = &run.evidence.report.filesystems[run.held[at].planned].mountpoint;
            let message = format!("failed to freeze {name}: {}", errno::words(&error));
            return Err((Refusal { code: "freeze_failed", message }, Phase::Failed));
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
                && let Some(why) = run.shared.asked_to_stop()
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
            // Waiting for the kernel, and well.
            expect_within(&run.ledger, Duration::ZERO);
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
        run.resume();
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
        run.evidence.report.thawed_by = thaw_cause(run.ledger.frozen_count(), refusal.is_some(), cause);
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
