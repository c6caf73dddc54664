//! `guest-get-fsinfo`: mounted file systems on block devices, and the disks that carry them.
//!
//! Unlike qemu-ga from 10.0 on, a second mount of a device is listed where it shows another part of it (a btrfs
//! subvolume), since hosts name such mounts in `guest-fsfreeze-freeze-list`; and so are file systems that have no device
//! number of their own, but lie on disks all the same.

use super::disks;
use crate::freeze::mountinfo::{self, DeviceNumber, Mount};
use guest_protocol::Error;
use guest_protocol::answers::FilesystemInfo;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Most parts of one device that are told. A host full of containers has thousands of them, which are of no use to anyone.
const PARTS_MAX: usize = 64;
/// Most file systems that are told.
const FILESYSTEMS_MAX: usize = 4096;

/// What a mounted file system lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Carrier {
    /// A block device.
    Device(DeviceNumber),
    /// Disks that the kernel does not name; the number tells the file system from others.
    Hidden(DeviceNumber),
}

/// What the kernel shows below `root`, which is `/` but in tests; what was mounted last comes first.
pub(super) fn fsinfo(root: &Path) -> Result<Vec<FilesystemInfo>, Error> {
    let mut seen = BTreeSet::new();
    let mut parts: BTreeMap<Carrier, usize> = BTreeMap::new();
    let mut filesystems = Vec::new();
    for (carrier, mount) in local_mounts(root)? {
        if filesystems.len() >= FILESYSTEMS_MAX {
            break;
        }
        if seen.insert((carrier, mount.root.clone())) {
            let part = parts.entry(carrier).or_default();
            *part += 1;
            if *part <= PARTS_MAX {
                filesystems.push(filesystem(root, &mount, carrier));
            }
        }
    }
    filesystems.reverse();
    Ok(filesystems)
}

/// Mounts of file systems that lie on disks of this machine, in the kernel's order.
pub(super) fn local_mounts(root: &Path) -> Result<Vec<(Carrier, Mount)>, Error> {
    let failed = |error: String| Error::generic(format!("failed to read the mount table: {error}"));
    let mut table = Vec::new();
    std::fs::File::open(root.join("proc/self/mountinfo"))
        .and_then(|file| file.take(mountinfo::TABLE_BYTES_MAX as u64 + 1).read_to_end(&mut table))
        .map_err(|error| failed(crate::words(&error)))?;
    let mounts = mountinfo::parse(&table).map_err(|error| failed(error.to_string()))?;
    Ok(mounts.into_iter().filter_map(|mount| Some((carrier(root, &mount)?, mount))).collect())
}

/// btrfs and bcachefs have numbers of their own for their parts; the device is the one that was mounted, the first of
/// several. What ZFS and UBIFS lie on is not to be seen.
fn carrier(root: &Path, mount: &Mount) -> Option<Carrier> {
    if mount.device.major != 0 {
        return Some(Carrier::Device(mount.device));
    }
    match mount.kind.as_str() {
        "btrfs" | "bcachefs" => {
            let source = mount.source.split(':').next().unwrap_or_default();
            let stat = rustix::fs::stat(root.join(source.trim_start_matches('/'))).ok();
            let device =
                stat.filter(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_block_device());
            let device = device.map(|stat| Carrier::Device(DeviceNumber::from_raw(stat.st_rdev)));
            device.or_else(|| (mount.kind == "bcachefs").then_some(Carrier::Hidden(mount.device)))
        }
        "zfs" | "ubifs" => Some(Carrier::Hidden(mount.device)),
        _ => None,
    }
}

fn filesystem(root: &Path, mount: &Mount, carrier: Carrier) -> FilesystemInfo {
    let mut info = FilesystemInfo {
        mountpoint: mount.mountpoint.to_string_lossy().into_owned(),
        kind: mount.kind.clone(),
        ..FilesystemInfo::default()
    };
    match carrier {
        Carrier::Device(device) => {
            match std::fs::canonicalize(root.join(format!("sys/dev/block/{device}"))) {
                Ok(folder) => {
                    info.name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    info.disk = disks::below(root, &folder);
                }
                // A container need not see the device below its file system.
                Err(_) => info.name = device.to_string(),
            }
        }
        Carrier::Hidden(_) => info.name.clone_from(&mount.source),
    }
    if let Ok(stat) = rustix::fs::statvfs(mountpoint(root, mount)) {
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        info.used_bytes = Some(used.saturating_mul(stat.f_frsize));
        info.total_bytes = Some(used.saturating_add(stat.f_bavail).saturating_mul(stat.f_frsize));
        info.total_bytes_privileged = Some(stat.f_blocks.saturating_mul(stat.f_frsize));
    }
    info
}

/// Where a mount is below `root`.
pub(super) fn mountpoint(root: &Path, mount: &Mount) -> PathBuf {
    root.join(mount.mountpoint.strip_prefix("/").unwrap_or(&mount.mountpoint))
}

#[cfg(test)]
mod tests;
