//! The level, computed from the receipt alone.
//!
//! It starts at *none* and is earned: an atomic cut makes it *crash*, a freeze that demonstrably held around the
//! cut makes a file system *filesystem*, an application's own flush or lock on top makes it *application*. The VM
//! is worth what its least part is worth. Missing evidence is never read kindly.

use crate::receipt::{Agent, DiskEvidence, Receipt, StockFreeze};
use crate::{Level, Reason, Request};
use guest_protocol::stillpoint::{
    ApplicationPolicy, ApplicationReport, FilesystemReport, FilesystemState, GuestDisk, GuestReport,
    HookCall, HookOutcome, HookReport, Policy, ThawCause,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a receipt is worth, and why it is not worth more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The VM's level.
    pub level: Level,
    /// Why, in the order of finding; also what the snapshot does not cover.
    pub reasons: Vec<Reason>,
    /// Each application's own level, in the order of the guest's report.
    pub applications: Vec<(Level, Vec<Reason>)>,
}

/// Computes the level of a receipt.
pub fn judge(receipt: &Receipt) -> Verdict {
    let mut reasons = receipt.reasons.clone();
    let mut applications = Vec::new();
    let mut level = cut(receipt, &mut reasons);
    if level >= Level::Crash {
        let inside = match &receipt.agent {
            _ if receipt.point.as_ref().is_some_and(|point| point.shut_off) => {
                shut_off(receipt, &mut reasons)
            }
            Agent::None => without_agent(receipt, &mut reasons),
            Agent::QemuGa { version } => stock(receipt, version, &mut reasons),
            Agent::Stillpoint { .. } => ours(receipt, &mut reasons, &mut applications),
        };
        level = inside;
    }
    Verdict { level, reasons, applications }
}

/// The application whose policy is `required` and that did not reach *application*, if any. One that nobody found, or
/// that nobody was there to look for, is not quiesced either.
pub fn required_unmet(request: &Request, receipt: &Receipt, verdict: &Verdict) -> Option<Reason> {
    let reports = receipt.guest.as_ref().map_or(&[][..], |guest| &guest.applications[..]);
    let told = reports.iter().zip(&verdict.applications).find_map(|(report, (level, why))| {
        let unmet = report.policy == Policy::Required && *level < Level::Application;
        unmet.then(|| {
            let subject = format!("{} {}", report.kind, report.instance);
            // The guest's own words come first: what is concluded from them ("not held frozen") explains less.
            let told = if report.quiesced { None } else { report.reasons.last() };
            let cause = told.or(why.last()).map_or("it was not quiesced", |reason| &reason.message);
            Reason::new("required_application_not_quiesced", subject, cause)
        })
    });
    told.or_else(|| required_unseen(request, reports, verdict))
}

/// Asks the wish itself: a report that does not name what was required, or no report, must not pass for quiesced.
fn required_unseen(request: &Request, reports: &[ApplicationReport], verdict: &Verdict) -> Option<Reason> {
    let held = |wanted: &&ApplicationPolicy| {
        reports.iter().zip(&verdict.applications).any(|(report, (level, _))| {
            let is_it = report.kind == wanted.kind
                && wanted.instance.as_ref().is_none_or(|instance| *instance == report.instance);
            is_it && *level >= Level::Application
        })
    };
    let mut required = request.applications.iter().filter(|policy| policy.policy == Policy::Required);
    let unmet = required.find(|wanted| !request.no_data && !held(wanted))?;
    let subject = [&unmet.kind[..], unmet.instance.as_deref().unwrap_or_default()].join(" ");
    let cause = verdict.reasons.first().map_or("the guest did not name it", |reason| &reason.message);
    Some(Reason::new("required_application_not_quiesced", subject.trim_end(), cause))
}

/// Was there one cut through all the disks that were wanted?
fn cut(receipt: &Receipt, reasons: &mut Vec<Reason>) -> Level {
    let Some(point) = &receipt.point else {
        reasons.push(Reason::new("no_point", &receipt.vm, "no disk was cut"));
        return Level::None;
    };
    if point.disks.is_empty() {
        reasons.push(Reason::new("no_disks", &receipt.vm, "the snapshot holds no disk"));
        return Level::None;
    }
    if !point.writers_unseen.is_empty() {
        let message = "lies on a block device or another host's storage, where a write during the copy would not have been \
                       seen";
        let unseen = point.writers_unseen.iter().map(|disk| Reason::new("writers_unseen", disk, message));
        reasons.extend(unseen);
        return Level::None;
    }
    if point.disks.len() > 1 && !point.vcpus_stopped && !point.shut_off {
        let message = "the disks were cut one after the other while the guest ran";
        reasons.push(Reason::new("point_not_atomic", &receipt.vm, message));
        return Level::None;
    }
    for disk in receipt.disks.iter().filter(|disk| !point.disks.contains(&disk.name)) {
        let message = if receipt.disks_chosen { "left out by choice" } else { "not part of the point" };
        reasons.push(Reason::new("disk_outside_point", &disk.name, message));
        if !receipt.disks_chosen {
            return Level::None;
        }
    }
    Level::Crash
}

/// Whoever claims to have been asked in a VM that is shut off proves nothing.
fn shut_off(receipt: &Receipt, reasons: &mut Vec<Reason>) -> Level {
    let message = "it was shut off, and nobody saw how it ended: after a proper shutdown everything is in, after a power \
                   failure what was written until then";
    reasons.push(Reason::new("vm_shut_off", &receipt.vm, message));
    Level::Crash
}

fn without_agent(receipt: &Receipt, reasons: &mut Vec<Reason>) -> Level {
    // The engine may already have said why nobody answered, or that nobody was asked.
    if reasons.is_empty() {
        reasons.push(Reason::new(
            "no_agent",
            &receipt.vm,
            "no agent in the guest: nothing was flushed or frozen",
        ));
    }
    Level::Crash
}

/// File system types that qemu-ga lists but no kernel can freeze.
const UNFREEZABLE: [&str; 6] = ["vfat", "msdos", "exfat", "squashfs", "iso9660", "fuseblk"];

/// A stock qemu-ga proves a freeze by its count before, its status after the point, and its count at the thaw.
fn stock(receipt: &Receipt, version: &str, reasons: &mut Vec<Reason>) -> Level {
    let Some(freeze) = &receipt.stock else {
        reasons.push(Reason::new("not_frozen", &receipt.vm, "the guest was not frozen"));
        return Level::Crash;
    };
    if let Some(reason) = stock_gap(receipt, freeze) {
        reasons.push(reason);
        return Level::Crash;
    }
    for filesystem in freeze.filesystems.iter().filter(|f| UNFREEZABLE.contains(&f.kind.as_str())) {
        let message = format!("{} cannot be frozen; qemu-ga skips it in silence", filesystem.kind);
        reasons.push(Reason::new("filesystem_not_frozen", &filesystem.mountpoint, message));
    }
    if freeze.filesystems.iter().any(|f| UNFREEZABLE.contains(&f.kind.as_str())) {
        return Level::Crash;
    }
    let message = format!("qemu-ga {version} froze the file systems but quiesces no application");
    reasons.push(Reason::new("stock_agent", &receipt.vm, message));
    Level::Filesystem
}

fn stock_gap(receipt: &Receipt, freeze: &StockFreeze) -> Option<Reason> {
    let vm = &receipt.vm;
    let mut devices: Vec<&str> = freeze
        .filesystems
        .iter()
        .filter(|f| !UNFREEZABLE.contains(&f.kind.as_str()))
        .map(|f| f.device.as_str())
        .collect();
    devices.sort_unstable();
    devices.dedup();
    if !receipt.order.proves_inside() {
        return Some(unproven(receipt));
    }
    if freeze.frozen == 0 || devices.is_empty() {
        return Some(Reason::new("not_frozen", vm, "qemu-ga froze no file system"));
    }
    if freeze.frozen < devices.len() as u64 {
        let message = format!("qemu-ga froze {} of {} file systems", freeze.frozen, devices.len());
        return Some(Reason::new("filesystem_not_frozen", vm, message));
    }
    if !freeze.frozen_after_point || freeze.thawed < freeze.frozen {
        let message = "qemu-ga did not hold the freeze until the thaw";
        return Some(Reason::new("early_thaw", vm, message));
    }
    None
}

fn unproven(receipt: &Receipt) -> Reason {
    let order = receipt.order;
    let (code, message) = if !order.frozen_before_point {
        ("not_frozen", "the guest had not said that it is frozen when the disks were cut")
    } else if !order.point_before_thaw {
        ("freeze_unproven", "the disks were cut only after the thaw had been sent")
    } else {
        ("thaw_unanswered", "the guest did not say how its freeze ended")
    };
    Reason::new(code, &receipt.vm, message)
}

fn ours(receipt: &Receipt, reasons: &mut Vec<Reason>, applications: &mut Vec<(Level, Vec<Reason>)>) -> Level {
    let Some(report) = &receipt.guest else {
        reasons.push(if receipt.order.proves_inside() {
            Reason::new("no_report", &receipt.vm, "the guest thawed but said nothing of its freeze")
        } else {
            unproven(receipt)
        });
        return Level::Crash;
    };
    reasons.extend(report.reasons.iter().cloned());
    reasons.extend(report.uncovered.iter().cloned());
    reasons.extend(unknown_writers(report));
    let held = freeze_held(receipt, report, reasons);
    // What did not hold says nothing about any part, however well the parts look.
    let mut level = if held { Level::Clean } else { Level::Crash };
    let mut parts = BTreeMap::new();
    let mut counted = 0;
    for filesystem in &report.filesystems {
        let (worth, counts) = filesystem_level(receipt, filesystem, held, reasons);
        // A guest that names one twice is believed the lesser.
        let part = parts.entry(filesystem.device_number.as_str()).or_insert(worth);
        *part = worth.min(*part);
        if counts {
            counted += 1;
            level = level.min(worth);
        }
    }
    let gaps = report.uncovered.iter().chain(&report.reasons);
    level = gaps.filter_map(|reason| gap(&reason.code)).fold(level, Level::min);
    if counted == 0 {
        let message = "the guest named no file system on the disks of the snapshot";
        reasons.push(Reason::new("no_filesystem_reported", &receipt.vm, message));
        level = level.min(Level::Crash);
    }
    for application in &report.applications {
        let (worth, why) = application_level(application, &parts, &report.hooks);
        reasons.extend(attested(application, worth));
        reasons.extend(why.iter().filter(|_| worth < Level::Application).cloned());
        level = level.min(worth);
        applications.push((worth, why));
    }
    if report.applications.is_empty() && level > Level::Filesystem {
        let message = "no application was found in the guest, so none vouches for its data";
        reasons.push(Reason::new("no_application_found", &receipt.vm, message));
        level = Level::Filesystem;
    }
    level
}

/// The most that is left when the guest could not look at, or freeze, a part of itself.
fn gap(code: &str) -> Option<Level> {
    match code {
        // Local data that goes on being written, or that nobody looked for.
        "zfs_cannot_freeze" | "too_many_namespaces" | "too_many_filesystems" => Some(Level::Crash),
        // The next agent knows what was frozen, and no more what could not be.
        "agent_restarted" => Some(Level::Crash),
        "too_many_applications" | "discovery_incomplete" => Some(Level::Filesystem),
        _ => None,
    }
}

/// Did this run's freeze hold around the point?
fn freeze_held(receipt: &Receipt, report: &GuestReport, reasons: &mut Vec<Reason>) -> bool {
    if !receipt.order.proves_inside() {
        reasons.push(unproven(receipt));
        return false;
    }
    if report.id != receipt.run {
        let message = "the guest's report belongs to another run";
        reasons.push(Reason::new("freeze_unproven", &receipt.vm, message));
        return false;
    }
    let message = match report.thawed_by {
        ThawCause::Host => return true,
        ThawCause::NothingFrozen => "no file system was frozen",
        ThawCause::FailedFreeze => "the freeze failed and was undone",
        ThawCause::LeaseEnded => "the lease ended before the host thawed",
        ThawCause::AgentGone => "the agent died or was stopped during the freeze",
    };
    let code = if report.thawed_by == ThawCause::LeaseEnded { "lease_ended" } else { "not_frozen" };
    reasons.push(Reason::new(code, &receipt.vm, message));
    false
}

/// The level of one file system, and whether it counts for the VM's.
fn filesystem_level(
    receipt: &Receipt,
    filesystem: &FilesystemReport,
    held: bool,
    reasons: &mut Vec<Reason>,
) -> (Level, bool) {
    match place(receipt, filesystem) {
        Place::Inside => {}
        Place::LeftOut(disk) => {
            let message = format!("lies on disk {disk}, which was left out by choice");
            reasons.push(Reason::new("filesystem_left_out", &filesystem.mountpoint, message));
            return (Level::None, false);
        }
        Place::Outside(disk) => {
            let message = format!("lies on {disk}, which is no disk of the point");
            reasons.push(Reason::new("filesystem_outside_point", &filesystem.mountpoint, message));
            // What cannot be written needs no point.
            return if filesystem.read_only { (Level::Filesystem, false) } else { (Level::None, true) };
        }
    }
    if filesystem.read_only {
        return (freeze_level(held), true);
    }
    if held && matches!(filesystem.state, FilesystemState::Held | FilesystemState::Unwritten) {
        return (freeze_level(held), true);
    }
    let message = match filesystem.state {
        FilesystemState::Held | FilesystemState::Unwritten => {
            return (Level::Crash, true); // the freeze as a whole has its reason already
        }
        FilesystemState::EarlyThaw => "was thawed by someone else before our thaw",
        FilesystemState::Unsupported => "cannot be frozen, and was written meanwhile",
        FilesystemState::HeldByOther => "is frozen by someone else",
        FilesystemState::Unreachable => "has no mount point that could be opened",
        FilesystemState::Failed => "refused the freeze",
        FilesystemState::NotFrozen | FilesystemState::Freezable => "was not frozen",
    };
    let code = match filesystem.state {
        FilesystemState::EarlyThaw => "early_thaw",
        FilesystemState::HeldByOther => "held_by_other",
        _ => "filesystem_not_frozen",
    };
    reasons.push(Reason::new(code, &filesystem.mountpoint, message));
    (Level::Crash, true)
}

/// Highest level that a file system can carry: its applications may lift the VM above *filesystem*.
const fn freeze_level(held: bool) -> Level {
    if held { Level::Clean } else { Level::Filesystem }
}

enum Place {
    Inside,
    LeftOut(String),
    Outside(String),
}

fn place(receipt: &Receipt, filesystem: &FilesystemReport) -> Place {
    let point = receipt.point.as_ref().map_or(&[][..], |point| &point.disks[..]);
    if filesystem.disks.is_empty() {
        return Place::Outside(format!("{} (no disk known)", filesystem.device));
    }
    for disk in &filesystem.disks {
        match host_disk(receipt, disk) {
            None => return Place::Outside(disk.name.clone()),
            Some(found) if point.contains(&found.name) => {}
            Some(found) if receipt.disks_chosen => return Place::LeftOut(found.name.clone()),
            Some(found) => return Place::Outside(found.name.clone()),
        }
    }
    Place::Inside
}

/// The host's disk that a guest's disk is: by serial, else by PCI address; never by order or size.
fn host_disk<'r>(receipt: &'r Receipt, guest: &GuestDisk) -> Option<&'r DiskEvidence> {
    let only = |matching: Vec<&'r DiskEvidence>| match matching[..] {
        [disk] => Some(disk),
        _ => None,
    };
    let by_serial = |serial: &String| {
        only(receipt.disks.iter().filter(|disk| same_serial(disk.serial.as_deref(), serial)).collect())
    };
    let by_pci =
        |pci: &String| only(receipt.disks.iter().filter(|disk| disk.pci.as_ref() == Some(pci)).collect());
    guest.serial.as_ref().and_then(by_serial).or_else(|| guest.pci.as_ref().and_then(by_pci))
}

/// virtio-blk shows the guest at most 20 bytes of a serial. Source: VIRTIO_BLK_ID_BYTES, virtio 1.2 section 5.2.6.
fn same_serial(host: Option<&str>, guest: &str) -> bool {
    host.is_some_and(|host| {
        !guest.is_empty()
            && (host == guest || (guest.len() == 20 && host.as_bytes().starts_with(guest.as_bytes())))
    })
}

/// Whose word it is, where a level rests on it.
fn attested(application: &ApplicationReport, worth: Level) -> Option<Reason> {
    let hook = application.attested_by.as_ref().filter(|_| worth >= Level::Application)?;
    let subject = format!("{} {}", application.kind, application.instance);
    Some(Reason::new(
        "attested",
        subject,
        format!("attested by {hook}: a hook's word, not seen by the agent"),
    ))
}

/// A hook's word counts if the hook was called before and after, and had no complaint.
fn hook_succeeded(path: &str, hooks: &[HookReport]) -> bool {
    let good =
        |call: &Option<HookCall>| call.as_ref().is_some_and(|call| call.outcome == HookOutcome::Succeeded);
    let mut named = hooks.iter().filter(|hook| hook.path == path).peekable();
    named.peek().is_some() && named.all(|hook| good(&hook.freeze) && good(&hook.thaw))
}

fn application_level(
    application: &ApplicationReport,
    parts: &BTreeMap<&str, Level>,
    hooks: &[HookReport],
) -> (Level, Vec<Reason>) {
    let subject = format!("{} {}", application.kind, application.instance);
    let mut why = application.reasons.clone();
    let mut level = Level::Clean;
    for number in &application.device_numbers {
        match parts.get(number.as_str()) {
            Some(Level::None) | None => {
                why.push(Reason::new("outside_point", &subject, "some of its files lie outside the point"));
                return (Level::None, why);
            }
            Some(part) => level = level.min(*part),
        }
    }
    if application.device_numbers.is_empty() {
        why.push(Reason::new("outside_point", &subject, "it is not known where its files lie"));
        return (Level::None, why);
    }
    if level < Level::Filesystem {
        why.push(Reason::new("filesystem_not_frozen", &subject, "its file systems were not held frozen"));
        return (level, why);
    }
    let missing = if application.policy == Policy::Off {
        Some(("policy_off", "not quiesced, by policy"))
    } else if !application.quiesced {
        Some(("not_quiesced", "its own flush or lock was not granted"))
    } else if !application.held {
        Some(("not_held", "its server or session did not last until after the thaw"))
    } else if application.saved_ms_before.is_some() {
        Some(("saved_before_freeze", "its data was saved some time before the freeze"))
    } else if application.attested_by.as_ref().is_some_and(|hook| !hook_succeeded(hook, hooks)) {
        Some((
            "attestation_unproven",
            "the hook that vouches for it was not called, or failed, before or after",
        ))
    } else if application.attested_by.is_none() && !application.locked && !application.crash_safe {
        Some(("not_crash_safe", "it was flushed, but its own settings do not keep what it acknowledges"))
    } else {
        None
    };
    match missing {
        None => (Level::Application.min(level), why),
        Some((code, message)) => {
            if !why.iter().any(|reason| reason.code == code) {
                why.push(Reason::new(code, &subject, message));
            }
            (Level::Filesystem.min(level), why)
        }
    }
}

fn unknown_writers(report: &GuestReport) -> Option<Reason> {
    let names: Vec<&str> =
        report.unknown_writers.iter().take(8).map(|writer| writer.command.as_str()).collect();
    let more = report.unknown_writers.len().saturating_sub(names.len());
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    (!names.is_empty()).then(|| {
        let message =
            format!("{}{tail} had files open for writing and no module of its own", names.join(", "));
        Reason::new("unknown_writers", "processes", message)
    })
}

#[cfg(test)]
mod tests;
