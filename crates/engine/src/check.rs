//! The rehearsal: everything that a run does in the guest, except locks and freeze, and the level to expect.

use crate::guest::Guest;
use crate::register::{Register, RegisterError, VmEntry};
use crate::seen::Seen;
use guest_protocol::stillpoint::{CheckReport, FilesystemState, GuestReport, ThawCause};
use qmp::machine::QueryStatus;
use snapshot::receipt::{Agent, DiskEvidence, Order, Point, Receipt};
use snapshot::{Level, Reason, judge};
use std::time::Duration;
use vm::machine;
use vm::monitor::{Monitor, MonitorError};

/// What a rehearsal found.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// Who answers in the guest, in words.
    pub agent: String,
    /// The level to expect of a snapshot now.
    pub level: Level,
    /// Why not more, and what to know.
    pub reasons: Vec<Reason>,
    /// The guest's report, if our agent is there.
    pub report: Option<CheckReport>,
}

/// Why nothing was rehearsed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// What was last seen of the VM.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The agent answered, but not this.
    #[error("the agent did not answer the rehearsal: {0}")]
    Agent(String),
}

/// Rehearses.
///
/// # Errors
/// See [`CheckError`]; no agent, or a stock one, is a result and not an error.
pub fn rehearse(register: &Register, entry: &VmEntry) -> Result<Rehearsal, CheckError> {
    let mut monitor = match Monitor::connect(&entry.qmp, Duration::from_secs(10)) {
        Err(nobody) if nobody.is_nobody() && Seen::last(register, &entry.name)?.is_some() => {
            let message = "the VM is shut off: a snapshot reads its images as they are";
            let reasons = vec![Reason::new("vm_shut_off", &entry.name, message)];
            return Ok(Rehearsal { agent: message.to_owned(), level: Level::Crash, reasons, report: None });
        }
        connected => connected?,
    };
    if !monitor.run(&QueryStatus {})?.running {
        let message = "the VM is paused, so nobody in the guest can answer";
        let reasons = vec![Reason::new("vm_paused", &entry.name, message)];
        return Ok(Rehearsal { agent: message.to_owned(), level: Level::Crash, reasons, report: None });
    }
    let seen = Seen::now(machine::definition(&mut monitor)?, machine::drives(&mut monitor)?);
    seen.keep(register, &entry.name)?;
    let (mut guest, why) = Guest::connect(entry);
    let agent = guest.describe(why.as_ref());
    let Some(report) = guest.check().map_err(CheckError::Agent)? else {
        let level = if guest.can_freeze() { Level::Filesystem } else { Level::Crash };
        return Ok(Rehearsal { agent, level, reasons: why.into_iter().collect(), report: None });
    };
    let evidence = |disk: &vm::disks::Disk| DiskEvidence {
        name: disk.name.clone(),
        serial: disk.serial.clone(),
        pci: disk.pci.clone(),
        size_bytes: disk.size_bytes,
        copy: None,
    };
    let expected =
        judge(&receipt_if_all_goes_well(&report, seen.drives.disks.iter().map(evidence).collect()));
    let mut reasons = report.reasons.clone();
    reasons.extend(expected.reasons.into_iter().filter(|reason| !report.reasons.contains(reason)));
    Ok(Rehearsal { agent, level: expected.level, reasons, report: Some(report) })
}

/// The receipt of a run in which everything that can be frozen is, and every application that answered is quiesced.
fn receipt_if_all_goes_well(report: &CheckReport, disks: Vec<DiskEvidence>) -> Receipt {
    let mut filesystems = report.filesystems.clone();
    for filesystem in &mut filesystems {
        if filesystem.state == FilesystemState::Freezable {
            filesystem.state = FilesystemState::Held;
        }
    }
    let mut applications = report.applications.clone();
    for application in &mut applications {
        // Whoever could not even be asked would not be quiesced either.
        let reachable = !application.facts.is_empty();
        (application.quiesced, application.held) = (reachable, reachable);
    }
    Receipt {
        run: "rehearsal".to_owned(),
        point: Some(Point {
            vcpus_stopped: true,
            disks: disks.iter().map(|disk| disk.name.clone()).collect(),
            ..Point::default()
        }),
        disks,
        agent: Agent::Stillpoint { version: report.agent_version.clone() },
        order: Order {
            frozen_before_point: true,
            point_before_thaw: true,
            thaw_answered: true,
            ..Order::default()
        },
        guest: Some(GuestReport {
            id: "rehearsal".to_owned(),
            thawed_by: ThawCause::Host,
            filesystems,
            applications,
            uncovered: report.uncovered.clone(),
            ..GuestReport::default()
        }),
        ..Receipt::default()
    }
}
