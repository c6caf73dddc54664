//! Hooks: programs of the guest's administrator, called before the freeze and again after the thaw.
//!
//! The layout and the arguments are qemu-ga's (`-F`, `fsfreeze-hook`, `fsfreeze-hook.d`). What is ours: an exit code
//! counts, each call has a time limit, output is bounded, what could be changed by others is refused, and whatever was
//! called before the freeze is called after the thaw, in reverse order, whatever happened in between. What is owed is in
//! the undo record before it is owed, so that the next agent makes up for one that died.
//!
//! No hook runs while anything is frozen: `freeze` is called before the first FIFREEZE, `thaw` after the last FITHAW.

mod call;
mod claims;
mod find;
mod leftovers;
mod output;
mod trust;

pub use claims::Claim;
pub use find::{DEFAULT_PATH, find};
pub use leftovers::Leftovers;

use crate::freeze::ledger::Ledger;
use crate::freeze::reach::superblock_of;
use crate::log;
use call::{Call, Ended};
use guest_protocol::stillpoint::{HookCall, HookOutcome, HookReport, Reason, TEXT_BYTES_MAX};
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest time for one call, if nothing else was configured: a database that flushes much, on a slow disk.
pub const LIMIT_DEFAULT: Duration = Duration::from_secs(60);
/// Longest time that can be configured: Proxmox waits as long for a freeze.
pub const LIMIT_MS_MAX: u64 = 3_600_000;
/// Most lines of a call's output that are logged.
const LOGGED_LINES_MAX: usize = 64;

/// What the command line decides about hooks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `-F`: a program, or a folder of programs.
    pub path: PathBuf,
    /// Longest time for one call.
    pub limit: Duration,
    /// Whether hosts are told what hooks write; otherwise that stays in the guest's log.
    pub tell_output: bool,
}

/// Why a freeze does not come about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Stable code, e.g. `hook_failed`.
    pub code: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// Ends a call that is made before the freeze.
#[derive(Clone, Copy)]
pub struct Stop<'s> {
    /// Readable when it is time to look.
    pub wake: BorrowedFd<'s>,
    /// Whether the run was asked to end.
    pub is_stopped: &'s dyn Fn() -> bool,
}

/// The hooks of one run.
#[must_use = "dropping it calls the thaw of every hook that is owed one"]
pub struct Hooks {
    paths: Vec<PathBuf>,
    run: String,
    limit: Duration,
    tell_output: bool,
    ledger: Arc<Ledger>,
    leftovers: Arc<Leftovers>,
    reports: Vec<HookReport>,
    claims: Vec<Claim>,
    reasons: Vec<Reason>,
}

impl Hooks {
    /// The hooks that were found for a run; the ledger's record must name them in this order.
    pub fn new(
        paths: Vec<PathBuf>,
        settings: Option<&Settings>,
        run: &str,
        ledger: &Arc<Ledger>,
        leftovers: &Arc<Leftovers>,
    ) -> Self {
        Self {
            paths,
            run: run.to_owned(),
            limit: settings.map_or(LIMIT_DEFAULT, |settings| settings.limit),
            tell_output: settings.is_some_and(|settings| settings.tell_output),
            ledger: Arc::clone(ledger),
            leftovers: Arc::clone(leftovers),
            reports: Vec::new(),
            claims: Vec::new(),
            reasons: Vec::new(),
        }
    }

    /// Those of a dead agent's run, as its record names them. A hook that was being called is ended first, with
    /// whatever it started.
    pub fn left(
        paths: Vec<PathBuf>,
        settings: Option<&Settings>,
        run: &str,
        ledger: &Arc<Ledger>,
        leftovers: &Arc<Leftovers>,
    ) -> Self {
        call::end_left(ledger);
        let mut hooks = Self::new(paths, settings, run, ledger, leftovers);
        let owed = hooks.owed();
        hooks.reports = hooks.paths.iter().take(owed).map(|path| report(path)).collect();
        hooks
    }

    /// The longest that all calls before the freeze may take.
    pub fn freeze_max(&self) -> Duration {
        self.longest(self.paths.len())
    }

    /// The longest that the calls that are owed may take.
    pub fn thaw_max(&self) -> Duration {
        self.longest(self.owed())
    }

    fn longest(&self, calls: usize) -> Duration {
        (self.limit + call::END_MAX) * u32::try_from(calls).unwrap_or(u32::MAX)
    }

    fn owed(&self) -> usize {
        self.ledger.hooks_owed().min(self.paths.len())
    }

    /// Calls each hook with `freeze`, one after the other, until one fails or the time is up.
    /// # Errors
    /// What failed. Those that were called are still owed their thaw.
    pub fn freeze(&mut self, until: Instant, stop: Stop<'_>) -> Result<(), Failure> {
        for at in 0..self.paths.len() {
            let path = self.paths[at].clone();
            // Once more: what was found may have been changed since.
            trust::trusted(&path).map_err(|why| refused(&path, &why))?;
            let limit = self.limit.min(until.saturating_duration_since(Instant::now()));
            self.ledger.owe_hooks(at + 1);
            let ended = self.call(&path, "freeze", limit, Some(stop));
            let failure = failure(&path, &ended, limit);
            self.reports.push(HookReport { freeze: Some(self.told(&ended)), ..report(&path) });
            if let Some(failure) = failure {
                return Err(failure);
            }
            self.take_claims(&path, ended);
        }
        Ok(())
    }

    /// Calls each hook that is owed it with `thaw`, last called first. Whatever becomes of one, the others are called.
    pub fn thaw(&mut self) {
        while let Some(at) = self.owed().checked_sub(1) {
            let path = self.paths[at].clone();
            let (told, failure) = match trust::trusted(&path) {
                Ok(()) => {
                    let ended = self.call(&path, "thaw", self.limit, None);
                    (self.told(&ended), failure(&path, &ended, self.limit))
                }
                Err(why) => (
                    HookCall { outcome: HookOutcome::Refused, ..HookCall::default() },
                    Some(refused(&path, &why)),
                ),
            };
            if let Some(failure) = failure {
                log!(Error, "after the thaw: {}", failure.message);
                let subject = path.to_string_lossy();
                self.reasons.push(Reason::new("hook_thaw_failed", subject, failure.message));
            }
            if let Some(report) = self.reports.get_mut(at) {
                report.thaw = Some(told);
            }
            self.ledger.owe_hooks(at);
        }
    }

    /// What was called, in the order of the freeze.
    pub fn reports(&self) -> &[HookReport] {
        &self.reports
    }

    /// What hooks said that they quiesced.
    pub fn claims(&self) -> &[Claim] {
        &self.claims
    }

    /// The same, to add the run's policies.
    pub fn claims_mut(&mut self) -> &mut [Claim] {
        &mut self.claims
    }

    /// What went wrong that did not end the run.
    pub fn reasons(&self) -> &[Reason] {
        &self.reasons
    }

    /// Whether a claim was kept: its hook was called before and after, and had no complaint.
    pub fn kept(&self, claim: &Claim) -> bool {
        let good = |call: &Option<HookCall>| {
            call.as_ref().is_some_and(|call| call.outcome == HookOutcome::Succeeded)
        };
        self.reports
            .iter()
            .any(|report| report.path == claim.hook && good(&report.freeze) && good(&report.thaw))
    }

    fn call(&self, path: &Path, verb: &'static str, limit: Duration, stop: Option<Stop<'_>>) -> Ended {
        log!(Info, "hook {} {verb}", path.display());
        let mut ended =
            Call { program: path, verb, run: &self.run, limit, ledger: &self.ledger, stop }.make();
        if let Some(pipe) = ended.pipe.take() {
            self.leftovers.adopt(pipe);
        }
        let words = words(&ended, limit);
        for line in ended.output.text().lines().take(LOGGED_LINES_MAX) {
            if ended.outcome == HookOutcome::Succeeded {
                log!(Info, "hook {} {verb}: {line}", path.display());
            } else {
                log!(Error, "hook {} {verb}: {line}", path.display());
            }
        }
        match ended.outcome {
            HookOutcome::Succeeded => log!(Info, "hook {} {verb}: {words}", path.display()),
            _ => log!(Error, "hook {} {verb}: {words}", path.display()),
        }
        ended
    }

    fn told(&self, ended: &Ended) -> HookCall {
        let output = || bounded(&ended.output.text());
        HookCall {
            outcome: ended.outcome,
            exit_code: ended.status.and_then(|status| status.code()),
            signal: ended.status.and_then(|status| std::os::unix::process::ExitStatusExt::signal(&status)),
            ms: u64::try_from(ended.took.as_millis()).unwrap_or(u64::MAX),
            output_bytes: ended.output.bytes(),
            output: (self.tell_output && ended.output.bytes() > 0).then(output),
        }
    }

    /// Looks where the files of an application lie: before the freeze, since it opens them.
    fn take_claims(&mut self, path: &Path, ended: Ended) {
        let hook = path.to_string_lossy().into_owned();
        let (claims, complaints) = ended.output.claims();
        for complaint in complaints {
            log!(Warning, "hook {hook}: {complaint}");
            self.reasons.push(Reason::new("hook_claim_unreadable", hook.as_str(), complaint));
        }
        self.claims.extend(claims.into_iter().map(|claim| Claim {
            hook: hook.clone(),
            device_numbers: device_numbers(&claim),
            ..claim
        }));
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        // Early return or panic: what was called before the freeze is called after it all the same.
        self.thaw();
    }
}

/// The superblocks of all places that a claim names. One that cannot be told is `0:0`, which the host counts as outside the
/// point.
fn device_numbers(claim: &Claim) -> Vec<String> {
    let places = std::iter::once(&claim.instance).chain(&claim.files);
    let number = |place: &PathBuf| {
        let told = superblock_of(place).ok().flatten();
        told.map_or("0:0".to_owned(), |device| device.to_string())
    };
    let numbers: BTreeSet<String> = places.map(number).collect();
    numbers.into_iter().collect()
}

fn report(path: &Path) -> HookReport {
    HookReport { path: path.to_string_lossy().into_owned(), ..HookReport::default() }
}

fn refused(path: &Path, why: &str) -> Failure {
    let message = format!("hook {} is not called: {why}", path.display());
    log!(Error, "{message}");
    Failure { code: "hook_refused", message }
}

/// Why a call failed, in qemu-ga's words where it has any; what the hook wrote stays in the guest's log.
fn failure(path: &Path, ended: &Ended, limit: Duration) -> Option<Failure> {
    let code = match ended.outcome {
        HookOutcome::Succeeded => return None,
        HookOutcome::TimedOut => "hook_timeout",
        HookOutcome::Aborted => "aborted",
        HookOutcome::Failed | HookOutcome::NotStarted | HookOutcome::Refused => "hook_failed",
    };
    let words = words(ended, limit);
    Some(Failure {
        code,
        message: format!("child process has failed to execute fsfreeze hook: {words} ({})", path.display()),
    })
}

/// How a call ended.
fn words(ended: &Ended, limit: Duration) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (ended.outcome, ended.status, &ended.error) {
        (HookOutcome::Succeeded, ..) => format!("done in {} ms", ended.took.as_millis()),
        (HookOutcome::TimedOut, ..) => format!("no end within {} ms", limit.as_millis()),
        (HookOutcome::Aborted, ..) => "ended, because the freeze was called off".to_owned(),
        (_, _, Some(error)) => format!("failed to exec: {error}"),
        (_, Some(status), _) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (_, Some(signal)) => format!("terminated abnormally, by signal {signal}"),
            _ => "ended in an unknown way".to_owned(),
        },
        _ => "ended in an unknown way".to_owned(),
    }
}

/// Cuts a text to what a report may carry.
fn bounded(text: &str) -> String {
    if text.len() <= TEXT_BYTES_MAX {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(TEXT_BYTES_MAX - '…'.len_utf8())])
}

#[cfg(test)]
mod tests;
