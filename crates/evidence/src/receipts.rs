//! Receipts of every kind, made from bytes: most of them nearly perfect, with anything spoiled.

use arbitrary::{Result, Unstructured};
use guest_protocol::stillpoint::{
    ApplicationReport, FilesystemReport, FilesystemState, GuestDisk, GuestReport, HookCall, HookOutcome,
    HookReport, Policy, Reason, ThawCause,
};
use snapshot::receipt::{Agent, DiskEvidence, Order, Point, Receipt, StockFilesystem, StockFreeze};

const DISKS: [&str; 4] = ["root", "data", "log", "swap"];
const NUMBERS: [&str; 4] = ["254:0", "254:16", "254:32", "8:1"];
const RUNS: [&str; 2] = ["run1", "run0"];
const SERIALS: [&str; 6] = ["root", "data", "log", "", "01234567890123456789", "0123456789012345678901"];
const PCI: [&str; 2] = ["0000:00:04.0", "0000:00:05.0"];
const HOOKS: [&str; 2] = ["hook", "other"];
const CODES: [&str; 6] = [
    "zfs_cannot_freeze",
    "too_many_namespaces",
    "too_many_filesystems",
    "too_many_applications",
    "network_filesystem",
    "early_thaw",
];
const STATES: [FilesystemState; 9] = [
    FilesystemState::Freezable,
    FilesystemState::Held,
    FilesystemState::EarlyThaw,
    FilesystemState::Unwritten,
    FilesystemState::Unsupported,
    FilesystemState::HeldByOther,
    FilesystemState::Unreachable,
    FilesystemState::Failed,
    FilesystemState::NotFrozen,
];
const CAUSES: [ThawCause; 5] = [
    ThawCause::NothingFrozen,
    ThawCause::Host,
    ThawCause::FailedFreeze,
    ThawCause::LeaseEnded,
    ThawCause::AgentGone,
];

/// Whether, one time in sixteen, something is wrong.
fn wrong(bytes: &mut Unstructured<'_>) -> Result<bool> {
    bytes.ratio(1, 16)
}

fn one_of<T: Clone>(bytes: &mut Unstructured<'_>, choices: &[T], right: usize) -> Result<T> {
    Ok(if wrong(bytes)? { bytes.choose(choices)?.clone() } else { choices[right].clone() })
}

fn few<T>(
    bytes: &mut Unstructured<'_>,
    most: usize,
    mut make: impl FnMut(&mut Unstructured<'_>, usize) -> Result<T>,
) -> Result<Vec<T>> {
    let count = bytes.int_in_range(0..=most)?;
    (0..count).map(|at| make(bytes, at)).collect()
}

/// A receipt.
///
/// # Errors
/// When the bytes do not suffice.
pub fn receipt(bytes: &mut Unstructured<'_>) -> Result<Receipt> {
    let disks = few(bytes, 4, |bytes, at| {
        Ok(DiskEvidence {
            name: one_of(bytes, &DISKS, at)?.to_owned(),
            serial: serial(bytes, at)?,
            pci: pci(bytes)?,
            ..DiskEvidence::default()
        })
    })?;
    let mut names: Vec<String> = disks.iter().map(|disk| disk.name.clone()).collect();
    if wrong(bytes)? {
        names.pop();
    }
    if wrong(bytes)? {
        names.push((*bytes.choose(&DISKS)?).to_owned());
    }
    let mut point = Point { vcpus_stopped: !wrong(bytes)?, disks: names, ..Point::default() };
    if wrong(bytes)? {
        point.shut_off = true;
        point.writers_unseen = few(bytes, 1, |bytes, at| Ok(one_of(bytes, &DISKS, at)?.to_owned()))?;
    }
    let version = "1".to_owned();
    let agents = [Agent::Stillpoint { version: version.clone() }, Agent::QemuGa { version }, Agent::None];
    let agent = if bytes.ratio(1, 4)? { bytes.choose(&agents)?.clone() } else { agents[0].clone() };
    Ok(Receipt {
        vm: "vm".to_owned(),
        run: "run1".to_owned(),
        point: if wrong(bytes)? { None } else { Some(point) },
        disks,
        disks_chosen: bytes.ratio(1, 4)?,
        order: Order {
            frozen_before_point: !wrong(bytes)?,
            point_before_thaw: !wrong(bytes)?,
            thaw_answered: !wrong(bytes)?,
            freeze_sent_ms: None,
        },
        guest: if wrong(bytes)? { None } else { Some(report(bytes)?) },
        stock: if agent == agents[1] && !wrong(bytes)? { Some(stock(bytes)?) } else { None },
        agent,
        ..Receipt::default()
    })
}

fn serial(bytes: &mut Unstructured<'_>, at: usize) -> Result<Option<String>> {
    let right = at.min(2);
    Ok(if wrong(bytes)? { None } else { Some(one_of(bytes, &SERIALS, right)?.to_owned()) })
}

fn pci(bytes: &mut Unstructured<'_>) -> Result<Option<String>> {
    Ok(if bytes.ratio(1, 4)? { Some((*bytes.choose(&PCI)?).to_owned()) } else { None })
}

fn report(bytes: &mut Unstructured<'_>) -> Result<GuestReport> {
    let reason = |bytes: &mut Unstructured<'_>, _| Ok(Reason::new(bytes.choose(&CODES)?, "", ""));
    Ok(GuestReport {
        id: one_of(bytes, &RUNS, 0)?.to_owned(),
        thawed_by: one_of(bytes, &CAUSES, 1)?,
        filesystems: few(bytes, 4, filesystem)?,
        applications: few(bytes, 2, application)?,
        hooks: few(bytes, 2, hook)?,
        uncovered: if wrong(bytes)? { few(bytes, 1, reason)? } else { vec![] },
        reasons: if wrong(bytes)? { few(bytes, 1, reason)? } else { vec![] },
        ..GuestReport::default()
    })
}

fn filesystem(bytes: &mut Unstructured<'_>, at: usize) -> Result<FilesystemReport> {
    let mut disks = vec![GuestDisk { serial: serial(bytes, at)?, pci: pci(bytes)?, ..GuestDisk::default() }];
    if wrong(bytes)? {
        disks.pop();
    }
    if wrong(bytes)? {
        let other = bytes.choose_index(3)?;
        disks.push(GuestDisk { serial: serial(bytes, other)?, ..GuestDisk::default() });
    }
    Ok(FilesystemReport {
        device_number: one_of(bytes, &NUMBERS, at)?.to_owned(),
        disks,
        read_only: bytes.ratio(1, 8)?,
        state: one_of(bytes, &STATES, 1)?,
        ..FilesystemReport::default()
    })
}

fn application(bytes: &mut Unstructured<'_>, at: usize) -> Result<ApplicationReport> {
    let policies = [Policy::Preferred, Policy::Required, Policy::Off];
    Ok(ApplicationReport {
        kind: "postgresql".to_owned(),
        instance: at.to_string(),
        policy: one_of(bytes, &policies, 0)?,
        device_numbers: few(bytes, 2, |bytes, at| Ok(one_of(bytes, &NUMBERS, at)?.to_owned()))?,
        quiesced: !wrong(bytes)?,
        locked: bytes.ratio(1, 4)?,
        held: !wrong(bytes)?,
        crash_safe: !wrong(bytes)?,
        saved_ms_before: if wrong(bytes)? { Some(900) } else { None },
        attested_by: if bytes.ratio(1, 4)? { Some((*bytes.choose(&HOOKS)?).to_owned()) } else { None },
        ..ApplicationReport::default()
    })
}

fn hook(bytes: &mut Unstructured<'_>, at: usize) -> Result<HookReport> {
    let outcomes = [HookOutcome::Succeeded, HookOutcome::Failed, HookOutcome::TimedOut, HookOutcome::Refused];
    let call = |bytes: &mut Unstructured<'_>| {
        let outcome = one_of(bytes, &outcomes, 0)?;
        Ok(if wrong(bytes)? { None } else { Some(HookCall { outcome, ..HookCall::default() }) })
    };
    Ok(HookReport {
        path: one_of(bytes, &HOOKS, at.min(1))?.to_owned(),
        freeze: call(bytes)?,
        thaw: call(bytes)?,
    })
}

fn stock(bytes: &mut Unstructured<'_>) -> Result<StockFreeze> {
    const KINDS: [&str; 3] = ["ext4", "xfs", "vfat"];
    let filesystems = few(bytes, 3, |bytes, at| {
        Ok(StockFilesystem {
            mountpoint: format!("/{at}"),
            kind: one_of(bytes, &KINDS, 0)?.to_owned(),
            device: one_of(bytes, &DISKS, at)?.to_owned(),
        })
    })?;
    let frozen = filesystems.len() as u64;
    Ok(StockFreeze {
        frozen: if wrong(bytes)? { bytes.int_in_range(0..=4)? } else { frozen },
        thawed: if wrong(bytes)? { bytes.int_in_range(0..=4)? } else { frozen },
        frozen_after_point: !wrong(bytes)?,
        filesystems,
    })
}
