//! Writes a disk of a snapshot to an image or a block device: sparse, complete or not at all. Raw is written by
//! several threads; qcow2 by `qemu-img`, which reads the disk from an NBD server of ours.
//!
//! A file is written under another name and renamed at the end, so a target is never half a disk. A block device
//! has no such way: whoever reads it after a failed restore is told by the error.

use crate::serve::SnapshotDisk;
use crate::watch::{Cancel, Watch};
use repository::DiskReader;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fcntl_lock};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm::nbd_server::{NbdServer, NbdServerError, ServerOptions};

/// Bytes that a thread reads and writes at a time.
const STEP_BYTES: u64 = 1 << 20;
/// Threads: decryption and decompression are the work, and the frame cache is shared.
const THREADS: usize = 2;

/// Why a disk was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Something is at the target already.
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

/// Writes `disk` to `path` as a raw image. `overwrite`: what is there may be replaced; a block device always needs it.
///
/// # Errors
/// See [`RestoreError`]; a file at `path` is then as it was.
pub fn to_raw(
    disk: &DiskReader,
    path: &Path,
    overwrite: bool,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<(), RestoreError> {
    let io = |source| RestoreError::Target { path: path.to_owned(), source };
    if let Some(mut device) = claim(path, overwrite)? {
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
    let partial = Partial::beside(path)?;
    partial.file.set_len(disk.size_bytes()).map_err(io)?;
    fill(disk, &partial.file, path, watch, cancel)?;
    partial.keep(path)
}

/// Writes `disk` to `path` as a qcow2 image, with `qemu-img`.
///
/// # Errors
/// See [`RestoreError`]; a file at `path` is then as it was.
pub fn to_qcow2(
    disk: &DiskReader,
    path: &Path,
    overwrite: bool,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<(), RestoreError> {
    if claim(path, overwrite)?.is_some() {
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
    let partial = Partial::beside(path)?;
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

/// Whether a restore to `path` may begin, before anything is written anywhere.
///
/// # Errors
/// `Exists`, `NotAFile`, `NoFolder`, `InUse`, `Target`.
pub fn check_target(path: &Path, overwrite: bool) -> Result<(), RestoreError> {
    claim(path, overwrite).map(drop)
}

/// Looks at the target: an error if something is there that may not be overwritten; otherwise the device, if it is one,
/// claimed for as long as it is open.
fn claim(path: &Path, overwrite: bool) -> Result<Option<File>, RestoreError> {
    let io = |source| RestoreError::Target { path: path.to_owned(), source };
    let kind = match fs::metadata(path) {
        Ok(_) if !overwrite => return Err(RestoreError::Exists(path.to_owned())),
        Ok(there) => there.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            let there = folder.is_dir() && path.file_name().is_some();
            return if there { Ok(None) } else { Err(RestoreError::NoFolder(folder.to_owned())) };
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
    // QEMU holds locks on every image that it has open. Source: `raw_apply_lock_bytes` in QEMU's `block/file-posix.c`.
    match fcntl_lock(&target, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(kind.is_block_device().then_some(target)),
        Err(Errno::AGAIN | Errno::ACCESS) => Err(in_use()),
        // A file system without locks cannot say; a VM could not have locked it either.
        Err(_) => Ok(kind.is_block_device().then_some(target)),
    }
}

/// A file under another name, removed unless kept.
pub(crate) struct Partial {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    kept: bool,
}

impl Partial {
    /// Makes it in the folder of `target`.
    pub(crate) fn beside(target: &Path) -> Result<Self, RestoreError> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let path = target.with_file_name(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|source| RestoreError::Target { path: target.to_owned(), source })?;
        Ok(Self { file, path, kept: false })
    }

    /// Makes it durable under its real name.
    pub(crate) fn keep(mut self, target: &Path) -> Result<(), RestoreError> {
        let io = |source| RestoreError::Target { path: target.to_owned(), source };
        self.file.sync_all().map_err(io)?;
        fs::rename(&self.path, target).map_err(io)?;
        self.kept = true;
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()).map_err(io)
    }
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
