//! The unprivileged user that a twin runs as when we are root.

use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// `nobody` and `nogroup`. Source: Debian's base-passwd, the kernel's overflow ids.
const NOBODY: u32 = 65534;

/// A user to run a program as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id; the only group.
    pub gid: u32,
}

impl User {
    /// Whom to become: nobody, if we are root; otherwise nobody else than we are.
    ///
    /// Its group is that of `/dev/kvm` if that group may use it, so that a twin can have KVM.
    pub fn unprivileged() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let kvm =
            std::fs::metadata("/dev/kvm").ok().filter(|kvm| kvm.mode() & 0o060 == 0o060 && kvm.gid() != 0);
        Some(Self { uid: NOBODY, gid: kvm.map_or(NOBODY, |kvm| kvm.gid()) })
    }

    /// Gives the user a file or folder.
    ///
    /// # Errors
    /// The kernel's.
    pub fn give(self, path: &Path) -> io::Result<()> {
        chown(path, Some(self.uid), Some(self.gid))
    }

    /// Lets a command run as the user. Supplementary groups are dropped by the standard library, as we are root.
    pub fn run_as(self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
    }
}
