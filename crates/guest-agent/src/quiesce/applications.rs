//! All applications of one run.

use super::channel::Note;
use super::discovery::discover;
use super::instance::{Instance, Turn};
use super::kinds::KINDS;
use super::process;
use crate::program::Program;
use guest_protocol::stillpoint::{APPLICATIONS_MAX, ApplicationPolicy, ApplicationReport, Policy, Reason};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Freeze budget where no application was found, in milliseconds.
const BUDGET_MS_DEFAULT: u64 = 5_000;
/// Stack of the thread that waits for one worker, in bytes; it does nothing but wait and copy.
const STACK_BYTES: usize = 256 << 10;

/// All applications of one run, in the phase that was called last.
///
/// `discover` → `prepare` → `quiesce` → *(freeze, point, thaw: nothing is called)* → `resume`; or `discover` →
/// `rehearse`. A phase never fails as a whole: what fails is one application, and its report says why. Dropping it
/// releases everything that is held, by ending the workers.
#[must_use = "dropping it resumes the applications"]
pub struct Applications {
    instances: Vec<Instance>,
    /// `None` when it could not be copied, or nothing needs it.
    program: Option<Program>,
    reasons: Vec<Reason>,
    /// Policies `required` that no instance answers to, with what to say of each.
    missing: Vec<(ApplicationPolicy, Reason)>,
    policies: Vec<ApplicationPolicy>,
    /// Kinds and instances that a hook says it quiesced.
    attested: Vec<(String, String)>,
    abort: Arc<AtomicBool>,
}

impl Applications {
    /// Finds every instance on the machine and gives it its policy (the one that names the instance, else the one
    /// that names its kind, else `preferred`). Opens files: call it before the freeze. Connects to nothing.
    pub fn discover(policies: &[ApplicationPolicy], deadline: Instant) -> Self {
        Self::discover_with(Path::new("/proc/self/exe"), policies, deadline)
    }

    /// As `discover`, for a caller that is not itself the agent: `program` is.
    pub fn discover_with(program: &Path, policies: &[ApplicationPolicy], deadline: Instant) -> Self {
        let mut reasons = Vec::new();
        let mut instances = Vec::new();
        let pids = process::all_pids().unwrap_or_else(|error| {
            reasons.push(Reason::new("not_found", "/proc", format!("processes cannot be listed: {error}")));
            Vec::new()
        });
        for kind in KINDS {
            let discovery = discover(kind, &pids, deadline);
            if let Some(first) = discovery.unseen.first() {
                let message = format!("{} could not be looked at; {first}", discovery.unseen.len());
                reasons.push(Reason::new("discovery_incomplete", kind.name, message));
            }
            for found in discovery.found {
                let policy = policy_of(policies, kind.name, &found.instance);
                instances.push(Instance::new(kind, found, policy));
            }
        }
        if instances.len() > APPLICATIONS_MAX {
            let message = format!("{} found, {APPLICATIONS_MAX} are served", instances.len());
            reasons.push(Reason::new("too_many_applications", "applications", message));
            instances.truncate(APPLICATIONS_MAX);
        }
        let missing = missing(policies, &instances);
        let wanted = instances.iter().any(|instance| instance.report.policy != Policy::Off);
        let program = match wanted.then(|| Program::copy_of(program)).transpose() {
            Ok(program) => program,
            Err(error) => {
                let note = Note::new("worker_lost", format!("no worker can be started: {error}"));
                instances.iter_mut().for_each(|instance| instance.out(note.clone()));
                None
            }
        };
        let policies = policies.to_vec();
        Self { instances, program, reasons, missing, policies, attested: Vec::new(), abort: Arc::default() }
    }

    /// Takes a hook's word that it quiesced an application, and answers the policy that holds for it.
    pub fn attest(&mut self, kind: &str, instance: &str) -> Policy {
        self.attested.push((kind.to_owned(), instance.to_owned()));
        policy_of(&self.policies, kind, instance)
    }

    /// Has phases end early by this flag from now on.
    pub fn abort_by(&mut self, flag: Arc<AtomicBool>) {
        self.abort = flag;
    }

    /// Ends the running phase early when set by another thread: what is not done counts as failed (`aborted`).
    /// `resume` is not ended by it.
    #[must_use]
    pub fn abort_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.abort)
    }

    /// Connects and reads the settings, but flushes and locks nothing: for `stillpoint-check`.
    pub fn rehearse(&mut self, deadline: Instant) {
        self.each(deadline, Instance::rehearse, &self.abort_flag());
    }

    /// Does the slow and harmless work (PostgreSQL: the first CHECKPOINT), all applications at the same time.
    pub fn prepare(&mut self, deadline: Instant) {
        self.each(deadline, Instance::prepare, &self.abort_flag());
    }

    /// Takes what must be held over the freeze and records positions, all applications at the same time.
    /// `per_application` bounds each one, `deadline` all of them.
    pub fn quiesce(&mut self, per_application: Duration, deadline: Instant) {
        self.each(deadline.min(Instant::now() + per_application), Instance::quiesce, &self.abort_flag());
    }

    /// After the thaw (or a failure before it): checks that nothing was lost in between, then resumes.
    /// Safe to call in any phase, and twice.
    pub fn resume(&mut self, deadline: Instant) {
        self.each(deadline, Instance::resume, &AtomicBool::new(false));
    }

    /// The evidence, for the guest's half of the receipt.
    #[must_use]
    pub fn reports(&self) -> Vec<ApplicationReport> {
        self.instances.iter().map(|instance| instance.report.clone()).collect()
    }

    /// What concerns no single application: too many of them, an unreadable `/proc`, `required` ones not found.
    #[must_use]
    pub fn reasons(&self) -> Vec<Reason> {
        self.reasons.iter().chain(self.missing()).cloned().collect()
    }

    /// The smallest freeze budget of the applications found, in milliseconds.
    #[must_use]
    pub fn budget_ms(&self) -> u64 {
        let budgets = self.instances.iter().map(|instance| instance.freeze_budget.as_millis());
        budgets.min().and_then(|least| u64::try_from(least).ok()).unwrap_or(BUDGET_MS_DEFAULT)
    }

    /// Whether what a quiesce holds stalls the clients of any application, from then to the thaw.
    #[must_use]
    pub fn stall_writers(&self) -> bool {
        self.instances.iter().any(|one| one.stalls_writers && one.report.policy != Policy::Off)
    }

    /// Why the run must fail: an application with policy `required` is not found, a phase of it failed, or (once
    /// resumed) it was not held.
    #[must_use]
    pub fn required_failure(&self) -> Option<Reason> {
        let attested = |one: &Instance| {
            let is_it = |(kind, instance): &(String, String)| {
                *kind == one.report.kind && *instance == one.report.instance
            };
            self.attested.iter().any(is_it)
        };
        let mut required = self
            .instances
            .iter()
            .filter(|one| one.report.policy == Policy::Required && (one.report.quiesced || !attested(one)));
        let missing = self.missing().next().cloned();
        missing.or_else(|| required.find_map(Instance::failure))
    }

    /// What was required and neither found nor attested.
    fn missing(&self) -> impl Iterator<Item = &Reason> {
        let answers = |policy: &ApplicationPolicy, (kind, instance): &(String, String)| {
            *kind == policy.kind && policy.instance.as_ref().is_none_or(|named| named == instance)
        };
        let unanswered = self
            .missing
            .iter()
            .filter(move |(policy, _)| !self.attested.iter().any(|one| answers(policy, one)));
        unanswered.map(|(_, reason)| reason)
    }

    /// The processes of the applications found and of our workers, so that they are not unknown writers.
    /// Reads `/proc`: not while frozen.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let running = self.instances.iter().filter(|instance| instance.process.runs());
        let mut ours: BTreeSet<u32> = running.map(|instance| instance.process.pid).collect();
        let parents = process::parents().unwrap_or_default();
        // Children of children come in later rounds; there are as many rounds as generations.
        loop {
            let before = ours.len();
            let children = parents.iter().filter(|(_, parent)| ours.contains(parent));
            ours.extend(children.map(|(child, _)| *child).collect::<Vec<_>>());
            if ours.len() == before {
                break;
            }
        }
        ours.extend(self.instances.iter().filter_map(Instance::worker_pid));
        ours.into_iter().collect()
    }

    /// Has every instance do something, each in its own thread.
    fn each(&mut self, until: Instant, phase: fn(&mut Instance, &Turn<'_>), abort: &AtomicBool) {
        let Some(program) = &self.program else { return };
        let turn = &Turn { program, until, abort };
        std::thread::scope(|scope| {
            let mut unhelped = Vec::new();
            for instance in &mut self.instances {
                let slot = Arc::new(std::sync::Mutex::new(Some(instance)));
                let theirs = Arc::clone(&slot);
                let work = move || {
                    let instance = theirs.lock().ok().and_then(|mut slot| slot.take());
                    if let Some(instance) = instance {
                        phase(instance, turn);
                    }
                };
                let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work);
                if thread.is_err() {
                    unhelped.push(slot);
                }
            }
            // The guest is short of threads: then one after another.
            for slot in unhelped {
                let instance = slot.lock().ok().and_then(|mut slot| slot.take());
                if let Some(instance) = instance {
                    phase(instance, turn);
                }
            }
        });
    }
}

/// The policy that fits best.
fn policy_of(policies: &[ApplicationPolicy], kind: &str, instance: &str) -> Policy {
    let of_kind = || policies.iter().filter(|policy| policy.kind == kind);
    let named = of_kind().find(|policy| policy.instance.as_deref() == Some(instance));
    named
        .or_else(|| of_kind().find(|policy| policy.instance.is_none()))
        .map_or(Policy::Preferred, |one| one.policy)
}

/// Policies `required` that nothing on the machine answers to.
fn missing(policies: &[ApplicationPolicy], instances: &[Instance]) -> Vec<(ApplicationPolicy, Reason)> {
    let answers = |policy: &ApplicationPolicy, report: &ApplicationReport| {
        report.kind == policy.kind && policy.instance.as_ref().is_none_or(|named| *named == report.instance)
    };
    let required = policies.iter().filter(|policy| policy.policy == Policy::Required);
    let unanswered = required.filter(|policy| !instances.iter().any(|one| answers(policy, &one.report)));
    let reason = |policy: &ApplicationPolicy| {
        let subject = format!("{} {}", policy.kind, policy.instance.as_deref().unwrap_or("(any)"));
        (policy.clone(), Reason::new("not_found", subject, "required, but no such application runs here"))
    };
    unanswered.map(reason).collect()
}
