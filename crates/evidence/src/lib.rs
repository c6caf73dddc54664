//! The most that a receipt may be worth, written down a second time from `docs/glossary.md` and `docs/reasons.md`.
//!
//! `snapshot::judge` walks through a receipt and gathers reasons; this only asks, for each level, whether everything
//! that the level needs is there. The two share no code: where they disagree, one of them is wrong.

pub mod receipts;

use guest_protocol::stillpoint::{
    ApplicationReport, FilesystemReport, FilesystemState, GuestDisk, GuestReport, HookCall, HookOutcome,
    Policy, ThawCause,
};
use snapshot::Level;
use snapshot::receipt::{Agent, DiskEvidence, Receipt};

/// The highest level for which all evidence is there. A judgement above it is wrong; one below it need not be.
pub fn most(receipt: &Receipt) -> Level {
    if !cut_at_once(receipt) {
        return Level::None;
    }
    let frozen = match &receipt.agent {
        // Where no virtual CPU was, nobody froze or quiesced anything.
        _ if receipt.point.as_ref().is_some_and(|point| point.shut_off) => return Level::Crash,
        Agent::None => false,
        Agent::QemuGa { .. } => frozen_by_stock(receipt),
        Agent::Stillpoint { .. } => frozen_by_ours(receipt),
    };
    match receipt.guest.as_ref().filter(|_| matches!(receipt.agent, Agent::Stillpoint { .. })) {
        Some(report) if anything_outside(receipt, report) => Level::None,
        Some(report) if frozen && applications_held(receipt, report) => Level::Application,
        _ if frozen => Level::Filesystem,
        _ => Level::Crash,
    }
}

/// The same for one application of the report.
pub fn most_of(receipt: &Receipt, application: &ApplicationReport) -> Level {
    let Some(report) = receipt.guest.as_ref().filter(|_| cut_at_once(receipt)) else { return Level::None };
    let parts: Vec<Vec<&FilesystemReport>> = application
        .device_numbers
        .iter()
        .map(|number| report.filesystems.iter().filter(|part| part.device_number == *number).collect())
        .collect();
    let somewhere = |part: &&FilesystemReport| inside(receipt, part) || part.read_only;
    if parts.is_empty() || parts.iter().any(|part| part.is_empty() || !part.iter().all(somewhere)) {
        return Level::None;
    }
    let frozen = |part: &&FilesystemReport| held(receipt, report) && stood_still(part);
    if !parts.iter().flatten().all(|part| frozen(part) || part.read_only) {
        return Level::Crash;
    }
    let granted = application.policy != Policy::Off && application.quiesced && application.held;
    let keeps = match &application.attested_by {
        Some(hook) => vouched(report, hook),
        None => application.crash_safe || application.locked,
    };
    let now = application.saved_ms_before.is_none();
    if granted && keeps && now && held(receipt, report) { Level::Application } else { Level::Filesystem }
}

/// A hook of this name took part, and every call of every such hook went well.
fn vouched(report: &GuestReport, name: &str) -> bool {
    let calls: Vec<_> = report
        .hooks
        .iter()
        .filter(|hook| hook.path == name)
        .flat_map(|hook| [&hook.freeze, &hook.thaw])
        .collect();
    let went_well =
        |call: &&Option<HookCall>| matches!(call, Some(call) if call.outcome == HookOutcome::Succeeded);
    !calls.is_empty() && calls.iter().all(went_well)
}

/// *crash*: one instant for every disk that counts, but for those that someone left out.
fn cut_at_once(receipt: &Receipt) -> bool {
    let Some(point) = &receipt.point else { return false };
    let all = || receipt.disks.iter().all(|disk| point.disks.contains(&disk.name));
    let stood_still = point.vcpus_stopped || point.shut_off;
    match point.disks.len() {
        _ if !point.writers_unseen.is_empty() => false,
        0 => false,
        1 => receipt.disks_chosen || all(),
        _ => stood_still && (receipt.disks_chosen || all()),
    }
}

fn frozen_by_stock(receipt: &Receipt) -> bool {
    const CANNOT: [&str; 6] = ["vfat", "msdos", "exfat", "squashfs", "iso9660", "fuseblk"];
    receipt.stock.as_ref().is_some_and(|freeze| {
        let mut devices: Vec<&String> = freeze.filesystems.iter().map(|part| &part.device).collect();
        devices.sort();
        devices.dedup();
        in_order(receipt)
            && !devices.is_empty()
            && freeze.filesystems.iter().all(|part| !CANNOT.contains(&part.kind.as_str()))
            && freeze.frozen_after_point
            && freeze.frozen >= devices.len() as u64
            && freeze.thawed >= freeze.frozen
    })
}

fn frozen_by_ours(receipt: &Receipt) -> bool {
    const GAPS: [&str; 4] =
        ["zfs_cannot_freeze", "too_many_namespaces", "too_many_filesystems", "agent_restarted"];
    receipt.guest.as_ref().is_some_and(|report| {
        let mut codes = report.uncovered.iter().chain(&report.reasons).map(|reason| reason.code.as_str());
        let counted = |part: &&FilesystemReport| inside(receipt, part);
        held(receipt, report)
            && !codes.any(|code| GAPS.contains(&code))
            && report.filesystems.iter().any(|part| counted(&part))
            && report.filesystems.iter().filter(counted).all(|part| stood_still(part) || part.read_only)
    })
}

/// *application*: at least one, and every one of them.
fn applications_held(receipt: &Receipt, report: &GuestReport) -> bool {
    let all = |one: &ApplicationReport| most_of(receipt, one) >= Level::Application;
    !report.applications.is_empty()
        && report.applications.iter().all(all)
        && !report
            .reasons
            .iter()
            .chain(&report.uncovered)
            .any(|reason| matches!(&*reason.code, "too_many_applications" | "discovery_incomplete"))
}

/// The three messages came in their order.
fn in_order(receipt: &Receipt) -> bool {
    let order = receipt.order;
    order.frozen_before_point && order.point_before_thaw && order.thaw_answered
}

/// This run's freeze lasted until this run's thaw.
fn held(receipt: &Receipt, report: &GuestReport) -> bool {
    in_order(receipt) && report.id == receipt.run && report.thawed_by == ThawCause::Host
}

fn stood_still(part: &FilesystemReport) -> bool {
    matches!(part.state, FilesystemState::Held | FilesystemState::Unwritten)
}

/// Something that can be written, or an application's file, lies where nobody cut, and nobody chose to leave it out.
fn anything_outside(receipt: &Receipt, report: &GuestReport) -> bool {
    let chosen = |part: &FilesystemReport| receipt.disks_chosen && !on(receipt, part, None);
    let outside = |part: &FilesystemReport| !part.read_only && !inside(receipt, part) && !chosen(part);
    report.filesystems.iter().any(outside)
        || report.applications.iter().any(|application| most_of(receipt, application) == Level::None)
}

/// Every disk that carries it was cut.
fn inside(receipt: &Receipt, part: &FilesystemReport) -> bool {
    on(receipt, part, receipt.point.as_ref().map(|point| &point.disks[..]))
}

/// Every disk that carries it is one of these, or, with no list, is not known to be one that was left out.
fn on(receipt: &Receipt, part: &FilesystemReport, names: Option<&[String]>) -> bool {
    let cut = receipt.point.as_ref().map_or(&[][..], |point| &point.disks[..]);
    match names {
        Some(names) => {
            let known = |disk| same(receipt, disk).is_some_and(|disk| names.contains(&disk.name));
            !part.disks.is_empty() && part.disks.iter().all(known)
        }
        None => {
            let left_out = |disk| same(receipt, disk).is_some_and(|disk| !cut.contains(&disk.name));
            !part.disks.iter().any(left_out)
        }
    }
}

/// The one disk of the host with this serial number, else the one with this address.
fn same<'r>(receipt: &'r Receipt, guest: &GuestDisk) -> Option<&'r DiskEvidence> {
    let alike = |disk: &&DiskEvidence| match (&disk.serial, &guest.serial) {
        (Some(host), Some(guest)) if !guest.is_empty() => {
            host == guest || guest.len() == 20 && host.get(..20) == Some(guest.as_str())
        }
        _ => false,
    };
    let beside = |disk: &&DiskEvidence| guest.pci.is_some() && disk.pci == guest.pci;
    let single = |found: Vec<&'r DiskEvidence>| if found.len() == 1 { found.first().copied() } else { None };
    single(receipt.disks.iter().filter(alike).collect())
        .or_else(|| single(receipt.disks.iter().filter(beside).collect()))
}
