//! `guest-fstrim`: gives unused blocks of every local file system back.

use super::fsinfo::{self, Carrier};
use crate::freeze::mountinfo::{DeviceNumber, Mount};
use crate::note;
use guest_protocol::Error;
use guest_protocol::answers::{Trimmed, TrimmedPath};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Most mounts of one file system that are tried: the first may be hidden below another, or be no folder.
const TRIES_MAX: usize = 16;

/// `struct fstrim_range`. Source: `linux/fs.h`.
#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
    bytes_min: u64,
}

/// `FITRIM`: `_IOWR('X', 121, struct fstrim_range)`.
const TRIM: u32 = 0xC018_5879;

/// Trims each file system that the kernel shows below `root` once; what was mounted last comes first.
pub(super) fn fstrim(root: &Path, minimum: i64) -> Result<Trimmed, Error> {
    note!("guest-fstrim called");
    let mut filesystems: BTreeMap<Carrier, Vec<Mount>> = BTreeMap::new();
    let mut order = Vec::new();
    for (carrier, mount) in fsinfo::local_mounts(root)? {
        let mounts = filesystems.entry(carrier).or_default();
        if mounts.is_empty() {
            order.push(carrier);
        }
        if mounts.len() < TRIES_MAX {
            mounts.push(mount);
        }
    }
    // One after the other: a disk is not faster if it is asked for several at once.
    let mut paths: Vec<TrimmedPath> =
        order.iter().map(|carrier| trim(root, *carrier, &filesystems[carrier], minimum)).collect();
    paths.reverse();
    Ok(Trimmed { paths })
}

fn trim(root: &Path, carrier: Carrier, mounts: &[Mount], minimum: i64) -> TrimmedPath {
    let mut tries = mounts.iter().map(|mount| (mount, open(root, carrier, mount)));
    let Some(first) = tries.next() else { return TrimmedPath::default() };
    let (mount, opened) =
        if first.1.is_ok() { first } else { tries.find(|(_, opened)| opened.is_ok()).unwrap_or(first) };
    let mut result =
        TrimmedPath { path: mount.mountpoint.to_string_lossy().into_owned(), ..TrimmedPath::default() };
    let words = |errno: Errno| crate::words(&errno.into());
    let folder = match opened {
        Ok(folder) => folder,
        Err(errno) => {
            result.error = Some(format!("failed to open: {}", words(errno)));
            return result;
        }
    };
    let mut range = Range { start: 0, bytes: u64::MAX, bytes_min: minimum.cast_unsigned() };
    // SAFETY: the range is the kernel's structure and outlives the call.
    let failed = unsafe { libc::ioctl(folder.as_raw_fd(), TRIM as _, &raw mut range) } != 0;
    if failed {
        let error = io::Error::last_os_error();
        result.error = Some(match error.raw_os_error() {
            Some(libc::ENOTTY | libc::EOPNOTSUPP) => "trim not supported".to_owned(),
            _ => format!("failed to trim: {}", crate::words(&error)),
        });
    } else {
        result.minimum = Some(range.bytes_min);
        result.trimmed = Some(range.bytes);
    }
    result
}

/// Opens a mount, if it is this file system that is seen there. A pipe that something was mounted on is not waited for.
fn open(root: &Path, carrier: Carrier, mount: &Mount) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(fsinfo::mountpoint(root, mount), flags, Mode::empty())?;
    let seen = DeviceNumber::from_raw(rustix::fs::fstat(&folder)?.st_dev);
    match carrier {
        // Parts of btrfs have numbers of their own.
        Carrier::Device(device) if device != mount.device => Ok(folder),
        Carrier::Device(device) | Carrier::Hidden(device) if device == seen => Ok(folder),
        // Hidden below a later mount.
        _ => Err(Errno::STALE),
    }
}

#[cfg(test)]
mod tests {
    use super::fstrim;
    use crate::freeze::mountinfo::DeviceNumber;
    use serde_json::json;

    /// In memory, where nothing can be trimmed whatever goes wrong here.
    #[test]
    fn every_file_system_is_tried_once_and_says_why_it_was_not_trimmed() {
        let guest = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let device = DeviceNumber::from_raw(rustix::fs::stat(guest.path()).expect("there").st_dev);
        let folder = |path: &str| std::fs::create_dir_all(guest.path().join(path)).expect("a folder");
        folder("proc/self");
        folder("mnt/zfs");
        let table = [
            "22 1 0:5 / /proc rw - proc proc rw".to_owned(),
            "23 1 254:1 / / rw - ext4 /dev/vda1 rw".to_owned(),
            "24 1 254:1 /x /mnt/bind rw - ext4 /dev/vda1 rw".to_owned(),
            "25 1 254:17 / /mnt/gone rw - ext4 /dev/vdb1 rw".to_owned(),
            format!("26 1 {device} / /mnt/zfs rw - zfs pool/data rw"),
            "27 1 0:9999 / /mnt/nfs rw - nfs4 server:/x rw".to_owned(),
        ];
        std::fs::write(guest.path().join("proc/self/mountinfo"), table.join("\n")).expect("written");
        let trimmed = fstrim(guest.path(), 0).expect("a table");
        assert_eq!(
            serde_json::to_value(&trimmed).expect("plain"),
            json!({"paths": [
                {"path": "/mnt/zfs", "error": "trim not supported"},
                {"path": "/mnt/gone", "error": "failed to open: No such file or directory"},
                {"path": "/", "error": "failed to open: Stale file handle"},
            ]})
        );
    }
}
