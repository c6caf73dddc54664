//! Whether the VM runs in this QEMU, and stays.
//!
//! Whoever lets a VM go on that has migrated runs it twice, on one set of disks; whoever stops it while it migrates may leave it
//! stopped where it arrives.

use crate::monitor::{COMMAND_TIMEOUT, Monitor, MonitorError};
use qmp::Event;
use qmp::machine::{Migration, QueryMigrate, QueryStatus, Status};

/// The VM is, or will be, another QEMU's.
#[derive(Debug, thiserror::Error)]
pub enum Away {
    /// Its disks are another QEMU's, or are being handed over.
    #[error("the VM does not run in this QEMU, whose state is {0}")]
    Elsewhere(String),
    /// It is on its way, or about to be.
    #[error("the VM migrates: its migration is {0}")]
    Migrating(String),
    /// QEMU does not say.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

/// What QEMU says of a VM that is here and stays for now.
///
/// # Errors
/// See [`Away`].
pub fn here(monitor: &mut Monitor) -> Result<Status, Away> {
    let (status, migration) = (monitor.ask(&QueryStatus {})?, monitor.ask(&QueryMigrate {})?);
    let status = monitor.hear(status, COMMAND_TIMEOUT)?;
    let migration = monitor.hear(migration, COMMAND_TIMEOUT)?;
    if status.is_elsewhere() {
        return Err(Away::Elsewhere(status.status));
    }
    stays(migration)?;
    Ok(status)
}

/// That no migration is under way.
///
/// # Errors
/// `Migrating`.
pub(super) fn stays(migration: Migration) -> Result<(), Away> {
    if migration.is_under_way() { Err(Away::Migrating(migration.status.unwrap_or_default())) } else { Ok(()) }
}

/// A VM that ran here when it was looked at. QEMU tells of each stop by itself, so nothing has to be asked to know that it still does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched {
    ran: bool,
}

impl Watched {
    /// Looks at the VM.
    ///
    /// # Errors
    /// See [`Away`].
    pub(super) fn begin(monitor: &mut Monitor) -> Result<Self, Away> {
        // Before it is asked: a stop that QEMU tells of right after its answer must not pass for an earlier one.
        let _earlier = monitor.has_told(tells_of_a_stop)?;
        Ok(Self { ran: here(monitor)?.running })
    }

    /// Whether it has run since. False where that is not sure: then ask.
    ///
    /// # Errors
    /// Those of the connection.
    pub(super) fn has_run_since(self, monitor: &mut Monitor) -> Result<bool, MonitorError> {
        Ok(self.ran && !monitor.has_told(tells_of_a_stop)?)
    }
}

/// The vCPUs run no more: whoever stopped them, or the guest suspended itself. A migration that is over has stopped them too.
fn tells_of_a_stop(event: &Event) -> bool {
    matches!(&*event.name, "STOP" | "SUSPEND")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::point::scripted::{Scripted, answer, told};
    use serde_json::json;
    use std::os::unix::net::UnixListener;
    use std::thread;
    use std::time::Duration;

    /// Whether a VM is taken to have run since it was looked at, whose QEMU tells these events before its answers, and these after.
    fn has_run_since(before: &'static [&str], after: &'static [&str]) -> bool {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = thread::spawn(move || {
            let mut qemu = Scripted::serve(&listener, before);
            let (status, migration) = (qemu.hear(), qemu.hear());
            let runs = json!({ "return": { "running": true, "status": "running" } });
            let answers = [answer(&status, runs), answer(&migration, json!({ "return": {} }))].concat();
            // In one piece: the events are there as soon as the answers are.
            qemu.say(&format!("{answers}{}", told(after)));
            qemu
        });
        let mut monitor = Monitor::connect(&path, Duration::from_secs(10)).unwrap();
        let watched = Watched::begin(&mut monitor).unwrap();
        let _open = qemu.join().unwrap();
        watched.has_run_since(&mut monitor).unwrap()
    }

    #[test]
    fn a_vm_has_run_since_if_nothing_was_told_of_a_stop() {
        assert!(has_run_since(&["STOP", "RESUME"], &[]), "that was before");
        assert!(has_run_since(&[], &["RTC_CHANGE"]));
    }

    #[test]
    fn a_stop_that_is_told_right_after_the_answer_counts() {
        assert!(!has_run_since(&[], &["STOP"]));
        assert!(!has_run_since(&[], &["STOP", "RESUME"]), "it is asked again");
        assert!(!has_run_since(&[], &["SUSPEND"]));
    }
}
