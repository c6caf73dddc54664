//! Holds an image against every QEMU, as a QEMU that may write to it holds it against others.
//!
//! QEMU locks single bytes of an image for reading, and refuses to start where it cannot. A lock for writing over all of
//! it excludes each of them, whatever a QEMU wants the image for. Source: `raw_apply_lock_bytes` and
//! `raw_check_lock_bytes` in QEMU's `block/file-posix.c`.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::io;

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    /// No QEMU has it open, and none can open it while the file that was locked is open. A lock belongs to the open
    /// file, not to the process: closing another handle to the same image does not end it.
    Held,
    /// A QEMU has it open.
    InUse,
    /// The file system knows no locks, so it cannot say; a QEMU could not have locked it either.
    Unknown,
}

/// Locks an image that was opened for writing, without waiting.
///
/// # Errors
/// The kernel's, if the file was not opened for writing.
pub fn lock(image: &File) -> io::Result<Locked> {
    let short =
        |number: i32| libc::c_short::try_from(number).expect("the kernel's numbers fit its own types");
    // A length of 0: to the end of the file, wherever that will be.
    let all = libc::flock {
        l_type: short(libc::F_WRLCK),
        l_whence: short(libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(image, FcntlArg::F_OFD_SETLK(&all)) {
        Ok(_) => Ok(Locked::Held),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(Locked::InUse),
        Err(Errno::EBADF) => Err(Errno::EBADF.into()),
        Err(_) => Ok(Locked::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn a_lock_lasts_as_long_as_its_file_is_open_and_no_longer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, [7; 4096]).unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let held = open();
        assert_eq!(lock(&held).unwrap(), Locked::Held);
        // Another handle is refused, and closing it, as any other that was only read, ends nothing.
        assert_eq!(lock(&open()).unwrap(), Locked::InUse);
        std::fs::read(&path).unwrap();
        assert_eq!(lock(&open()).unwrap(), Locked::InUse);
        drop(held);
        assert_eq!(lock(&open()).unwrap(), Locked::Held);
        assert!(lock(&File::open(&path).unwrap()).is_err(), "it was opened for reading only");
    }
}
