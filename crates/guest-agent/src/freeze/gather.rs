//! Gathers the facts for the plan from `/proc`, `/sys` and `/dev`, below a root that tests can replace.

use super::facts::{Backing, Block, Facts, Namespace, View};
use super::mountinfo::{self, DeviceNumber, TABLE_BYTES_MAX, TableError};
use super::plan::{is_on_blocks, is_volatile};
use super::reach::PLACES_MAX;
use guest_protocol::stillpoint::{GuestDisk, Reason};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Most processes looked at for other mount namespaces. Source: the kernel's default `pid_max` on small machines
/// is 32,768; with more, containers are named as unseen.
const PROCESSES_MAX: usize = 65_536;
/// Most mount namespaces read: a container or a sandboxed unit each.
const NAMESPACES_MAX: usize = 1024;
/// Most mounts of other namespaces that are kept whole, a few hundred bytes each.
const PLACES_KEPT_MAX: usize = 65_536;
/// Most mounts of other namespaces that are numbered besides, 16 bytes each: sandboxed services see all of the host's.
const NUMBERED_MAX: usize = 1 << 20;
/// Most bytes of a sysfs file.
const ATTRIBUTE_BYTES_MAX: u64 = 4096;
/// Most block devices below one another.
const DEPTH_MAX: usize = 32;

/// Where the facts lie.
#[derive(Clone, Debug)]
pub struct Gatherer {
    root: PathBuf,
}

impl Gatherer {
    /// `root` is `/`, or a recorded tree.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Reads everything.
    /// # Errors
    /// When the agent's own mount table cannot be read or understood. Whatever else fails is in `Facts::unseen`.
    pub fn gather(&self) -> io::Result<Facts> {
        let own = self.table("self").map_err(io::Error::other)?;
        let mut facts =
            Facts { namespaces: vec![Namespace { view: View::Own, mounts: own }], ..Facts::default() };
        self.other_namespaces(&mut facts);
        let mut starts: BTreeSet<DeviceNumber> = BTreeSet::new();
        let mut anonymous: BTreeMap<DeviceNumber, String> = BTreeMap::new();
        for mount in facts.namespaces.iter().flat_map(|namespace| &namespace.mounts) {
            if mount.device.major != 0 {
                starts.insert(mount.device);
            } else if is_on_blocks(&mount.kind) {
                anonymous.entry(mount.device).or_insert_with(|| mount.source.clone());
            }
        }
        for (superblock, source) in anonymous {
            let members = self.members(&source);
            if members.is_empty() {
                facts.unseen.push(Reason::new(
                    "devices_unknown",
                    &source,
                    "the devices of this file system were not found",
                ));
            }
            starts.extend(&members);
            facts.members.insert(superblock, members);
        }
        for start in starts {
            self.descend(start, &mut facts, 0);
        }
        Ok(facts)
    }

    fn table(&self, process: &str) -> Result<Vec<mountinfo::Mount>, GatherError> {
        let path = self.root.join("proc").join(process).join("mountinfo");
        let table = read_bounded(&path, TABLE_BYTES_MAX as u64 + 1)
            .map_err(|error| GatherError::Read { path, error })?;
        Ok(mountinfo::parse(&table)?)
    }

    /// Containers and sandboxed services mount in namespaces of their own: a process stands for each.
    fn other_namespaces(&self, facts: &mut Facts) {
        let proc = self.root.join("proc");
        let mut places = Places::of(&facts.namespaces);
        let mut seen: BTreeSet<PathBuf> = fs::read_link(proc.join("self/ns/mnt")).into_iter().collect();
        let Ok(entries) = fs::read_dir(&proc) else { return };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        for (count, pid) in pids.enumerate() {
            let full = places.kept > PLACES_KEPT_MAX || facts.further.len() > NUMBERED_MAX;
            if count == PROCESSES_MAX || seen.len() > NAMESPACES_MAX || full {
                facts.unseen.push(Reason::new(
                    "too_many_namespaces",
                    "/proc",
                    "not all mount namespaces were looked at",
                ));
                return;
            }
            // A process that ended meanwhile, or a kernel thread, has no namespace to show.
            let Ok(namespace) = fs::read_link(proc.join(format!("{pid}/ns/mnt"))) else { continue };
            if seen.contains(&namespace) {
                continue;
            }
            // One whose process ended between the two reads is tried again through the next process in it.
            let Ok(mut mounts) = self.table(&pid.to_string()) else { continue };
            seen.insert(namespace);
            mounts.retain(|mount| !is_volatile(&mount.kind));
            // The likeliest to be opened first, as in the plan.
            mounts.sort_by_key(|mount| mount.mountpoint.as_os_str().len());
            mounts.retain(|mount| {
                let keep = places.keep(mount.device);
                if !keep {
                    facts.further.push((mount.id, mount.device));
                }
                keep
            });
            facts.namespaces.push(Namespace { view: View::Process(pid), mounts });
        }
    }

    fn members(&self, source: &str) -> Vec<DeviceNumber> {
        let Ok(metadata) = fs::metadata(self.root.join(source.trim_start_matches('/'))) else {
            return Vec::new();
        };
        let first = DeviceNumber::from_raw(metadata.rdev());
        let Ok(pools) = fs::read_dir(self.root.join("sys/fs/btrfs")) else { return vec![first] };
        for pool in pools.flatten() {
            let Ok(devices) = fs::read_dir(pool.path().join("devices")) else { continue };
            let numbers: Vec<DeviceNumber> =
                devices.flatten().filter_map(|device| number_in(&device.path())).collect();
            if numbers.contains(&first) {
                return numbers;
            }
        }
        vec![first]
    }

    fn descend(&self, device: DeviceNumber, facts: &mut Facts, depth: usize) {
        if facts.blocks.contains_key(&device) || depth > DEPTH_MAX {
            return;
        }
        let Ok(folder) = fs::canonicalize(self.root.join(format!("sys/dev/block/{device}"))) else { return };
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut block = Block { name: name.clone(), ..Block::default() };
        if folder.join("partition").exists() {
            block.below.extend(folder.parent().and_then(number_in));
        } else if let Ok(slaves) = fs::read_dir(folder.join("slaves")) {
            block.below.extend(slaves.flatten().filter_map(|slave| number_in(&slave.path())));
        }
        block.backing = self.backing(&folder, &name);
        if block.below.is_empty() && block.backing.is_none() {
            block.disk = Some(disk(&folder, name));
        }
        let (below, backing) = (block.below.clone(), block.backing.clone());
        facts.blocks.insert(device, block);
        for next in below {
            self.descend(next, facts, depth + 1);
        }
        if let Some(Backing::Device(carrier)) = backing {
            self.descend(carrier, facts, depth + 1);
        }
    }

    fn backing(&self, folder: &Path, name: &str) -> Option<Backing> {
        let shown = attribute(&folder.join("loop/backing_file"))?;
        if let Some(device) = loop_carrier(&self.root.join("dev").join(name)) {
            // An anonymous number may be that of a btrfs subvolume, which no mount table knows.
            if device.major != 0 {
                return Some(Backing::Device(device));
            }
        }
        Some(Backing::Path(PathBuf::from(shown)))
    }
}

/// How many places of each superblock are known: more than are ever tried need no memory.
struct Places {
    known: BTreeMap<DeviceNumber, usize>,
    kept: usize,
}

impl Places {
    fn of(namespaces: &[Namespace]) -> Self {
        let mut known = BTreeMap::new();
        for mount in namespaces.iter().flat_map(|namespace| &namespace.mounts) {
            *known.entry(mount.device).or_default() += 1;
        }
        Self { known, kept: 0 }
    }

    fn keep(&mut self, device: DeviceNumber) -> bool {
        let known = self.known.entry(device).or_default();
        let keep = *known < PLACES_MAX;
        *known += usize::from(keep);
        self.kept += usize::from(keep);
        keep
    }
}

#[derive(Debug, thiserror::Error)]
enum GatherError {
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Table(#[from] TableError),
}

/// A whole disk, by what the host knows it by too.
fn disk(folder: &Path, name: String) -> GuestDisk {
    let serial = ["serial", "device/serial"]
        .iter()
        .find_map(|place| attribute(&folder.join(place)))
        .or_else(|| {
            let page = read_bounded(&folder.join("device/vpd_pg80"), ATTRIBUTE_BYTES_MAX).ok()?;
            unit_serial(&page)
        })
        .filter(|serial| !serial.is_empty());
    let sectors: u64 = attribute(&folder.join("size")).and_then(|text| text.parse().ok()).unwrap_or(0);
    GuestDisk { name, serial, pci: pci_address(folder), size_bytes: sectors.saturating_mul(512) }
}

/// The serial number in SCSI's unit serial number page (`vpd_pg80`): four bytes of header, then text.
pub fn unit_serial(page: &[u8]) -> Option<String> {
    Some(
        String::from_utf8_lossy(page.get(4..)?)
            .trim_matches(|c: char| c == '\0' || c.is_whitespace())
            .to_owned(),
    )
}

/// The last part of a sysfs path that looks like `0000:00:04.0`: the controller, not the bridges before it.
pub fn pci_address(folder: &Path) -> Option<String> {
    let looks = |part: &str| {
        part.len() >= 12
            && part.as_bytes()[part.len() - 2] == b'.'
            && part.matches(':').count() == 2
            && part.chars().all(|c| c.is_ascii_hexdigit() || c == ':' || c == '.')
    };
    folder.iter().filter_map(|part| part.to_str()).rfind(|part| looks(part)).map(str::to_owned)
}

fn number_in(folder: &Path) -> Option<DeviceNumber> {
    attribute(&folder.join("dev"))?.parse().ok()
}

fn attribute(path: &Path) -> Option<String> {
    let bytes = read_bounded(path, ATTRIBUTE_BYTES_MAX).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// Reads at most so many bytes of a file.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Asks the loop driver for the device of its file: sysfs shows only a name, which later mounts make wrong.
fn loop_carrier(node: &Path) -> Option<DeviceNumber> {
    /// `struct loop_info64`, of which only the first word is wanted: `lo_device`. Source: `linux/loop.h`.
    const WORDS: usize = 29;
    const LOOP_GET_STATUS64: u32 = 0x4C05;
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(node).ok()?;
    let mut info = [0u64; WORDS];
    // SAFETY: the kernel writes one `loop_info64` (232 bytes = 29 words) to a buffer of that size that outlives the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64 as _, info.as_mut_ptr()) };
    (done == 0).then(|| DeviceNumber::from_raw(info[0]))
}

#[cfg(test)]
mod tests {
    use super::super::plan::plan;
    use super::*;
    use std::os::unix::fs::symlink;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
        fn file(&self, path: &str, text: &str) -> &Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }
        fn link(&self, from: &str, to: &str) -> &Self {
            let from = self.0.path().join(from);
            fs::create_dir_all(from.parent().unwrap()).unwrap();
            symlink(to, from).unwrap();
            self
        }
        fn plan(&self) -> super::super::plan::Plan {
            plan(&Gatherer::new(self.0.path()).gather().unwrap())
        }
    }

    #[test]
    fn finds_the_disk_of_a_logical_volume_on_a_partition() {
        let tree = Tree::new();
        let sda = "sys/devices/pci0000:00/0000:00:02.0/0000:01:04.0/virtio1/block/vda";
        tree.file("proc/self/mountinfo", "1 0 253:0 / / rw - ext4 /dev/mapper/root rw\n")
            .file("sys/devices/virtual/block/dm-0/dev", "253:0\n")
            .link(
                "sys/devices/virtual/block/dm-0/slaves/vda2",
                "../../../../../../sys/devices/pci0000:00/0000:00:02.0/0000:01:04.0/virtio1/block/vda/vda2",
            )
            .file(&format!("{sda}/vda2/partition"), "2\n")
            .file(&format!("{sda}/vda2/dev"), "254:2\n")
            .file(&format!("{sda}/dev"), "254:0\n")
            .file(&format!("{sda}/serial"), "root-disk\n")
            .file(&format!("{sda}/size"), "2048\n")
            .link("sys/dev/block/253:0", "../../devices/virtual/block/dm-0")
            .link("sys/dev/block/254:2", &format!("../../../{sda}/vda2"))
            .link("sys/dev/block/254:0", &format!("../../../{sda}"));
        let plan = tree.plan();
        assert_eq!(
            plan.superblocks[0].disks,
            [GuestDisk {
                name: "vda".into(),
                serial: Some("root-disk".into()),
                pci: Some("0000:01:04.0".into()),
                size_bytes: 1 << 20
            }]
        );
    }

    #[test]
    fn a_loop_file_is_followed_by_its_name_where_the_driver_cannot_be_asked() {
        let tree = Tree::new();
        tree.file("proc/self/mountinfo", "1 0 8:1 / /out rw - ext4 a rw\n2 0 7:0 / /in rw - ext4 b rw\n")
            .file("sys/devices/virtual/block/loop0/loop/backing_file", "/out/disk image.img\n")
            .link("sys/dev/block/7:0", "../../devices/virtual/block/loop0");
        let plan = tree.plan();
        assert_eq!(plan.superblocks[0].name(), "/in");
        assert_eq!(plan.steps, [0, 1]);
    }

    #[test]
    fn looks_into_each_other_namespace_once() {
        let tree = Tree::new();
        tree.file("proc/self/mountinfo", "1 0 8:1 / / rw - ext4 a rw\n")
            .link("proc/self/ns/mnt", "mnt:[1]")
            .link("proc/11/ns/mnt", "mnt:[1]")
            .link("proc/12/ns/mnt", "mnt:[2]")
            .link("proc/13/ns/mnt", "mnt:[2]")
            .file("proc/12/mountinfo", "5 0 8:9 / /data rw - xfs b rw\n6 5 0:4 / /proc rw - proc proc rw\n")
            .file("proc/13/mountinfo", "5 0 8:9 / /data rw - xfs b rw\n");
        let plan = tree.plan();
        assert_eq!(plan.superblocks.len(), 2);
        assert_eq!(plan.superblocks[0].places.len(), 1);
    }

    #[test]
    fn of_a_host_full_of_sandboxes_only_the_places_that_can_be_tried_are_kept() {
        let tree = Tree::new();
        tree.file("proc/self/mountinfo", "1 0 8:1 / / rw - ext4 a rw\n").link("proc/self/ns/mnt", "mnt:[1]");
        for pid in 100..150 {
            let line = |n: u64| format!("{} 0 8:1 /x /b{n} rw - ext4 a rw\n", pid * 1000 + n);
            let table: String = (0..100).map(line).collect();
            tree.file(&format!("proc/{pid}/mountinfo"), &table)
                .link(&format!("proc/{pid}/ns/mnt"), &format!("mnt:[{pid}]"));
        }
        let facts = Gatherer::new(tree.0.path()).gather().unwrap();
        let kept: usize = facts.namespaces.iter().map(|namespace| namespace.mounts.len()).sum();
        assert_eq!((kept, facts.further.len(), facts.unseen.len()), (PLACES_MAX, 5001 - PLACES_MAX, 0));
        let devices = crate::freeze::reach::mount_devices(&facts);
        assert_eq!(devices.len(), 5001, "a writer is found on any of them");
    }

    #[test]
    fn takes_the_controller_not_the_bridge_for_a_disks_address() {
        let path = Path::new("/sys/devices/pci0000:00/0000:00:1c.0/0000:02:00.0/nvme/nvme0/nvme0n1");
        assert_eq!(pci_address(path).as_deref(), Some("0000:02:00.0"));
        assert_eq!(pci_address(Path::new("/sys/devices/virtual/block/loop0")), None);
    }
}
