//! Mount tables and what sysfs says, up to the freeze plan. A table that a kernel could write is read back as it
//! was; no superblock goes missing; what lies on others is frozen before them.
#![no_main]

use arbitrary::Arbitrary;
use guest_agent::freeze::facts::{Backing, Block, Facts, Namespace, View};
use guest_agent::freeze::mountinfo::{self, DeviceNumber, Mount};
use guest_agent::freeze::plan::{is_on_blocks, is_volatile, plan};
use guest_agent::freeze::{counters, gather, writers};
use libfuzzer_sys::fuzz_target;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

#[derive(Arbitrary, Debug)]
struct Line {
    device: (u8, u8),
    place: Vec<u8>,
    kind: u8,
    read_only: bool,
    optional: u8,
}

#[derive(Arbitrary, Debug)]
struct Device {
    below: Vec<(u8, u8)>,
    backing: Option<Result<(u8, u8), Vec<u8>>>,
    disk: bool,
}

#[derive(Arbitrary, Debug)]
enum Input {
    Table(Vec<u8>),
    Attribute(Vec<u8>),
    Facts {
        tables: Vec<Vec<Line>>,
        devices: Vec<((u8, u8), Device)>,
        members: Vec<((u8, u8), Vec<(u8, u8)>)>,
    },
}

const KINDS: [&str; 8] = ["ext4", "xfs", "btrfs", "tmpfs", "nfs4", "zfs", "vfat", "fuse.sshfs"];

fn number(pair: (u8, u8)) -> DeviceNumber {
    DeviceNumber { major: u32::from(pair.0 % 4), minor: u32::from(pair.1 % 16) }
}

/// A name as the kernel writes it.
fn mangled(name: &[u8]) -> Vec<u8> {
    let escape = |byte: &u8| match byte {
        b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{byte:03o}").into_bytes(),
        other => vec![*other],
    };
    name.iter().flat_map(escape).collect()
}

fn place(line: &Line) -> PathBuf {
    let mut place = vec![b'/'];
    place.extend(line.place.iter().copied().filter(|byte| *byte != 0).take(40));
    PathBuf::from(OsString::from_vec(place))
}

fn table(lines: &[Line]) -> Vec<Mount> {
    let mut text = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        text.extend(format!("{at} 0 {} / ", number(line.device)).bytes());
        text.extend(mangled(place(line).as_os_str().as_bytes()));
        let optional = "shared:1 ".repeat(usize::from(line.optional % 3));
        let kind = KINDS[usize::from(line.kind) % KINDS.len()];
        let mode = if line.read_only { "ro" } else { "rw" };
        text.extend(format!(" rw {optional}- {kind} /dev/x {mode},relatime\n").bytes());
    }
    let mounts = mountinfo::parse(&text).expect("a table that a kernel could write");
    assert_eq!(mounts.len(), lines.len());
    for (mount, line) in mounts.iter().zip(lines) {
        assert_eq!(mount.mountpoint, place(line));
        assert_eq!((mount.device, mount.read_only), (number(line.device), line.read_only));
    }
    mounts
}

fn check(facts: &Facts) {
    let plan = plan(facts);
    assert_eq!(plan.superblocks.len(), plan.steps.len());
    assert!(plan.steps.is_sorted());
    let planned: BTreeSet<DeviceNumber> =
        plan.superblocks.iter().map(|superblock| superblock.device).collect();
    assert_eq!(planned.len(), plan.superblocks.len(), "a superblock twice");
    // Whatever is mounted is frozen, holds nothing that lasts, or is named.
    let mut first: BTreeMap<DeviceNumber, &Mount> = BTreeMap::new();
    for mount in facts.namespaces.iter().flat_map(|namespace| &namespace.mounts) {
        first.entry(mount.device).or_insert(mount);
    }
    let named = first.iter().filter(|(device, mount)| {
        assert!(planned.contains(device) || is_volatile(&mount.kind) || !is_on_blocks(&mount.kind));
        !planned.contains(device) && !is_volatile(&mount.kind)
    });
    assert_eq!(named.count(), plan.uncovered.len(), "something is left out in silence");
    if plan.reasons.iter().any(|reason| reason.code == "stacking_ring") {
        return;
    }
    let step = |device: &DeviceNumber| {
        plan.superblocks.iter().position(|superblock| superblock.device == *device).map(|at| plan.steps[at])
    };
    for (superblock, own) in plan.superblocks.iter().zip(&plan.steps) {
        assert!(!superblock.places.is_empty());
        for below in superblock.lies_on.iter().filter_map(step) {
            assert!(*own < below, "frozen after what it lies on");
        }
    }
}

fuzz_target!(|input: Input| match input {
    Input::Table(bytes) => {
        let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
        if let Ok(mounts) = mountinfo::parse(&bytes) {
            assert_eq!(mounts.len(), lines, "a line went missing in silence");
            check(&Facts { namespaces: vec![Namespace { view: View::Own, mounts }], ..Facts::default() });
        }
    }
    Input::Attribute(bytes) => {
        let text = String::from_utf8_lossy(&bytes);
        let _read = (
            gather::unit_serial(&bytes).is_some(),
            gather::pci_address(text.as_ref().as_ref()).is_some(),
            counters::parse(&text).is_some(),
            writers::parent(&bytes).is_some(),
            writers::written_mount(&text).is_some(),
            text.parse::<DeviceNumber>().is_ok(),
        );
    }
    Input::Facts { tables, devices, members } => {
        let view =
            |at: usize| if at == 0 { View::Own } else { View::Process(u32::try_from(at).unwrap_or(1)) };
        let namespaces =
            tables.iter().enumerate().map(|(at, lines)| Namespace { view: view(at), mounts: table(lines) });
        let blocks = devices.into_iter().map(|(at, device)| {
            let backing = device.backing.map(|backing| match backing {
                Ok(at) => Backing::Device(number(at)),
                Err(path) => Backing::Path(PathBuf::from(OsString::from_vec(path))),
            });
            let disk = device.disk.then(Default::default);
            let below = device.below.into_iter().map(number).collect();
            (number(at), Block { name: String::new(), below, backing, disk })
        });
        let members = members
            .into_iter()
            .map(|(at, of)| (DeviceNumber { major: 0, ..number(at) }, of.into_iter().map(number).collect()));
        check(&Facts {
            namespaces: namespaces.collect(),
            blocks: blocks.collect(),
            members: members.collect(),
            ..Facts::default()
        });
    }
});
