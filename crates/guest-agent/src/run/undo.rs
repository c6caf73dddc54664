//! Undoes what a dead agent left frozen: exactly what its record says.

use super::evidence::{Evidence, boot_id};
use super::frozen::thawed_count;
use super::record::{Record, Records};
use super::shared::Shared;
use crate::freeze::facts::View;
use crate::freeze::gather::Gatherer;
use crate::freeze::grace;
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::{Ledger, Phase, Thaw};
use crate::freeze::plan::{Plan, Superblock, plan};
use crate::freeze::reach::{mount_devices, reach};
use crate::log;
use guest_protocol::stillpoint::{GuestReport, Reason, State, ThawCause};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How often a guard that still lives is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How long after its lease a guard that still lives is trusted to thaw: longer, and it hangs.
const GUARD_TRUSTED_NS: u64 = 500_000_000;
/// How long a guard whose lease has not begun is waited for: it only has to see that the agent is gone.
const GUARD_END_MAX: Duration = Duration::from_secs(2);

/// Begins to undo what is left, in a thread. Answers whether there was anything.
pub(super) fn take_up(shared: &Arc<Shared>, records: &Records) -> bool {
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
    let (shared, records) = (Arc::clone(shared), records.clone());
    let undo = {
        let shared = Arc::clone(&shared);
        let records = records.clone();
        move || {
            let report = undo(&record, &Arc::new(ledger));
            shared.set_frozen(false);
            records.unmark();
            records.remove();
            log!(
                Warning,
                "thawed {} file systems that an agent before this one left frozen",
                thawed_count(&report)
            );
            let thawed = thawed_count(&report);
            let ended =
                record.plain.then(|| "the freeze was undone because the agent was restarted".to_owned());
            shared.end(Some(report), thawed, ended);
        }
    };
    if thread::Builder::new().name("undo".to_owned()).spawn(undo).is_err() {
        // Without a thread nothing can be undone now; the record stays for the next agent.
        log!(Critical, "no thread to thaw what an agent before this one left frozen");
        shared.set_frozen(false);
        shared.end(None, 0, None);
    }
    true
}

fn undo(record: &Record, ledger: &Arc<Ledger>) -> GuestReport {
    // A guard that outlived its agent is at it, and holds the lock until it is done.
    let patience = Instant::now() + GUARD_END_MAX;
    while Records::is_held(ledger) {
        let deadline = ledger.deadline_ns();
        let hangs = if deadline == 0 {
            Instant::now() > patience
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
                // Each in its own thread: a FITHAW waits for a FIFREEZE that is still in the kernel.
                threads.push(thread::spawn(move || {
                    theirs.claim(at, Thaw::Agent, boottime_ns());
                    crate::freeze::crew::thaw_left(reached.folder.as_fd(), &theirs, at);
                }));
            }
            Err(failure) => lost.push((superblock.name(), failure)),
        }
    }
    for thread in threads {
        // One that panicked has not thawed, which the report shows.
        let _joined = thread.join().is_ok();
    }
    grace::undo(Path::new(grace::SWITCH), ledger);
    report(record, ledger, superblocks, lost)
}

fn report(
    record: &Record,
    ledger: &Ledger,
    superblocks: Vec<Option<Superblock>>,
    lost: Vec<(String, String)>,
) -> GuestReport {
    let plan = Plan { superblocks: superblocks.into_iter().flatten().collect(), ..Plan::default() };
    let mut evidence = Evidence::new(&record.id, record.lease_ms, &plan);
    for (at, recorded) in record.filesystems.iter().enumerate() {
        evidence.report.filesystems[at] = recorded.report.clone();
        evidence.filesystem(at, ledger, at, false);
    }
    evidence.times(ledger);
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
    evidence.report
}

/// Thaws everything once, whoever froze it: what a plain thaw does after a stock qemu-ga left its mark and died.
pub(super) fn thaw_foreign() -> i64 {
    let Ok(facts) = Gatherer::new("/").gather() else { return 0 };
    let mounts = mount_devices(&facts);
    let folders =
        plan(&facts).superblocks.into_iter().filter(|s| s.places.iter().any(|place| place.view == View::Own));
    let threads: Vec<_> = folders
        .filter_map(|superblock| reach(&superblock, &mounts).ok())
        .map(|reached| thread::spawn(move || crate::freeze::kernel::thaw(reached.folder.as_fd()).is_ok()))
        .collect();
    let thawed = threads.into_iter().filter_map(|thread| thread.join().ok()).filter(|thawed| *thawed).count();
    i64::try_from(thawed).unwrap_or(i64::MAX)
}
