//! What a point will put into QEMU, by name: decided before anything is done, and kept in the run's journal.

use crate::disks::{Disk, OUR_PREFIX};
use crate::point::steps::Step;
use qmp::bitmap::{BlockDirtyBitmapAdd, BlockDirtyBitmapDisable, BlockDirtyBitmapMerge};
use qmp::block::{BlockdevAdd, Cache, Discard, OnCbwError};
use qmp::export::{BitmapReference, BlockExportAdd, ExportKind};
use qmp::transaction::Action;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Longest node name. Source: `BlockDriverState.node_name` has 32 bytes with the end mark.
pub const NODE_NAME_BYTES_MAX: usize = 31;
/// Longest path of a unix socket. Source: `sockaddr_un.sun_path` has 108 bytes with the end mark.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest bitmap name. Source: QEMU's `BDRV_BITMAP_MAX_NAME_SIZE`.
pub const BITMAP_NAME_BYTES_MAX: usize = 1023;
/// Length of the tag that tells runs apart, in bytes.
pub const TAG_BYTES: usize = 8;
/// Most memory that one bitmap may take in QEMU, in bytes; 4 KiB blocks up to 1 TiB.
const BITMAP_BYTES_MAX: u64 = 32 << 20;
/// Finest block that a bitmap tracks, in bytes.
const GRANULARITY_BYTES_MIN: u32 = 4096;

/// What a point is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Tells this run's nodes from others': [`TAG_BYTES`] lower-case letters or digits.
    pub tag: String,
    /// First part of the repository's id: bitmaps of other repositories are left alone.
    pub repository: String,
    /// Id of the snapshot that the run makes; the new bitmap is named after it.
    pub snapshot: String,
    /// Private folder for scratch images and socket. Must not exist yet; its parent must.
    pub folder: PathBuf,
    /// Longest time that a guest's write may wait for the copy of what it overwrites, in seconds; then the snapshot
    /// breaks.
    pub cbw_timeout_s: u32,
    /// The vCPUs run now.
    pub running: bool,
    /// The disks to cut, all in one step.
    pub disks: Vec<DiskRequest>,
}

/// One disk of a point.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// The disk.
    pub disk: Disk,
    /// Bitmap that recorded every write since the parent snapshot; absent: the disk is read in full.
    pub base: Option<String>,
    /// Only what `base` holds will be read: the reader may discard the rest of the export, and guest writes there cost nothing from
    /// then on.
    pub only_base: bool,
}

/// What a point will put into QEMU. Written to the journal before [`prepare`](crate::point::prepare).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Private folder of this run.
    pub folder: PathBuf,
    /// Socket of QEMU's NBD server.
    pub socket: PathBuf,
    /// See [`Request::cbw_timeout_s`].
    pub cbw_timeout_s: u32,
    /// The vCPUs ran when this was made, so if they are found stopped in the middle of the cut, the cut stopped them.
    /// Otherwise somebody else did, and the way back leaves them stopped.
    pub running: bool,
    /// What the bitmaps of this repository begin with.
    pub bitmap_prefix: String,
    /// One entry a disk.
    pub disks: Vec<DiskPlan>,
}

/// What a point will put into QEMU for one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// The disk.
    pub disk: Disk,
    /// Scratch image.
    pub scratch_file: PathBuf,
    /// Node of the scratch image's file.
    pub file_node: String,
    /// Node of the scratch image.
    pub scratch_node: String,
    /// The `copy-before-write` node.
    pub filter_node: String,
    /// The `snapshot-access` node.
    pub access_node: String,
    /// Id of the export, its NBD name, and id of the job that formats the scratch image.
    pub export: String,
    /// See [`DiskRequest::base`].
    pub base: Option<String>,
    /// See [`DiskRequest::only_base`].
    pub only_base: bool,
    /// The new bitmap.
    pub bitmap: String,
    /// Its bytes per bit.
    pub granularity_bytes: u32,
}

/// How to read one disk at the point.
///
/// In a full read only what `base:allocation` calls *zero* may be left out. What it calls a *hole* but not zero lies
/// in a backing file: a `snapshot-access` node tells of the top of a chain only, and such parts are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskExport {
    /// Name of the disk.
    pub disk: String,
    /// NBD export name.
    pub export: String,
    /// Meta context that shows what changed since the parent, e.g. `qemu:dirty-bitmap:…`; absent: read in full.
    pub changed_context: Option<String>,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// A request that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nothing to cut.
    #[error("no disk to take a snapshot of")]
    NoDisk,
    /// The tag is not [`TAG_BYTES`] lower-case letters or digits.
    #[error("the run's tag {0:?} is not {TAG_BYTES} lower-case letters or digits")]
    Tag(String),
    /// The folder's path is too long for a socket in it, or not UTF-8, or not absolute.
    #[error("the scratch folder {0:?} must be an absolute UTF-8 path, short enough for a socket in it")]
    Folder(PathBuf),
    /// The names of repository and snapshot make no bitmap name.
    #[error("{0:?} cannot be the name of a bitmap")]
    Bitmap(String),
    /// Too many disks for short node names.
    #[error("{0} disks are more than fit into node names")]
    TooManyDisks(usize),
}

/// Name of the bitmap that begins with a snapshot on its disk number so-and-so.
///
/// Each disk has its own: names of disks may be exchanged between two starts of a VM (QEMU makes some up from the order
/// of its arguments), and a bitmap found by name on the wrong disk would vouch for the other one's data.
pub fn bitmap_name(repository: &str, snapshot: &str, number: usize) -> String {
    format!("{}{snapshot}-{number}", bitmap_prefix(repository))
}

/// What the names of a repository's bitmaps begin with.
pub fn bitmap_prefix(repository: &str) -> String {
    format!("{OUR_PREFIX}{repository}-")
}

/// Bytes per bit of a disk's bitmap: the finest that keeps it within 32 MiB of QEMU's memory.
pub fn granularity_bytes(size_bytes: u64) -> u32 {
    let mut granularity = GRANULARITY_BYTES_MIN;
    while size_bytes / u64::from(granularity) > BITMAP_BYTES_MAX * 8 && granularity < 1 << 30 {
        granularity *= 2;
    }
    granularity
}

impl Plan {
    /// Decides every name.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn new(request: &Request) -> Result<Self, PlanError> {
        let tag = &request.tag;
        if tag.len() != TAG_BYTES
            || !tag.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        {
            return Err(PlanError::Tag(tag.clone()));
        }
        if request.disks.is_empty() {
            return Err(PlanError::NoDisk);
        }
        let socket = request.folder.join("nbd");
        let fits = socket.to_str().is_some_and(|path| path.len() <= SOCKET_PATH_BYTES_MAX);
        if !fits || !request.folder.is_absolute() {
            return Err(PlanError::Folder(request.folder.clone()));
        }
        let name = |number| bitmap_name(&request.repository, &request.snapshot, number);
        let bitmap = name(request.disks.len());
        let printable = bitmap.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        if request.repository.is_empty()
            || request.snapshot.is_empty()
            || !printable
            || bitmap.len() > BITMAP_NAME_BYTES_MAX
        {
            return Err(PlanError::Bitmap(bitmap));
        }
        if request.disks.len() > 1000 {
            return Err(PlanError::TooManyDisks(request.disks.len()));
        }
        let disks = request.disks.iter().enumerate().map(|(number, wanted)| {
            let node = |part: &str| format!("{OUR_PREFIX}{tag}-{number}{part}");
            DiskPlan {
                disk: wanted.disk.clone(),
                scratch_file: request.folder.join(format!("{number}.qcow2")),
                file_node: node("-file"),
                scratch_node: node("-new"),
                filter_node: node("-cbw"),
                access_node: node("-old"),
                export: node(""),
                base: wanted.base.clone(),
                only_base: wanted.only_base && wanted.base.is_some(),
                bitmap: name(number),
                granularity_bytes: granularity_bytes(wanted.disk.size_bytes),
            }
        });
        Ok(Self {
            folder: request.folder.clone(),
            socket,
            cbw_timeout_s: request.cbw_timeout_s,
            running: request.running,
            bitmap_prefix: bitmap_prefix(&request.repository),
            disks: disks.collect(),
        })
    }

    /// Everything slow, before the guest is frozen.
    pub fn prepare_steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::MakeFolder(self.folder.clone())];
        // Scratch data need not survive the host, and a guest's flush must not wait for it.
        let cache = Some(Cache { direct: false, no_flush: true });
        for disk in &self.disks {
            steps.push(Step::MakeFile(disk.scratch_file.clone()));
            steps.push(Step::Open(BlockdevAdd::File {
                node_name: disk.file_node.clone(),
                filename: disk.scratch_file.to_string_lossy().into_owned(),
                cache,
            }));
            steps.push(Step::Format {
                job: disk.export.clone(),
                node: disk.file_node.clone(),
                size_bytes: disk.disk.size_bytes,
            });
            steps.push(Step::Open(BlockdevAdd::Qcow2 {
                node_name: disk.scratch_node.clone(),
                file: disk.file_node.clone(),
                cache,
            }));
            steps.push(Step::Open(self.filter(disk)));
            // Records what the guest writes through the filter, and so from the point on.
            steps.push(Step::Record(BlockDirtyBitmapAdd {
                node: disk.filter_node.clone(),
                name: disk.bitmap.clone(),
                granularity: Some(disk.granularity_bytes),
                persistent: None,
                disabled: None,
            }));
        }
        steps.push(Step::StartServer(self.socket.clone()));
        steps
    }

    /// What happens while the vCPUs are stopped, and so no more than has to.
    pub fn cut_steps(&self) -> Vec<Step> {
        let filter = |disk: &DiskPlan| Step::SetDrive {
            device: disk.disk.device.clone(),
            node: disk.filter_node.clone(),
        };
        self.disks.iter().map(filter).collect()
    }

    /// What makes the disks readable as they were at the point.
    ///
    /// Only now do the new bitmaps begin on the disks themselves, with what the filters' bitmaps have recorded since the point, and
    /// the old ones end. What the guest wrote since the point is in those too: a little more is read, as it was at the point.
    pub fn export_steps(&self) -> Vec<Step> {
        let begin = |disk: &DiskPlan| {
            let (node, name) = (disk.disk.node.clone(), disk.bitmap.clone());
            let since_the_point = BitmapReference { node: disk.filter_node.clone(), name: name.clone() };
            [
                Action::BlockDirtyBitmapAdd(BlockDirtyBitmapAdd {
                    node: node.clone(),
                    name: name.clone(),
                    granularity: Some(disk.granularity_bytes),
                    persistent: Some(disk.disk.keeps_bitmaps),
                    disabled: None,
                }),
                Action::BlockDirtyBitmapMerge(BlockDirtyBitmapMerge {
                    node,
                    target: name,
                    bitmaps: vec![since_the_point],
                }),
            ]
        };
        let end = |disk: &DiskPlan| {
            let BitmapReference { node, name } = disk.base_reference()?;
            Some(Action::BlockDirtyBitmapDisable(BlockDirtyBitmapDisable { node, name }))
        };
        let bitmaps = self.disks.iter().flat_map(begin).chain(self.disks.iter().filter_map(end)).collect();
        let each = self.disks.iter().flat_map(|disk| {
            let access = BlockdevAdd::SnapshotAccess {
                node_name: disk.access_node.clone(),
                // Refused before the guest's device uses the filter: a permission conflict.
                file: disk.filter_node.clone(),
                discard: disk.only_base.then_some(Discard::Unmap),
            };
            let export = BlockExportAdd {
                kind: ExportKind::Nbd,
                id: disk.export.clone(),
                node_name: disk.access_node.clone(),
                name: disk.export.clone(),
                writable: disk.only_base,
                bitmaps: disk.base_reference().into_iter().collect(),
            };
            [Step::Open(access), Step::Export(export)]
        });
        std::iter::once(Step::Change(bitmaps)).chain(each).collect()
    }

    /// How to read each disk, in the plan's order.
    pub fn exports(&self) -> Vec<DiskExport> {
        let each = self.disks.iter().map(|disk| DiskExport {
            disk: disk.disk.name.clone(),
            export: disk.export.clone(),
            changed_context: disk.base.as_ref().map(|base| format!("qemu:dirty-bitmap:{base}")),
            size_bytes: disk.disk.size_bytes,
        });
        each.collect()
    }

    fn filter(&self, disk: &DiskPlan) -> BlockdevAdd {
        BlockdevAdd::CopyBeforeWrite {
            node_name: disk.filter_node.clone(),
            file: disk.disk.node.clone(),
            target: disk.scratch_node.clone(),
            on_cbw_error: Some(OnCbwError::BreakSnapshot),
            cbw_timeout: Some(self.cbw_timeout_s),
        }
    }
}

impl DiskPlan {
    fn base_reference(&self) -> Option<BitmapReference> {
        let name = self.base.clone()?;
        Some(BitmapReference { node: self.disk.node.clone(), name })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::disks::Bus;
    use serde_json::json;

    pub(in crate::point) fn disk(name: &str, keeps_bitmaps: bool) -> Disk {
        Disk {
            name: name.into(),
            device: format!("/machine/peripheral/{name}"),
            node: format!("{name}-node"),
            format: "raw".into(),
            file: String::new(),
            size_bytes: 1 << 30,
            serial: None,
            pci: None,
            bus: Bus::VirtioBlk,
            keeps_bitmaps,
            io_thread: false,
            passthrough: false,
            layers: Vec::new(),
        }
    }

    pub(in crate::point) fn request(bases: &[Option<&str>], only_base: bool) -> Request {
        let disks = bases.iter().enumerate().map(|(number, base)| DiskRequest {
            disk: disk(&format!("d{number}"), number % 2 == 1),
            base: base.map(str::to_owned),
            only_base,
        });
        Request {
            tag: "abcd1234".into(),
            repository: "repo".into(),
            snapshot: "new".into(),
            folder: "/run/stillpoint/scratch".into(),
            cbw_timeout_s: 10,
            running: true,
            disks: disks.collect(),
        }
    }

    #[test]
    fn a_bitmap_is_as_fine_as_32_mib_of_memory_allow() {
        for (size_bytes, granularity) in [
            (0, 4096),
            (1 << 40, 4096),
            ((1 << 40) + 4096, 8192),
            (1 << 41, 8192),
            (16 << 40, 65536),
            (u64::MAX, 1 << 30),
        ] {
            assert_eq!(granularity_bytes(size_bytes), granularity, "{size_bytes}");
        }
    }

    #[test]
    fn names_fit_into_qemus_limits_for_every_disk() {
        let plan = Plan::new(&request(&vec![None; 1000], false)).unwrap();
        let mut names = std::collections::BTreeSet::new();
        for disk in &plan.disks {
            for name in [&disk.file_node, &disk.scratch_node, &disk.filter_node, &disk.access_node] {
                assert!(name.len() <= NODE_NAME_BYTES_MAX && name.starts_with(OUR_PREFIX), "{name}");
                assert!(names.insert(name.clone()), "{name} twice");
            }
        }
    }

    #[test]
    fn what_cannot_be_named_is_refused() {
        let check = |change: fn(&mut Request)| {
            let mut request = request(&[None], false);
            change(&mut request);
            Plan::new(&request).unwrap_err()
        };
        assert!(matches!(check(|request| request.tag = "ABCD1234".into()), PlanError::Tag(_)));
        assert!(matches!(check(|request| request.tag = "abc".into()), PlanError::Tag(_)));
        assert!(matches!(check(|request| request.folder = "relative".into()), PlanError::Folder(_)));
        assert!(matches!(
            check(|request| request.folder = format!("/{}", "x".repeat(110)).into()),
            PlanError::Folder(_)
        ));
        assert!(matches!(check(|request| request.snapshot = String::new()), PlanError::Bitmap(_)));
        assert!(matches!(check(|request| request.snapshot = "a b".into()), PlanError::Bitmap(_)));
        assert!(matches!(check(|request| request.disks.clear()), PlanError::NoDisk));
        assert!(matches!(
            check(|request| request.disks = vec![request.disks[0].clone(); 1001]),
            PlanError::TooManyDisks(1001)
        ));
    }

    #[test]
    fn the_stop_holds_only_what_has_to_happen_in_it() {
        let plan = Plan::new(&request(&[Some("old"), None], true)).unwrap();
        let words: Vec<_> = plan
            .cut_steps()
            .iter()
            .map(|step| match step {
                Step::SetDrive { device, node } => format!("{device} uses {node}"),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            words,
            [
                "/machine/peripheral/d0 uses stillpoint-abcd1234-0-cbw",
                "/machine/peripheral/d1 uses stillpoint-abcd1234-1-cbw",
            ]
        );
    }

    #[test]
    fn the_new_bitmaps_begin_with_all_since_the_point_and_the_old_ones_end_before_they_are_exported() {
        let plan = Plan::new(&request(&[Some("old"), None], true)).unwrap();
        let steps = plan.export_steps();
        let Step::Change(actions) = &steps[0] else { panic!("{steps:?}") };
        let actions: Vec<_> = actions.iter().map(|action| serde_json::to_value(action).unwrap()).collect();
        let (first, second) = (["d0", "stillpoint-repo-new-0"], ["d1", "stillpoint-repo-new-1"]);
        let begun =
            [(first, "stillpoint-abcd1234-0-cbw", false), (second, "stillpoint-abcd1234-1-cbw", true)];
        let mut expected = vec![];
        for ([disk, name], filter, persistent) in begun {
            let node = format!("{disk}-node");
            let add = json!({ "node": node, "name": name, "granularity": 4096, "persistent": persistent });
            let since_the_point = json!([{ "node": filter, "name": name }]);
            let merge = json!({ "node": node, "target": name, "bitmaps": since_the_point });
            expected.push(json!({ "type": "block-dirty-bitmap-add", "data": add }));
            expected.push(json!({ "type": "block-dirty-bitmap-merge", "data": merge }));
        }
        let end = json!({ "node": "d0-node", "name": "old" });
        expected.push(json!({ "type": "block-dirty-bitmap-disable", "data": end }));
        assert_eq!(actions, expected);
        let discards = |step: &Step| matches!(step, Step::Export(export) if export.writable);
        assert_eq!(
            steps.iter().filter(|step| discards(step)).count(),
            1,
            "of the increment alone: {steps:#?}"
        );
    }
}
