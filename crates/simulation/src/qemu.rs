//! A model of QEMU's block graph: nodes, bitmaps, exports, and where the guest's writes go.
//!
//! It carries out the steps that `vm::point` decides on, and knows what none of the program's parts can know: at which
//! instant each disk was cut, and which writes a bitmap should hold.

use crate::schedule::Fault;
use qmp::CommandError;
use qmp::block::{Device, Node};
use qmp::export::Export;
use qmp::machine::Status;
use qmp::transaction::Action;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use vm::monitor::MonitorError;
use vm::point::Plan;
use vm::point::steps::{Step, StepError};
use vm::point::undo::Facts;

/// Blocks of each disk.
const BLOCKS: u8 = 32;

/// A dirty bitmap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bitmap {
    recording: bool,
    pub(crate) dirty: BTreeSet<u8>,
}

/// The machine.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    pub(crate) alive: bool,
    pub(crate) running: bool,
    /// Node that each device uses, by the device's path.
    pub(crate) devices: BTreeMap<String, String>,
    nodes: BTreeSet<String>,
    /// The node below each filter.
    filters: BTreeMap<String, String>,
    /// By node and name.
    pub(crate) bitmaps: BTreeMap<(String, String), Bitmap>,
    exports: BTreeSet<String>,
    server: bool,
    files: BTreeSet<PathBuf>,
    folders: BTreeSet<PathBuf>,
    /// Blocks written since the last snapshot that was kept, by node: what the next increment must hold.
    pub(crate) owed: BTreeMap<String, BTreeSet<u8>>,
    /// Blocks written since the cut of this run, by node; absent: not cut.
    pub(crate) since_cut: BTreeMap<String, BTreeSet<u8>>,
    /// A filter could not copy: what is read from now on is an error.
    pub(crate) broken: bool,
    /// The next command fails, or is carried out without an answer.
    pub(crate) fault: Option<(u32, Fault)>,
    /// Names of the nodes that were cut while the virtual CPUs ran.
    pub(crate) cut_running: bool,
}

impl Qemu {
    pub(crate) fn new(disks: &[String], base: Option<&str>) -> Self {
        let bitmap = |node: &String| {
            let recording = Bitmap { recording: true, dirty: BTreeSet::new() };
            base.map(|name| ((node.clone(), name.to_owned()), recording))
        };
        let nodes: BTreeSet<String> = disks.iter().map(|disk| format!("{disk}-node")).collect();
        Self {
            alive: true,
            running: true,
            devices: disks
                .iter()
                .map(|disk| (format!("/machine/peripheral/{disk}"), format!("{disk}-node")))
                .collect(),
            bitmaps: nodes.iter().filter_map(bitmap).collect(),
            owed: nodes.iter().map(|node| (node.clone(), BTreeSet::new())).collect(),
            nodes,
            filters: BTreeMap::new(),
            exports: BTreeSet::new(),
            server: false,
            files: BTreeSet::new(),
            folders: BTreeSet::new(),
            since_cut: BTreeMap::new(),
            broken: false,
            fault: None,
            cut_running: false,
        }
    }

    /// The guest writes a block of a disk.
    pub(crate) fn write(&mut self, rng: &mut fastrand::Rng) {
        if !self.alive || !self.running {
            return;
        }
        let at = rng.usize(..self.owed.len());
        let block = rng.u8(..BLOCKS);
        let Some((node, owed)) = self.owed.iter_mut().nth(at) else { return };
        owed.insert(block);
        if let Some(since) = self.since_cut.get_mut(node) {
            since.insert(block);
        }
        let passed = |on: &String| {
            on == node || self.filters.get(on) == Some(node) && self.devices.values().any(|uses| uses == on)
        };
        for ((on, _), bitmap) in &mut self.bitmaps {
            if passed(on) && bitmap.recording {
                bitmap.dirty.insert(block);
            }
        }
    }

    /// QEMU ends: everything in its memory goes, bitmaps too.
    pub(crate) fn die(&mut self) {
        self.alive = false;
        self.running = false;
    }

    /// What must be as before once a run is over: everything but bitmaps.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let ours = |name: &&String| name.starts_with("stillpoint-");
        let mut left: Vec<String> = self.nodes.iter().filter(ours).cloned().collect();
        left.extend(self.devices.values().filter(ours).map(|node| format!("a device on {node}")));
        left.extend(self.exports.iter().cloned());
        left.extend(self.files.iter().chain(&self.folders).map(|path| path.display().to_string()));
        left.extend(self.server.then(|| "the NBD server".to_owned()));
        left
    }

    /// What a bitmap on a node misses of these writes, in words.
    pub(crate) fn gap(&self, node: &str, bitmap: &str, owed: &BTreeSet<u8>) -> Option<String> {
        match self.bitmaps.get(&(node.to_owned(), bitmap.to_owned())) {
            Some(found) if found.recording && found.dirty.is_superset(owed) => None,
            found => Some(format!("{node}: {found:?} does not hold {owed:?}")),
        }
    }

    pub(crate) fn facts(&self, plan: &Plan) -> Facts {
        let node = |name: &String| {
            let bitmaps = self.bitmaps.iter().filter(|((on, _), _)| on == name);
            let bitmaps: Vec<_> = bitmaps
                .map(|((_, name), bitmap)| json!({ "name": name, "recording": bitmap.recording }))
                .collect();
            serde_json::from_value(json!({ "node-name": name, "dirty-bitmaps": bitmaps }))
                .expect("as QEMU would say it")
        };
        let device = |(path, uses): (&String, &String)| Device {
            qdev: Some(path.clone()),
            inserted: Some(Node { node_name: Some(uses.clone()), ..Node::default() }),
            ..Device::default()
        };
        Facts {
            devices: self.devices.iter().map(device).collect(),
            nodes: self.nodes.iter().map(node).collect(),
            exports: self.exports.iter().map(|id| Export { id: id.clone(), ..Export::default() }).collect(),
            jobs: vec![],
            status: Status {
                running: self.running,
                status: if self.running { "running" } else { "paused" }.to_owned(),
            },
            server_listens: self.server,
            files: self.files.iter().filter(|path| path.starts_with(&plan.folder)).cloned().collect(),
            folder: self.folders.contains(&plan.folder),
        }
    }

    /// A command of the monitor; the fault that is due meets it.
    pub(crate) fn command(
        &mut self,
        name: &str,
        act: impl FnOnce(&mut Self) -> Result<(), String>,
    ) -> Result<(), MonitorError> {
        let command = name.to_owned();
        if !self.alive {
            return Err(MonitorError::Closed { command });
        }
        let failed = |desc: String| MonitorError::Failed {
            command: name.to_owned(),
            error: CommandError { class: "GenericError".to_owned(), desc },
        };
        match &mut self.fault {
            Some((0, fault)) => {
                let fault = *fault;
                self.fault = None;
                if fault == Fault::MonitorFails {
                    return Err(failed("made to fail".to_owned()));
                }
                act(self).map_err(failed)?;
                return Err(MonitorError::Timeout { command, limit: std::time::Duration::from_secs(30) });
            }
            Some((left, _)) => *left -= 1,
            None => {}
        }
        act(self).map_err(failed)
    }

    /// Carries out a step of `vm::point`.
    pub(crate) fn carry_out(&mut self, step: &Step) -> Result<(), StepError> {
        let file =
            |path: &PathBuf, kind| StepError::File { path: path.clone(), source: std::io::Error::from(kind) };
        let missing = std::io::ErrorKind::NotFound;
        match step {
            Step::MakeFolder(path) => {
                self.folders.insert(path.clone());
            }
            Step::MakeFile(path) => {
                self.files.insert(path.clone());
            }
            Step::RemoveFile(path) if self.files.remove(path) => {}
            Step::RemoveFile(path) => return Err(file(path, missing)),
            Step::RemoveFolder(path) if self.files.iter().any(|file| file.starts_with(path)) => {
                return Err(file(path, std::io::ErrorKind::DirectoryNotEmpty));
            }
            Step::RemoveFolder(path) if self.folders.remove(path) => {}
            Step::RemoveFolder(path) => return Err(file(path, missing)),
            of_qemu => self.command("a step", |qemu| qemu.change(of_qemu))?,
        }
        Ok(())
    }

    fn change(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Open(node) => {
                let node = serde_json::to_value(node).expect("a command is JSON");
                let name = node["node-name"].as_str().unwrap_or_default().to_owned();
                let uses = node["file"].as_str().filter(|_| node["driver"] != "file");
                if uses.is_some_and(|uses| !self.nodes.contains(uses)) {
                    return Err(format!("no node {uses:?}"));
                }
                if let Some(below) = uses.filter(|_| node["driver"] == "copy-before-write") {
                    self.filters.insert(name.clone(), below.to_owned());
                }
                if !self.nodes.insert(name.clone()) { Err(format!("{name} exists")) } else { Ok(()) }
            }
            Step::Format { .. } | Step::DismissJob(_) => Ok(()),
            Step::StartServer(socket) => {
                self.server = true;
                self.files.insert(socket.clone());
                Ok(())
            }
            Step::StopServer => {
                self.server = false;
                self.files.retain(|path| !path.ends_with("nbd"));
                Ok(())
            }
            Step::SetDrive { device, node } => {
                if !self.nodes.contains(node) {
                    return Err(format!("no node {node}"));
                }
                let uses = self.devices.get_mut(device).ok_or("no such device")?;
                assert!(uses != node, "QEMU 7.2 dies when a device is set to the node that it uses");
                *uses = node.clone();
                self.cut_running |= self.running && node.ends_with("-cbw");
                if let Some(below) = self.filters.get(node) {
                    // The guest's writes from here on belong to the next increment.
                    self.since_cut.insert(below.clone(), BTreeSet::new());
                }
                Ok(())
            }
            Step::Export(export) => {
                self.exports.insert(export.id.clone());
                Ok(())
            }
            Step::EndExport(id) => self.exports.remove(id).then_some(()).ok_or(format!("no export {id}")),
            Step::Resume => {
                self.running = true;
                Ok(())
            }
            Step::Close(node) => {
                let used = self.devices.values().any(|uses| uses == node)
                    || node.ends_with("-cbw") && self.nodes.contains(&node.replace("-cbw", "-old"))
                    || node.ends_with("-new") && self.nodes.contains(&node.replace("-new", "-cbw"))
                    || node.ends_with("-file") && self.nodes.contains(&node.replace("-file", "-new"))
                    || node.ends_with("-old") && self.exports.iter().any(|export| node.starts_with(export));
                if used {
                    return Err(format!("{node} is in use"));
                }
                self.bitmaps.retain(|(on, _), _| on != node);
                self.nodes.remove(node).then_some(()).ok_or(format!("no node {node}"))
            }
            Step::Record(bitmap) => self.bitmap(&Action::BlockDirtyBitmapAdd(bitmap.clone())),
            Step::Change(actions) => {
                let mut changed = self.clone();
                actions.iter().try_for_each(|action| changed.bitmap(action))?;
                *self = changed;
                Ok(())
            }
            Step::MakeFolder(_) | Step::MakeFile(_) | Step::RemoveFile(_) | Step::RemoveFolder(_) => {
                unreachable!("no step of QEMU's")
            }
        }
    }

    fn bitmap(&mut self, action: &Action) -> Result<(), String> {
        let missing = |name: &str| format!("no bitmap {name}");
        match action {
            Action::BlockDirtyBitmapAdd(add) => {
                let fresh = Bitmap { recording: true, dirty: BTreeSet::new() };
                self.bitmaps.insert((add.node.clone(), add.name.clone()), fresh);
            }
            Action::BlockDirtyBitmapRemove(one) => {
                let key = (one.node.clone(), one.name.clone());
                self.bitmaps.remove(&key).ok_or_else(|| missing(&one.name))?;
            }
            Action::BlockDirtyBitmapEnable(one) => {
                let key = (one.node.clone(), one.name.clone());
                self.bitmaps.get_mut(&key).ok_or_else(|| missing(&one.name))?.recording = true;
            }
            Action::BlockDirtyBitmapDisable(one) => {
                let key = (one.node.clone(), one.name.clone());
                self.bitmaps.get_mut(&key).ok_or_else(|| missing(&one.name))?.recording = false;
            }
            Action::BlockDirtyBitmapMerge(merge) => {
                for from in &merge.bitmaps {
                    let from = (from.node.clone(), from.name.clone());
                    let dirty = self.bitmaps.get(&from).ok_or_else(|| missing(&from.1))?.dirty.clone();
                    let into = (merge.node.clone(), merge.target.clone());
                    self.bitmaps.get_mut(&into).ok_or_else(|| missing(&merge.target))?.dirty.extend(dirty);
                }
            }
        }
        Ok(())
    }
}
