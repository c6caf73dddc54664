//! Writes a disk of a snapshot to an image or a block device: sparse, complete or not at all. Raw is written by
//! several threads; qcow2 by `qemu-img`, which reads the disk from an NBD server of ours.
//!
//! A file is written under another name and renamed at the end, so a target is never half a disk. What it replaces is
//! held against every QEMU until then: a VM that was started on the old image meanwhile would go on writing to a file
//! without a name. A block device has no such way: whoever reads it after a failed restore is told by the error.

use crate::serve::SnapshotDisk;
use crate::watch::{Cancel, Watch};
use repository::DiskReader;
use rustix::fs::{CWD, FallocateFlags, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm::image_lock::{self, Locked};
use vm::nbd_server::{NbdServer, NbdServerError, ServerOptions};

/// Bytes that a thread reads and writes at a time.
const STEP_BYTES: u64 = 1 << 20;
/// Threads: decryption and decompression are the work, and the frame cache is shared.
const THREADS: usize = 2;

/// Why a disk was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Something is at the target already, or appeared there while the disk was written.
    #[error("{} exists", .0.display())]
    Exists(PathBuf),
    /// The target is a folder, a socket or the like.
    #[error("{} is neither a file nor a block device", .0.display())]
    NotAFile(PathBuf),
    /// The folder in which the target should be made is not there.
    #[error("the folder {} does not exist", .0.display())]
    NoFolder(PathBuf),
    /// Someone holds the target open: a running VM, or a mounted file system.
    #[error("{} is in use, by a running VM or a mount", .0.display())]
    InUse(PathBuf),
    /// Somebody put another file in the place of the one that should be replaced.
    #[error("{} is another file than when the restore began", .0.display())]
    Changed(PathBuf),
    /// The block device is smaller than the disk.
    #[error("{} has {have} bytes, the disk has {need}", .path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        have: u64,
        /// The disk's size in bytes.
        need: u64,
    },
    /// A block device cannot hold an image format.
    #[error("{} is a block device and takes raw only", .0.display())]
    RawOnly(PathBuf),
    /// The target failed.
    #[error("{}: {source}", .path.display())]
    Target {
        /// The file or device.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// The disk could not be served to `qemu-img`.
    #[error(transparent)]
    Serve(#[from] NbdServerError),
    /// `qemu-img` could not write the image.
    #[error("qemu-img could not write {}: {cause}", .path.display())]
    Convert {
        /// The image.
        path: PathBuf,
        /// What it said.
        cause: String,
    },
    /// Someone wanted it to end.
    #[error("interrupted")]
    Interrupted,
}

/// Where a disk goes. What is there is held against every QEMU until it was replaced, or this is dropped. Of several
/// disks of one VM all targets are claimed before the first is written: a VM that is started in between must not find
/// some of them restored, and others not yet.
#[derive(Debug)]
#[must_use = "dropping this lets a VM use what is there"]
pub struct Target {
    path: PathBuf,
    claimed: Claimed,
}

impl Target {
    /// Looks at a path before anything is written anywhere. `overwrite`: what is there may be replaced; a block device
    /// always needs it.
    ///
    /// # Errors
    /// `Exists`, `NotAFile`, `NoFolder`, `InUse`, `Target`.
    pub fn claim(path: &Path, overwrite: bool) -> Result<Self, RestoreError> {
        Ok(Self { path: path.to_owned(), claimed: claim(path, overwrite)? })
    }
}

/// Writes `disk` as a raw image.
///
/// # Errors
/// See [`RestoreError`]; a file at the target is then as it was.
pub fn to_raw(
    disk: &DiskReader,
    target: Target,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<(), RestoreError> {
    let Target { path, claimed } = target;
    let path = path.as_path();
    let io = |source| RestoreError::Target { path: path.to_owned(), source };
    if let Claimed::Device(mut device) = claimed {
        let have = io::Seek::seek(&mut device, io::SeekFrom::End(0)).map_err(io)?;
        let need = disk.size_bytes();
        if have < need {
            return Err(RestoreError::TooSmall { path: path.to_owned(), have, need });
        }
        rustix::fs::fallocate(&device, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 0, need)
            .map_err(|errno| io(errno.into()))?;
        fill(disk, &device, path, watch, cancel)?;
        return device.sync_all().map_err(io);
    }
    let partial = Partial::beside(path, claimed)?;
    partial.file.set_len(disk.size_bytes()).map_err(io)?;
    fill(disk, &partial.file, path, watch, cancel)?;
    partial.keep(path)
}

/// Writes `disk` as a qcow2 image, with `qemu-img`.
///
/// # Errors
/// See [`RestoreError`]; a file at the target is then as it was.
pub fn to_qcow2(
    disk: &DiskReader,
    target: Target,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<(), RestoreError> {
    let Target { path, claimed } = target;
    let path = path.as_path();
    if let Claimed::Device(_) = claimed {
        return Err(RestoreError::RawOnly(path.to_owned()));
    }
    // Said, not left to the umask: the server refuses a folder that others may enter.
    let private = fs::Permissions::from_mode(0o700);
    let folder = tempfile::Builder::new().prefix("stillpoint-restore-").permissions(private).tempdir();
    let folder = folder.map_err(|source| RestoreError::Target { path: std::env::temp_dir(), source })?;
    let source = Arc::new(SnapshotDisk::new(disk.clone()));
    let total = source.data_bytes()?;
    let socket = folder.path().join("nbd");
    let exports = vec![("disk".to_owned(), Arc::clone(&source) as _)];
    let _server = NbdServer::start(&socket, exports, ServerOptions::default())?;
    let partial = Partial::beside(path, claimed)?;
    // Every format is named; nothing is probed.
    let mut convert = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", "-W"])
        .arg(format!("nbd+unix:///disk?socket={}", socket.display()))
        .arg(&partial.path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| RestoreError::Convert { path: path.to_owned(), cause: e.to_string() })?;
    let ended = watch_child(&mut convert, || source.tell(watch, total), cancel);
    match ended {
        Ok(()) => partial.keep(path),
        Err(_) if cancel.is_set() => Err(RestoreError::Interrupted),
        Err(cause) => Err(RestoreError::Convert { path: path.to_owned(), cause }),
    }
}

/// Waits for a child's end, ending it if someone wants that; an error is what it said.
fn watch_child(child: &mut Child, tell: impl Fn(), cancel: &Cancel) -> Result<(), String> {
    let failed = |e: io::Error| e.to_string();
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            let mut said = String::new();
            if let Some(pipe) = child.stderr.take() {
                // What it said is only for the message; without it the status says enough.
                pipe.take(4096).read_to_string(&mut said).unwrap_or_default();
            }
            return if status.success() { Ok(()) } else { Err(format!("{status}: {}", said.trim())) };
        }
        if cancel.is_set() {
            child.kill().map_err(failed)?;
        }
        tell();
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What is at a target, held against every QEMU for as long as it is open.
#[derive(Debug)]
enum Claimed {
    /// Nothing is there yet.
    Nothing,
    /// A file, which will be replaced.
    File(File),
    /// A device, which will be written to.
    Device(File),
}

/// Looks at the target, and claims it: an error if something is there that may not be overwritten.
fn claim(path: &Path, overwrite: bool) -> Result<Claimed, RestoreError> {
    let io = |source| RestoreError::Target { path: path.to_owned(), source };
    let kind = match fs::metadata(path) {
        Ok(_) if !overwrite => return Err(RestoreError::Exists(path.to_owned())),
        Ok(there) => there.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            let there = folder.is_dir() && path.file_name().is_some();
            return if there { Ok(Claimed::Nothing) } else { Err(RestoreError::NoFolder(folder.to_owned())) };
        }
        Err(source) => return Err(io(source)),
    };
    if !kind.is_file() && !kind.is_block_device() {
        return Err(RestoreError::NotAFile(path.to_owned()));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if kind.is_block_device() {
        // Refused while a file system on it is mounted. Source: open(2), O_EXCL without O_CREAT.
        options.custom_flags(i32::try_from(OFlags::EXCL.bits()).expect("a flag of open(2)"));
    }
    let in_use = || RestoreError::InUse(path.to_owned());
    let target = options
        .open(path)
        .map_err(|e| if e.kind() == io::ErrorKind::ResourceBusy { in_use() } else { io(e) })?;
    match image_lock::lock(&target).map_err(io)? {
        Locked::InUse => Err(in_use()),
        Locked::Held | Locked::Unknown if kind.is_block_device() => Ok(Claimed::Device(target)),
        Locked::Held | Locked::Unknown => Ok(Claimed::File(target)),
    }
}

/// A file under another name, removed unless kept.
struct Partial {
    file: File,
    path: PathBuf,
    /// What it will replace, held until it has.
    replaces: Option<File>,
    kept: bool,
}

impl Partial {
    /// Makes it in the folder of `target`, for the owner of what it will replace.
    fn beside(target: &Path, claimed: Claimed) -> Result<Self, RestoreError> {
        let io = |source| RestoreError::Target { path: target.to_owned(), source };
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let path = target.with_file_name(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let replaces = match claimed {
            Claimed::File(file) => Some(file),
            Claimed::Nothing | Claimed::Device(_) => None,
        };
        let partial = Self { file: file.map_err(io)?, path, replaces, kept: false };
        if let Some(old) = &partial.replaces {
            // Now, because it may be refused: better before the work than after it.
            give_owner(&partial.file, old).map_err(io)?;
        }
        Ok(partial)
    }

    /// Makes it durable under its real name.
    fn keep(mut self, target: &Path) -> Result<(), RestoreError> {
        let io = |source| RestoreError::Target { path: target.to_owned(), source };
        if let Some(old) = &self.replaces {
            let mode = old.metadata().map_err(io)?.mode() & 0o7777;
            self.file.set_permissions(fs::Permissions::from_mode(mode)).map_err(io)?;
        }
        self.file.sync_all().map_err(io)?;
        self.take_name(target)?;
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        // Only after this is the old file let go of: a QEMU that opened it just before the renaming must still find it
        // locked when it comes to locking it.
        File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()).map_err(io)
    }

    fn take_name(&mut self, target: &Path) -> Result<(), RestoreError> {
        let io = |source| RestoreError::Target { path: target.to_owned(), source };
        let Some(old) = &self.replaces else { return self.take_new_name(target) };
        // The file that is held, and not one that somebody put in its place, which a VM may use by now.
        let is_there = match fs::metadata(target) {
            Ok(there) => is_same(&there, &old.metadata().map_err(io)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(source) => return Err(io(source)),
        };
        if !is_there {
            return Err(RestoreError::Changed(target.to_owned()));
        }
        fs::rename(&self.path, target).map_err(io)?;
        self.kept = true;
        Ok(())
    }

    /// Where nothing was: nothing that appeared meanwhile is replaced.
    fn take_new_name(&mut self, target: &Path) -> Result<(), RestoreError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => RestoreError::Exists(target.to_owned()),
            _ => RestoreError::Target { path: target.to_owned(), source },
        };
        match renameat_with(CWD, &self.path, CWD, target, RenameFlags::NOREPLACE) {
            Ok(()) => {
                self.kept = true;
                Ok(())
            }
            // Not every file system has it (NFS); a second name replaces nothing either, and the first is then removed.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::hard_link(&self.path, target).map_err(failed)
            }
            Err(errno) => Err(failed(errno.into())),
        }
    }
}

/// Gives a file the owner and group of another, if it has others.
fn give_owner(file: &File, like: &File) -> io::Result<()> {
    let (have, want) = (file.metadata()?, like.metadata()?);
    let user = (have.uid() != want.uid()).then(|| want.uid());
    let group = (have.gid() != want.gid()).then(|| want.gid());
    if user.is_none() && group.is_none() { Ok(()) } else { fchown(file, user, group) }
}

fn is_same(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path); // an error was reported already; this is only tidiness
        }
    }
}

/// Writes every byte that is no hole. The target reads as zeroes elsewhere.
fn fill(
    disk: &DiskReader,
    target: &File,
    path: &Path,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<(), RestoreError> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for range in disk.data_ranges() {
        ranges.push(range?);
    }
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let steps = ranges.into_iter().flat_map(|range| {
        let first = range.start;
        (0..(range.end - first).div_ceil(STEP_BYTES))
            .map(move |n| first + n * STEP_BYTES..(first + (n + 1) * STEP_BYTES).min(range.end))
    });
    let steps = Mutex::new(steps);
    let done = AtomicU64::new(0);
    let work = || -> Result<(), RestoreError> {
        let mut buffer = Vec::new();
        loop {
            // A poisoned lock means that the other thread panicked, which ends the restore anyway.
            let Some(step) = steps.lock().expect("no thread panics here").next() else { return Ok(()) };
            if cancel.is_set() {
                return Err(RestoreError::Interrupted);
            }
            let length = step.end - step.start;
            buffer.resize(usize::try_from(length).expect("a step is 1 MiB"), 0);
            disk.read_at(step.start, &mut buffer)?;
            let io = |source| RestoreError::Target { path: path.to_owned(), source };
            target.write_all_at(&buffer, step.start).map_err(io)?;
            watch.progress(done.fetch_add(length, Ordering::Relaxed) + length, total);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        let results =
            threads.into_iter().map(|thread| thread.join().expect("a restore thread does not panic"));
        results.collect::<Vec<_>>().into_iter().collect()
    })
}
