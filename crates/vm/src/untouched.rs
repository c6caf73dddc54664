//! Shows that nobody wrote to a file while it was read, without being in anybody's way.
//!
//! Two kinds of evidence, both before the first read and after the last: no QEMU holds the file's lock for writing, and
//! the kernel's own record of the file (identity, size, times of modification and change) is the same.

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{Mode, OFlags, fstat, fstatfs, open, stat};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// The byte on which every QEMU that may write to a file holds a lock.
/// Source: QEMU `block/file-posix.c`, `RAW_LOCK_PERM_BASE` (100), plus the number of the bit `BLK_PERM_WRITE` (1).
const WRITER_BYTE: libc::off_t = 101;
/// How old a file's times must be, so that a write after they were read is sure to change them: file systems take them
/// from a clock that moves 100 to 1000 times a second.
const SETTLED: Duration = Duration::from_millis(100);
/// How long to wait for that. A file that is still being written has a writer.
const SETTLE_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// File systems that no other host can write to. Source: Linux `include/uapi/linux/magic.h`; ZFS on Linux `sys/zfs_vfsops`.
const LOCAL: [u64; 9] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0xF2F5_2010, // f2fs
    0xCA45_1A4E, // bcachefs
    0x2FC1_2FC1, // zfs
    0x0102_1994, // tmpfs
    0x8584_58F6, // ramfs
    0x794C_7630, // overlayfs
];

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum Touched {
    /// A QEMU has it open for writing, or it was written all the time while we looked.
    #[error("{} is in use: a program has it open for writing", .0.display())]
    InUse(PathBuf),
    /// It is another file now, or was written to.
    #[error("{} was changed meanwhile", .0.display())]
    Changed(PathBuf),
    /// It is neither a file nor a block device.
    #[error("{} is neither a file nor a block device", .0.display())]
    NotAnImage(PathBuf),
    /// The kernel refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kernel's words.
        source: io::Error,
    },
}

/// A file as it was before the first read.
#[derive(Debug)]
pub struct Untouched {
    path: PathBuf,
    file: File,
    seen: Facts,
    device: bool,
    local: bool,
}

/// What the kernel records of a file. A device has its numbers and nothing else that tells of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    place: (u64, u64, u64),
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Untouched {
    /// Looks at a file that nobody has open for writing.
    ///
    /// # Errors
    /// See [`Touched`].
    pub fn since_now(path: &Path) -> Result<Self, Touched> {
        let io = |source: io::Error| Touched::Io { path: path.to_owned(), source };
        // Not blocking, because the path may name a FIFO by now.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(open(path, flags, Mode::empty()).map_err(|errno| io(errno.into()))?);
        let kind = file.metadata().map_err(io)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Touched::NotAnImage(path.to_owned()));
        }
        let magic = fstatfs(&file).map_err(|errno| io(errno.into()))?.f_type;
        let device = kind.is_block_device();
        let local = kind.is_file() && LOCAL.contains(&magic.cast_unsigned());
        let deadline = Instant::now() + SETTLE_LIMIT;
        let seen = loop {
            let facts = Facts::of(&fstat(&file).map_err(|errno| io(errno.into()))?, device);
            if device || facts.is_settled() {
                break facts;
            }
            if Instant::now() >= deadline {
                return Err(Touched::InUse(path.to_owned()));
            }
            std::thread::sleep(LOOK);
        };
        let untouched = Self { path: path.to_owned(), file, seen, device, local };
        untouched.has_no_writer()?;
        Ok(untouched)
    }

    /// Looks again: it is the same file, nobody has written to it, nobody has it open for writing.
    ///
    /// # Errors
    /// See [`Touched`].
    pub fn still(&self) -> Result<(), Touched> {
        let io = |errno: rustix::io::Errno| Touched::Io { path: self.path.clone(), source: errno.into() };
        let by_name = Facts::of(&stat(&self.path).map_err(io)?, self.device);
        let by_handle = Facts::of(&fstat(&self.file).map_err(io)?, self.device);
        if by_name != self.seen || by_handle != self.seen {
            return Err(Touched::Changed(self.path.clone()));
        }
        self.has_no_writer()
    }

    /// Nobody could have written to it unseen. A block device keeps no time of its last write, and what lies on another
    /// host's storage may be written by a third.
    pub fn shows_every_writer(&self) -> bool {
        self.local
    }

    /// It is a block device.
    pub fn is_device(&self) -> bool {
        self.device
    }

    fn has_no_writer(&self) -> Result<(), Touched> {
        let mut lock = writer_lock(libc::F_WRLCK);
        match fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) if i32::from(lock.l_type) == libc::F_UNLCK => Ok(()),
            Ok(_) => Err(Touched::InUse(self.path.clone())),
            Err(errno) => Err(Touched::Io { path: self.path.clone(), source: errno.into() }),
        }
    }
}

/// A lock of this kind on the byte of writers.
fn writer_lock(kind: i32) -> libc::flock {
    let short =
        |number: i32| libc::c_short::try_from(number).expect("the kernel's numbers fit its own types");
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: WRITER_BYTE,
        l_len: 1,
        l_pid: 0,
    }
}

impl Facts {
    fn of(stat: &rustix::fs::Stat, device: bool) -> Self {
        let place = (stat.st_dev, stat.st_ino, stat.st_rdev);
        if device {
            // A device node's times are those of its name; udev touches them.
            return Self { place, size: 0, modified: (0, 0), changed: (0, 0) };
        }
        let nanos = |nanos| i64::try_from(nanos).unwrap_or_default();
        Self {
            place,
            size: stat.st_size,
            modified: (stat.st_mtime, nanos(stat.st_mtime_nsec)),
            changed: (stat.st_ctime, nanos(stat.st_ctime_nsec)),
        }
    }

    /// Its last change is so long ago that another one would show. A time to come is somebody's own invention.
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let last = |(seconds, nanos): (i64, i64)| {
            Duration::new(
                u64::try_from(seconds).unwrap_or_default(),
                u32::try_from(nanos).unwrap_or_default(),
            )
        };
        now.abs_diff(last(self.changed)) >= SETTLED && now.abs_diff(last(self.modified)) >= SETTLED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(folder: &Path) -> PathBuf {
        let path = folder.join("disk.raw");
        std::fs::write(&path, [7; 4096]).unwrap();
        path
    }

    #[test]
    fn a_file_that_nobody_wrote_to_is_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path());
        let untouched = Untouched::since_now(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap().len(), 4096);
        untouched.still().unwrap();
    }

    #[test]
    fn a_write_at_once_after_the_first_look_shows() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path());
        let untouched = Untouched::since_now(&path).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(&[7; 512]).unwrap();
        assert!(matches!(untouched.still(), Err(Touched::Changed(_))));
    }

    #[test]
    fn another_file_of_the_same_name_shows() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path());
        let untouched = Untouched::since_now(&path).unwrap();
        let other = folder.path().join("other");
        std::fs::copy(&path, &other).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert!(matches!(untouched.still(), Err(Touched::Changed(_))));
    }

    #[test]
    fn a_lock_as_qemu_holds_it_shows_a_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path());
        let qemu = File::open(&path).unwrap();
        let mut lock = writer_lock(libc::F_RDLCK);
        fcntl(&qemu, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(matches!(Untouched::since_now(&path), Err(Touched::InUse(_))));
        lock.l_type = writer_lock(libc::F_UNLCK).l_type;
        fcntl(&qemu, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        Untouched::since_now(&path).unwrap();
    }

    #[test]
    fn what_is_no_image_is_refused_and_blocks_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [fifo.as_path(), folder.path(), Path::new("/dev/null")] {
            assert!(matches!(Untouched::since_now(path), Err(Touched::NotAnImage(_))), "{}", path.display());
        }
    }
}
