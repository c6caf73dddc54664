//! A user's `.ssh` folder and the file in it, reached with the user's rights and without following links.

use super::user::User;
use crate::errno;
use guest_protocol::Error;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, fchmod, fstat, fsync, mkdirat, openat, renameat, unlinkat,
};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Largest `authorized_keys` that is read, in bytes; ten thousand keys fit.
const FILE_BYTES_MAX: u64 = 8 << 20;
const FILE: &str = "authorized_keys";
/// Written first, then renamed. Only one change is under way.
const NEW_FILE: &str = ".authorized_keys.stillpoint-new";

/// A home that the thread acts in as its user.
#[derive(Debug)]
pub(super) struct Home {
    home: io::Result<OwnedFd>,
    /// As people know them.
    folder: PathBuf,
    file: PathBuf,
}

impl Home {
    /// Gives up all rights of the thread but the user's.
    pub(super) fn enter(root: &Path, user: &User) -> Result<Home, Error> {
        become_user(user).map_err(|error| {
            let words = errno::words(&error);
            Error::generic(format!("failed to act as user {}: {words}", user.uid))
        })?;
        let folder = user.home.join(".ssh");
        // Where homes are is the administrator's choice, links included; what is in one is not.
        let path = root.join(user.home.strip_prefix("/").unwrap_or(&user.home));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let home = openat(rustix::fs::CWD, path, flags, Mode::empty()).map_err(io::Error::from);
        Ok(Home { home, file: folder.join(FILE), folder })
    }

    /// The file's bytes.
    pub(super) fn read(&self) -> Result<Vec<u8>, Error> {
        self.read_file().map_err(|error| self.cannot_read(&error))
    }

    /// The file's bytes, or nothing if there is none.
    pub(super) fn read_if_there(&self) -> Result<Option<Vec<u8>>, Error> {
        match self.read_file() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.cannot_read(&error)),
        }
    }

    /// Makes the folder if it is not there.
    pub(super) fn make_folder(&self) -> Result<(), Error> {
        let make = || -> io::Result<()> {
            let home = self.home()?;
            match mkdirat(home, ".ssh", Mode::RWXU) {
                // The mode must not depend on our umask.
                Ok(()) => Ok(fchmod(self.open_folder(OFlags::RDONLY)?, Mode::RWXU)?),
                Err(Errno::EXIST) => self.open_folder(OFlags::PATH).map(drop),
                Err(error) => Err(error.into()),
            }
        };
        make().map_err(|error| {
            let (folder, words) = (self.folder.display(), errno::words(&error));
            Error::generic(format!("failed to create directory '{folder}': {words}"))
        })
    }

    /// Puts a new file, for its user only, in the place of the old one.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        self.write_file(bytes).map_err(|error| {
            let (file, words) = (self.file.display(), errno::words(&error));
            Error::generic(format!("failed to write to '{file}': {words}"))
        })
    }

    fn cannot_read(&self, error: &io::Error) -> Error {
        let (file, words) = (self.file.display(), errno::words(error));
        Error::generic(format!(
            "failed to read '{file}': Failed to open file \u{201C}{file}\u{201D}: {words}"
        ))
    }

    fn home(&self) -> io::Result<&OwnedFd> {
        self.home.as_ref().map_err(|error| match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::Error::new(error.kind(), error.to_string()),
        })
    }

    /// Each name is one step, so that `O_NOFOLLOW` leaves no link that could be followed.
    fn open_folder(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(self.home()?, ".ssh", flags, Mode::empty())?)
    }

    fn read_file(&self) -> io::Result<Vec<u8>> {
        let folder = self.open_folder(OFlags::PATH)?;
        // A pipe that someone put there must not hold us up.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = openat(&folder, FILE, flags, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut bytes = Vec::new();
        File::from(file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        // Part of it must not be written back as if it were all.
        if bytes.len() as u64 > FILE_BYTES_MAX {
            Err(io::Error::from_raw_os_error(libc::EFBIG))
        } else {
            Ok(bytes)
        }
    }

    fn write_file(&self, bytes: &[u8]) -> io::Result<()> {
        let folder = self.open_folder(OFlags::PATH)?;
        // One that a dead agent left.
        match unlinkat(&folder, NEW_FILE, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(&folder, NEW_FILE, flags, mode)?);
        let mut fill = || -> io::Result<()> {
            fchmod(&file, mode)?;
            file.write_all(bytes)?;
            fsync(&file)?;
            Ok(renameat(&folder, NEW_FILE, &folder, FILE)?)
        };
        fill().inspect_err(|_| {
            // The next change removes what remains.
            let _removed = unlinkat(&folder, NEW_FILE, AtFlags::empty()).is_ok();
        })
    }
}

/// The rights of this thread on file systems become the user's, and stay so.
///
/// Source: credentials(7): on Linux each thread has its own; setfsuid(2) takes the capabilities on files along. The
/// system calls are made directly because a C library would change all threads.
fn become_user(user: &User) -> io::Result<()> {
    let nobody = libc::c_long::from(-1);
    // SAFETY: they take plain numbers and a list that is alive, and change nothing but this thread's credentials.
    unsafe {
        let (count, groups) = (user.groups.len(), user.groups.as_ptr());
        if rustix::process::geteuid().is_root() && libc::syscall(libc::SYS_setgroups, count, groups) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(libc::SYS_setfsgid, libc::c_long::from(user.gid));
        libc::syscall(libc::SYS_setfsuid, libc::c_long::from(user.uid));
        // They tell no failure; asking for nobody changes nothing and answers who it is.
        let gid = libc::syscall(libc::SYS_setfsgid, nobody);
        let uid = libc::syscall(libc::SYS_setfsuid, nobody);
        if (uid, gid) != (libc::c_long::from(user.uid), libc::c_long::from(user.gid)) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
    }
    Ok(())
}
