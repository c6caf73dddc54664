//! Paths as a process sees them: resolved below that process's root and never outside of it, and the superblocks
//! that they lie on.

use super::process::Process;
use crate::freeze::mountinfo::{self, Mount};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The number that no superblock has: stands for a file system that could not be told, so that the host counts it
/// as outside the point.
pub(super) const UNKNOWN_DEVICE: &str = "0:0";

/// The root and the mounts of one process.
#[derive(Debug)]
pub(super) struct Root {
    folder: OwnedFd,
    /// It is our own root, in our own mount namespace.
    own: bool,
    mounts: Vec<Mount>,
}

impl Root {
    /// # Errors
    /// When the process ended, its `/proc` folder may not be read, or its mount table is none that a kernel writes.
    pub(super) fn of(process: &Process) -> io::Result<Self> {
        let folder = process.place("root")?;
        let (theirs, ours) = (fstat(&folder)?, rustix::fs::stat("/")?);
        let same_namespace = std::fs::read_link("/proc/self/ns/mnt")? == process.link("ns/mnt")?;
        let own = same_namespace && (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino);
        let mounts = mountinfo::parse(&process.read("mountinfo")?)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Self { folder, own, mounts })
    }

    /// Is it the root that we have ourselves?
    pub(super) fn is_own(&self) -> bool {
        self.own
    }

    /// Opens what the process would find under `path`, as a mere place.
    ///
    /// `..`, absolute and relative symbolic links stay below its root (`RESOLVE_IN_ROOT`, Linux 5.6); `/proc` links
    /// that would leave it are refused.
    /// # Errors
    /// As `open`; `ENOSYS` on an older kernel, if the root is not our own.
    pub(super) fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match openat2(&self.folder, path, flags, Mode::empty(), resolve) {
            // Where the root is our own there is nothing to be kept inside of.
            Err(rustix::io::Errno::NOSYS) if self.own => {
                Ok(openat(rustix::fs::CWD, path, flags, Mode::empty())?)
            }
            other => Ok(other?),
        }
    }

    /// A small file below the root.
    /// # Errors
    /// As opening and reading it; `InvalidData` when it is longer than `bytes_max`.
    pub(super) fn read(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let name = path.file_name().unwrap_or(OsStr::new("."));
        let folder = self.open(path.parent().unwrap_or(Path::new("/")))?;
        super::process::read_below(folder, Path::new(name), bytes_max)
    }

    /// The superblock (`MAJOR:MINOR` as in mountinfo) that an open place lies on.
    ///
    /// `st_dev` will not do: on btrfs it is the subvolume's. An overlay keeps what is written in its upper folder,
    /// so that folder's superblock is told.
    /// # Errors
    /// When the kernel does not say to which mount the place belongs.
    pub(super) fn superblock_of(&self, place: impl AsFd) -> io::Result<String> {
        let place = place.as_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", place.as_raw_fd()))?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        let Some(mount) = id.and_then(|id: u64| self.mounts.iter().find(|mount| mount.id == id)) else {
            // A mount of a namespace that the process does not show: the plain number is the best there is.
            let device = fstat(place)?.st_dev;
            return Ok(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
        };
        match &mount.upper {
            Some(upper) => superblock_of_upper(upper).or_else(|_| Ok(mount.device.to_string())),
            None => Ok(mount.device.to_string()),
        }
    }

    /// The superblocks of everything directly in a folder, of the folder itself, and of what its symbolic links
    /// lead to; but not of the entries named in `except`. `path` is the folder as the process sees it. A place that
    /// cannot be told is `UNKNOWN_DEVICE`.
    pub(super) fn superblocks_below(
        &self,
        path: &Path,
        except: &[&str],
        entries_max: usize,
    ) -> BTreeSet<String> {
        let mut numbers = BTreeSet::new();
        let unknown = || UNKNOWN_DEVICE.to_owned();
        let told = |path: &Path| self.open(path).and_then(|place| self.superblock_of(place));
        numbers.insert(told(path).unwrap_or_else(|_| unknown()));
        let entries = self.list(path, entries_max).unwrap_or_else(|_| vec![None]);
        for name in entries {
            match name {
                Some(name) if except.iter().any(|not| not.as_bytes() == name) => {}
                Some(name) => match told(&path.join(OsStr::from_bytes(&name))) {
                    Ok(number) => drop(numbers.insert(number)),
                    // It may have been removed since it was listed: files come and go in a living folder.
                    Err(error) if error.kind() == io::ErrorKind::NotFound && !self.is_link(path, &name) => {}
                    Err(_) => drop(numbers.insert(unknown())),
                },
                None => drop(numbers.insert(unknown())),
            }
        }
        numbers
    }

    fn is_link(&self, folder: &Path, name: &[u8]) -> bool {
        let at = self.open(folder).ok();
        at.is_some_and(|at| rustix::fs::readlinkat(&at, OsStr::from_bytes(name), Vec::new()).is_ok())
    }

    /// Names in a folder; `None` at the end stands for those beyond the limit.
    fn list(&self, path: &Path, entries_max: usize) -> io::Result<Vec<Option<Vec<u8>>>> {
        let place = self.open(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(&place, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            if names.len() == entries_max {
                names.push(None);
                break;
            }
            names.push(Some(name));
        }
        Ok(names)
    }
}

/// An upper folder is named as the mounter saw it, which for container engines is our own view.
fn superblock_of_upper(upper: &Path) -> io::Result<String> {
    let own = Process::open(std::process::id())?;
    let root = Root::of(&own)?;
    let place = root.open(upper)?;
    let mut inner = root;
    // One level only: an overlay on an overlay is told as the lower one's own number.
    for mount in &mut inner.mounts {
        mount.upper = None;
    }
    inner.superblock_of(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_root() -> Root {
        Root::of(&Process::open(std::process::id()).unwrap()).unwrap()
    }

    #[test]
    fn a_place_in_proc_is_on_proc() {
        let root = own_root();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/proc")).unwrap();
        let place = root.open(Path::new("/proc/version")).unwrap();
        assert_eq!(root.superblock_of(place).unwrap(), line.split(' ').nth(2).unwrap());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_an_unknown_superblock() {
        let folder = tempfile::tempdir().unwrap();
        let root = own_root();
        let known = root.superblocks_below(folder.path(), &[], 16);
        assert!(!known.contains(UNKNOWN_DEVICE) && known.len() == 1, "{known:?}");
        std::os::unix::fs::symlink("/nonexistent/place", folder.path().join("pg_wal")).unwrap();
        assert!(root.superblocks_below(folder.path(), &[], 16).contains(UNKNOWN_DEVICE));
    }

    #[test]
    fn links_do_not_lead_out_of_a_root() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("etc")).unwrap();
        std::fs::write(folder.path().join("etc/passwd"), "inside").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../../../etc/passwd", folder.path().join("etc/relative")).unwrap();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let place = rustix::fs::open(folder.path(), flags, Mode::empty()).unwrap();
        let root = Root { folder: place, own: false, mounts: Vec::new() };
        let inside = rustix::fs::stat(folder.path().join("etc/passwd")).unwrap().st_ino;
        for link in ["/absolute", "/etc/relative"] {
            assert_eq!(fstat(root.open(Path::new(link)).unwrap()).unwrap().st_ino, inside, "{link}");
        }
    }
}
