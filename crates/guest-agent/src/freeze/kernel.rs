//! The few calls into the kernel that freezing needs.

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `_IOWR('X', 119, int)`. Source: `linux/fs.h`.
const FIFREEZE: u32 = 0xC004_5877;
/// `_IOWR('X', 120, int)`.
const FITHAW: u32 = 0xC004_5878;

/// Blocks new writes to a file system and waits until what was written is on disk (seconds, on a busy guest).
/// # Errors
/// `BUSY`: someone else holds it. `OPNOTSUPP`: it cannot freeze.
/// Source: FIFREEZE in `ioctl_fsfreeze`, Linux `fs/ioctl.c`.
pub fn freeze(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    control(folder, FIFREEZE)
}

/// Lets writers go on. Waits for a FIFREEZE of the same superblock that is still in the kernel.
/// # Errors
/// `INVAL`: it was not frozen.
pub fn thaw(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    control(folder, FITHAW)
}

fn control(folder: BorrowedFd<'_>, request: u32) -> Result<(), Errno> {
    // SAFETY: both requests ignore their argument and touch no memory of ours.
    let done = unsafe { libc::ioctl(folder.as_raw_fd(), request as _, 0) };
    if done == 0 { Ok(()) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

/// Time since boot in nanoseconds, the time that the machine slept included: what leases are counted in.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
