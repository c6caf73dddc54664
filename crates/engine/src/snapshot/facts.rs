//! What a run knows before it changes anything: the disks, what each is compared with, and the names it will use.

use super::SnapshotError;
use crate::journal::tag;
use crate::parent::{BITMAP_FACT, Parent, Tracked};
use crate::register::Register;
use qmp::block::Node;
use repository::{DiskRoot, Repository, SnapshotId};
use snapshot::Request;
use snapshot::receipt::{DiskEvidence, Receipt};
use std::collections::BTreeMap;
use vm::disks::{Base, Disk, Drives, base, bitmaps};
use vm::point::{self, Plan, PlanError};

/// Longest time that a guest's write may wait for scratch, in seconds; then the snapshot breaks, not the write.
const SCRATCH_WAIT_S: u32 = 5;

/// What is known before anything is changed.
pub(super) struct Facts {
    disks: Vec<Disk>,
    pub(super) wanted: Vec<Wanted>,
    chosen: bool,
    pub(super) parent: Option<SnapshotId>,
}

/// A disk that will be cut.
pub(super) struct Wanted {
    pub(super) disk: Disk,
    pub(super) parent: Option<DiskRoot>,
    pub(super) base: Option<String>,
}

impl Facts {
    /// Of the wanted ones among a VM's disks, with the nodes that they are open as.
    pub(super) fn choose(
        drives: &Drives,
        disks: Vec<Disk>,
        nodes: &[Node],
        repository: &Repository,
        request: &Request,
    ) -> Result<Self, SnapshotError> {
        let prefix = point::plan::bitmap_prefix(&repository.id().to_string());
        let track = |disk: &Disk| {
            let names = bitmaps(nodes, disk).iter().filter_map(|bitmap| bitmap.name.clone());
            let usable = |name: &String| {
                name.starts_with(&prefix) && matches!(base(nodes, disk, name), Base::Usable { .. })
            };
            let usable_bitmaps = names.filter(usable).collect();
            Tracked { disk: disk.name.clone(), size_bytes: disk.size_bytes, usable_bitmaps }
        };
        let tracked: Vec<Tracked> = disks.iter().map(track).collect();
        let parent = Parent::choose(repository, &request.vm, &tracked)?;
        let wanted: Vec<Wanted> = disks
            .into_iter()
            .zip(&tracked)
            .map(|(disk, tracked)| Wanted {
                parent: parent.as_ref().and_then(|parent| parent.part(&disk.name)).map(|part| part.root),
                base: parent.as_ref().and_then(|parent| parent.bitmap(tracked)),
                disk,
            })
            .collect();
        let parent = parent.map(|parent| parent.snapshot);
        let chosen = !request.disks.is_empty();
        Ok(Self { disks: drives.disks.clone(), wanted, chosen, parent })
    }

    pub(super) fn plan(
        &self,
        register: &Register,
        repository: &Repository,
        run: &str,
        running: bool,
    ) -> Result<Option<Plan>, PlanError> {
        if self.wanted.is_empty() {
            return Ok(None);
        }
        let disk = |wanted: &Wanted| point::DiskRequest {
            disk: wanted.disk.clone(),
            base: wanted.base.clone(),
            only_base: wanted.base.is_some(),
        };
        Plan::new(&point::Request {
            tag: tag(run).to_owned(),
            repository: repository.id().to_string(),
            snapshot: run.to_owned(),
            folder: register.scratch().join(run),
            cbw_timeout_s: SCRATCH_WAIT_S,
            running,
            disks: self.wanted.iter().map(disk).collect(),
        })
        .map(Some)
    }

    pub(super) fn receipt(&self, request: &Request, run: &str) -> Receipt {
        let evidence = |disk: &Disk| DiskEvidence {
            name: disk.name.clone(),
            serial: disk.serial.clone(),
            pci: disk.pci.clone(),
            size_bytes: disk.size_bytes,
            copy: None,
        };
        Receipt {
            vm: request.vm.clone(),
            run: run.to_owned(),
            wanted: Some(request.want),
            required: Some(request.require),
            disks: self.disks.iter().map(evidence).collect(),
            disks_chosen: self.chosen,
            ..Receipt::default()
        }
    }
}

/// The disks that a request is about.
pub(super) fn wanted(drives: &Drives, request: &Request) -> Result<Vec<Disk>, SnapshotError> {
    // A disk behind a filter is a disk that would be missing without a word.
    if let Some(filtered) = drives.left_out.iter().find(|left| left.why.is_filter())
        && !request.no_data
    {
        return Err(SnapshotError::OtherFilter(filtered.name.clone()));
    }
    let known = || drives.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(missing) = request.disks.iter().find(|name| !drives.disks.iter().any(|d| d.name == **name)) {
        return Err(SnapshotError::NoSuchDisk { disk: missing.clone(), known: known() });
    }
    let all = request.disks.is_empty();
    let wants = |disk: &&Disk| !request.no_data && (all || request.disks.contains(&disk.name));
    let disks: Vec<Disk> = drives.disks.iter().filter(wants).cloned().collect();
    if disks.is_empty() && !request.no_data {
        return Err(SnapshotError::NoDisk);
    }
    Ok(disks)
}

/// What restore and boot need to know about a disk.
pub(super) fn disk_facts(disk: &Disk, bitmap: Option<&str>) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::from([("format".to_owned(), disk.format.clone())]);
    facts.extend(bitmap.map(|bitmap| (BITMAP_FACT.to_owned(), bitmap.to_owned())));
    if let Ok(serde_json::Value::String(bus)) = serde_json::to_value(disk.bus) {
        facts.insert("bus".to_owned(), bus);
    }
    facts.extend(disk.serial.iter().map(|serial| ("serial".to_owned(), serial.clone())));
    facts
}
