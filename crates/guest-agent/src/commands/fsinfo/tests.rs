use super::fsinfo;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A folder that looks like a guest's /proc, /sys and /dev.
struct Guest(tempfile::TempDir);

impl Guest {
    fn new(mounts: &str) -> Guest {
        let guest = Guest(tempfile::tempdir().expect("a folder"));
        guest.file("proc/self/mountinfo", mounts);
        fs::create_dir_all(guest.path().join("sys/dev/block")).expect("a folder");
        guest
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, text).expect("written");
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        symlink(self.path().join(target), path).expect("linked");
    }

    /// A block device at a folder below /sys/devices, as the kernel and udev show it.
    fn device(&self, number: &str, folder: &str) {
        let folder = format!("sys/devices/{folder}");
        self.file(&format!("{folder}/dev"), number);
        self.link(&format!("sys/dev/block/{number}"), &folder);
        self.file(&format!("dev/{}", folder.rsplit('/').next().expect("a name")), "");
    }

    fn disks(&self) -> Value {
        let filesystems = fsinfo(self.path()).expect("a table");
        let disks = filesystems.into_iter().map(|filesystem| (filesystem.mountpoint, json!(filesystem.disk)));
        Value::Object(disks.collect())
    }
}

#[test]
fn a_virtio_disk_is_told_by_its_controller_and_serial() {
    let guest = Guest::new("22 1 254:1 / / rw - ext4 /dev/vda1 rw\n23 22 0:5 / /proc rw - proc proc rw\n");
    guest.device("254:1", "pci0000:00/0000:00:1e.0/0000:01:03.0/virtio1/block/vda/vda1");
    guest.file("sys/devices/pci0000:00/0000:00:1e.0/0000:01:03.0/virtio1/block/vda/vda1/partition", "1");
    guest.file("sys/devices/pci0000:00/0000:00:1e.0/0000:01:03.0/virtio1/block/vda/serial", "root-disk\n");
    guest.link("sys/devices/pci0000:00/0000:00:1e.0/0000:01:03.0/driver", "sys/bus/pci/drivers/virtio-pci");
    assert_eq!(
        guest.disks(),
        json!({"/": [{
            "pci-controller": {"domain": 0, "bus": 1, "slot": 3, "function": 0},
            "bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, "serial": "root-disk", "dev": "/dev/vda1"
        }]})
    );
    let all = fsinfo(guest.path()).expect("a table");
    assert_eq!((all[0].name.as_str(), all[0].kind.as_str()), ("vda1", "ext4"));
    assert!(all[0].total_bytes_privileged >= all[0].used_bytes);
}

#[test]
fn scsi_and_sata_disks_are_told_by_target_and_port() {
    let guest = Guest::new("22 1 8:0 / / rw - ext4 /dev/sda rw\n23 22 8:16 / /b rw - xfs /dev/sdb rw\n");
    guest.device("8:0", "pci0000:00/0000:00:05.0/virtio2/host2/target2:0:3/2:0:3:7/block/sda");
    guest.link("sys/devices/pci0000:00/0000:00:05.0/driver", "sys/bus/pci/drivers/virtio-pci");
    guest.file("run/udev/data/b8:0", "S:disk/by-id/x\nE:ID_SERIAL=0QEMU_QEMU_HARDDISK_one\n");
    guest.device("8:16", "pci0000:00/0000:00:1f.2/ata4/host5/target5:0:0/5:0:0:0/block/sdb");
    for port in ["ata3/host4", "ata5/host6"] {
        guest.file(&format!("sys/devices/pci0000:00/0000:00:1f.2/{port}/x"), "");
    }
    guest.link("sys/devices/pci0000:00/0000:00:1f.2/driver", "sys/bus/pci/drivers/ahci");
    let disks = guest.disks();
    assert_eq!(
        disks["/"],
        json!([{
            "pci-controller": {"domain": 0, "bus": 0, "slot": 5, "function": 0}, "bus-type": "scsi",
            "bus": 0, "target": 3, "unit": 7, "serial": "0QEMU_QEMU_HARDDISK_one", "dev": "/dev/sda"
        }])
    );
    assert_eq!((&disks["/b"][0]["bus-type"], &disks["/b"][0]["unit"]), (&json!("sata"), &json!(1)));
}

#[test]
fn a_logical_volume_stands_for_the_disks_below_it() {
    let guest =
        Guest::new("22 1 253:0 / / rw - ext4 /dev/mapper/v rw\n23 22 7:0 / /loop rw - ext4 /dev/loop0 rw\n");
    guest.device("253:0", "virtual/block/dm-0");
    for (number, name) in [("254:0", "vda"), ("254:16", "vdb")] {
        guest.device(number, &format!("pci0000:00/0000:00:0{}.0/virtio0/block/{name}", name.len()));
        let real = format!("sys/devices/pci0000:00/0000:00:0{}.0/virtio0/block/{name}", name.len());
        guest.link(&format!("sys/devices/virtual/block/dm-0/slaves/{name}"), &real);
    }
    guest.device("7:0", "virtual/block/loop0");
    let disks = guest.disks();
    let nodes: Vec<_> = disks["/"].as_array().expect("a list").iter().map(|disk| &disk["dev"]).collect();
    assert_eq!(nodes, ["/dev/vda", "/dev/vdb"]);
    assert_eq!(disks["/loop"], json!([]));
}

#[test]
fn another_part_of_a_device_is_listed_and_the_same_part_once() {
    let guest = Guest::new(concat!(
        "22 1 254:0 /@ / rw - btrfs /dev/vda rw\n",
        "23 22 254:0 /@home /home rw - btrfs /dev/vda rw\n",
        "24 22 254:0 /@home /mnt/again rw - btrfs /dev/vda rw\n",
    ));
    guest.device("254:0", "pci0000:00/0000:00:04.0/virtio0/block/vda");
    let mountpoints: Vec<_> =
        fsinfo(guest.path()).expect("a table").into_iter().map(|filesystem| filesystem.mountpoint).collect();
    assert_eq!(mountpoints, ["/home", "/"], "last mounted first");
}

#[test]
fn d6_a_second_mount_is_told_but_not_each_of_thousands() {
    let mut table = "22 1 254:0 / / rw - ext4 /dev/vda rw\n".to_owned();
    for nth in 0..3000 {
        table += &format!("{} 22 254:0 /pods/{nth} /run/pods/{nth} rw - ext4 /dev/vda rw\n", nth + 23);
    }
    table += "9000 22 254:16 / /data rw - xfs /dev/vdb rw\n";
    let guest = Guest::new(&table);
    let told = fsinfo(guest.path()).expect("a table");
    let mountpoints: Vec<_> = told.iter().map(|filesystem| filesystem.mountpoint.as_str()).collect();
    assert_eq!(mountpoints.len(), 65);
    assert_eq!((mountpoints.first(), mountpoints.last()), (Some(&"/data"), Some(&"/")));
    assert!(mountpoints.contains(&"/run/pods/0"));
}

#[test]
fn d7_file_systems_without_a_device_number_are_told() {
    let guest = Guest::new(concat!(
        "22 1 0:30 / / rw - zfs rpool/ROOT/debian rw\n",
        "23 22 0:31 / /home rw - zfs rpool/home rw\n",
        "24 22 0:32 / /srv rw - bcachefs /dev/sda:/dev/sdb rw\n",
        "25 22 0:33 / /flash rw - ubifs ubi0:rootfs rw\n",
        "26 22 0:34 / /nfs rw - nfs4 server:/export rw\n",
        "27 22 0:35 / /run rw - tmpfs tmpfs rw\n",
        "28 22 0:36 / /var/lib/x rw - overlay overlay rw\n",
    ));
    let told: Vec<_> = fsinfo(guest.path())
        .expect("a table")
        .into_iter()
        .map(|filesystem| format!("{} {} {}", filesystem.kind, filesystem.name, filesystem.mountpoint))
        .collect();
    assert_eq!(
        told,
        [
            "ubifs ubi0:rootfs /flash",
            "bcachefs /dev/sda:/dev/sdb /srv",
            "zfs rpool/home /home",
            "zfs rpool/ROOT/debian /"
        ]
    );
}
