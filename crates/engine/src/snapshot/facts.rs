//! What a run knows before it changes anything: the disks, what each is compared with, and the names it will use.

use super::SnapshotError;
use crate::journal::tag;
use crate::parent::{BITMAP_FACT, Parent, Tracked};
use crate::register::Register;
use qmp::machine::QueryStatus;
use repository::{DiskRoot, Repository, SnapshotId};
use snapshot::Request;
use snapshot::receipt::{DiskEvidence, Receipt};
use std::collections::BTreeMap;
use vm::disks::{Base, Disk, base, bitmaps};
use vm::machine;
use vm::monitor::Monitor;
use vm::point::{self, Plan, PlanError};

/// Longest time that a guest's write may wait for scratch, in seconds; then the snapshot breaks, not the write.
const SCRATCH_WAIT_S: u32 = 5;

/// What is known before anything is changed.
pub(super) struct Facts {
    disks: Vec<Disk>,
    pub(super) wanted: Vec<Wanted>,
    chosen: bool,
    pub(super) parent: Option<SnapshotId>,
    running: bool,
}

/// A disk that will be cut.
pub(super) struct Wanted {
    pub(super) disk: Disk,
    pub(super) parent: Option<DiskRoot>,
    pub(super) base: Option<String>,
}

impl Facts {
    pub(super) fn gather(
        monitor: &mut Monitor,
        repository: &Repository,
        request: &Request,
    ) -> Result<Self, SnapshotError> {
        let drives = machine::drives(monitor)?;
        // A disk behind a filter is a disk that would be missing without a word.
        if let Some(filtered) = drives.left_out.iter().find(|left| left.why.is_filter())
            && !request.no_data
        {
            return Err(SnapshotError::OtherFilter(filtered.name.clone()));
        }
        let known = || drives.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
        if let Some(missing) =
            request.disks.iter().find(|name| !drives.disks.iter().any(|d| d.name == **name))
        {
            return Err(SnapshotError::NoSuchDisk { disk: missing.clone(), known: known() });
        }
        let chosen = !request.disks.is_empty();
        let wants = |disk: &&Disk| !request.no_data && (!chosen || request.disks.contains(&disk.name));
        let nodes = machine::nodes(monitor)?;
        let prefix = point::plan::bitmap_prefix(&repository.id().to_string());
        let track = |disk: &Disk| {
            let names = bitmaps(&nodes, disk).iter().filter_map(|bitmap| bitmap.name.clone());
            let usable = |name: &String| {
                name.starts_with(&prefix) && matches!(base(&nodes, disk, name), Base::Usable { .. })
            };
            let usable_bitmaps = names.filter(usable).collect();
            Tracked { disk: disk.name.clone(), size_bytes: disk.size_bytes, usable_bitmaps }
        };
        let disks: Vec<&Disk> = drives.disks.iter().filter(wants).collect();
        let tracked: Vec<Tracked> = disks.iter().map(|disk| track(disk)).collect();
        let parent = Parent::choose(repository, &request.vm, &tracked)?;
        let wanted: Vec<Wanted> = disks
            .into_iter()
            .zip(&tracked)
            .map(|(disk, tracked)| Wanted {
                disk: disk.clone(),
                parent: parent.as_ref().and_then(|parent| parent.part(&disk.name)).map(|part| part.root),
                base: parent.as_ref().and_then(|parent| parent.bitmap(tracked)),
            })
            .collect();
        if wanted.is_empty() && !request.no_data {
            return Err(SnapshotError::NoDisk);
        }
        let parent = parent.map(|parent| parent.snapshot);
        let running = monitor.run(&QueryStatus {})?.running;
        Ok(Self { disks: drives.disks, wanted, chosen, parent, running })
    }

    pub(super) fn plan(
        &self,
        register: &Register,
        repository: &Repository,
        run: &str,
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
            running: self.running,
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

/// What restore and boot need to know about a disk.
pub(super) fn disk_facts(disk: &Disk, bitmap: &str) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::from([
        (BITMAP_FACT.to_owned(), bitmap.to_owned()),
        ("format".to_owned(), disk.format.clone()),
    ]);
    if let Ok(serde_json::Value::String(bus)) = serde_json::to_value(disk.bus) {
        facts.insert("bus".to_owned(), bus);
    }
    facts.extend(disk.serial.iter().map(|serial| ("serial".to_owned(), serial.clone())));
    facts
}
