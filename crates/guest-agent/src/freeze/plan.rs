//! Decides what is to be frozen, in which order. Pure: facts in, plan out.
//!
//! FIFREEZE flushes a file system onto what it lies on, so what lies on another one is frozen first:
//! the other way round, the flush waits for a frozen file system and nobody is left to thaw it.

use super::facts::{Backing, Facts, View};
use super::mountinfo::{DeviceNumber, Mount, covering};
use guest_protocol::stillpoint::{GuestDisk, Reason};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// File systems that hold no data beyond the machine's run, or none of their own.
/// `overlay` keeps its data in the superblock of its upper folder, which is planned for itself.
const VOLATILE: &[&str] = &[
    "autofs",
    "bdev",
    "binder",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "cpuset",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nfsd",
    "nsfs",
    "overlay",
    "pidfs",
    "pipefs",
    "proc",
    "pstore",
    "ramfs",
    "resctrl",
    "rootfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sockfs",
    "sysfs",
    "tmpfs",
    "tracefs",
    "fuse.lxcfs",
    "fuse.portal",
    "fuse.gvfsd-fuse",
];

/// File systems with an anonymous number that lie on block devices all the same, and can be frozen.
const ANONYMOUS_ON_BLOCKS: &[&str] = &["btrfs", "bcachefs"];

/// Whether a type holds nothing that a snapshot could miss.
pub fn is_volatile(kind: &str) -> bool {
    VOLATILE.contains(&kind)
}

/// Whether a type lies on block devices although its number says nothing of them.
pub fn is_on_blocks(kind: &str) -> bool {
    ANONYMOUS_ON_BLOCKS.contains(&kind)
}

/// Where a superblock is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// From where it can be opened.
    pub view: View,
    /// The mount point there.
    pub mountpoint: PathBuf,
}

/// One superblock with everything that is known about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Its number.
    pub device: DeviceNumber,
    /// Its type.
    pub kind: String,
    /// Its source, as mounted first.
    pub source: String,
    /// Nothing can be written.
    pub read_only: bool,
    /// Its mount points, the likeliest to be openable and shortest first.
    pub places: Vec<Place>,
    /// Whole disks that carry it.
    pub disks: Vec<GuestDisk>,
    /// Superblocks that it lies on, by number.
    pub lies_on: BTreeSet<DeviceNumber>,
}

impl Superblock {
    /// Whether it carries the agent's own root folder.
    pub fn is_root(&self) -> bool {
        self.places.iter().any(|place| place.view == View::Own && place.mountpoint == Path::new("/"))
    }

    /// The name by which people know it: its first place in the agent's own namespace, else in another.
    pub fn name(&self) -> String {
        self.places
            .first()
            .map_or_else(|| self.device.to_string(), |place| place.mountpoint.to_string_lossy().into_owned())
    }
}

/// What to freeze, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order of the freeze.
    pub superblocks: Vec<Superblock>,
    /// For each superblock, its step: equal ones may freeze at the same time.
    pub steps: Vec<usize>,
    /// Mounts that no freeze can cover.
    pub uncovered: Vec<Reason>,
    /// What could not be seen, or makes no sense.
    pub reasons: Vec<Reason>,
}

impl Plan {
    /// How many steps there are.
    pub fn steps_count(&self) -> usize {
        self.steps.last().map_or(0, |last| last + 1)
    }

    /// Keeps only the superblocks that are mounted at one of these places of the agent's own namespace
    /// (exact match, as qemu-ga does for `guest-fsfreeze-freeze-list`).
    pub fn only(&mut self, mountpoints: &[String]) {
        let wanted = |superblock: &Superblock| {
            superblock.places.iter().any(|place| {
                place.view == View::Own
                    && mountpoints
                        .iter()
                        .any(|wanted| Path::new(wanted).as_os_str() == place.mountpoint.as_os_str())
            })
        };
        let (superblocks, steps) = self
            .superblocks
            .drain(..)
            .zip(self.steps.drain(..))
            .filter(|(superblock, _)| wanted(superblock))
            .unzip();
        self.superblocks = superblocks;
        self.steps = steps;
    }
}

/// Makes the plan.
pub fn plan(facts: &Facts) -> Plan {
    let mut groups: BTreeMap<DeviceNumber, Vec<(View, &Mount)>> = BTreeMap::new();
    for namespace in &facts.namespaces {
        for mount in &namespace.mounts {
            groups.entry(mount.device).or_default().push((namespace.view, mount));
        }
    }
    let mut plan = Plan { reasons: facts.unseen.clone(), ..Plan::default() };
    let mut superblocks = Vec::new();
    for (device, mounts) in &groups {
        let kind = mounts[0].1.kind.as_str();
        if is_volatile(kind) {
            continue;
        }
        if device.major == 0 && !is_on_blocks(kind) {
            let places = places(mounts);
            plan.uncovered.push(uncovered(kind, &places[0].mountpoint));
            continue;
        }
        superblocks.push(superblock(facts, *device, mounts));
    }
    let known: BTreeSet<DeviceNumber> = superblocks.iter().map(|superblock| superblock.device).collect();
    for superblock in &mut superblocks {
        // A loop file on tmpfs or NFS lies on nothing that we freeze.
        superblock.lies_on.retain(|below| known.contains(below) && *below != superblock.device);
    }
    let steps = steps(&superblocks, &mut plan.reasons);
    let mut ordered: Vec<(usize, Superblock)> = steps.into_iter().zip(superblocks).collect();
    ordered.sort_by(|(a, x), (b, y)| {
        a.cmp(b).then_with(|| y.name().len().cmp(&x.name().len())).then(x.device.cmp(&y.device))
    });
    (plan.steps, plan.superblocks) = ordered.into_iter().unzip();
    plan
}

fn places(mounts: &[(View, &Mount)]) -> Vec<Place> {
    let mut places: Vec<(bool, Place)> = mounts
        .iter()
        .map(|(view, mount)| {
            (mount.root != Path::new("/"), Place { view: *view, mountpoint: mount.mountpoint.clone() })
        })
        .collect();
    // Own namespace before others; then the shortest name; of equals the whole file system before a part of it.
    places.sort_by_key(|(part, place)| {
        (place.view, place.mountpoint.as_os_str().len(), *part, place.mountpoint.clone())
    });
    places.into_iter().map(|(_, place)| place).collect()
}

fn uncovered(kind: &str, mountpoint: &Path) -> Reason {
    let (code, words) = match kind {
        "nfs" | "nfs4" | "cifs" | "smb3" | "ceph" | "afs" | "9p" | "virtiofs" | "lustre" | "ncpfs"
        | "coda" => ("network_filesystem", "its data are not on this guest's disks"),
        "zfs" => ("zfs_cannot_freeze", "ZFS has no freeze; its data lie on disks that were cut without one"),
        fuse if fuse == "fuse" || fuse.starts_with("fuse.") => {
            ("fuse_cannot_freeze", "a file system in user space has no freeze")
        }
        _ => ("no_block_device", "it has no block device that could be frozen"),
    };
    Reason::new(code, mountpoint.to_string_lossy(), format!("{kind}: {words}"))
}

fn superblock(facts: &Facts, device: DeviceNumber, mounts: &[(View, &Mount)]) -> Superblock {
    let first = mounts[0].1;
    let starts = if device.major == 0 {
        facts.members.get(&device).cloned().unwrap_or_default()
    } else {
        vec![device]
    };
    let mut found = Below { facts, seen: BTreeSet::new(), lies_on: BTreeSet::new(), disks: Vec::new() };
    for start in starts {
        found.descend(start);
    }
    found.disks.sort_by(|a, b| a.name.cmp(&b.name));
    Superblock {
        device,
        kind: first.kind.clone(),
        source: first.source.clone(),
        read_only: mounts.iter().all(|(_, mount)| mount.read_only),
        places: places(mounts),
        disks: found.disks,
        lies_on: found.lies_on,
    }
}

/// Walks down from a block device to disks, passing through loop files.
struct Below<'f> {
    facts: &'f Facts,
    seen: BTreeSet<DeviceNumber>,
    lies_on: BTreeSet<DeviceNumber>,
    disks: Vec<GuestDisk>,
}

impl Below<'_> {
    fn descend(&mut self, device: DeviceNumber) {
        if !self.seen.insert(device) {
            return;
        }
        let Some(block) = self.facts.blocks.get(&device) else { return };
        self.disks.extend(block.disk.clone());
        for below in &block.below {
            self.descend(*below);
        }
        let Some(carrier) = block.backing.as_ref().and_then(|backing| self.carrier(backing)) else { return };
        self.lies_on.insert(carrier);
        // The disks of the carrying file system are ours too.
        match self.facts.members.get(&carrier) {
            Some(members) => members.iter().for_each(|member| self.descend(*member)),
            None => self.descend(carrier),
        }
    }

    fn carrier(&self, backing: &Backing) -> Option<DeviceNumber> {
        match backing {
            Backing::Device(device) => Some(*device),
            Backing::Path(path) => {
                // Only the agent's own table fits the name that sysfs shows to the agent.
                let own = self.facts.namespaces.iter().find(|namespace| namespace.view == View::Own)?;
                covering(&own.mounts, path).map(|mount| mount.device)
            }
        }
    }
}

impl Superblock {
    /// It lies on real disks alone: its FIFREEZE waits for the kernel and for hardware, and for nobody who might want to
    /// write to another file system first.
    fn is_on_hardware(&self) -> bool {
        self.lies_on.is_empty() && !self.disks.is_empty() && self.disks.iter().all(|disk| disk.pci.is_some())
    }
}

/// A step for each superblock: after everything that lies on it, and the root folder's after its equals. Those on hardware
/// freeze together with the root folder's: each of them then waits for the slowest of them, and not for their sum.
fn steps(superblocks: &[Superblock], reasons: &mut Vec<Reason>) -> Vec<usize> {
    let index: BTreeMap<DeviceNumber, usize> =
        superblocks.iter().enumerate().map(|(at, s)| (s.device, at)).collect();
    let root = superblocks.iter().position(Superblock::is_root);
    // Root waits for those that do not carry it and may need a program (a disk over the network, for example), which
    // may need the root: they count as lying on it.
    let carries_root = root.map(|root| carriers(superblocks, &index, root)).unwrap_or_default();
    let beside_root: Vec<usize> = (0..superblocks.len())
        .filter(|at| superblocks[*at].is_on_hardware() && !carries_root.contains(at))
        .collect();
    let below = |at: usize| -> Vec<usize> {
        let mut below: Vec<usize> =
            superblocks[at].lies_on.iter().filter_map(|device| index.get(device).copied()).collect();
        if let Some(root) = root
            && at != root
            && !carries_root.contains(&at)
            && !beside_root.contains(&at)
        {
            below.push(root);
        }
        below
    };
    let mut step = vec![0; superblocks.len()];
    // Longest chains by relaxation: at most as many rounds as superblocks, or there is a ring.
    for round in 0..=superblocks.len() {
        let mut changed = false;
        for at in 0..superblocks.len() {
            for under in below(at) {
                if step[under] <= step[at] {
                    step[under] = step[at] + 1;
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
        if round == superblocks.len() {
            reasons.push(Reason::new("stacking_ring", "", "file systems lie on one another in a ring"));
        }
    }
    if let Some(root) = root {
        // Nothing that they lie on could be frozen before them, so they may wait for their turn.
        for at in beside_root {
            step[at] = step[at].max(step[root]);
        }
    }
    // Rings leave numbers with gaps; make them dense.
    let used: BTreeSet<usize> = step.iter().copied().collect();
    let dense: BTreeMap<usize, usize> = used.into_iter().enumerate().map(|(to, from)| (from, to)).collect();
    step.iter().map(|from| dense[from]).collect()
}

fn carriers(superblocks: &[Superblock], index: &BTreeMap<DeviceNumber, usize>, of: usize) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut open = vec![of];
    while let Some(at) = open.pop() {
        for under in superblocks[at].lies_on.iter().filter_map(|device| index.get(device)) {
            if found.insert(*under) {
                open.push(*under);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::facts::{Block, Namespace};
    use super::super::mountinfo::parse;
    use super::*;

    fn number(text: &str) -> DeviceNumber {
        text.parse().unwrap()
    }

    /// Mount lines as `DEVICE PLACE TYPE SOURCE`, devices as `M:m slaves M:m,…` / `M:m loop-on M:m` / `M:m loop-file PATH`.
    fn facts(mounts: &str, devices: &str) -> Facts {
        let table: String = mounts
            .split(';')
            .enumerate()
            .map(|(at, mount)| {
                let part: Vec<&str> = mount.split_whitespace().collect();
                format!(
                    "{} 1 {} / {} rw - {} {} rw\n",
                    at + 10,
                    part[0],
                    part[1],
                    part[2],
                    part.get(3).unwrap_or(&"none")
                )
            })
            .collect();
        let mut facts = Facts {
            namespaces: vec![Namespace { view: View::Own, mounts: parse(table.as_bytes()).unwrap() }],
            ..Facts::default()
        };
        for device in devices.split(';').filter(|device| !device.trim().is_empty()) {
            let part: Vec<&str> = device.split_whitespace().collect();
            let block = facts
                .blocks
                .entry(number(part[0]))
                .or_insert_with(|| Block { name: part[0].to_owned(), ..Block::default() });
            match part[1] {
                "slaves" => block.below = part[2].split(',').map(number).collect(),
                "loop-on" => block.backing = Some(Backing::Device(number(part[2]))),
                "loop-file" => block.backing = Some(Backing::Path(part[2].into())),
                "disk" => {
                    let pci = part.get(3).map(|address| (*address).to_owned());
                    block.disk = Some(GuestDisk { name: part[2].to_owned(), pci, ..GuestDisk::default() });
                }
                "member-of" => {
                    let at = number(part[0]);
                    facts.members.entry(number(part[2])).or_default().push(at);
                }
                other => panic!("{other}"),
            }
        }
        facts
    }

    /// The order as text: steps divided by ` | `.
    fn order(mounts: &str, devices: &str) -> String {
        let plan = plan(&facts(mounts, devices));
        let mut text = String::new();
        for (at, superblock) in plan.superblocks.iter().enumerate() {
            if at > 0 {
                text.push_str(if plan.steps[at] == plan.steps[at - 1] { " " } else { " | " });
            }
            text.push_str(&superblock.name());
        }
        text
    }

    #[test]
    fn freezes_the_root_file_system_last() {
        assert_eq!(order("8:1 / ext4; 8:2 /var xfs; 8:3 /srv ext4", ""), "/var /srv | /");
    }

    #[test]
    fn what_lies_on_real_disks_freezes_together_with_the_root() {
        let disks = "8:1 slaves 8:0; 8:0 disk vda 0000:00:02.0; 8:16 disk vdb 0000:00:03.0; 8:32 disk sdc";
        assert_eq!(
            order("8:1 / ext4; 8:16 /data xfs; 8:32 /over-the-network xfs", disks),
            "/over-the-network | /data /"
        );
        let below = format!("{disks}; 7:0 loop-on 8:16");
        assert_eq!(order("8:1 / ext4; 8:16 /data xfs; 7:0 /loop ext4", &below), "/loop | /data /");
        let carried = format!("{disks}; 7:0 loop-on 8:16");
        assert_eq!(order("7:0 / ext4; 8:16 /host xfs; 8:1 /data ext4", &carried), "/data / | /host");
        assert_eq!(
            order("8:1 / ext4; 253:0 /both xfs", &format!("{disks}; 253:0 slaves 8:16,8:32")),
            "/both | /"
        );
    }

    #[test]
    fn a_loop_file_system_freezes_before_the_one_that_its_file_lies_on() {
        assert_eq!(order("7:0 /inner ext4; 8:2 /outer ext4", "7:0 loop-on 8:2"), "/inner | /outer");
    }

    #[test]
    fn the_order_of_the_table_does_not_matter() {
        assert_eq!(order("8:2 /outer ext4; 7:0 /inner ext4", "7:0 loop-on 8:2"), "/inner | /outer");
        assert_eq!(
            order("8:2 /outer ext4; 7:0 /inner ext4", "7:0 loop-file /outer/disk.img"),
            "/inner | /outer"
        );
    }

    #[test]
    fn a_chain_of_loops_and_device_mappers_is_followed_to_its_end() {
        assert_eq!(
            order(
                "8:1 / ext4; 7:0 /a ext4; 253:1 /b xfs; 7:2 /c ext4",
                "7:0 loop-on 8:1; 253:1 slaves 253:0; 253:0 slaves 7:1; 7:1 loop-on 7:0; 7:2 loop-on 253:1"
            ),
            "/c | /b | /a | /"
        );
    }

    #[test]
    fn what_carries_the_root_file_system_freezes_after_it() {
        assert_eq!(
            order("7:0 / ext4; 8:1 /host ext4; 8:2 /data ext4", "7:0 loop-on 8:1"),
            "/data | / | /host"
        );
    }

    #[test]
    fn bind_mounts_and_subvolumes_are_one_superblock() {
        let plan = plan(&facts(
            "0:40 /home btrfs /dev/sda3; 0:40 / btrfs /dev/sda3; 8:2 /x ext4; 8:2 /y ext4",
            "8:3 member-of 0:40",
        ));
        assert_eq!(plan.superblocks.len(), 2);
        assert_eq!(plan.superblocks[1].places.len(), 2);
        assert_eq!(plan.superblocks[1].name(), "/");
    }

    #[test]
    fn btrfs_is_followed_to_all_its_devices() {
        assert_eq!(
            order(
                "0:40 /pool btrfs /dev/loop0; 8:1 /a ext4; 8:2 /b ext4",
                "7:0 loop-on 8:1; 7:1 loop-on 8:2; 7:0 member-of 0:40; 7:1 member-of 0:40"
            ),
            "/pool | /a /b"
        );
    }

    #[test]
    fn a_loop_file_on_btrfs_is_known_by_the_number_of_its_superblock() {
        assert_eq!(
            order("7:1 /in ext4; 0:40 /pool btrfs /dev/sda", "7:1 loop-file /pool/x.img; 8:0 member-of 0:40"),
            "/in | /pool"
        );
    }

    #[test]
    fn disks_are_found_through_partitions_mappers_and_loop_files() {
        let plan = plan(&facts(
            "7:0 /in ext4; 253:0 /out xfs",
            "7:0 loop-on 253:0; 253:0 slaves 8:1,8:17; 8:1 slaves 8:0; 8:17 slaves 8:16; 8:0 disk sda; 8:16 disk sdb",
        ));
        let names: Vec<&str> = plan.superblocks[0].disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["sda", "sdb"]);
    }

    #[test]
    fn what_cannot_be_frozen_is_named_and_what_holds_no_data_is_not() {
        let plan = plan(&facts(
            "0:5 /proc proc; 0:6 /run tmpfs; 0:7 /nfs nfs4 h:/x; 0:8 /tank zfs tank; 0:9 /s fuse.sshfs h:; 0:10 /m overlay; 0:11 /q newfs",
            "",
        ));
        assert!(plan.superblocks.is_empty());
        let codes: Vec<(&str, &str)> =
            plan.uncovered.iter().map(|r| (r.code.as_str(), r.subject.as_str())).collect();
        assert_eq!(
            codes,
            [
                ("network_filesystem", "/nfs"),
                ("zfs_cannot_freeze", "/tank"),
                ("fuse_cannot_freeze", "/s"),
                ("no_block_device", "/q")
            ]
        );
    }

    #[test]
    fn mounts_in_other_namespaces_are_planned_and_our_own_place_is_preferred() {
        let mut facts = facts("8:1 / ext4; 8:2 /long/name xfs", "");
        let other = parse(b"90 1 8:2 / /v rw - xfs b rw\n91 1 8:3 / /only-there ext4 - ext4 c rw\n").unwrap();
        facts.namespaces.push(Namespace { view: View::Process(7), mounts: other });
        let plan = plan(&facts);
        let names: Vec<String> = plan.superblocks.iter().map(Superblock::name).collect();
        assert_eq!(names, ["/only-there", "/long/name", "/"]);
        assert_eq!(plan.superblocks[0].places[0].view, View::Process(7));
    }

    #[test]
    fn a_list_of_places_keeps_what_is_mounted_exactly_there() {
        let mut plan = plan(&facts("8:1 / ext4; 8:2 /x ext4; 8:2 /y ext4; 8:3 /z ext4", ""));
        plan.only(&["/y".to_owned(), "/z/".to_owned(), "/nope".to_owned()]);
        assert_eq!(plan.superblocks.len(), 1);
        assert_eq!(plan.superblocks[0].device, number("8:2"));
    }

    #[test]
    fn a_ring_is_reported_and_ends() {
        let plan = plan(&facts("7:0 /a ext4; 7:1 /b ext4", "7:0 loop-on 7:1; 7:1 loop-on 7:0"));
        assert_eq!(plan.reasons[0].code, "stacking_ring");
        assert_eq!(plan.superblocks.len(), 2);
    }
}
