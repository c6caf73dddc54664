//! Undoes what a dead agent left frozen: exactly what its record says.

use super::ended_message;
use super::evidence::{Evidence, boot_id, ms};
use super::frozen::thawed_count;
use super::record::{Record, Records};
use super::shared::Shared;
use crate::freeze::gather::Gatherer;
use crate::freeze::grace;
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::{Freeze, Ledger, Phase, Thaw};
use crate::freeze::plan::{Plan, Superblock, plan};
use crate::freeze::queue;
use crate::freeze::reach::{mount_devices, reach};
use crate::hooks::{self, Hooks};
use crate::log;
use guest_protocol::stillpoint::{Reason, State, ThawCause};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often a guard that still lives is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How long after its lease a guard that still lives is trusted to thaw: longer, and it hangs.
const GUARD_TRUSTED_NS: u64 = 500_000_000;
/// How long a guard whose lease has not begun is waited for: it only has to see that the agent is gone.
const GUARD_END_MAX: Duration = Duration::from_secs(2);

/// Begins to undo what is left, in a thread. Answers whether there was anything.
pub(super) fn take_up(shared: &Arc<Shared>, records: &Records, settings: Option<&hooks::Settings>) -> bool {
    let Some((record, ledger)) = records.left() else {
        // A record that was never completed: nothing was frozen under it.
        records.remove();
        return false;
    };
    if record.boot_id != boot_id() {
        // The kernel that froze is gone, and its freezes with it.
        records.remove();
        records.unmark();
        return false;
    }
    // Nothing else can hold the guest: this is the agent's first act.
    shared.begin(&record.id);
    shared.lock().state = State::Thawing;
    shared.set_frozen(true);
    let (shared, records, settings) = (Arc::clone(shared), records.clone(), settings.cloned());
    let undo = {
        let shared = Arc::clone(&shared);
        let records = records.clone();
        move || {
            let ledger = Arc::new(ledger);
            let mut evidence = undo(&record, &ledger);
            shared.set_frozen(false);
            records.unmark();
            // After the last FITHAW, and before the record goes: what is owed still after another death is owed on.
            let paths = record.hooks.clone();
            let mut hooks = Hooks::left(paths, settings.as_ref(), &record.id, &ledger, shared.leftovers());
            hooks.thaw();
            evidence.hooks(&hooks);
            let report = evidence.report;
            let thawed = thawed_count(&report);
            log!(Warning, "thawed {thawed} file systems that an agent before this one left frozen");
            let ended = record.plain.then(|| {
                let why = "the agent died during the freeze, and the next one undid it";
                ended_message(&report, why)
            });
            if let Some(message) = &ended {
                records.note_ended(message);
            }
            records.remove();
            if shared.end(Some(report), thawed, ended) {
                records.forget_ended();
            }
        }
    };
    if thread::Builder::new().name("undo".to_owned()).spawn(undo).is_err() {
        // Without a thread nothing can be undone now; the record stays for the next agent.
        log!(Critical, "no thread to thaw what an agent before this one left frozen");
        shared.set_frozen(false);
        let _told = shared.end(None, 0, None); // nothing to be told
    }
    true
}

fn undo(record: &Record, ledger: &Arc<Ledger>) -> Evidence {
    // A guard that outlived its agent is at it, and holds the lock until it is done.
    let patience = Instant::now() + GUARD_END_MAX;
    while Records::is_held(ledger) {
        let (deadline, due) = (ledger.deadline_ns(), ledger.agent_due_ns());
        let hangs = if deadline == 0 {
            // Not dead, but another agent's on the same folder: it prepares, and has said for how long.
            Instant::now() > patience && boottime_ns() > due.saturating_add(GUARD_TRUSTED_NS)
        } else {
            boottime_ns() > deadline.saturating_add(GUARD_TRUSTED_NS)
        };
        if hangs {
            break;
        }
        thread::sleep(LOOK);
    }
    ledger.end(Phase::AgentGone);
    let superblocks: Vec<Option<Superblock>> =
        record.filesystems.iter().map(|recorded| recorded.superblock()).collect();
    let current = Gatherer::new("/").gather().ok();
    let mounts = current.as_ref().map(mount_devices).unwrap_or_default();
    let now = current.as_ref().map(plan).unwrap_or_default();
    let mut lost = Vec::new();
    let mut threads = Vec::new();
    for (at, superblock) in superblocks.iter().enumerate().filter(|(at, _)| !ledger.settled(*at)) {
        let Some(superblock) = superblock else { continue };
        // As it was opened before, or else by any place where it is seen today.
        let today = now.superblocks.iter().find(|today| today.device == superblock.device);
        let reached = reach(superblock, &mounts)
            .or_else(|failure| today.map_or(Err(failure), |today| reach(today, &mounts)));
        match reached {
            Ok(reached) => {
                let theirs = Arc::clone(ledger);
                let thaw = Arc::new(move || {
                    theirs.claim(at, Thaw::Agent, boottime_ns());
                    crate::freeze::crew::thaw_left(reached.folder.as_fd(), &theirs, at);
                });
                // Each in its own thread: a FITHAW waits for a FIFREEZE that is still in the kernel.
                let in_thread = Arc::clone(&thaw);
                match thread::Builder::new().spawn(move || in_thread()) {
                    Ok(thread) => threads.push(thread),
                    // The guest is short of threads: then one after another.
                    Err(_) => thaw(),
                }
            }
            Err(failure) => lost.push((superblock.name(), failure)),
        }
    }
    for thread in threads {
        // One that panicked has not thawed, which the report shows.
        let _joined = thread.join().is_ok();
    }
    grace::undo(Path::new(grace::SWITCH), ledger);
    queue::undo(ledger);
    report(record, ledger, superblocks, lost)
}

fn report(
    record: &Record,
    ledger: &Ledger,
    superblocks: Vec<Option<Superblock>>,
    lost: Vec<(String, String)>,
) -> Evidence {
    let plan = Plan { superblocks: superblocks.into_iter().flatten().collect(), ..Plan::default() };
    let mut evidence = Evidence::new(&record.id, record.lease_ms, &plan);
    for (at, recorded) in record.filesystems.iter().enumerate() {
        evidence.report.filesystems[at] = recorded.report.clone();
        evidence.filesystem(at, ledger, at, false);
    }
    evidence.times(ledger);
    evidence.report.frozen_at_ms = frozen_at_ms(ledger);
    evidence.report.thawed_by = match ledger.phase() {
        _ if ledger.frozen_count() == 0 => ThawCause::NothingFrozen,
        Phase::LeaseEnded => ThawCause::LeaseEnded,
        Phase::Host => ThawCause::Host,
        Phase::Armed | Phase::AgentGone | Phase::Failed | Phase::GuardGone => ThawCause::AgentGone,
    };
    evidence.reason(Reason::new(
        "agent_restarted",
        "",
        "the agent died during the run; its record was undone",
    ));
    for (name, failure) in lost {
        evidence.reason(Reason::new("undo_failed", name, failure));
    }
    evidence
}

/// When the last FIFREEZE returned, by the wall clock of today.
fn frozen_at_ms(ledger: &Ledger) -> Option<u64> {
    let frozen = (0..ledger.count()).filter(|at| ledger.frozen(*at) == Freeze::Frozen);
    let done_ns = frozen.map(|at| ledger.times_ns(at)[1]).max()?;
    let ago = Duration::from_nanos(boottime_ns().saturating_sub(done_ns));
    let then = SystemTime::now().checked_sub(ago)?.duration_since(UNIX_EPOCH).ok()?;
    Some(ms(then))
}
