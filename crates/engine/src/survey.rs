//! What a VM looks like now: its disks, what counts and what does not, and who answers in the guest.

use crate::guest::Guest;
use crate::register::VmEntry;
use serde::Serialize;
use std::time::Duration;
use vm::disks::Drives;
use vm::machine::{self, Definition};
use vm::monitor::{Monitor, MonitorError};

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// The virtual CPUs run.
    pub running: bool,
    /// What the VM is made of.
    pub definition: Definition,
    /// Disks that count, and the others.
    pub drives: Drives,
    /// Who answers in the guest, in words.
    pub agent: String,
}

/// Asks a VM's monitor and agent.
///
/// # Errors
/// Those of the monitor; a silent agent is no error.
pub fn survey(entry: &VmEntry) -> Result<Survey, MonitorError> {
    let mut monitor = Monitor::connect(&entry.qmp, Duration::from_secs(10))?;
    let running = monitor.run(&qmp::machine::QueryStatus {})?.running;
    let definition = machine::definition(&mut monitor)?;
    let drives = machine::drives(&mut monitor)?;
    let agent =
        if running { Guest::who(entry) } else { "not asked: the virtual CPUs are stopped".to_owned() };
    Ok(Survey { running, definition, drives, agent })
}
