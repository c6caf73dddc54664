//! The rehearsal: everything but locks and freeze.

use super::evidence::{boot_id, ms};
use super::survey::{state_stays_writable, survey};
use super::{Refusal, Settings};
use crate::freeze::developer::is_developers_machine;
use crate::freeze::gather::read_bounded;
use crate::hooks;
use crate::quiesce::Applications;
use guest_protocol::stillpoint::{CheckArguments, CheckReport, FilesystemState, Reason, Want};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

/// Longest time for the applications' part.
const APPLICATIONS_MAX: Duration = Duration::from_secs(30);
/// Longest time for each of the two flush rounds: the first writes out, the second predicts.
const ROUND_MAX: Duration = Duration::from_secs(30);
/// How often a wait looks whether it is still wanted.
const MOMENT: Duration = Duration::from_millis(50);
/// Stack of a thread that flushes.
const STACK_BYTES: usize = 64 << 10;
/// File systems on block devices that have no freeze. Others are thought to have one.
/// Source: those in Linux `fs/` with neither `freeze_fs` nor `freeze_super`.
const WITHOUT_FREEZE: &[&str] = &[
    "vfat", "msdos", "exfat", "squashfs", "erofs", "iso9660", "udf", "cramfs", "romfs", "minix", "hfs",
    "hfsplus", "ntfs3", "ntfs", "fuseblk", "affs", "ufs",
];

/// Looks, rehearses and predicts, unless `abort` is raised meanwhile.
pub(super) fn check(
    arguments: &CheckArguments,
    settings: &Settings,
    abort: &Arc<AtomicBool>,
) -> Result<CheckReport, Refusal> {
    let statedir = settings.statedir.as_path();
    let surveyed = survey(None, &settings.selection)?;
    let mut evidence = surveyed.evidence("", 0);
    if let Err(refusal) = state_stays_writable(statedir, &surveyed) {
        evidence.reason(Reason::new(refusal.code, statedir.to_string_lossy(), refusal.message));
    }
    if is_developers_machine() {
        evidence.reason(Reason::new("developers_machine", "", "this program will freeze nothing here"));
    }
    let mut called = Vec::new();
    if let Some(hooks) = settings.hooks.as_ref().filter(|_| arguments.want == Want::Application) {
        match hooks::find(&hooks.path) {
            Ok(found) => called = found.iter().map(|hook| hook.to_string_lossy().into_owned()).collect(),
            Err(failure) => {
                evidence.reason(Reason::new(failure.code, hooks.path.to_string_lossy(), failure.message));
            }
        }
    }
    let mut applications = Applications::discover(&arguments.applications, Instant::now() + APPLICATIONS_MAX);
    applications.abort_by(Arc::clone(abort));
    if arguments.want == Want::Application {
        applications.rehearse(Instant::now() + APPLICATIONS_MAX);
    }
    let dirty_bytes = dirty_bytes();
    let folders: Vec<(usize, Arc<std::os::fd::OwnedFd>)> = surveyed
        .folders()
        .filter_map(|(at, folder)| Some((surveyed.plan.steps[at], Arc::new(folder.try_clone().ok()?))))
        .collect();
    flush(&folders, abort);
    let predicted = flush(&folders, abort);
    if abort.load(SeqCst) {
        let message = "a run began during the rehearsal".to_owned();
        return Err(Refusal { code: "aborted", message });
    }
    for (filesystem, reached) in evidence.report.filesystems.iter_mut().zip(&surveyed.reached) {
        if filesystem.state == FilesystemState::NotFrozen && reached.is_ok() {
            let cannot = WITHOUT_FREEZE.contains(&filesystem.kind.as_str());
            filesystem.state = if cannot { FilesystemState::Unsupported } else { FilesystemState::Freezable };
        }
    }
    evidence.applications(&applications);
    Ok(CheckReport {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: boot_id(),
        budget_ms: applications.budget_ms(),
        dirty_bytes,
        predicted_freeze_ms: ms(predicted),
        filesystems: evidence.report.filesystems,
        applications: evidence.report.applications,
        hooks: called,
        uncovered: evidence.report.uncovered,
        reasons: evidence.report.reasons,
    })
}

/// Flushes all at once; answers how long a freeze in steps would take by that. Raised, `abort` ends the wait.
fn flush(folders: &[(usize, Arc<std::os::fd::OwnedFd>)], abort: &AtomicBool) -> Duration {
    let (sender, receiver) = channel();
    let deadline = Instant::now() + ROUND_MAX;
    let mut waiting = 0;
    for (step, folder) in folders {
        let (step, folder, sender) = (*step, Arc::clone(folder), sender.clone());
        let flush = move || {
            let begun = Instant::now();
            // Its error would be the freeze's too, which a rehearsal does not call.
            let _flushed = rustix::fs::syncfs(&folder).is_ok();
            sender.send((step, begun.elapsed())).is_ok()
        };
        if thread::Builder::new().stack_size(STACK_BYTES).spawn(flush).is_ok() {
            waiting += 1;
        }
    }
    let mut steps: BTreeMap<usize, Duration> = BTreeMap::new();
    while waiting > 0 {
        match receiver.recv_timeout(MOMENT) {
            Ok((step, took)) => {
                let slowest = steps.entry(step).or_default();
                *slowest = (*slowest).max(took);
                waiting -= 1;
            }
            Err(_) if Instant::now() < deadline && !abort.load(SeqCst) => {}
            // Some file system does not even flush: say so with the time that was waited.
            Err(_) => return ROUND_MAX,
        }
    }
    steps.values().sum()
}

fn dirty_bytes() -> u64 {
    let text = read_bounded(Path::new("/proc/meminfo"), 64 << 10).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let kib = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    (kib("Dirty") + kib("Writeback")) * 1024
}
