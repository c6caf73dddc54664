//! Puts the guest's half of the receipt together, as a run goes along.

use crate::freeze::facts::View;
use crate::freeze::gather::read_bounded;
use crate::freeze::ledger::{Freeze, Ledger, Phase, Thaw};
use crate::freeze::plan::{Place, Plan};
use crate::hooks::{Claim, Hooks};
use crate::quiesce::Applications;
use guest_protocol::stillpoint::{
    APPLICATIONS_MAX, ApplicationReport, FILESYSTEMS_MAX, FilesystemReport, FilesystemState, GuestReport,
    Reason, TEXT_BYTES_MAX, ThawCause,
};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

/// Most of what no freeze covers: it is for people.
const UNCOVERED_MAX: usize = 256;
/// Most reasons with one code. There are some thirty codes, and one that lowers the level must not be lost among others.
const REASONS_MAX: usize = 64;

/// A duration as reports give it.
pub fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Nanoseconds as reports give them; a fraction counts as a whole, so that no stall shows as none.
fn ns_to_ms(ns: u64) -> u64 {
    ns.div_ceil(1_000_000)
}

pub(super) fn boot_id() -> String {
    let bytes = read_bounded(Path::new("/proc/sys/kernel/random/boot_id"), 64).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// The report in the making.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// So far.
    pub report: GuestReport,
}

impl Evidence {
    /// Of a run that has frozen nothing yet.
    pub fn new(id: &str, lease_ms: u64, plan: &Plan) -> Self {
        let filesystems = plan
            .superblocks
            .iter()
            .take(FILESYSTEMS_MAX)
            .map(|superblock| FilesystemReport {
                mountpoint: bounded(superblock.name()),
                kind: bounded(superblock.kind.clone()),
                device: bounded(superblock.source.clone()),
                device_number: superblock.device.to_string(),
                disks: superblock.disks.clone(),
                read_only: superblock.read_only,
                state: FilesystemState::NotFrozen,
                frozen_ms: None,
                detail: None,
            })
            .collect();
        let mut report = GuestReport {
            id: id.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: boot_id(),
            lease_ms,
            filesystems,
            ..GuestReport::default()
        };
        // First what lowers the level, which must not be among those that are only counted.
        let mut uncovered: Vec<&Reason> = plan.uncovered.iter().collect();
        uncovered.sort_by_key(|reason| reason.code != "zfs_cannot_freeze");
        report.uncovered = uncovered.into_iter().take(UNCOVERED_MAX).map(bounded_reason).collect();
        if plan.uncovered.len() > UNCOVERED_MAX {
            let more = format!("{} more", plan.uncovered.len() - UNCOVERED_MAX);
            report.uncovered.push(Reason::new("more", "", more));
        }
        let mut evidence = Self { report };
        for reason in &plan.reasons {
            evidence.reason(reason.clone());
        }
        evidence
    }

    /// Notes a reason, as long as there are not too many like it.
    pub fn reason(&mut self, reason: Reason) {
        let like_it = self.report.reasons.iter().filter(|known| known.code == reason.code).count();
        if like_it < REASONS_MAX {
            self.report.reasons.push(bounded_reason(&reason));
        }
    }

    /// The place by which a file system was opened.
    pub(super) fn place(&mut self, at: usize, place: &Place) {
        let report = &mut self.report.filesystems[at];
        report.mountpoint = bounded(place.mountpoint.to_string_lossy().into_owned());
        if let View::Process(pid) = place.view {
            report.detail = Some(format!("in the mount namespace of process {pid}"));
        }
    }

    pub(super) fn unreachable(&mut self, at: usize, failure: &str) {
        let report = &mut self.report.filesystems[at];
        report.state = FilesystemState::Unreachable;
        report.detail = Some(bounded(failure.to_owned()));
    }

    /// The administrator of the guest leaves it out of freezes.
    pub(super) fn excluded(&mut self, at: usize) {
        let message = "the agent's configuration leaves it out of freezes";
        let report = &mut self.report.filesystems[at];
        report.detail = Some(message.to_owned());
        let name = report.mountpoint.clone();
        self.reason(Reason::new("filesystem_excluded", name, message));
    }

    pub(super) fn applications(&mut self, applications: &Applications) {
        self.report.applications = applications.reports();
        for reason in applications.reasons() {
            self.reason(reason);
        }
    }

    /// What hooks did, and what they said that they quiesced: after `applications`, since a module's word goes before a
    /// hook's.
    pub(super) fn hooks(&mut self, hooks: &Hooks) {
        self.report.hooks = hooks.reports().to_vec();
        for reason in hooks.reasons() {
            self.reason(reason.clone());
        }
        for claim in hooks.claims() {
            self.claim(claim, hooks.kept(claim));
        }
    }

    fn claim(&mut self, claim: &Claim, kept: bool) {
        let instance = bounded(claim.instance.to_string_lossy().into_owned());
        let all = &mut self.report.applications;
        let known = all.iter().position(|report| report.kind == claim.kind && report.instance == instance);
        let at = known.unwrap_or(all.len());
        if at == APPLICATIONS_MAX {
            let message = format!("{APPLICATIONS_MAX} are reported, and {} said more", claim.hook);
            return self.reason(Reason::new("too_many_applications", "applications", message));
        }
        if at == all.len() {
            let (kind, policy) = (claim.kind.clone(), claim.policy);
            all.push(ApplicationReport { kind, instance, policy, ..ApplicationReport::default() });
        }
        let report = &mut all[at];
        if report.quiesced {
            // Its own module vouches for it.
            return;
        }
        report.quiesced = true;
        report.held = kept;
        report.locked = claim.locked;
        report.position =
            claim.position.as_deref().map(|text| bounded(text.to_owned())).or(report.position.take());
        report.attested_by = Some(bounded(claim.hook.clone()));
        let mut numbers: BTreeSet<String> = report.device_numbers.drain(..).collect();
        numbers.extend(claim.device_numbers.iter().cloned());
        report.device_numbers = numbers.into_iter().collect();
    }

    /// The times of the freeze as a whole, as far as they are known.
    pub fn times(&mut self, ledger: &Ledger) {
        let ours = (0..ledger.count()).filter(|at| ledger.frozen(*at) != Freeze::Idle);
        let times: Vec<[u64; 4]> = ours.map(|at| ledger.times_ns(at)).collect();
        let first = |word: usize| times.iter().map(|time| time[word]).filter(|ns| *ns > 0).min();
        let last = |word: usize| times.iter().map(|time| time[word]).max().unwrap_or(0);
        let Some(begun) = first(0) else { return };
        self.report.freeze_ms = ns_to_ms(last(1).saturating_sub(begun));
        self.report.frozen_ms = ns_to_ms(last(3).saturating_sub(begun));
        self.report.thaw_ms = first(2).map_or(0, |thaw| ns_to_ms(last(3).saturating_sub(thaw)));
    }

    /// What became of a file system.
    pub fn filesystem(&mut self, planned: usize, ledger: &Ledger, at: usize, unwritten: bool) {
        let report = &mut self.report.filesystems[planned];
        let words = |errno| std::io::Error::from_raw_os_error(errno).to_string();
        (report.state, report.detail) = match (ledger.frozen(at), ledger.thawed(at)) {
            (Freeze::Frozen, Thaw::Done) => (FilesystemState::Held, report.detail.take()),
            (Freeze::Frozen, _) => (
                FilesystemState::EarlyThaw,
                Some("FITHAW found it thawed already: someone else did it".to_owned()),
            ),
            (Freeze::Busy, _) => (FilesystemState::HeldByOther, Some("frozen by someone else".to_owned())),
            (Freeze::Unsupported, _) if unwritten => {
                (FilesystemState::Unwritten, Some(words(ledger.errno(at))))
            }
            (Freeze::Unsupported, _) => (FilesystemState::Unsupported, Some(words(ledger.errno(at)))),
            (Freeze::Failed, _) => (FilesystemState::Failed, Some(words(ledger.errno(at)))),
            // The agent died before it could note what FIFREEZE answered; the thaw found it frozen, so it had been.
            (Freeze::Called, _) | (Freeze::Idle, _) => (FilesystemState::NotFrozen, report.detail.take()),
        };
        let [called, _, _, thawed] = ledger.times_ns(at);
        if ledger.frozen(at) == Freeze::Frozen && thawed > 0 {
            report.frozen_ms = Some(ns_to_ms(thawed.saturating_sub(called)));
        }
        if report.state == FilesystemState::EarlyThaw {
            let (name, message) = (report.mountpoint.clone(), "thawed by someone else during the freeze");
            self.reason(Reason::new("early_thaw", name, message));
        }
    }
}

/// Who ended a freeze, by what the ledger says; `refused`: the host was told that the freeze did not come about.
pub fn thaw_cause(frozen: u64, refused: bool, cause: Phase) -> ThawCause {
    match cause {
        _ if frozen == 0 => ThawCause::NothingFrozen,
        Phase::Failed | Phase::Host | Phase::GuardGone if refused => ThawCause::FailedFreeze,
        Phase::Armed | Phase::Host => ThawCause::Host,
        Phase::LeaseEnded => ThawCause::LeaseEnded,
        Phase::AgentGone => ThawCause::AgentGone,
        Phase::Failed | Phase::GuardGone => ThawCause::FailedFreeze,
    }
}

fn bounded_reason(reason: &Reason) -> Reason {
    Reason {
        code: reason.code.clone(),
        subject: bounded(reason.subject.clone()),
        message: bounded(reason.message.clone()),
    }
}

/// Cuts a text to what a report may carry.
fn bounded(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let end = text.floor_char_boundary(TEXT_BYTES_MAX - '…'.len_utf8());
        text.truncate(end);
        text.push('…');
    }
    text
}
