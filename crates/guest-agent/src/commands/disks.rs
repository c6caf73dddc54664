//! `guest-get-disks`: block devices, their partitions and what they lie on.
//!
//! What udev knows is read from its files; without udev the kernel's own names serve.

pub mod address;
mod nvme;

pub(super) use address::below;

use guest_protocol::Error;
use guest_protocol::answers::{DiskInfo, DiskSmart};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most disks and partitions that are told: 1,024 disks of 15 partitions.
const DISKS_MAX: usize = 16_384;
/// Most bytes read of a file of sysfs or udev.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What the kernel shows below `root`, which is `/` but in tests; what was found last comes first, as in qemu-ga.
pub(super) fn disks(root: &Path) -> Result<Vec<DiskInfo>, Error> {
    let folder = fs::read_dir(root.join("sys/block"));
    let folder = folder.map_err(|error| {
        Error::generic(format!("Can't open directory \"/sys/block\": {}", crate::words(&error)))
    })?;
    let mut disks = Vec::new();
    for entry in folder.filter_map(Result::ok) {
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let Some(folder) = fs::canonicalize(entry.path()).ok().filter(|_| is_link) else { continue };
        // Loop devices without a file and drives without a medium.
        let is_empty = read(&folder.join("size")).is_none_or(|size| size == "0");
        let Some(name) = node(&folder).filter(|_| !is_empty) else { continue };
        disks.push(disk(root, &folder, &name));
        disks.extend(partitions(&folder, &name));
        if disks.len() >= DISKS_MAX {
            break;
        }
    }
    disks.reverse();
    Ok(disks)
}

fn disk(root: &Path, folder: &Path, name: &str) -> DiskInfo {
    let address = if address::is_virtual(root, folder) { None } else { address::address(root, folder) };
    let is_nvme = address.as_ref().is_some_and(|address| address.bus_type == "nvme");
    let smart = if is_nvme { nvme::smart(&in_root(root, name)) } else { None };
    let alias = number(folder).and_then(|number| udev(root, &number, "DM_NAME"));
    DiskInfo {
        name: name.to_owned(),
        partition: false,
        dependencies: dependencies(folder),
        address,
        alias: alias.or_else(|| read(&folder.join("dm/name"))),
        smart: smart.map(DiskSmart::Nvme),
    }
}

fn dependencies(folder: &Path) -> Option<Vec<String>> {
    let slaves = fs::read_dir(folder.join("slaves")).ok()?.filter_map(Result::ok);
    let mut nodes: Vec<String> =
        slaves.filter_map(|slave| node(&fs::canonicalize(slave.path()).ok()?)).collect();
    nodes.reverse();
    Some(nodes)
}

fn partitions(folder: &Path, disk: &str) -> Vec<DiskInfo> {
    let children = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let partitions = children.map(|child| child.path()).filter(|child| child.join("partition").exists());
    let partition = |folder: PathBuf| {
        Some(DiskInfo {
            name: node(&folder)?,
            partition: true,
            dependencies: Some(vec![disk.to_owned()]),
            ..DiskInfo::default()
        })
    };
    partitions.filter_map(partition).collect()
}

/// The device node of a block device: its name, in which sysfs writes `!` for `/`, unless the kernel says otherwise.
fn node(folder: &Path) -> Option<String> {
    let uevent = read(&folder.join("uevent")).unwrap_or_default();
    let named = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    if let Some(name) = named {
        return Some(format!("/dev/{name}"));
    }
    folder.join("dev").exists().then_some(())?;
    Some(format!("/dev/{}", folder.file_name()?.to_str()?.replace('!', "/")))
}

/// `MAJOR:MINOR` of a block device.
fn number(folder: &Path) -> Option<String> {
    read(&folder.join("dev"))
}

/// What udev noted about a block device. Source: systemd's `device-private.c`, the udev database.
fn udev(root: &Path, number: &str, property: &str) -> Option<String> {
    let notes = read(&root.join(format!("run/udev/data/b{number}")))?;
    let value =
        notes.lines().find_map(|line| line.strip_prefix("E:")?.strip_prefix(property)?.strip_prefix('='));
    value.filter(|value| !value.is_empty()).map(str::to_owned)
}

fn in_root(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn read(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    fs::File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests;
