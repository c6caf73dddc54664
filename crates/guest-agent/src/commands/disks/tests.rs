use super::disks;
use crate::commands::fsinfo::fsinfo;
use crate::commands::recorded::Guest;
use guest_protocol::answers::{DiskAddress, DiskInfo};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;

fn shown(address: &DiskAddress) -> String {
    let pci = address.pci_controller;
    let pci = format!("{:x}:{:x}:{:x}.{:x}", pci.domain, pci.bus, pci.slot, pci.function);
    let DiskAddress { bus_type, bus, target, unit, .. } = address;
    let serial = address.serial.as_deref().unwrap_or("-");
    format!("{bus_type} {} {bus}/{target}/{unit} {serial}", if pci.contains("ffff") { "-" } else { &pci })
}

fn told(guest: &Guest) -> BTreeMap<String, DiskInfo> {
    disks(guest.path()).expect("disks").into_iter().map(|disk| (disk.name.clone(), disk)).collect()
}

#[track_caller]
fn places(guest: &Guest, expected: &[(&str, &str)]) {
    let disks = told(guest);
    let disks = disks.values().filter(|disk| !disk.partition);
    let places: Vec<_> = disks.map(|disk| (&*disk.name, disk.address.as_ref().map(shown))).collect();
    let expected: Vec<_> = expected.iter().map(|(name, place)| (*name, Some((*place).to_owned()))).collect();
    assert_eq!(places, expected);
}

#[test]
fn disks_behind_bridges_on_ahci_nvme_and_usb_are_told_by_their_places() {
    let guest = Guest::recorded("q35");
    places(
        &guest,
        &[
            ("/dev/nvme0n1", "nvme 0:0:3.0 0/0/0 nvme-1"),
            ("/dev/nvme2n1", "nvme 0:0:4.0 0/0/0 shared-1"),
            ("/dev/sda", "scsi 0:3:3.0 0/3/7 -"),
            ("/dev/sdb", "sata 0:0:1f.2 0/0/2 -"),
            ("/dev/sdc", "sata 0:0:1f.2 0/0/4 -"),
            ("/dev/sdd", "usb 0:0:6.0 0/0/0 -"),
            ("/dev/vda", "virtio 0:1:0.0 0/0/0 blk-1"),
        ],
    );
    let disks = told(&guest);
    let partition = serde_json::to_value(&disks["/dev/vda1"]).expect("plain");
    assert_eq!(partition, json!({"name": "/dev/vda1", "partition": true, "dependencies": ["/dev/vda"]}));
    assert_eq!(disks["/dev/vda"].dependencies.as_deref(), Some(&[][..]));
    assert_eq!(disks.len(), 8, "paths of an NVMe disk are no disks");
}

#[test]
fn disks_on_ide_and_on_a_parallel_scsi_bus_are_told_by_their_places() {
    places(
        &Guest::recorded("i440fx"),
        &[
            ("/dev/sda", "ide 0:0:1.1 0/0/0 -"),
            ("/dev/sdb", "ide 0:0:1.1 1/0/1 -"),
            ("/dev/sdc", "scsi 0:0:2.0 0/0/5 -"),
            ("/dev/sdd", "usb 0:0:3.0 0/0/0 -"),
            ("/dev/vda", "virtio 0:0:4.0 0/0/0 blk-2"),
        ],
    );
}

#[test]
fn disks_on_a_mainframes_channels_are_told_by_their_addresses() {
    let guest = Guest::recorded("s390x");
    places(
        &guest,
        &[
            ("/dev/dasda", "unknown - 0/0/0 -"),
            ("/dev/sda", "scsi - 0/1/2 -"),
            ("/dev/vda", "virtio - 0/0/0 -"),
        ],
    );
    let disks = told(&guest);
    let ccw = |name: &str| {
        let address = disks[name].address.as_ref().expect("an address");
        serde_json::to_value(address.ccw_address).expect("plain")
    };
    assert_eq!(ccw("/dev/vda"), json!({"cssid": 0, "ssid": 0, "subchno": 2, "devno": 0xA01}));
    assert_eq!(ccw("/dev/sda"), json!({"cssid": 0, "ssid": 0, "subchno": 3, "devno": 0xB02}));
    assert_eq!(ccw("/dev/dasda"), json!({"cssid": 0, "ssid": 1, "subchno": 0xFE, "devno": 0x120}));
}

#[test]
fn disks_of_machines_whose_devices_are_no_pci_devices_are_told() {
    places(
        &Guest::recorded("arm64"),
        &[
            ("/dev/sda", "scsi - 0/2/1 -"),
            ("/dev/vda", "virtio 0:0:2.0 0/0/0 -"),
            ("/dev/vdb", "virtio - 0/0/0 -"),
        ],
    );
}

#[test]
fn what_udev_knows_is_told() {
    let guest = Guest::recorded("q35");
    let note = |number: &str, text: &str| {
        let path = guest.path().join(format!("run/udev/data/b{number}"));
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    };
    note("8:16", "S:disk/by-id/x\nE:ID_SERIAL=QEMU_HARDDISK_sata-1\nE:ID_SERIAL_SHORT=sata-1\n");
    note("8:32", "E:ID_SERIAL=\nE:ID_SERIAL_SHORT=x\n");
    let disks = told(&guest);
    let serial = |name: &str| disks[name].address.as_ref().expect("an address").serial.as_deref();
    assert_eq!(serial("/dev/sdb"), Some("QEMU_HARDDISK_sata-1"));
    assert_eq!(serial("/dev/sdc"), None);
}

#[test]
fn volumes_name_what_they_lie_on_and_their_alias() {
    let guest = Guest::recorded("q35");
    let folder = guest.path().join("sys/devices/virtual/block/dm-0");
    fs::create_dir_all(folder.join("slaves")).expect("made");
    fs::create_dir_all(folder.join("dm")).expect("made");
    for (name, text) in
        [("dev", "253:0\n"), ("size", "8\n"), ("uevent", "DEVNAME=dm-0\n"), ("dm/name", "vg-root\n")]
    {
        fs::write(folder.join(name), text).expect("written");
    }
    let link = |target: &str, place: &str| {
        let target = fs::canonicalize(guest.path().join(target)).expect("there");
        std::os::unix::fs::symlink(target, guest.path().join(place)).expect("linked");
    };
    link("sys/devices/virtual/block/dm-0", "sys/block/dm-0");
    link("sys/block/sdb", "sys/devices/virtual/block/dm-0/slaves/sdb");
    let disks = told(&guest);
    assert_eq!(
        serde_json::to_value(&disks["/dev/dm-0"]).expect("plain"),
        json!({"name": "/dev/dm-0", "partition": false, "dependencies": ["/dev/sdb"], "alias": "vg-root"})
    );
}

#[test]
fn an_empty_drive_is_no_disk_and_a_name_may_hold_a_slash() {
    let guest = Guest::recorded("i440fx");
    let sda = fs::canonicalize(guest.path().join("sys/block/sda")).expect("there");
    fs::write(sda.join("size"), "0\n").expect("written");
    let sdb = fs::canonicalize(guest.path().join("sys/block/sdb")).expect("there");
    fs::remove_file(sdb.join("uevent")).expect("there");
    fs::rename(&sdb, sdb.with_file_name("cciss!c0d0")).expect("renamed");
    fs::remove_file(guest.path().join("sys/block/sdb")).expect("there");
    std::os::unix::fs::symlink(sdb.with_file_name("cciss!c0d0"), guest.path().join("sys/block/cciss!c0d0"))
        .expect("linked");
    let disks = told(&guest);
    assert!(!disks.contains_key("/dev/sda") && disks.contains_key("/dev/cciss/c0d0"), "{disks:?}");
    let missing = disks_of_nothing();
    assert_eq!(missing, "Can't open directory \"/sys/block\": No such file or directory");
}

fn disks_of_nothing() -> String {
    disks(std::path::Path::new("/nope")).expect_err("nothing").desc
}

#[test]
fn a_disk_whose_controller_we_cannot_place_is_unknown() {
    let guest = Guest::recorded("i440fx");
    let controller = guest.path().join("sys/devices/pci0000:00/0000:00:02.0/driver");
    fs::remove_file(&controller).expect("there");
    std::os::unix::fs::symlink("/sys/bus/pci/drivers/megaraid_sas", controller).expect("linked");
    let disks = told(&guest);
    let address = disks["/dev/sdc"].address.as_ref().expect("known by its node");
    assert_eq!((shown(address), address.dev.as_deref()), ("unknown - 0/0/0 -".to_owned(), Some("/dev/sdc")));
}

#[test]
fn file_systems_tell_the_disks_of_a_recorded_guest() {
    let guest = Guest::recorded("q35");
    guest.mount(&[("254:1", "/"), ("259:1", "/shared"), ("8:0", "/srv"), ("99:7", "/elsewhere")]);
    let told: Vec<_> = fsinfo(guest.path())
        .expect("a table")
        .into_iter()
        .map(|filesystem| {
            let disks: Vec<_> = filesystem.disk.iter().map(shown).collect();
            format!("{} {} {}", filesystem.name, filesystem.mountpoint, disks.join(","))
        })
        .collect();
    assert_eq!(
        told,
        [
            "99:7 /elsewhere ",
            "sda /srv scsi 0:3:3.0 0/3/7 -",
            "nvme2n1 /shared nvme 0:0:4.0 0/0/0 shared-1",
            "vda1 / virtio 0:1:0.0 0/0/0 blk-1",
        ]
    );
}
