//! From a block device's folder in sysfs to where its disk is plugged in.

use super::{number, udev};
use guest_protocol::answers::{CcwAddress, DiskAddress, PciAddress};
use std::fs;
use std::path::{Path, PathBuf};

/// Deepest stack of devices (LUKS on LVM on md on …) that is followed.
const DEPTH_MAX: usize = 16;
/// Most disks told for one file system.
const DISKS_MAX: usize = 256;

/// The disks below a device. Virtual ones (LVM, md, LUKS) stand for those they lie on; a loop device lies on none.
pub(in super::super) fn below(root: &Path, folder: &Path) -> Vec<DiskAddress> {
    let mut disks = Vec::new();
    descend(root, folder, 0, &mut disks);
    disks
}

/// Whether a device is made of others, or of nothing that is plugged in.
pub(super) fn is_virtual(root: &Path, folder: &Path) -> bool {
    folder.starts_with(root.join("sys/devices/virtual/block"))
}

fn descend(root: &Path, folder: &Path, depth: usize, disks: &mut Vec<DiskAddress>) {
    if depth > DEPTH_MAX || disks.len() >= DISKS_MAX {
        return;
    }
    if !is_virtual(root, folder) {
        disks.extend(address(root, folder));
        return;
    }
    let Ok(slaves) = fs::read_dir(folder.join("slaves")) else { return };
    let mut slaves: Vec<PathBuf> =
        slaves.filter_map(|slave| fs::canonicalize(slave.ok()?.path()).ok()).collect();
    slaves.sort();
    for slave in slaves {
        descend(root, &slave, depth + 1, disks);
    }
}

/// Where a disk, or the disk of a partition, is plugged in; `None` if nothing is known of it.
pub(super) fn address(root: &Path, folder: &Path) -> Option<DiskAddress> {
    let mut disk = DiskAddress {
        bus_type: "unknown".to_owned(),
        serial: serial(root, folder),
        dev: super::node(folder),
        ..DiskAddress::default()
    };
    let is_placed = place(&mut disk, root, folder);
    (is_placed || disk.serial.is_some() || disk.dev.is_some()).then_some(disk)
}

fn place(disk: &mut DiskAddress, root: &Path, folder: &Path) -> bool {
    let names: Vec<_> = folder.iter().filter_map(|name| name.to_str()).collect();
    let is_virtio = names.iter().any(|name| name.starts_with("virtio")) && names.contains(&"block");
    if let Some((pci, controller, driver)) = controller(folder) {
        return place_on_pci(disk, pci, &controller, &driver, folder);
    }
    if let Some(ccw) = ccw_address(&names) {
        disk.ccw_address = Some(ccw);
        if is_virtio {
            place_on_virtio(disk, folder);
        }
        return true;
    }
    if is_virtio {
        place_on_virtio(disk, folder);
        return true;
    }
    if let Some((pci, ..)) = nvme_path(root, folder).as_deref().and_then(controller) {
        disk.pci_controller = pci;
        disk.bus_type = "nvme".to_owned();
        return true;
    }
    false
}

/// The PCI device that a disk hangs on, and its driver, if it is one whose disks we can tell apart.
fn controller(folder: &Path) -> Option<(PciAddress, PathBuf, String)> {
    const KNOWN: [&str; 7] = ["ata_piix", "sym53c8xx", "virtio-pci", "ahci", "nvme", "xhci_hcd", "ehci-pci"];
    folder.ancestors().find_map(|folder| {
        let pci = pci_address(folder)?;
        let driver = fs::read_link(folder.join("driver")).ok()?;
        let driver = driver.file_name()?.to_str()?;
        KNOWN.contains(&driver).then(|| (pci, folder.to_owned(), driver.to_owned()))
    })
}

/// Fills in bus, target and unit, by the controller's driver.
fn place_on_pci(
    disk: &mut DiskAddress,
    pci: PciAddress,
    controller: &Path,
    driver: &str,
    folder: &Path,
) -> bool {
    let scsi = scsi_address(folder);
    let nth = |host| nth_host(controller, host);
    let (kind, bus, target, unit) = match (driver, scsi) {
        ("virtio-pci", None) => ("virtio", 0, 0, 0),
        ("virtio-pci", Some([_, channel, target, lun])) => ("scsi", channel, target, lun),
        ("ata_piix", Some([host, _, target, _])) => ("ide", nth(host), 0, target),
        ("ahci", Some([host, ..])) => ("sata", 0, 0, nth(host)),
        ("sym53c8xx", Some([_, _, target, _])) => ("scsi", 0, 0, target),
        ("nvme", _) => ("nvme", 0, 0, 0),
        ("ehci-pci" | "xhci_hcd", _) => ("usb", 0, 0, 0),
        _ => return false,
    };
    disk.pci_controller = pci;
    disk.bus_type = kind.to_owned();
    (disk.bus, disk.target, disk.unit) = (bus, target, unit);
    true
}

/// virtio on something else than PCI: memory-mapped, or a mainframe's channel.
fn place_on_virtio(disk: &mut DiskAddress, folder: &Path) {
    match scsi_address(folder) {
        Some([_, channel, target, lun]) => {
            disk.bus_type = "scsi".to_owned();
            (disk.bus, disk.target, disk.unit) = (channel, target, lun);
        }
        None => disk.bus_type = "virtio".to_owned(),
    }
}

/// A folder named `DDDD:BB:SS.F` is a PCI device.
pub fn pci_address(folder: &Path) -> Option<PciAddress> {
    let name = folder.file_name()?.to_str()?;
    let (rest, function) = name.rsplit_once('.')?;
    let mut parts = rest.split(':').map(|part| i64::from_str_radix(part, 16).ok());
    let (domain, bus, slot) = (parts.next()??, parts.next()??, parts.next()??);
    parts.next().is_none().then_some(())?;
    Some(PciAddress { domain, bus, slot, function: i64::from_str_radix(function, 16).ok()? })
}

/// Below `cssN` come the subchannel and the device, each `CSSID.SSID.NUMBER` in hexadecimal.
pub fn ccw_address(names: &[&str]) -> Option<CcwAddress> {
    let css = names.iter().position(|name| {
        name.strip_prefix("css").is_some_and(|number| u64::from_str_radix(number, 16).is_ok())
    })?;
    let parts = |name: &str| {
        let parts: Option<Vec<u64>> =
            name.split('.').map(|part| u64::from_str_radix(part, 16).ok()).collect();
        <[u64; 3]>::try_from(parts?).ok()
    };
    let [cssid, ssid, subchno] = parts(names.get(css + 1)?)?;
    let [_, _, devno] = parts(names.get(css + 2)?)?;
    Some(CcwAddress { cssid, ssid, subchno, devno })
}

/// A folder named `HOST:CHANNEL:TARGET:LUN` is a SCSI device, as ATA disks are too.
pub fn scsi_address(folder: &Path) -> Option<[i64; 4]> {
    folder.ancestors().find_map(|folder| {
        let numbers: Option<Vec<i64>> =
            folder.file_name()?.to_str()?.split(':').map(|number| number.parse().ok()).collect();
        <[i64; 4]>::try_from(numbers?).ok()
    })
}

/// Which of the controller's hosts this is: the kernel counts hosts over all controllers.
fn nth_host(controller: &Path, host: i64) -> i64 {
    let folders = |folder: &Path| fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let number = |name: &str| name.strip_prefix("host")?.parse::<i64>().ok();
    let mut hosts: Vec<i64> = folders(controller)
        .flat_map(|child| {
            std::iter::once(child.path()).chain(folders(&child.path()).map(|inner| inner.path()))
        })
        .filter_map(|path| number(path.file_name()?.to_str()?))
        .collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts.iter().position(|found| *found == host).and_then(|at| i64::try_from(at).ok()).unwrap_or(0)
}

/// An NVMe disk that may have several paths hangs on none of them in sysfs; its subsystem links to each.
fn nvme_path(root: &Path, folder: &Path) -> Option<PathBuf> {
    let subsystem = folder
        .ancestors()
        .find(|folder| folder.parent() == Some(&root.join("sys/devices/virtual/nvme-subsystem")))?;
    let links = fs::read_dir(subsystem).ok()?.filter_map(Result::ok);
    let links = links.filter(|link| link.file_type().is_ok_and(|kind| kind.is_symlink()));
    let paths = links.filter_map(|link| fs::canonicalize(link.path()).ok());
    paths.filter(|path| path.ancestors().any(|folder| pci_address(folder).is_some())).min()
}

/// What udev calls the disk, or else what the kernel knows.
fn serial(root: &Path, folder: &Path) -> Option<String> {
    let is_partition = folder.join("partition").exists();
    let whole = if is_partition { folder.parent()? } else { folder };
    udev(root, &number(folder)?, "ID_SERIAL")
        .or_else(|| super::read(&whole.join("serial")))
        .or_else(|| super::read(&whole.join("device/serial")))
}
