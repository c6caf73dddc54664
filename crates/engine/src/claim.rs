//! Claims a VM for one run: against the same name on this host by a lock, against everyone else in QEMU itself.

use crate::journal::{Journal, Note, tag};
use crate::register::{Register, RegisterError, VmEntry, VmLock};
use crate::snapshot::SnapshotError;
use std::time::Duration;
use vm::monitor::Monitor;
use vm::point::{self, ClaimError, Outcome};

/// How long the monitor may take to greet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A VM that this process works on: locked, connected, and rid of what dead runs left.
pub(crate) struct Claimed {
    pub(crate) monitor: Monitor,
    pub(crate) journal: Journal,
    pub(crate) lock: VmLock,
}

/// Connects to a VM that no other run of this name works on, and undoes what the last one left if it died.
pub(crate) fn connect(register: &Register, entry: &VmEntry) -> Result<Claimed, SnapshotError> {
    let lock = register.lock(&entry.name)?;
    // A monitor serves one client at a time: without this the other run would look like a monitor out of reach.
    if let Some(other) = register.busy_namesake(entry) {
        return Err(RegisterError::Busy(other).into());
    }
    let mut monitor = Monitor::connect(&entry.qmp, CONNECT_TIMEOUT)?;
    // Before anything is touched: the disks may be another QEMU's by now, or be on their way.
    point::here(&mut monitor)?;
    let journal = Journal::of(register, &entry.name);
    clear_leftovers(&journal, &mut monitor)?;
    Ok(Claimed { monitor, journal, lock })
}

/// Undoes what a dead run left in a VM, by its journal. Safe to call at any time that the VM is claimed.
pub(crate) fn clear_leftovers(journal: &Journal, monitor: &mut Monitor) -> Result<(), SnapshotError> {
    let Some(note) = journal.read()? else { return Ok(()) };
    if let Some(plan) = &note.plan {
        point::release(monitor, plan, note.outcome).map_err(SnapshotError::Leftovers)?;
    }
    point::unclaim(monitor, note.tag())?;
    journal.clear()?;
    Ok(())
}

impl Claimed {
    /// Claims the VM in QEMU, with the journal written first. What a run under another name of the same VM left, if it
    /// died, is undone on the way.
    pub(crate) fn claim(&mut self, register: &Register, run: &str) -> Result<(), SnapshotError> {
        self.journal.write(&Note { run: run.to_owned(), plan: None, outcome: Outcome::Dropped })?;
        let claimed = self.claim_in_qemu(register, run);
        if claimed.is_err() {
            self.give_up(run);
        }
        claimed
    }

    fn claim_in_qemu(&mut self, register: &Register, run: &str) -> Result<(), SnapshotError> {
        let mut by = String::new();
        // The holder may end at any moment: a second look finds its claim gone.
        for _ in 0..2 {
            by = match point::claim(&mut self.monitor, tag(run)) {
                Ok(()) => return Ok(()),
                Err(ClaimError::Monitor(error)) => return Err(error.into()),
                Err(ClaimError::Held(by)) => by,
            };
            if let Some(name) = Journal::find(register, &by)? {
                let _lock = register.lock(&name)?;
                clear_leftovers(&Journal::of(register, &name), &mut self.monitor)?;
            }
        }
        Err(SnapshotError::Held(by))
    }

    /// Ends before anything but the claim was put into QEMU.
    pub(crate) fn give_up(&mut self, run: &str) {
        // If it fails, the note stays, and the next run tries again.
        if point::unclaim(&mut self.monitor, tag(run)).is_ok() {
            let _ = self.journal.clear(); // as above
        }
    }
}
