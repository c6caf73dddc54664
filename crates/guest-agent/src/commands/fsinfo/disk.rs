//! From a block device's folder in sysfs to the addresses of the disks below it.

use guest_protocol::answers::{DiskAddress, PciAddress};
use std::path::{Path, PathBuf};

/// Deepest stack of devices (LUKS on LVM on md on …) that is followed.
const DEPTH_MAX: usize = 16;
/// Most disks told for one file system.
const DISKS_MAX: usize = 256;
/// Most bytes read of a file of sysfs or udev.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The disks below a device. Virtual ones (LVM, md, LUKS) stand for those they lie on; a loop device lies on none.
pub(super) fn below(root: &Path, folder: &Path) -> Vec<DiskAddress> {
    let mut disks = Vec::new();
    descend(root, folder, 0, &mut disks);
    disks
}

fn descend(root: &Path, folder: &Path, depth: usize, disks: &mut Vec<DiskAddress>) {
    if depth > DEPTH_MAX || disks.len() >= DISKS_MAX {
        return;
    }
    let is_virtual =
        folder.strip_prefix(root).is_ok_and(|path| path.starts_with("sys/devices/virtual/block"));
    if !is_virtual {
        disks.extend(address(root, folder));
        return;
    }
    let Ok(slaves) = std::fs::read_dir(folder.join("slaves")) else { return };
    let mut slaves: Vec<PathBuf> =
        slaves.filter_map(|slave| std::fs::canonicalize(slave.ok()?.path()).ok()).collect();
    slaves.sort();
    for slave in slaves {
        descend(root, &slave, depth + 1, disks);
    }
}

fn address(root: &Path, folder: &Path) -> Option<DiskAddress> {
    let name = folder.file_name()?.to_string_lossy();
    let node = root.join("dev").join(&*name);
    let mut disk = DiskAddress {
        bus_type: "unknown".to_owned(),
        serial: serial(root, folder),
        dev: node.exists().then(|| format!("/dev/{name}")),
        ..DiskAddress::default()
    };
    let controller = folder.ancestors().find_map(|folder| Some((folder, pci_address(folder)?)));
    if let Some((controller, pci)) = controller {
        disk.pci_controller = pci;
        place(&mut disk, controller, folder);
    }
    // A disk of which nothing is known tells a host nothing.
    (disk.bus_type != "unknown" || disk.serial.is_some() || disk.dev.is_some()).then_some(disk)
}

/// Fills in bus, target and unit, by the controller's driver.
fn place(disk: &mut DiskAddress, controller: &Path, folder: &Path) {
    let driver = std::fs::read_link(controller.join("driver")).unwrap_or_default();
    let driver = driver.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let scsi = scsi_address(folder);
    let (kind, bus, target, unit) = match (driver.as_str(), scsi) {
        ("virtio-pci", None) => ("virtio", 0, 0, 0),
        ("virtio-pci", Some([_, channel, target, lun])) => ("scsi", channel, target, lun),
        ("ata_piix", Some([host, _, target, _])) => ("ide", nth_host(controller, host), 0, target),
        ("ahci", Some([host, ..])) => ("sata", 0, 0, nth_host(controller, host)),
        ("sym53c8xx", Some([_, channel, target, _])) => ("scsi", channel, 0, target),
        ("nvme", _) => ("nvme", 0, 0, 0),
        ("ehci-pci" | "xhci_hcd", _) => ("usb", 0, 0, 0),
        _ => return,
    };
    disk.bus_type = kind.to_owned();
    (disk.bus, disk.target, disk.unit) = (bus, target, unit);
}

/// A folder named `DDDD:BB:SS.F` is a PCI device.
fn pci_address(folder: &Path) -> Option<PciAddress> {
    let name = folder.file_name()?.to_str()?;
    let (rest, function) = name.rsplit_once('.')?;
    let mut parts = rest.split(':').map(|part| i64::from_str_radix(part, 16).ok());
    let (domain, bus, slot) = (parts.next()??, parts.next()??, parts.next()??);
    parts.next().is_none().then_some(())?;
    Some(PciAddress { domain, bus, slot, function: i64::from_str_radix(function, 16).ok()? })
}

/// A folder named `HOST:CHANNEL:TARGET:LUN` is a SCSI device, as ATA disks are too.
fn scsi_address(folder: &Path) -> Option<[i64; 4]> {
    folder.ancestors().find_map(|folder| {
        let numbers: Option<Vec<i64>> =
            folder.file_name()?.to_str()?.split(':').map(|number| number.parse().ok()).collect();
        <[i64; 4]>::try_from(numbers?).ok()
    })
}

/// Which of the controller's hosts this is: the kernel counts hosts over all controllers.
fn nth_host(controller: &Path, host: i64) -> i64 {
    let folders = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
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

/// What udev calls the disk, or else what the kernel knows.
fn serial(root: &Path, folder: &Path) -> Option<String> {
    let number = read(&folder.join("dev"))?;
    let udev = read(&root.join(format!("run/udev/data/b{number}"))).unwrap_or_default();
    let named = udev.lines().find_map(|line| line.strip_prefix("E:ID_SERIAL=")).map(str::to_owned);
    let is_partition = folder.join("partition").exists();
    let whole = if is_partition { folder.parent()? } else { folder };
    named.or_else(|| read(&whole.join("serial"))).or_else(|| read(&whole.join("device/serial")))
}

fn read(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}
