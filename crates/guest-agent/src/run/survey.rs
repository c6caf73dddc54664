//! Looks at the guest's file systems without changing anything: facts, plan, and a folder open on each.

use super::Refusal;
use super::evidence::Evidence;
use crate::freeze::gather::Gatherer;
use crate::freeze::ledger::SUPERBLOCKS_MAX;
use crate::freeze::mountinfo::DeviceNumber;
use crate::freeze::plan::{Plan, plan};
use crate::freeze::reach::{MountDevices, Reached, mount_devices, reach, superblock_of};
use crate::freeze::selection::Selection;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What is known about the guest's file systems: facts, plan, and a folder open on each.
pub(super) struct Surveyed {
    pub(super) plan: Plan,
    pub(super) mounts: MountDevices,
    /// In plan order.
    pub(super) reached: Vec<Result<Reached, Missed>>,
    /// For each superblock of the guest, also one that is not to be frozen, what it lies on.
    carriers: BTreeMap<DeviceNumber, BTreeSet<DeviceNumber>>,
}

/// Why no folder is open on a superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Missed {
    /// The administrator leaves it out.
    Excluded,
    /// In words.
    Unreachable(String),
}

/// Looks at the guest without changing anything.
pub(super) fn survey(only: Option<&[String]>, selection: &Selection) -> Result<Surveyed, Refusal> {
    let facts = Gatherer::new("/")
        .gather()
        .map_err(|error| Refusal { code: "mounts_unreadable", message: error.to_string() })?;
    let mut plan = plan(&facts);
    let carriers = plan.superblocks.iter().map(|s| (s.device, s.lies_on.clone())).collect();
    if let Some(only) = only {
        plan.only(only);
    }
    if plan.superblocks.len() > SUPERBLOCKS_MAX {
        let message =
            format!("{} file systems, at most {SUPERBLOCKS_MAX} can be frozen", plan.superblocks.len());
        return Err(Refusal { code: "too_many_filesystems", message });
    }
    let mounts = mount_devices(&facts);
    let reached = plan
        .superblocks
        .iter()
        .map(|superblock| match selection.takes(superblock) {
            true => reach(superblock, &mounts).map_err(Missed::Unreachable),
            false => Err(Missed::Excluded),
        })
        .collect();
    Ok(Surveyed { plan, mounts, reached, carriers })
}

impl Surveyed {
    pub(super) fn evidence(&self, id: &str, lease_ms: u64) -> Evidence {
        let mut evidence = Evidence::new(id, lease_ms, &self.plan);
        for (at, reached) in self.reached.iter().enumerate() {
            match reached {
                Ok(reached) => evidence.place(at, &reached.place),
                Err(Missed::Excluded) => evidence.excluded(at),
                Err(Missed::Unreachable(failure)) => evidence.unreachable(at, failure),
            }
        }
        evidence
    }

    fn freezes(&self, device: DeviceNumber) -> bool {
        let all = self.plan.superblocks.iter().zip(&self.reached);
        all.filter(|(_, reached)| !matches!(reached, Err(Missed::Excluded))).any(|(s, _)| s.device == device)
    }

    /// Neither it nor anything that it lies on will be frozen, as far down as can be seen. False if it is not known.
    fn leaves_alone(&self, device: DeviceNumber) -> bool {
        let mut seen = BTreeSet::new();
        let mut below = vec![device];
        while let Some(device) = below.pop() {
            let Some(carriers) = self.carriers.get(&device).filter(|_| !self.freezes(device)) else {
                return false;
            };
            below.extend(carriers.iter().filter(|carrier| seen.insert(**carrier)));
        }
        true
    }

    /// Folders for a flush, those that were reached.
    pub(super) fn folders(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.reached.iter().enumerate().filter_map(|(at, reached)| Some((at, &reached.as_ref().ok()?.folder)))
    }
}

/// File systems whose files are nowhere but in memory, and stay writable whatever is frozen. Source: `statfs(2)`.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6]; // tmpfs, ramfs

/// The state folder must stay writable while frozen, and must not be what is frozen: the next store into the ledger would
/// wait for the thaw that only the ledger's readers can bring. What cannot be told, like an overlay, is refused.
pub(super) fn state_stays_writable(statedir: &Path, surveyed: &Surveyed) -> Result<(), Refusal> {
    let folder = statedir.display();
    let unusable =
        |error: io::Error| Refusal { code: "statedir_unusable", message: format!("{folder}: {error}") };
    let kind = rustix::fs::statfs(statedir).map_err(|error| unusable(error.into()))?.f_type;
    let device = superblock_of(statedir).map_err(unusable)?;
    if IN_MEMORY.contains(&kind) || device.is_some_and(|device| surveyed.leaves_alone(device)) {
        return Ok(());
    }
    Err(Refusal {
        code: "statedir_would_freeze",
        message: format!(
            "{folder} lies on a file system that would be frozen, or over one; use a folder on tmpfs"
        ),
    })
}
