//! The way of a run, as types: `Prepared::quiesce` → `Quiesced::freeze` → `Frozen::thaw`. The wrong order does not
//! compile, and a run that stops anywhere leaves nothing frozen and nothing locked.

use super::evidence::{Evidence, ms};
use super::frozen::Frozen;
use super::record::{Record, Recorded, Records, Written};
use super::shared::Shared;
use super::survey::{Surveyed, state_stays_writable, survey};
use super::{Refusal, Settings};
use crate::freeze::crew::Crew;
use crate::freeze::developer::is_developers_machine;
use crate::freeze::facts::View;
use crate::freeze::guard::{Guard, START_MAX};
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::{Ledger, Phase};
use crate::freeze::plan::Plan;
use crate::freeze::selection::Selection;
use crate::freeze::writers::writers;
use crate::hooks::{self, Hooks};
use crate::quiesce::Applications;
use guest_protocol::stillpoint::{ApplicationPolicy, GuestReport, Reason, State, Want};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Before the freeze a flush round as quick as this needs no other after it.
const ROUND_FAST: Duration = Duration::from_millis(50);
/// Most flush rounds: a guest that dirties faster than it writes never converges.
const ROUNDS_MAX: usize = 8;
/// Before the quiesce a round as quick as this will do: what comes in while applications quiesce has to be flushed afterwards
/// in any case, well within `LAST_FLUSH_MAX`, and each round is a time in which others wait for the disk.
const FIRST_ROUND_FAST: Duration = Duration::from_secs(1);
/// Longest time for the flush rounds between the quiesce and the freeze, while locks may be held.
const LAST_FLUSH_MAX: Duration = Duration::from_secs(5);
/// Longest time for looking at other processes.
const WRITERS_MAX: Duration = Duration::from_secs(2);
/// How much later than its own limits allow a step of a run may end. One that is later hangs, and the guard ends the
/// agent: a guest that is short of everything is late by a second or two.
const STEP_LATE_MAX: Duration = Duration::from_secs(5);
/// Longest time for checking and resuming the applications.
const RESUME_MAX: Duration = Duration::from_secs(10);

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
    /// What the administrator leaves to be frozen.
    pub(super) selection: Selection,
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
pub(super) struct Held {
    /// Where it is in the plan.
    pub(super) planned: usize,
    pub(super) step: usize,
}

/// Everything that a run holds. Dropping it ends the guard and the applications' workers.
pub(super) struct Run {
    pub(super) shared: Arc<Shared>,
    pub(super) order: Order,
    /// Dropped before the record, which says what is owed to them.
    pub(super) hooks: Hooks,
    /// Removed with the rest, after `Frozen` has thawed.
    pub(super) record: Written,
    pub(super) applications: Applications,
    pub(super) evidence: Evidence,
    pub(super) held: Vec<Held>,
    first_flush: Option<Instant>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) crew: Crew,
    pub(super) guard: Guard,
}

impl Run {
    /// Undoes a run that has frozen nothing (yet, or any more).
    pub(super) fn stopped(mut self, refusal: Refusal, cause: Phase) -> Box<Stopped> {
        self.resume();
        self.evidence.reason(Reason::new(refusal.code, "", refusal.message.clone()));
        Box::new(Stopped { refusal, report: self.evidence.report, cause })
    }

    /// Lets go of everything that was quiesced, the last first, and notes how that went. Nothing is frozen any more.
    pub(super) fn resume(&mut self) {
        // Another wait for a hook must not look like a hang.
        expect_within(&self.ledger, RESUME_MAX + self.hooks.thaw_max());
        self.applications.resume(Instant::now() + RESUME_MAX);
        self.hooks.thaw();
        self.guard.end();
        self.evidence.applications(&self.applications);
        self.evidence.hooks(&self.hooks);
    }

    /// Calls the hooks; what they quiesced counts for the policies.
    fn call_hooks(&mut self, until: Instant) -> Result<(), (Refusal, Phase)> {
        let shared = Arc::clone(&self.shared);
        let is_stopped = || shared.is_stopped();
        let stop = hooks::Stop { wake: shared.wake(), is_stopped: &is_stopped };
        self.hooks.freeze(until, stop).map_err(|failure| match shared.lock().stop {
            Some(why) => (aborted(why), why),
            None => (failure.into(), Phase::Failed),
        })?;
        for claim in self.hooks.claims_mut() {
            claim.policy = self.applications.attest(&claim.kind, &claim.instance.to_string_lossy());
        }
        Ok(())
    }

    /// Flushes in rounds until one is fast, they have settled, or another one would not end in time; answers how long each
    /// superblock took in the last round.
    fn flush(&mut self, fast: Duration, deadline: Instant) -> Vec<Option<Duration>> {
        let mut last = vec![Some(Duration::ZERO); self.held.len()];
        let mut rounds = Rounds { fast, quickest: None };
        for _ in 0..ROUNDS_MAX {
            let begun = Instant::now();
            self.first_flush.get_or_insert(begun);
            let shared = &self.shared;
            last = self.crew.flush(deadline, || shared.is_stopped());
            let took = begun.elapsed();
            self.evidence.report.flush_rounds_ms.push(ms(took));
            if rounds.settled(took) || Instant::now() + took >= deadline || self.shared.is_stopped() {
                break;
            }
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

/// Says when flush rounds have written out as much as they ever will.
#[derive(Debug)]
struct Rounds {
    /// A round as quick as this needs no other after it.
    fast: Duration,
    quickest: Option<Duration>,
}

impl Rounds {
    /// Whether a freeze after this round would be about as short as one after any later round.
    ///
    /// A round that took much longer than the quickest one had a burst of writes to write out, and as much came meanwhile: the
    /// next round is worth its time, a freeze now would be a long one.
    fn settled(&mut self, took: Duration) -> bool {
        let quickest = self.quickest.replace(self.quickest.map_or(took, |quickest| quickest.min(took)));
        let alike = |quickest: Duration| took >= quickest * 4 / 5 && took <= quickest * 5 / 4;
        took <= self.fast || quickest.is_some_and(alike)
    }
}

/// Everything slow and harmless is done; the guard is armed.
#[must_use]
pub(super) struct Prepared {
    run: Run,
}

impl Prepared {
    /// Finds applications and file systems, lets applications write out, starts the guard, flushes in rounds.
    pub(super) fn prepare(
        shared: &Arc<Shared>,
        order: Order,
        settings: &Settings,
    ) -> Result<Self, Box<Stopped>> {
        let statedir = settings.statedir.as_path();
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
        let surveyed = survey(order.only.as_deref(), &order.selection)
            .map_err(|refusal| early(refusal, Phase::Failed))?;
        let mut evidence = surveyed.evidence(&order.id, order.lease_ms);
        let failed = |mut evidence: Evidence, refusal: Refusal| {
            evidence.reason(Reason::new(refusal.code, "", refusal.message.clone()));
            Box::new(Stopped { refusal, report: evidence.report, cause: Phase::Failed })
        };
        if let Err(refusal) = state_stays_writable(statedir, &surveyed) {
            return Err(failed(evidence, refusal));
        }
        let Surveyed { plan, mounts, reached } = surveyed;
        // Where applications are to be left alone, so are those that hooks speak to.
        let hook = settings.hooks.as_ref().filter(|_| order.want == Want::Application);
        let hooks = match hook.map_or(Ok(Vec::new()), |hook| hooks::find(&hook.path)) {
            Ok(hooks) => hooks,
            Err(failure) => return Err(failed(evidence, failure.into())),
        };
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
            hooks: hooks.clone(),
        };
        let (ledger, record) = match Records::new(statedir).create(&record) {
            Ok((ledger, written)) => (Arc::new(ledger), written),
            Err(error) => {
                let message = format!("the undo record cannot be written to {}: {error}", statedir.display());
                return Err(failed(evidence, Refusal { code: "statedir_unusable", message }));
            }
        };
        expect_within(&ledger, START_MAX + order.prepare + WRITERS_MAX);
        let hooks = Hooks::new(hooks, hook, &order.id, &ledger, shared.leftovers());
        let machinery = || -> std::io::Result<(Crew, Guard)> {
            Ok((Crew::start(&folders, &ledger)?, Guard::start(&ledger, &folders)?))
        };
        let (crew, guard) = match machinery() {
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
        let mut run = Run {
            shared,
            order,
            hooks,
            record,
            applications,
            evidence,
            held,
            first_flush: None,
            ledger,
            crew,
            guard,
        };
        run.flush(FIRST_ROUND_FAST, deadline.max(Instant::now() + ROUND_FAST));
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
        // A host of ours waits no longer than it said; one that knows no phases has its hooks' own limits.
        let for_hooks = if run.order.plain { run.hooks.freeze_max() } else { per_application };
        // The guard ends an agent that hangs with locks taken.
        expect_within(&run.ledger, for_hooks + per_application + LAST_FLUSH_MAX);
        if let Err(error) = run.guard.arm() {
            let refusal = Refusal { code: "guard_failed", message: error.to_string() };
            return Err(run.stopped(refusal, Phase::GuardGone));
        }
        if wanted {
            // First: who knows how long they take, and what the modules hold stalls writers meanwhile.
            if let Err((refusal, why)) = run.call_hooks(begun + for_hooks) {
                run.evidence.report.quiesce_ms = ms(begun.elapsed());
                return Err(run.stopped(refusal, why));
            }
            run.applications.quiesce(per_application, Instant::now() + per_application);
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
        let last = run.flush(ROUND_FAST, Instant::now() + LAST_FLUSH_MAX);
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
        run.evidence.report.flushing_ms = run.first_flush.map(|begun| ms(begun.elapsed()));
        Frozen::begin(run, budget)
    }
}

impl From<hooks::Failure> for Refusal {
    fn from(failure: hooks::Failure) -> Self {
        Refusal { code: failure.code, message: failure.message }
    }
}

/// Says to the guard by when this agent will have come to its next step.
pub(super) fn expect_within(ledger: &Ledger, step: Duration) {
    let ns = u64::try_from((step + STEP_LATE_MAX).as_nanos()).unwrap_or(u64::MAX);
    ledger.expect_agent(boottime_ns().saturating_add(ns));
}

/// Why a run ended before it was frozen, or before the host asked.
pub(super) fn aborted(why: Phase) -> Refusal {
    let (code, message) = match why {
        Phase::Armed | Phase::Host => ("aborted", "the host asked for a thaw before the freeze was done"),
        Phase::LeaseEnded => ("lease_ended", "the lease ended"),
        Phase::AgentGone => ("agent_stopping", "the agent was told to stop"),
        Phase::Failed => ("freeze_failed", "the freeze failed"),
        Phase::GuardGone => ("guard_died", "the guard process ended"),
    };
    Refusal { code, message: message.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of these rounds, in milliseconds, are flushed.
    fn flushed(rounds_ms: &[u64]) -> usize {
        let mut rounds = Rounds { fast: ROUND_FAST, quickest: None };
        let settled = rounds_ms.iter().position(|ms| rounds.settled(Duration::from_millis(*ms)));
        settled.map_or(rounds_ms.len() + 1, |at| at + 1)
    }

    #[test]
    fn flush_rounds_end_with_a_fast_one() {
        assert_eq!(flushed(&[40, 30]), 1);
        assert_eq!(flushed(&[900, 300, 50, 40]), 3);
    }

    #[test]
    fn flush_rounds_end_when_none_gets_faster() {
        assert_eq!(flushed(&[300, 290, 280]), 2);
        assert_eq!(flushed(&[1193, 671, 310, 300]), 4);
    }

    #[test]
    fn a_freeze_does_not_begin_after_a_flush_round_that_met_a_burst_of_writes() {
        assert_eq!(flushed(&[1193, 671, 310, 98, 475, 90]), 6);
    }
}
