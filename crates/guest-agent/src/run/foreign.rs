//! What a stock qemu-ga left frozen: it marks a frozen guest with a file and keeps no record, so all that is known is the
//! mark and its age.
//!
//! Its freeze has the compat lease, like one of our own: the host that asked for it may be gone. The lease counts from the
//! mark, so that an agent that is restarted again and again does not extend it. A mark from before the boot means nothing.

use super::evidence::ms;
use super::record::Records;
use super::shared::{Inner, Shared, Thawing};
use super::{Ending, Refusal, Settings};
use crate::freeze::facts::View;
use crate::freeze::gather::Gatherer;
use crate::freeze::kernel::{self, boottime_ns};
use crate::freeze::ledger::Ledger;
use crate::freeze::plan::plan;
use crate::freeze::reach::{mount_devices, reach};
use crate::hooks::{self, Hooks};
use crate::log;
use guest_protocol::stillpoint::State;
use std::os::fd::AsFd;
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, SystemTime};

/// How much earlier than the boot a mark must be to be taken for one of an earlier boot. Both times are the wall clock's, and
/// when the machine booted is found by counting back from its reading of now: a clock that was set forward meanwhile, as
/// after a start without the right time, makes a mark seem older than it is. What is within the slack has its lease.
const CLOCK_SLACK: Duration = Duration::from_secs(60);

/// What a mark says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// The kernel that froze is gone, and its freezes with it.
    OfAnEarlierBoot,
    /// What is frozen may stay so for as long.
    LeaseLeft(Duration),
}

/// `outlives_boots` says whether the folder of the mark does.
fn judge(marked: SystemTime, now: SystemTime, up: Duration, outlives_boots: bool, lease: Duration) -> Mark {
    // In the future: the clock was set back. Who cannot tell the age begins anew.
    let age = now.duration_since(marked).unwrap_or_default();
    if outlives_boots && age > up.saturating_add(CLOCK_SLACK) {
        return Mark::OfAnEarlierBoot;
    }
    Mark::LeaseLeft(lease.saturating_sub(age))
}

/// Looks for a mark without a record of ours, and holds the guest for frozen until its lease ends or a host thaws it.
pub(super) fn take_up(shared: &Arc<Shared>, records: &Records, settings: &Settings) {
    let Some(mark) = records.marked() else { return };
    let up = Duration::from_nanos(boottime_ns());
    match judge(mark.at, SystemTime::now(), up, mark.outlives_boots, settings.compat_lease) {
        Mark::OfAnEarlierBoot => {
            records.unmark();
            log!(Warning, "removed a mark of a frozen guest that is older than this boot: nothing is frozen");
        }
        Mark::LeaseLeft(left) => {
            log!(
                Warning,
                "another agent left this guest frozen: it is thawed in {} ms at the latest",
                ms(left)
            );
            shared.lock().foreign = Some(boottime_ns().saturating_add(ms(left).saturating_mul(1_000_000)));
            shared.set_frozen(true);
            let (shared, settings) = (Arc::clone(shared), settings.clone());
            let keep = move || keep_lease(&shared, &settings);
            if thread::Builder::new().name("lease".to_owned()).spawn(keep).is_err() {
                log!(
                    Critical,
                    "no thread to keep a lease: what another agent froze waits for its host's thaw"
                );
            }
        }
    }
}

/// Waits for the lease's end, and thaws if no host did before.
fn keep_lease(shared: &Arc<Shared>, settings: &Settings) {
    let mut inner = shared.lock();
    while let Some(deadline) = inner.foreign {
        let left_ns = deadline.saturating_sub(boottime_ns());
        if left_ns == 0 {
            begin(&mut inner);
            drop(inner);
            let lease_ms = ms(settings.compat_lease);
            log!(Error, "the lease of {lease_ms} ms ended: what another agent left frozen is thawed");
            let ended = format!(
                "the guest was frozen no longer: another agent had left it frozen, and the lease of {lease_ms} ms \
                 ended; a snapshot taken since is not of a frozen guest"
            );
            return thaw(shared, settings, Some(ended));
        }
        inner = shared.wait(inner, Duration::from_nanos(left_ns));
    }
}

/// A host's plain thaw. It is answered when everything is thawed and the hooks were called.
pub(super) fn thaw_for_host(
    shared: &Arc<Shared>,
    mut inner: MutexGuard<'_, Inner>,
    settings: &Settings,
    ticket: u64,
) {
    let deadline = inner.foreign;
    begin(&mut inner);
    // There is room: nobody could wait before.
    inner.thaws.push(Thawing { ticket, plain: true });
    drop(inner);
    let (theirs, settings) = (Arc::clone(shared), settings.clone());
    let work = move || thaw(&theirs, &settings, None);
    if thread::Builder::new().name("thaw".to_owned()).spawn(work).is_err() {
        let mut inner = shared.lock();
        (inner.foreign, inner.state) = (deadline, State::Thawed);
        inner.thaws.clear();
        drop(inner);
        let message = "no thread to thaw what another agent left frozen; ask again".to_owned();
        shared.finish(ticket, Err(Refusal { code: "internal", message }));
    }
}

/// From now on it is being thawed, by one.
fn begin(inner: &mut Inner) {
    (inner.foreign, inner.state) = (None, State::Thawing);
}

fn thaw(shared: &Arc<Shared>, settings: &Settings, ended: Option<String>) {
    let records = Records::new(&settings.statedir);
    // On a panic too, whoever waits for the thaw is answered.
    let mut ending = Ending { shared, records: records.clone(), done: false };
    let thawed = thaw_everything();
    records.unmark();
    shared.set_frozen(false);
    if let Some(message) = &ended {
        records.note_ended(message);
    }
    call_hooks(settings.hooks.as_ref(), shared);
    ending.done = true;
    if shared.end(None, thawed, ended) {
        records.forget_ended();
    }
}

/// Thaws everything once, whoever froze it: nothing says what the other agent froze.
fn thaw_everything() -> i64 {
    let Ok(facts) = Gatherer::new("/").gather() else { return 0 };
    let mounts = mount_devices(&facts);
    let folders =
        plan(&facts).superblocks.into_iter().filter(|s| s.places.iter().any(|place| place.view == View::Own));
    let (mut threads, mut thawed) = (Vec::new(), 0);
    for reached in folders.filter_map(|superblock| reach(&superblock, &mounts).ok()) {
        let thaw = Arc::new(move || kernel::thaw(reached.folder.as_fd()).is_ok());
        let in_thread = Arc::clone(&thaw);
        match thread::Builder::new().spawn(move || in_thread()) {
            Ok(thread) => threads.push(thread),
            // The guest is short of threads: then one after another.
            Err(_) => thawed += i64::from(thaw()),
        }
    }
    for thread in threads {
        thawed += i64::from(thread.join().unwrap_or(false));
    }
    thawed
}

/// The other agent had called its hook before its freeze, and nobody else will call it after the thaw.
fn call_hooks(settings: Option<&hooks::Settings>, shared: &Shared) {
    let Some(settings) = settings else { return };
    let owed = hooks::find(&settings.path).map_err(|failure| failure.message).and_then(|paths| {
        let ledger = Ledger::of_hooks_alone().map_err(|error| error.to_string())?;
        ledger.owe_hooks(paths.len());
        Ok(Hooks::left(paths, Some(settings), "", &Arc::new(ledger), shared.leftovers()))
    });
    match owed {
        Ok(mut hooks) => hooks.thaw(),
        Err(why) => log!(Error, "no hook is called after the thaw: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(300);

    fn aged(age_s: u64, up_s: u64, outlives_boots: bool) -> Mark {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let at = now - Duration::from_secs(age_s);
        judge(at, now, Duration::from_secs(up_s), outlives_boots, LEASE)
    }

    fn left(seconds: u64) -> Mark {
        Mark::LeaseLeft(Duration::from_secs(seconds))
    }

    #[test]
    fn a_stock_agents_mark_from_before_the_boot_means_nothing() {
        assert_eq!(aged(86_400, 30, true), Mark::OfAnEarlierBoot);
        assert_eq!(aged(91, 30, true), Mark::OfAnEarlierBoot);
        assert_eq!(aged(90, 30, true), left(210), "within the slack of clocks");
    }

    #[test]
    fn what_lies_in_memory_is_of_this_boot_whatever_the_clock_says() {
        assert_eq!(aged(86_400, 30, false), left(0));
    }

    #[test]
    fn the_lease_of_a_foreign_freeze_counts_from_its_mark() {
        assert_eq!(aged(0, 5_000, true), left(300));
        assert_eq!(aged(100, 5_000, true), left(200), "whichever agent it is that counts");
        assert_eq!(aged(301, 5_000, true), left(0));
        let now = SystemTime::UNIX_EPOCH;
        let mark = judge(now + LEASE * 9, now, Duration::from_secs(9), true, LEASE);
        assert_eq!(mark, left(300), "never longer, if the clock was set back");
    }
}
