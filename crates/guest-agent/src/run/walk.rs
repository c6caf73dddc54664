//! The way of a run, as types: `Prepared::quiesce` → `Quiesced::freeze` → `Frozen::thaw`. The wrong order does not
//! compile, and a run that stops anywhere leaves nothing frozen and nothing locked.

use super::evidence::{Evidence, ms};
use super::frozen::Frozen;
use super::record::{Record, Recorded, Records, Written};
use super::shared::Shared;
use super::survey::{Surveyed, state_stays_writable, survey};
use super::{Refusal, Settings, busy};
use crate::freeze::crew::Crew;
use crate::freeze::developer::is_developers_machine;
use crate::freeze::facts::View;
use crate::freeze::guard::{Guard, START_MAX};
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::{Ledger, Phase};
use crate::freeze::plan::Plan;
use crate::freeze::queue::{self, ShortQueues};
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
/// Before a quiesce that stalls writers a round as quick as this will do: what comes in while applications quiesce has to be
/// flushed afterwards in any case, well within `LAST_FLUSH_MAX`, and each round is a time in which others wait for the disk.
const FIRST_ROUND_FAST: Duration = Duration::from_secs(1);
/// After so many rounds in a row that took about as long as the quickest, they have settled: where writers are stalled meanwhile,
/// and where nobody is. There another round costs little, and each page that it writes out is one that no frozen writer waits for.
const ALIKE_STALLING: u32 = 1;
const ALIKE: u32 = 3;
/// The same right before FIFREEZE, whose own time begins with what came in during the last round.
const REMAINDER_FAST: Duration = Duration::from_millis(15);
/// Longest time for the flush rounds between the quiesce and the freeze, where locks may be held.
const LAST_FLUSH_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the end of a rehearsal that is called off.
const CHECK_END_MAX: Duration = Duration::from_secs(10);
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
    /// Where the quiesce stalls nobody, all flushes come after it, and have until then.
    flush_until: Option<Instant>,
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

    /// Says to the guard by when this agent will have come to its next step, and waits until it has heard.
    fn expected_within(mut self, step: Duration) -> Result<Self, Box<Stopped>> {
        expect_within(&self.ledger, step);
        match self.guard.arm() {
            Ok(()) => Ok(self),
            Err(error) => {
                let refusal = Refusal { code: "guard_failed", message: error.to_string() };
                Err(self.stopped(refusal, Phase::GuardGone))
            }
        }
    }

    /// Calls the hooks; what they quiesced counts for the policies.
    fn call_hooks(&mut self, until: Instant) -> Result<(), (Refusal, Phase)> {
        let shared = Arc::clone(&self.shared);
        let is_stopped = || shared.is_stopped();
        let stop = hooks::Stop { wake: shared.wake(), is_stopped: &is_stopped };
        self.hooks.freeze(until, stop).map_err(|failure| match shared.asked_to_stop() {
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
        let mut rounds = Rounds::until(fast, self.alike_max());
        let _short = ShortQueues::begin(&self.ledger);
        for _ in 0..ROUNDS_MAX {
            let begun = Instant::now();
            self.first_flush.get_or_insert(begun);
            let shared = &self.shared;
            last = self.crew.flush(deadline, || shared.is_stopped());
            let took = begun.elapsed();
            self.evidence.report.flush_rounds_ms.push(ms(took));
            let left = deadline.saturating_duration_since(Instant::now());
            if rounds.settled(took) || !another_fits(took, left) || self.shared.is_stopped() {
                break;
            }
        }
        last
    }

    /// Writes out what came in while the guard was armed: FIFREEZE would, with all writers shut out. A long round leaves as much as
    /// came in meanwhile, so others follow. Not where the last round before was slow: that guest's rounds never get short.
    /// False if it is not done at the deadline, or not wanted any more.
    pub(super) fn flush_remainder(&mut self, deadline: Instant) -> bool {
        let alike_max = self.alike_max();
        let report = &mut self.evidence.report;
        let mut is_out = true;
        if report.flush_rounds_ms.last().is_some_and(|last| *last <= ms(ROUND_FAST)) {
            let ledger = &self.ledger;
            let mut rounds = Rounds::until(REMAINDER_FAST, alike_max);
            // The other half is FIFREEZE's own.
            let half = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
            for _ in 0..ROUNDS_MAX {
                let begun = Instant::now();
                let flushed = self.crew.flush(deadline, || ledger.phase() != Phase::Armed);
                let took = begun.elapsed();
                report.flush_rounds_ms.push(ms(took));
                is_out = flushed.iter().all(Option::is_some);
                let left = half.saturating_duration_since(Instant::now());
                if !is_out || rounds.settled(took) || !another_fits(took, left) {
                    break;
                }
            }
        }
        report.flushing_ms = self.first_flush.map(|first| ms(first.elapsed()));
        is_out
    }

    fn alike_max(&self) -> u32 {
        if self.flush_until.is_some() { ALIKE } else { ALIKE_STALLING }
    }

    /// Longest time from now for the flush rounds before the freeze.
    fn last_flush_max(&self) -> Duration {
        let left = self.flush_until.map(|until| until.saturating_duration_since(Instant::now()));
        left.unwrap_or_default().max(LAST_FLUSH_MAX)
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

/// Whether there is time for another round as long as the last one, and half as long again: one that met a burst of writes and is
/// not over at the deadline would leave nothing to tell how long the freeze takes, and so there would be none.
fn another_fits(took: Duration, left: Duration) -> bool {
    took * 3 / 2 < left
}

/// Says when flush rounds have written out as much as they ever will.
#[derive(Debug)]
struct Rounds {
    /// A round as quick as this needs no other after it.
    fast: Duration,
    alike_max: u32,
    quickest: Option<Duration>,
    /// So many in a row took about as long as the quickest.
    alike: u32,
}

impl Rounds {
    fn until(fast: Duration, alike_max: u32) -> Self {
        Self { fast, alike_max, quickest: None, alike: 0 }
    }

    /// Whether a freeze after this round would be about as short as one after any later round.
    ///
    /// A round that took much longer than the quickest one had a burst of writes to write out, and as much came meanwhile: the
    /// next round is worth its time, a freeze now would be a long one.
    fn settled(&mut self, took: Duration) -> bool {
        let quickest = self.quickest.replace(self.quickest.map_or(took, |quickest| quickest.min(took)));
        let alike = |quickest: Duration| took >= quickest * 4 / 5 && took <= quickest * 5 / 4;
        self.alike = if quickest.is_some_and(alike) { self.alike + 1 } else { 0 };
        took <= self.fast || self.alike >= self.alike_max
    }
}

/// Everything slow and harmless is done; the guard is armed.
#[must_use]
pub(super) struct Prepared {
    run: Run,
}

impl Prepared {
    /// Finds applications and file systems, lets applications write out, starts the guard, and flushes in rounds what must not
    /// be flushed while writers are stalled.
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
        if !shared.call_off_check(CHECK_END_MAX) {
            return Err(early(busy("a rehearsal is under way, and does not end"), Phase::Failed));
        }
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
        let Surveyed { plan, mounts, reached, .. } = surveyed;
        // Where applications are to be left alone, so are those that hooks speak to.
        let hook = settings.hooks.as_ref().filter(|_| order.want == Want::Application);
        let paths = match hook.map_or(Ok(Vec::new()), |hook| hooks::find(&hook.path)) {
            Ok(paths) => paths,
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
        let carriers = held.iter().flat_map(|held| &plan.superblocks[held.planned].disks);
        let disks: Vec<&str> = carriers.map(|disk| disk.name.as_str()).collect();
        let record = Record {
            id: order.id.clone(),
            plain: order.plain,
            boot_id: evidence.report.boot_id.clone(),
            lease_ms: order.lease_ms,
            filesystems: recorded,
            hooks: paths.clone(),
        };
        let (ledger, record) = match Records::new(statedir).create(&record, &queue::long(disks)) {
            Ok((ledger, written)) => (Arc::new(ledger), written),
            Err(error) => {
                let message = format!("the undo record cannot be written to {}: {error}", statedir.display());
                return Err(failed(evidence, Refusal { code: "statedir_unusable", message }));
            }
        };
        expect_within(&ledger, START_MAX + order.prepare + WRITERS_MAX);
        // Nobody knows what a hook holds.
        let mut is_stalling = !paths.is_empty();
        let hooks = Hooks::new(paths, hook, &order.id, &ledger, shared.leftovers());
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
            applications.abort_by(Arc::clone(&inner.abort));
            inner.ledger = Some(Arc::clone(&ledger));
            inner.bell = Some(guard.renewed());
        }
        if order.want == Want::Application {
            applications.prepare(deadline);
            is_stalling |= applications.stall_writers();
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
        let flush_until = (!is_stalling).then_some(deadline);
        let mut run = Run {
            shared,
            order,
            hooks,
            record,
            applications,
            evidence,
            held,
            flush_until,
            first_flush: None,
            ledger,
            crew,
            guard,
        };
        if is_stalling {
            run.flush(FIRST_ROUND_FAST, deadline.max(Instant::now() + ROUND_FAST));
        }
        run.evidence.report.prepare_ms = ms(begun.elapsed());
        match run.shared.enter(State::Quiescing) {
            Ok(()) => Ok(Self { run }),
            Err(why) => Err(run.stopped(aborted(why), why)),
        }
    }

    /// Takes locks and records positions.
    pub(super) fn quiesce(self) -> Result<Quiesced, Box<Stopped>> {
        let run = self.run;
        let begun = Instant::now();
        let per_application = run.order.quiesce;
        let wanted = run.order.want == Want::Application;
        // A host of ours waits no longer than it said; one that knows no phases has its hooks' own limits.
        let for_hooks = if run.order.plain { run.hooks.freeze_max() } else { per_application };
        // The guard ends an agent that hangs with locks taken.
        let mut run = run.expected_within(for_hooks + per_application)?;
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
        let longest = self.run.last_flush_max();
        // qemu-ga's own freeze knows no budget, and a host that uses it cannot raise one.
        let allowed = if self.run.order.plain { u64::MAX } else { self.run.applications.budget_ms() };
        let budget = self.run.order.budget.min(Duration::from_millis(allowed));
        let patience = if self.run.order.plain { budget } else { Duration::ZERO };
        // A limit of its own: where nothing is locked, flushing may take much longer than the quiesce.
        let mut run = self.run.expected_within(longest + patience)?;
        let mut last = run.flush(ROUND_FAST, Instant::now() + longest);
        if run.predicted(&last).is_none() && !patience.is_zero() {
            // qemu-ga takes as long as it takes, and hosts rely on that. Nothing is frozen yet meanwhile.
            let shared = &run.shared;
            last = run.crew.flush(Instant::now() + patience, || shared.is_stopped());
        }
        if let Some(why) = run.shared.asked_to_stop() {
            return Err(run.stopped(aborted(why), why));
        }
        let predicted = run.predicted(&last);
        if predicted.is_none_or(|predicted| predicted > budget) {
            return Err(run.stopped(would_stall(predicted, budget), Phase::Failed));
        }
        Frozen::begin(run, budget)
    }
}

fn would_stall(predicted: Option<Duration>, budget: Duration) -> Refusal {
    let found = predicted.map_or("cannot be told".to_owned(), |time| format!("is {} ms", ms(time)));
    let allowed = ms(budget);
    let message =
        format!("by the last flush, the time that the freeze would take {found}; {allowed} ms are allowed");
    Refusal { code: "freeze_would_stall", message }
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

    /// How many of these rounds, in milliseconds, are flushed while writers are stalled.
    fn flushed(rounds_ms: &[u64]) -> usize {
        flushed_until(ALIKE_STALLING, rounds_ms)
    }

    fn flushed_until(alike_max: u32, rounds_ms: &[u64]) -> usize {
        let mut rounds = Rounds::until(ROUND_FAST, alike_max);
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
    fn flush_rounds_that_stall_nobody_go_on_for_longer() {
        assert_eq!(flushed_until(ALIKE, &[1148, 1069, 300, 80, 20]), 5);
        assert_eq!(flushed_until(ALIKE, &[300, 290, 480, 300, 290, 280]), 6);
    }

    #[test]
    fn no_round_begins_that_a_burst_of_writes_would_carry_over_the_deadline() {
        let fits =
            |took_ms, left_ms| another_fits(Duration::from_millis(took_ms), Duration::from_millis(left_ms));
        assert!(fits(1_300, 2_000));
        assert!(!fits(1_330, 1_550));
    }

    #[test]
    fn a_freeze_does_not_begin_after_a_flush_round_that_met_a_burst_of_writes() {
        assert_eq!(flushed(&[1193, 671, 310, 98, 475, 90]), 6);
    }
}
