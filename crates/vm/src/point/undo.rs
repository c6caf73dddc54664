//! The way back from a point, computed from what is there: after success, failure, or the death of the program.

use crate::monitor::{Monitor, MonitorError};
use crate::point::plan::{DiskPlan, Plan};
use crate::point::settle::settled;
use crate::point::steps::{Step, StepError};
use crate::unix;
use qmp::bitmap::{Bitmap, BlockDirtyBitmapEnable, BlockDirtyBitmapMerge, BlockDirtyBitmapRemove};
use qmp::block::{Device, Node, QueryBlock, QueryNamedBlockNodes};
use qmp::export::{BitmapReference, Export, QueryBlockExports};
use qmp::job::{Job, QueryJobs};
use qmp::machine::{QueryStatus, Status};
use qmp::transaction::Action;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often what is there is looked at again until nothing of ours is left.
const ROUNDS_MAX: u32 = 5;
/// Between two rounds after a failure.
const PAUSE: Duration = Duration::from_millis(200);

/// How the run ended, which decides about the bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The snapshot is sealed: its bitmap is the base of the next, older ones of the same repository go.
    Kept,
    /// There is no snapshot: what the new bitmap recorded goes back into the old one, and the new one goes.
    Dropped,
}

/// What is there now.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The guest's devices.
    pub devices: Vec<Device>,
    /// Nodes with their bitmaps.
    pub nodes: Vec<Node>,
    /// Exports.
    pub exports: Vec<Export>,
    /// Jobs.
    pub jobs: Vec<Job>,
    /// Whether the vCPUs run.
    pub status: Status,
    /// Something listens on our NBD socket.
    pub server_listens: bool,
    /// Which files of the plan exist.
    pub files: Vec<PathBuf>,
    /// The plan's folder exists.
    pub folder: bool,
}

/// A way back that was not finished. Calling again is safe.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// The monitor cannot be asked.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Taking the filters out would make the guest wait for a disk that does not answer.
    #[error("the disk of {} does not answer, so what an earlier run put into the VM stays, where it disturbs nobody", .0.display())]
    ScratchHangs(PathBuf),
    /// Something could not be removed.
    #[error("parts of an earlier run could not be removed from the VM: {}", .0.join("; "))]
    Left(Vec<String>),
}

/// Where a plan was carried out: a QEMU behind its monitor, or a simulated one.
pub trait Place {
    /// What is there now.
    ///
    /// # Errors
    /// Those of the monitor.
    fn look(&mut self, plan: &Plan) -> Result<Facts, MonitorError>;
    /// Carries a step out.
    ///
    /// # Errors
    /// See [`StepError`].
    fn run(&mut self, step: &Step) -> Result<(), StepError>;
    /// Waits until no write to the plan's scratch is under way; false if that takes too long.
    fn settles(&mut self, _plan: &Plan) -> bool {
        true
    }
    /// Lets time go by.
    fn pause(&mut self, time: Duration);
}

impl Place for Monitor {
    fn look(&mut self, plan: &Plan) -> Result<Facts, MonitorError> {
        look(self, plan)
    }

    fn run(&mut self, step: &Step) -> Result<(), StepError> {
        step.run(self)
    }

    fn settles(&mut self, plan: &Plan) -> bool {
        self.peer().is_none_or(|qemu| settled(plan, qemu.pid))
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Removes exactly what the plan names, in the reverse order of its making, whatever part of it is there.
///
/// # Errors
/// See [`UndoError`].
pub fn release(place: &mut impl Place, plan: &Plan, outcome: Outcome) -> Result<(), UndoError> {
    let mut failures = vec![];
    for round in 0..ROUNDS_MAX {
        let facts = place.look(plan)?;
        let mut steps = steps(plan, &facts, outcome);
        if steps.is_empty() {
            return Ok(());
        }
        if steps[0] == Step::Resume {
            // A paused guest waits for nothing else.
            steps.truncate(1);
        } else if is_filtered(plan, &facts) && !place.settles(plan) {
            return Err(UndoError::ScratchHangs(plan.folder.clone()));
        }
        if round > 0 && !failures.is_empty() {
            place.pause(PAUSE);
        }
        failures = vec![];
        for step in steps {
            match place.run(&step) {
                Ok(()) => (),
                Err(StepError::Monitor(error @ (MonitorError::Closed { .. } | MonitorError::Io(_)))) => {
                    return Err(error.into());
                }
                Err(error) => failures.push(error.to_string()),
            }
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(UndoError::Left(failures)) }
}

/// Removes the files of a plan whose QEMU has ended: everything else went with it.
///
/// # Errors
/// `Left`.
pub fn release_files(plan: &Plan) -> Result<(), UndoError> {
    let mut failures = vec![];
    for path in files(plan) {
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            failures.push(format!("{}: {error}", path.display()));
        }
    }
    if plan.folder.exists()
        && let Err(error) = std::fs::remove_dir(&plan.folder)
    {
        failures.push(format!("{}: {error}", plan.folder.display()));
    }
    if failures.is_empty() { Ok(()) } else { Err(UndoError::Left(failures)) }
}

/// Looks at what is there.
///
/// # Errors
/// Those of the monitor.
pub fn look(monitor: &mut Monitor, plan: &Plan) -> Result<Facts, MonitorError> {
    Ok(Facts {
        devices: monitor.run(&QueryBlock {})?,
        nodes: monitor.run(&QueryNamedBlockNodes { flat: true })?,
        exports: monitor.run(&QueryBlockExports {})?,
        jobs: monitor.run(&QueryJobs {})?,
        status: monitor.run(&QueryStatus {})?,
        server_listens: listens(&plan.socket),
        files: files(plan).into_iter().filter(|path| path.symlink_metadata().is_ok()).collect(),
        folder: plan.folder.is_dir(),
    })
}

/// Whether somebody listens; whoever is too busy to let us in does.
fn listens(socket: &Path) -> bool {
    unix::connect(socket, Instant::now()).map_or_else(|error| unix::is_timeout(&error), |_| true)
}

fn files(plan: &Plan) -> Vec<PathBuf> {
    let mut files: Vec<_> = plan.disks.iter().map(|disk| disk.scratch_file.clone()).collect();
    files.push(plan.socket.clone());
    files
}

/// What has to be done so that nothing of the plan is left; empty if nothing has. Pure.
pub fn steps(plan: &Plan, facts: &Facts, outcome: Outcome) -> Vec<Step> {
    let node = |name: &str| facts.nodes.iter().any(|node| node.node_name.as_deref() == Some(name));
    let mut steps = vec![];
    // Filters without their access nodes on a paused VM: whoever cut died before `cont`, and so did its restarter.
    let stopped_by_us = plan.running && facts.status.status == "paused";
    if stopped_by_us && is_filtered(plan, facts) && !plan.disks.iter().any(|disk| node(&disk.access_node)) {
        steps.push(Step::Resume);
    }
    for disk in plan.disks.iter().rev() {
        if facts.exports.iter().any(|export| export.id == disk.export) {
            steps.push(Step::EndExport(disk.export.clone()));
        }
    }
    let close = |name: &str, steps: &mut Vec<Step>| {
        if node(name) {
            steps.push(Step::Close(name.to_owned()));
        }
    };
    for disk in plan.disks.iter().rev() {
        close(&disk.access_node, &mut steps);
        for device in devices_using(facts, &disk.filter_node) {
            steps.push(Step::SetDrive { device, node: disk.disk.node.clone() });
        }
        close(&disk.filter_node, &mut steps);
        close(&disk.scratch_node, &mut steps);
        if facts.jobs.iter().any(|job| job.id == disk.export && job.status == "concluded") {
            steps.push(Step::DismissJob(disk.export.clone()));
        }
        close(&disk.file_node, &mut steps);
        let actions = bitmap_actions(plan, disk, facts, outcome);
        if !actions.is_empty() {
            steps.push(Step::Change(actions));
        }
    }
    let ours = |export: &Export| plan.disks.iter().any(|disk| disk.export == export.id);
    // An export of ours lives in no server but ours, also where someone made room and removed its socket.
    let server_is_ours = facts.server_listens || facts.exports.iter().any(ours);
    if server_is_ours && facts.exports.iter().all(ours) {
        steps.push(Step::StopServer);
    }
    steps.extend(facts.files.iter().filter(|path| **path != plan.socket).cloned().map(Step::RemoveFile));
    // A QEMU that ends its server removes the socket itself; one that died does not.
    if facts.files.contains(&plan.socket) && !facts.server_listens {
        steps.push(Step::RemoveFile(plan.socket.clone()));
    }
    if facts.folder {
        steps.push(Step::RemoveFolder(plan.folder.clone()));
    }
    steps
}

fn is_filtered(plan: &Plan, facts: &Facts) -> bool {
    plan.disks.iter().any(|disk| in_place(facts, &disk.filter_node))
}

fn in_place(facts: &Facts, filter: &str) -> bool {
    devices_using(facts, filter).next().is_some()
}

/// The devices that use a node now, as `qom-set` takes them.
fn devices_using<'a>(facts: &'a Facts, node: &'a str) -> impl Iterator<Item = String> + 'a {
    facts.devices.iter().filter_map(move |device| {
        let inserted = device.inserted.as_ref()?.node_name.as_deref()?;
        (inserted == node).then(|| device.qdev.as_deref().map(crate::disks::device_path))?
    })
}

fn bitmap_actions(plan: &Plan, disk: &DiskPlan, facts: &Facts, outcome: Outcome) -> Vec<Action> {
    let node = &disk.disk.node;
    let bitmaps = crate::disks::bitmaps(&facts.nodes, &disk.disk);
    let find = |name: &str| bitmaps.iter().find(|bitmap| bitmap.name.as_deref() == Some(name));
    let remove = |name: &str| {
        Action::BlockDirtyBitmapRemove(BlockDirtyBitmapRemove { node: node.clone(), name: name.to_owned() })
    };
    // Without the new bitmap nothing was exported (or all is undone): the old one still records.
    let Some(new) = find(&disk.bitmap) else { return vec![] };
    match outcome {
        Outcome::Kept => {
            let old = bitmaps.iter().filter_map(|bitmap| bitmap.name.as_deref());
            let old = old.filter(|name| name.starts_with(&plan.bitmap_prefix) && *name != disk.bitmap);
            old.map(remove).collect()
        }
        Outcome::Dropped => {
            let usable = |bitmap: &&Bitmap| !bitmap.inconsistent;
            let base = disk.base.as_deref().filter(|name| find(name).filter(usable).is_some());
            let mut actions = vec![];
            if let Some(name) = base.filter(|_| usable(&new)) {
                // The old one records again before the new one is added to it, so no write falls between them.
                let name = name.to_owned();
                let merged = BitmapReference { node: node.clone(), name: disk.bitmap.clone() };
                actions.push(Action::BlockDirtyBitmapEnable(BlockDirtyBitmapEnable {
                    node: node.clone(),
                    name: name.clone(),
                }));
                actions.push(Action::BlockDirtyBitmapMerge(BlockDirtyBitmapMerge {
                    node: node.clone(),
                    target: name,
                    bitmaps: vec![merged],
                }));
            }
            actions.push(remove(&disk.bitmap));
            actions
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::point::plan::tests::request;
    use qmp::block::Device;

    fn plan() -> Plan {
        Plan::new(&request(&[Some("stillpoint-repo-old")], false)).unwrap()
    }

    fn node(name: &str, bitmaps: &[(&str, bool)]) -> Node {
        let bitmap = |(name, recording): &(&str, bool)| Bitmap {
            name: Some((*name).to_owned()),
            recording: *recording,
            ..Bitmap::default()
        };
        Node {
            node_name: Some(name.to_owned()),
            dirty_bitmaps: bitmaps.iter().map(bitmap).collect(),
            ..Node::default()
        }
    }

    /// What is there while a disk is copied.
    fn in_the_middle() -> Facts {
        let plan = plan();
        let disk = &plan.disks[0];
        let bitmaps = [
            ("stillpoint-repo-old", false),
            ("stillpoint-repo-new-0", true),
            ("stillpoint-other-x", true),
            ("someone-elses", true),
        ];
        let mut nodes = vec![node(&disk.disk.node, &bitmaps)];
        nodes.extend(
            [&disk.file_node, &disk.scratch_node, &disk.filter_node, &disk.access_node]
                .map(|name| node(name, &[])),
        );
        Facts {
            devices: vec![Device {
                qdev: Some("d0".into()),
                inserted: Some(node(&disk.filter_node, &[])),
                ..Device::default()
            }],
            nodes,
            exports: vec![Export { id: disk.export.clone(), ..Export::default() }],
            status: Status { running: true, status: "running".into() },
            server_listens: true,
            files: vec![disk.scratch_file.clone(), plan.socket.clone()],
            folder: true,
            ..Facts::default()
        }
    }

    fn show(facts: &Facts, outcome: Outcome) -> Vec<String> {
        let line = |step: Step| match step {
            Step::Change(actions) => {
                let name = |action: &Action| match action {
                    Action::BlockDirtyBitmapRemove(action) => format!("remove {}", action.name),
                    Action::BlockDirtyBitmapEnable(action) => format!("enable {}", action.name),
                    Action::BlockDirtyBitmapMerge(action) => {
                        format!("merge {} into {}", action.bitmaps[0].name, action.target)
                    }
                    other => format!("{other:?}"),
                };
                actions.iter().map(name).collect::<Vec<_>>().join(", ")
            }
            Step::SetDrive { device, node } => format!("{device} uses {node}"),
            Step::EndExport(id) => format!("end export {id}"),
            Step::Close(node) => format!("close {node}"),
            Step::RemoveFile(path) => format!("remove file {}", path.display()),
            other => format!("{other:?}"),
        };
        steps(&plan(), facts, outcome).into_iter().map(line).collect()
    }

    const TAIL: [&str; 2] = ["StopServer", "remove file /run/stillpoint/scratch/0.qcow2"];

    #[test]
    fn a_good_run_is_taken_apart_in_reverse_and_its_bitmap_stays() {
        let expected = [
            "end export stillpoint-abcd1234-0",
            "close stillpoint-abcd1234-0-old",
            "/machine/peripheral/d0 uses d0-node",
            "close stillpoint-abcd1234-0-cbw",
            "close stillpoint-abcd1234-0-new",
            "close stillpoint-abcd1234-0-file",
            "remove stillpoint-repo-old",
        ];
        let folder = ["RemoveFolder(\"/run/stillpoint/scratch\")"];
        assert_eq!(show(&in_the_middle(), Outcome::Kept), [&expected[..], &TAIL, &folder].concat());
    }

    #[test]
    fn a_failed_run_gives_its_writes_back_to_the_old_bitmap_which_records_before_it_receives() {
        let steps = show(&in_the_middle(), Outcome::Dropped);
        let expected = "enable stillpoint-repo-old, merge stillpoint-repo-new-0 into stillpoint-repo-old, remove stillpoint-repo-new-0";
        assert!(steps.iter().any(|step| step == expected), "{steps:#?}");
    }

    #[test]
    fn nothing_is_done_where_nothing_is() {
        let untouched = Facts {
            devices: vec![Device {
                qdev: Some("d0".into()),
                inserted: Some(node("d0-node", &[])),
                ..Device::default()
            }],
            nodes: vec![node("d0-node", &[("stillpoint-repo-old", true), ("someone-elses", true)])],
            status: Status { running: true, status: "running".into() },
            ..Facts::default()
        };
        for outcome in [Outcome::Kept, Outcome::Dropped] {
            assert!(steps(&plan(), &untouched, outcome).is_empty());
        }
    }

    #[test]
    fn a_device_that_uses_its_disk_already_is_never_set_to_it_again() {
        let mut facts = in_the_middle();
        facts.devices[0].inserted = Some(node("d0-node", &[]));
        let steps = show(&facts, Outcome::Dropped);
        assert!(!steps.iter().any(|step| step.contains(" uses ")), "{steps:#?}");
    }

    #[test]
    fn a_server_that_others_use_stays() {
        let mut facts = in_the_middle();
        facts.exports.push(Export { id: "theirs".into(), ..Export::default() });
        assert!(!show(&facts, Outcome::Kept).iter().any(|step| step == "StopServer"));
        let mut facts = in_the_middle();
        facts.server_listens = false; // the server that runs, if any, does not listen on our socket
        facts.exports.clear();
        assert!(!show(&facts, Outcome::Kept).iter().any(|step| step == "StopServer"));
    }

    #[test]
    fn a_server_whose_socket_was_removed_is_known_by_its_exports() {
        let mut facts = in_the_middle();
        (facts.server_listens, facts.folder) = (false, false);
        facts.files.clear();
        assert!(show(&facts, Outcome::Dropped).iter().any(|step| step == "StopServer"));
    }

    #[test]
    fn a_vm_that_somebody_else_paused_stays_paused_and_one_left_in_the_cut_runs_again() {
        let mut facts = in_the_middle();
        facts.status = Status { running: false, status: "paused".into() };
        assert!(!show(&facts, Outcome::Dropped).iter().any(|step| step == "Resume"), "the cut was over");
        let access = plan().disks[0].access_node.clone();
        facts.nodes.retain(|node| node.node_name.as_ref() != Some(&access));
        assert_eq!(show(&facts, Outcome::Dropped)[0], "Resume");
        // QEMU stopped it, on a full disk, say: to let it go on is its owner's decision.
        facts.status.status = "io-error".into();
        assert!(
            !show(&facts, Outcome::Dropped).iter().any(|step| step == "Resume"),
            "not stopped by the cut"
        );
        facts.status.status = "paused".into();
        let began_paused = Plan { running: false, ..plan() };
        let steps = steps(&began_paused, &facts, Outcome::Dropped);
        assert!(!steps.iter().any(|step| matches!(step, Step::Resume)), "its owner paused it before the cut");
    }
}
