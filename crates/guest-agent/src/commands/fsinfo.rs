//! `guest-get-fsinfo`: mounted file systems on block devices, and the disks that carry them.
//!
//! Unlike qemu-ga from 10.0 on, a second mount of a device is listed where it shows another part of it (a btrfs
//! subvolume), since hosts name such mounts in `guest-fsfreeze-freeze-list`.

mod disk;

use crate::freeze::mountinfo::{self, DeviceNumber, Mount};
use guest_protocol::Error;
use guest_protocol::answers::FilesystemInfo;
use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What the kernel shows below `root`, which is `/` but in tests.
pub(super) fn fsinfo(root: &Path) -> Result<Vec<FilesystemInfo>, Error> {
    let failed = |error: String| Error::generic(format!("failed to read the mount table: {error}"));
    let mut table = Vec::new();
    std::fs::File::open(root.join("proc/self/mountinfo"))
        .and_then(|file| file.take(mountinfo::TABLE_BYTES_MAX as u64 + 1).read_to_end(&mut table))
        .map_err(|error| failed(error.to_string()))?;
    let mounts = mountinfo::parse(&table).map_err(|error| failed(error.to_string()))?;
    let mut seen = BTreeSet::new();
    let mut filesystems = Vec::new();
    for mount in mounts {
        if let Some(device) = block_device(&mount)
            && seen.insert((device, mount.root.clone()))
        {
            filesystems.extend(filesystem(root, &mount, device));
        }
    }
    filesystems.reverse();
    Ok(filesystems)
}

/// btrfs has numbers of its own for its parts; the device is the one that was mounted.
fn block_device(mount: &Mount) -> Option<DeviceNumber> {
    if mount.device.major != 0 {
        return Some(mount.device);
    }
    if mount.kind != "btrfs" {
        return None;
    }
    let stat = rustix::fs::stat(&mount.source).ok()?;
    rustix::fs::FileType::from_raw_mode(stat.st_mode)
        .is_block_device()
        .then(|| DeviceNumber::from_raw(stat.st_rdev))
}

fn filesystem(root: &Path, mount: &Mount, device: DeviceNumber) -> Option<FilesystemInfo> {
    let folder = std::fs::canonicalize(root.join(format!("sys/dev/block/{device}"))).ok()?;
    let mut info = FilesystemInfo {
        name: folder.file_name()?.to_string_lossy().into_owned(),
        mountpoint: mount.mountpoint.to_string_lossy().into_owned(),
        kind: mount.kind.clone(),
        disk: disk::below(root, &folder),
        ..FilesystemInfo::default()
    };
    if let Ok(stat) = rustix::fs::statvfs(mountpoint(root, mount)) {
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        info.used_bytes = Some(used.saturating_mul(stat.f_frsize));
        info.total_bytes = Some(used.saturating_add(stat.f_bavail).saturating_mul(stat.f_frsize));
        info.total_bytes_privileged = Some(stat.f_blocks.saturating_mul(stat.f_frsize));
    }
    Some(info)
}

fn mountpoint(root: &Path, mount: &Mount) -> PathBuf {
    root.join(mount.mountpoint.strip_prefix("/").unwrap_or(&mount.mountpoint))
}

#[cfg(test)]
mod tests;
