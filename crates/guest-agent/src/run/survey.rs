//! Looks at the guest's file systems without changing anything: facts, plan, and a folder open on each.

use super::Refusal;
use super::evidence::Evidence;
use crate::freeze::gather::Gatherer;
use crate::freeze::ledger::SUPERBLOCKS_MAX;
use crate::freeze::mountinfo::DeviceNumber;
use crate::freeze::plan::{Plan, plan};
use crate::freeze::reach::{MountDevices, Reached, mount_devices, reach, superblock_of};
use crate::freeze::selection::Selection;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What is known about the guest's file systems: facts, plan, and a folder open on each.
pub(super) struct Surveyed {
    pub(super) plan: Plan,
    pub(super) mounts: MountDevices,
    /// In plan order.
    pub(super) reached: Vec<Result<Reached, Missed>>,
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
    Ok(Surveyed { plan, mounts, reached })
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

    /// Folders for a flush, those that were reached.
    pub(super) fn folders(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.reached.iter().enumerate().filter_map(|(at, reached)| Some((at, &reached.as_ref().ok()?.folder)))
    }
}

/// The state folder must stay writable while frozen, and must not be what is frozen.
pub(super) fn state_stays_writable(statedir: &Path, surveyed: &Surveyed) -> Result<(), Refusal> {
    let folder: PathBuf = statedir.to_owned();
    match superblock_of(&folder) {
        Ok(Some(device)) if surveyed.freezes(device) => Err(Refusal {
            code: "statedir_would_freeze",
            message: format!(
                "{} lies on a file system that would be frozen; use a folder on tmpfs",
                folder.display()
            ),
        }),
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Refusal { code: "statedir_unusable", message: format!("{}: {error}", folder.display()) })
        }
    }
}
