//! Which of a VM's drives count as disks, decided from what QEMU reports. Pure; no image is ever opened or probed.

use qmp::bitmap::Bitmap;
use qmp::block::{Device, Image, Node};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Our nodes, exports and bitmaps begin with this.
pub const OUR_PREFIX: &str = "stillpoint-";

/// What the object tree tells about the device that holds a drive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Absolute path in the object tree.
    pub path: String,
    /// Type, e.g. `scsi-hd`.
    pub kind: String,
    /// Serial number that the guest sees; empty: none.
    pub serial: String,
    /// `DDDD:BB:SS.F` of the PCI device that carries it.
    pub pci: Option<String>,
    /// Its requests are served by an I/O thread.
    pub io_thread: bool,
    /// It hands SCSI commands of the guest's own choice to the host's device: `scsi=on` of an old virtio-blk.
    pub scsi_commands: bool,
}

/// How the guest reaches a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bus {
    /// virtio-blk.
    VirtioBlk,
    /// A SCSI disk, on virtio-scsi or another controller.
    Scsi,
    /// IDE or SATA.
    Ide,
    /// NVMe.
    Nvme,
    /// A disk device that we do not know by name; read as any other, but a twin gets virtio-blk.
    Other,
}

/// A disk that counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// What people call it: device id, else drive id, else serial number, else PCI address. Unique in its VM.
    pub name: String,
    /// Path of the device in the object tree, for `qom-set`.
    pub device: String,
    /// Node that the device uses: the top of the disk's chain.
    pub node: String,
    /// The node's driver, as QEMU was told: `raw`, `qcow2` … or a filter.
    pub format: String,
    /// File name as QEMU shows it; for people only.
    pub file: String,
    /// Size that the guest sees, in bytes.
    pub size_bytes: u64,
    /// Serial number that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// `DDDD:BB:SS.F` of the PCI device that carries it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
    /// How the guest reaches it.
    pub bus: Bus,
    /// The image can keep bitmaps over a restart of QEMU.
    pub keeps_bitmaps: bool,
    /// Its requests are served by an I/O thread, which a point does not allow in every QEMU.
    #[serde(default)]
    pub io_thread: bool,
    /// Its writes do not all go through QEMU's block layer, so while the VM runs it cannot be cut: see [`passes_through`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passthrough: bool,
    /// The images that it is made of, the one that the guest writes first: how to read it while the VM is shut off.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
}

/// One image of a disk's chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its driver, as QEMU was told.
    pub format: String,
    /// Its file name, as QEMU knows it.
    pub file: String,
    /// Its data lie in another file, which the image only names.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub data_elsewhere: bool,
}

/// Why a drive does not count, or cannot be cut now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    /// CD-ROM or floppy: its medium is no part of the machine.
    Removable,
    /// Nothing is inserted.
    Empty,
    /// The guest cannot write it.
    ReadOnly,
    /// Firmware flash; its variables are kept with the VM's definition instead.
    Firmware,
    /// No device of the guest uses it.
    NoDevice,
    /// A filter of an earlier run of ours is still in place: undo that run first.
    OurFilter,
    /// Another tool's backup filter is in place.
    OtherFilter,
}

impl Left {
    /// A backup's filter is in place, ours or another's: the disk counts, but not now.
    pub const fn is_filter(self) -> bool {
        matches!(self, Self::OurFilter | Self::OtherFilter)
    }
}

/// A drive that is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Named as a disk would be.
    pub name: String,
    /// Why.
    pub why: Left,
}

/// The decision over all drives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drives {
    /// Those that count, as QEMU lists them.
    pub disks: Vec<Disk>,
    /// The others.
    pub left_out: Vec<LeftOut>,
}

/// Decides which drives count. `facts` is keyed by what `query-block` reports as `qdev`.
///
/// Backing files never count by themselves: a disk is what its device uses, chain included, and only the top of
/// the chain is written.
pub fn decide(devices: &[Device], facts: &BTreeMap<String, DeviceFacts>) -> Drives {
    let mut drives = Drives::default();
    let mut names = BTreeSet::new();
    for device in devices {
        let facts = device.qdev.as_ref().and_then(|qdev| facts.get(qdev));
        let name = unique_name(device, facts, &mut names);
        match judge(device, facts) {
            Ok((node, facts)) => drives.disks.push(Disk {
                name,
                device: facts.path.clone(),
                node: node.node_name.clone().unwrap_or_default(),
                format: node.drv.clone(),
                file: node.file.clone(),
                size_bytes: node.image.virtual_size,
                serial: Some(facts.serial.clone()).filter(|serial| !serial.is_empty()),
                pci: facts.pci.clone(),
                bus: bus(&facts.kind),
                keeps_bitmaps: node.drv == "qcow2" && node.image.keeps_bitmaps(),
                io_thread: facts.io_thread,
                passthrough: passes_through(facts),
                layers: layers(&node.image),
            }),
            Err(why) => drives.left_out.push(LeftOut { name, why }),
        }
    }
    drives
}

fn judge<'a>(
    device: &'a Device,
    facts: Option<&'a DeviceFacts>,
) -> Result<(&'a Node, &'a DeviceFacts), Left> {
    let facts = facts.ok_or(Left::NoDevice)?;
    if facts.kind.starts_with("cfi.pflash") {
        return Err(Left::Firmware);
    }
    // `scsi-cd` with a fixed medium and `floppy` are removable by kind, whatever the flag says.
    if device.removable || matches!(facts.kind.as_str(), "scsi-cd" | "ide-cd" | "floppy") {
        return Err(Left::Removable);
    }
    let node = device.inserted.as_ref().ok_or(Left::Empty)?;
    if node.drv == "copy-before-write" {
        let ours = node.node_name.as_ref().is_some_and(|name| name.starts_with(OUR_PREFIX));
        return Err(if ours { Left::OurFilter } else { Left::OtherFilter });
    }
    if node.ro {
        return Err(Left::ReadOnly);
    }
    Ok((node, facts))
}

/// Whether a device hands the guest's commands to the host's own device as they are, by the ioctl `SG_IO`.
///
/// No dirty bitmap sees such a write, and QEMU's filters carry no ioctl: with one in place the guest's I/O would fail.
/// These are all that call `blk_aio_ioctl` or `blk_ioctl`; every other device, known to us or not, reads and writes through the
/// block layer. Source: QEMU 7.2 and 10.0, `hw/scsi/scsi-disk.c`, `hw/scsi/scsi-generic.c`, `hw/block/virtio-blk.c`.
fn passes_through(facts: &DeviceFacts) -> bool {
    matches!(facts.kind.as_str(), "scsi-block" | "scsi-generic") || facts.scsi_commands
}

/// A chain of images, top first. An image without a file name (a node that is no image) ends it.
fn layers(top: &Image) -> Vec<Layer> {
    let chain = std::iter::successors(Some(top), |image| image.backing_image.as_deref());
    let layer = |image: &Image| Layer {
        format: image.format.clone(),
        file: image.filename.clone(),
        data_elsewhere: image.format_specific["data"]["data-file"].is_string(),
    };
    chain.take_while(|image| !image.filename.is_empty()).map(layer).collect()
}

fn bus(kind: &str) -> Bus {
    match kind {
        "virtio-blk-device" => Bus::VirtioBlk,
        "scsi-hd" | "scsi-block" | "scsi-generic" => Bus::Scsi,
        "ide-hd" => Bus::Ide,
        "nvme" | "nvme-ns" => Bus::Nvme,
        _ => Bus::Other,
    }
}

fn unique_name(device: &Device, facts: Option<&DeviceFacts>, taken: &mut BTreeSet<String>) -> String {
    let id = device.qdev.as_deref().and_then(device_id).map(str::to_owned);
    // QEMU makes up drive ids such as `virtio0` from the order of its arguments; they are at least as stable as that.
    let drive = Some(device.device.clone());
    let serial = facts.map(|facts| facts.serial.clone());
    let pci = facts.and_then(|facts| facts.pci.as_ref()).map(|pci| format!("pci-{pci}"));
    let name = [id, drive, serial, pci].into_iter().flatten().find(|name| !name.is_empty());
    let name = name.unwrap_or_else(|| "disk".to_owned());
    let mut unique = name.clone();
    let mut number = 2;
    while !taken.insert(unique.clone()) {
        unique = format!("{name}-{number}");
        number += 1;
    }
    unique
}

/// The id that the user gave a device, from what `query-block` calls `qdev`.
fn device_id(qdev: &str) -> Option<&str> {
    if !qdev.starts_with('/') {
        return Some(qdev);
    }
    qdev.strip_prefix("/machine/peripheral/")?.split('/').next()
}

/// The absolute path of a device, from what `query-block` calls `qdev`.
pub fn device_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// The state of the bitmap that an increment would start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// It recorded every write since its snapshot.
    Usable {
        /// Bytes per bit.
        granularity_bytes: u64,
        /// Dirty bytes so far.
        dirty_bytes: u64,
    },
    /// It is not there: QEMU ended with a raw disk, or someone removed it.
    Missing,
    /// The image was not closed properly; the bitmap can only be removed.
    Inconsistent,
    /// An operation holds it.
    Busy,
    /// It was switched off, so writes are missing from it.
    NotRecording,
}

/// Looks for a bitmap on a disk's node.
pub fn base(nodes: &[Node], disk: &Disk, bitmap: &str) -> Base {
    match bitmaps(nodes, disk).iter().find(|found| found.name.as_deref() == Some(bitmap)) {
        None => Base::Missing,
        Some(found) if found.inconsistent => Base::Inconsistent,
        Some(found) if found.busy => Base::Busy,
        Some(found) if !found.recording => Base::NotRecording,
        Some(found) => Base::Usable { granularity_bytes: found.granularity, dirty_bytes: found.count },
    }
}

/// The bitmaps on a disk's node.
pub fn bitmaps<'a>(nodes: &'a [Node], disk: &Disk) -> &'a [Bitmap] {
    nodes
        .iter()
        .find(|node| node.node_name.as_ref() == Some(&disk.node))
        .map_or(&[], |node| &node.dirty_bitmaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(drive: &str, qdev: Option<&str>, removable: bool, inserted: Option<Node>) -> Device {
        Device { device: drive.into(), qdev: qdev.map(str::to_owned), removable, inserted }
    }

    fn node(name: &str, drv: &str, ro: bool) -> Node {
        let image = Image {
            format: drv.into(),
            virtual_size: 64 << 20,
            format_specific: serde_json::json!({"data": {"compat": "1.1"}}),
            ..Image::default()
        };
        Node {
            node_name: Some(name.into()),
            drv: drv.into(),
            file: format!("{name}.img"),
            ro,
            image,
            ..Node::default()
        }
    }

    /// One line a drive: its name, then node, bus and format if it counts, or the reason if it does not.
    fn check(devices: &[(Device, &str, &str)], expected: &[&str]) {
        let facts = devices.iter().filter_map(|(device, kind, serial)| {
            let qdev = device.qdev.clone()?;
            let pci = Some("0000:00:04.0".to_owned());
            let path = device_path(&qdev);
            Some((
                qdev,
                DeviceFacts {
                    path,
                    kind: (*kind).into(),
                    serial: (*serial).into(),
                    pci,
                    ..DeviceFacts::default()
                },
            ))
        });
        let facts = facts.collect();
        let list: Vec<_> = devices.iter().map(|(device, ..)| device.clone()).collect();
        let drives = decide(&list, &facts);
        let mut lines: Vec<_> = drives
            .disks
            .iter()
            .map(|disk| {
                format!("{}: {} {:?} {} {}", disk.name, disk.node, disk.bus, disk.format, disk.keeps_bitmaps)
            })
            .collect();
        lines.extend(drives.left_out.iter().map(|left| format!("{}: {:?}", left.name, left.why)));
        assert_eq!(lines, expected);
    }

    #[test]
    fn disks_on_every_bus_count() {
        check(
            &[
                (
                    device(
                        "olddrive",
                        Some("/machine/peripheral-anon/device[3]/virtio-backend"),
                        false,
                        Some(node("#block1", "raw", false)),
                    ),
                    "virtio-blk-device",
                    "",
                ),
                (
                    device(
                        "",
                        Some("/machine/peripheral/vd1/virtio-backend"),
                        false,
                        Some(node("f1", "qcow2", false)),
                    ),
                    "virtio-blk-device",
                    "S",
                ),
                (device("", Some("sd0"), false, Some(node("f2", "qcow2", false))), "scsi-hd", ""),
                (
                    device(
                        "",
                        Some("/machine/peripheral-anon/device[0]"),
                        false,
                        Some(node("f3", "raw", false)),
                    ),
                    "ide-hd",
                    "SERI",
                ),
                (
                    device(
                        "",
                        Some("/machine/peripheral-anon/device[1]"),
                        false,
                        Some(node("f4", "raw", false)),
                    ),
                    "nvme",
                    "",
                ),
            ],
            &[
                "olddrive: #block1 VirtioBlk raw false",
                "vd1: f1 VirtioBlk qcow2 true",
                "sd0: f2 Scsi qcow2 true",
                "SERI: f3 Ide raw false",
                "pci-0000:00:04.0: f4 Nvme raw false",
            ],
        );
    }

    #[test]
    fn media_firmware_and_what_the_guest_cannot_write_do_not_count() {
        check(
            &[
                (device("", Some("cd0"), true, Some(node("cd", "raw", true))), "scsi-cd", ""),
                (device("", Some("cd1"), true, None), "scsi-cd", ""),
                (
                    device(
                        "fld",
                        Some("/machine/peripheral-anon/device[2]"),
                        true,
                        Some(node("fl", "raw", false)),
                    ),
                    "floppy",
                    "",
                ),
                (
                    device("", Some("/machine/system.flash0"), false, Some(node("pf0", "raw", true))),
                    "cfi.pflash01",
                    "",
                ),
                (
                    device("", Some("/machine/system.flash1"), false, Some(node("pf1", "raw", false))),
                    "cfi.pflash01",
                    "",
                ),
                (device("", Some("ro0"), false, Some(node("ro", "raw", true))), "virtio-blk-device", ""),
                (device("", Some("hd0"), false, None), "scsi-hd", ""),
                (device("spare", None, false, Some(node("spare", "qcow2", false))), "", ""),
            ],
            &[
                "cd0: Removable",
                "cd1: Removable",
                "fld: Removable",
                "pci-0000:00:04.0: Firmware",
                "pci-0000:00:04.0-2: Firmware",
                "ro0: ReadOnly",
                "hd0: Empty",
                "spare: NoDevice",
            ],
        );
    }

    #[test]
    fn a_disk_knows_every_image_that_it_lies_on() {
        let image = |format: &str, file: &str, below| Image {
            format: format.into(),
            filename: file.into(),
            backing_image: below,
            ..Image::default()
        };
        let below = image("qcow2", "/b", Some(Box::new(image("raw", "/c", None))));
        let mut top = image("qcow2", "/a", Some(Box::new(below)));
        top.format_specific = serde_json::json!({"data": {"compat": "1.1", "data-file": "/a.data"}});
        let told: Vec<_> = layers(&top)
            .into_iter()
            .map(|layer| format!("{} {} {}", layer.format, layer.file, layer.data_elsewhere))
            .collect();
        assert_eq!(told, ["qcow2 /a true", "qcow2 /b false", "raw /c false"]);
    }

    #[test]
    fn a_filter_that_is_in_place_is_told_apart_by_its_owner() {
        check(
            &[
                (
                    device(
                        "",
                        Some("a"),
                        false,
                        Some(node("stillpoint-1-0-cbw", "copy-before-write", false)),
                    ),
                    "scsi-hd",
                    "",
                ),
                (
                    device("", Some("b"), false, Some(node("libvirt-1", "copy-before-write", false))),
                    "scsi-hd",
                    "",
                ),
            ],
            &["a: OurFilter", "b: OtherFilter"],
        );
    }

    #[test]
    fn a_device_that_hands_the_guests_commands_to_the_hosts_device_is_known_and_no_other_is() {
        let passes = |kind: &str, scsi_commands| {
            passes_through(&DeviceFacts { kind: kind.into(), scsi_commands, ..DeviceFacts::default() })
        };
        for kind in ["scsi-block", "scsi-generic"] {
            assert!(passes(kind, false), "{kind}");
        }
        assert!(passes("virtio-blk-device", true), "scsi=on");
        for kind in [
            "virtio-blk-device",
            "scsi-hd",
            "ide-hd",
            "nvme",
            "nvme-ns",
            "usb-storage",
            "sd-card",
            "xen-disk",
        ] {
            assert!(!passes(kind, false), "{kind}");
        }
        let taped = device("", Some("tape"), false, Some(node("sg", "host_device", false)));
        let facts = DeviceFacts { kind: "scsi-generic".into(), ..DeviceFacts::default() };
        let drives = decide(&[taped], &BTreeMap::from([("tape".to_owned(), facts)]));
        assert!(drives.disks[0].passthrough, "{drives:?}");
    }

    #[test]
    fn only_a_bitmap_that_recorded_without_a_break_is_a_base() {
        let disk = Disk {
            name: "d".into(),
            device: "/d".into(),
            node: "n".into(),
            format: "qcow2".into(),
            file: String::new(),
            size_bytes: 1 << 20,
            serial: None,
            pci: None,
            bus: Bus::Scsi,
            keeps_bitmaps: true,
            io_thread: false,
            passthrough: false,
            layers: Vec::new(),
        };
        let good = Bitmap {
            name: Some("b".into()),
            recording: true,
            granularity: 4096,
            count: 8192,
            ..Bitmap::default()
        };
        let check = |bitmap: Bitmap| {
            base(&[Node { dirty_bitmaps: vec![bitmap], ..node("n", "qcow2", false) }], &disk, "b")
        };
        assert_eq!(check(good.clone()), Base::Usable { granularity_bytes: 4096, dirty_bytes: 8192 });
        assert_eq!(check(Bitmap { name: Some("c".into()), ..good.clone() }), Base::Missing);
        assert_eq!(check(Bitmap { inconsistent: true, ..good.clone() }), Base::Inconsistent);
        assert_eq!(check(Bitmap { busy: true, ..good.clone() }), Base::Busy);
        assert_eq!(check(Bitmap { recording: false, ..good }), Base::NotRecording);
    }
}
