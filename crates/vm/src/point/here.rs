//! Whether the VM runs in this QEMU, and stays.
//!
//! Whoever lets a VM go on that has migrated runs it twice, on one set of disks; whoever stops it while it migrates may leave it
//! stopped where it arrives.

use crate::monitor::{COMMAND_TIMEOUT, Monitor, MonitorError};
use qmp::machine::{QueryMigrate, QueryStatus, Status};

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
    if migration.is_under_way() {
        return Err(Away::Migrating(migration.status.unwrap_or_default()));
    }
    Ok(status)
}
