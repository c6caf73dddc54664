//! Looks at the guest's file systems without changing anything: facts, plan, and a folder open on each.

use super::Refusal;
use super::evidence::Evidence;
use crate::freeze::gather::Gatherer;
use crate::freeze::ledger::SUPERBLOCKS_MAX;
use crate::freeze::plan::{Plan, plan};
use crate::freeze::reach::{MountDevices, Reached, mount_devices, reach, superblock_of};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What is known about the guest's file systems: facts, plan, and a folder open on each.
pub(super) struct Surveyed {
    pub(super) plan: Plan,
    pub(super) mounts: MountDevices,
    /// In plan order; why not, in words.
    pub(super) reached: Vec<Result<Reached, String>>,
}

/// Looks at the guest without changing anything.
pub(super) fn survey(only: Option<&[String]>) -> Result<Surveyed, Refusal> {
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
    let reached = plan.superblocks.iter().map(|superblock| reach(superblock, &mounts)).collect();
    Ok(Surveyed { plan, mounts, reached })
}

impl Surveyed {
    pub(super) fn evidence(&self, id: &str, lease_ms: u64) -> Evidence {
        let mut evidence = Evidence::new(id, lease_ms, &self.plan);
        for (at, reached) in self.reached.iter().enumerate() {
            match reached {
                Ok(reached) => evidence.place(at, &reached.place),
                Err(failure) => evidence.unreachable(at, failure),
            }
        }
        evidence
    }

    /// Folders for a flush, those that were reached.
    pub(super) fn folders(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.reached.iter().enumerate().filter_map(|(at, reached)| Some((at, &reached.as_ref().ok()?.folder)))
    }
}

/// The state folder must stay writable while frozen, and must not be what is frozen.
pub(super) fn state_stays_writable(statedir: &Path, plan: &Plan) -> Result<(), Refusal> {
    let folder: PathBuf = statedir.to_owned();
    match superblock_of(&folder) {
        Ok(Some(device)) if plan.superblocks.iter().any(|superblock| superblock.device == device) => {
            Err(Refusal {
                code: "statedir_would_freeze",
                message: format!(
                    "{} lies on a file system that would be frozen; use a folder on tmpfs",
                    folder.display()
                ),
            })
        }
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Refusal { code: "statedir_unusable", message: format!("{}: {error}", folder.display()) })
        }
    }
}
