//! Opens a folder (or file) on each superblock, by which it can be flushed, frozen and thawed.
//!
//! Opening must neither wait for ever (a FIFO, a dead server on the way) nor end on another file system than the one
//! meant (a mount on top of the mount point): each attempt has a thread and a time limit, looks before it opens, and
//! is checked by the number of the mount that it ended on.

use super::facts::{Facts, View};
use super::mountinfo::DeviceNumber;
use super::plan::{Place, Superblock};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Longest time for one attempt.
const ATTEMPT_MAX: Duration = Duration::from_secs(2);
/// Most places tried for one superblock: a busy container host binds one file system thousands of times.
pub(super) const PLACES_MAX: usize = 16;
/// Stack of a thread that opens.
const STACK_BYTES: usize = 64 << 10;

/// A superblock that was reached.
#[derive(Debug)]
pub struct Reached {
    /// Open on it.
    pub folder: OwnedFd,
    /// Which of its places it was.
    pub place: Place,
}

/// Which superblock each mount belongs to.
pub type MountDevices = HashMap<u64, DeviceNumber>;

/// The table for `reach`.
pub fn mount_devices(facts: &Facts) -> MountDevices {
    facts
        .namespaces
        .iter()
        .flat_map(|namespace| &namespace.mounts)
        .map(|mount| (mount.id, mount.device))
        .chain(facts.further.iter().copied())
        .collect()
}

/// Opens the first place of a superblock that can be opened.
/// # Errors
/// Why each place could not, in words.
pub fn reach(superblock: &Superblock, mounts: &MountDevices) -> Result<Reached, String> {
    let mut failures = Vec::new();
    for place in superblock.places.iter().take(PLACES_MAX) {
        match attempt(place, superblock.device, mounts) {
            Ok(folder) => return Ok(Reached { folder, place: place.clone() }),
            Err(failure) => failures.push(format!("{}: {failure}", place.mountpoint.display())),
        }
    }
    Err(failures.join("; "))
}

fn attempt(place: &Place, device: DeviceNumber, mounts: &MountDevices) -> Result<OwnedFd, String> {
    let (sender, receiver) = mpsc::channel();
    let wanted = place.clone();
    // A thread that never comes back is left behind: nothing can end a thread that waits in the kernel.
    thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || sender.send(open(&wanted)).is_ok())
        .map_err(|error| format!("no thread: {error}"))?;
    let folder = receiver.recv_timeout(ATTEMPT_MAX).map_err(|_| "opening it takes too long".to_owned())??;
    let found = superblock_number(&folder, mounts).map_err(|error| error.to_string())?;
    if found == Some(device) { Ok(folder) } else { Err("another file system is mounted on top".to_owned()) }
}

fn open(place: &Place) -> Result<OwnedFd, String> {
    // O_PATH opens nothing: a socket, FIFO or device node is only looked at.
    let name = match place.view {
        View::Own => rustix::fs::open(&place.mountpoint, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()),
        View::Process(pid) => {
            let root =
                rustix::fs::open(format!("/proc/{pid}/root"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| format!("the root of process {pid}: {error}"))?;
            rustix::fs::openat2(
                &root,
                place
                    .mountpoint
                    .strip_prefix("/")
                    .map_or(Path::new("."), |path| if path == Path::new("") { Path::new(".") } else { path }),
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            )
        }
    }
    .map_err(|error| error.to_string())?;
    let stat = rustix::fs::fstat(&name).map_err(|error| error.to_string())?;
    let flags = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::DIRECTORY | OFlags::CLOEXEC,
        FileType::RegularFile => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        other => return Err(format!("what is mounted there is no folder and no file, but {other:?}")),
    };
    let through = format!("/proc/self/fd/{}", name.as_raw_fd());
    rustix::fs::openat(CWD, through, flags, Mode::empty()).map_err(|error| error.to_string())
}

/// The superblock that an open file lies on, as mount tables number it.
///
/// `st_dev` is not enough: on btrfs it is the subvolume's. Source: `proc_pid_fdinfo(5)`, `mnt_id`.
fn superblock_number(file: &OwnedFd, mounts: &MountDevices) -> io::Result<Option<DeviceNumber>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse::<u64>().ok());
    if let Some(device) = mount.and_then(|mount| mounts.get(&mount)) {
        return Ok(Some(*device));
    }
    // Mounted since the tables were read, or by a namespace that we did not look into: then the number must do.
    let device = DeviceNumber::from_raw(rustix::fs::fstat(file)?.st_dev);
    Ok((device.major != 0).then_some(device))
}

/// The superblock that a path lies on, as reports number it: for applications to say where their files are.
/// # Errors
/// When the path cannot be opened or the mount table cannot be read.
pub fn superblock_of(path: &Path) -> io::Result<Option<DeviceNumber>> {
    let table = super::gather::read_bounded(
        Path::new("/proc/self/mountinfo"),
        super::mountinfo::TABLE_BYTES_MAX as u64,
    )?;
    let mounts = super::mountinfo::parse(&table).map_err(io::Error::other)?;
    let numbers = mounts.iter().map(|mount| (mount.id, mount.device)).collect();
    let file = rustix::fs::open(PathBuf::from(path), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    superblock_number(&file, &numbers)
}
