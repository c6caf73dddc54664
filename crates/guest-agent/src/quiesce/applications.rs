//! All applications of one run.

use guest_protocol::stillpoint::{ApplicationPolicy, ApplicationReport, Reason};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Freeze budget where no application was found, in milliseconds.
const BUDGET_MS_DEFAULT: u64 = 5_000;

/// All applications of one run, in the phase that was called last.
///
/// `discover` → `prepare` → `quiesce` → *(freeze, point, thaw: nothing is called)* → `resume`; or `discover` →
/// `rehearse`. A phase never fails as a whole: what fails is one application, and its report says why. Dropping it
/// releases everything that is held, by ending the workers.
#[must_use = "dropping it resumes the applications"]
pub struct Applications {
    reports: Vec<ApplicationReport>,
    abort: Arc<AtomicBool>,
}

impl Applications {
    /// Finds every instance on the machine and gives it its policy (the one that names the instance, else the one
    /// that names its kind, else `preferred`). Opens files: call it before the freeze. Connects to nothing.
    pub fn discover(policies: &[ApplicationPolicy], deadline: Instant) -> Self {
        let (_, _) = (policies, deadline);
        Self { reports: Vec::new(), abort: Arc::default() }
    }

    /// Ends the running phase early when set by another thread: what is not done counts as failed (`aborted`).
    #[must_use]
    pub fn abort_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.abort)
    }

    /// Connects and reads the settings, but flushes and locks nothing: for `stillpoint-check`.
    pub fn rehearse(&mut self, _deadline: Instant) {}

    /// Does the slow and harmless work (PostgreSQL: the first CHECKPOINT), all applications at the same time.
    pub fn prepare(&mut self, _deadline: Instant) {}

    /// Takes what must be held over the freeze and records positions, all applications at the same time.
    /// `per_application` bounds each one, `deadline` all of them.
    pub fn quiesce(&mut self, _per_application: Duration, _deadline: Instant) {}

    /// After the thaw (or a failure before it): checks that nothing was lost in between, then resumes.
    /// Safe to call in any phase, and twice.
    pub fn resume(&mut self, _deadline: Instant) {}

    /// The evidence, for the guest's half of the receipt.
    #[must_use]
    pub fn reports(&self) -> Vec<ApplicationReport> {
        self.reports.clone()
    }

    /// What concerns no single application (too many of them, an unreadable `/proc`).
    #[must_use]
    pub fn reasons(&self) -> Vec<Reason> {
        Vec::new()
    }

    /// The smallest freeze budget of the applications found, in milliseconds.
    #[must_use]
    pub fn budget_ms(&self) -> u64 {
        BUDGET_MS_DEFAULT
    }

    /// Why the run must fail: an application with policy `required` is not found, not quiesced, or was not held.
    #[must_use]
    pub fn required_failure(&self) -> Option<Reason> {
        None
    }

    /// The processes of the applications found and of our workers, so that they are not unknown writers.
    /// Reads `/proc`: not while frozen.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        Vec::new()
    }
}
