//! What a VM looks like now: its disks, what counts and what does not, and who answers in the guest.

use crate::guest::Guest;
use crate::register::{Register, RegisterError, VmEntry};
use crate::seen::Seen;
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
    /// The VM is shut off, and was last seen then: milliseconds since 1970. Absent: it was asked now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen_ms: Option<u64>,
    /// What the VM is made of.
    pub definition: Definition,
    /// Disks that count, and the others.
    pub drives: Drives,
    /// Who answers in the guest, in words.
    pub agent: String,
}

/// Why a VM could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// Its monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// What was last seen of it.
    #[error(transparent)]
    Register(#[from] RegisterError),
}

/// Asks a VM's monitor and agent; of a VM that is shut off, tells what was last seen.
///
/// # Errors
/// See [`SurveyError`]; a silent agent is no error.
pub fn survey(register: &Register, entry: &VmEntry) -> Result<Survey, SurveyError> {
    let mut monitor = match Monitor::connect(&entry.qmp, Duration::from_secs(10)) {
        Err(nobody) if nobody.is_nobody() => {
            let Some(Seen { at_ms, definition, drives }) = Seen::last(register, &entry.name)? else {
                return Err(nobody.into());
            };
            let agent = "not asked: the VM is shut off".to_owned();
            return Ok(Survey { running: false, last_seen_ms: Some(at_ms), definition, drives, agent });
        }
        connected => connected?,
    };
    let running = monitor.run(&qmp::machine::QueryStatus {})?.running;
    let seen = Seen::now(machine::definition(&mut monitor)?, machine::drives(&mut monitor)?);
    seen.keep(register, &entry.name)?;
    let agent =
        if running { Guest::who(entry) } else { "not asked: the virtual CPUs are stopped".to_owned() };
    let Seen { definition, drives, .. } = seen;
    Ok(Survey { running, last_seen_ms: None, definition, drives, agent })
}
