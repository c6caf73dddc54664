//! The unprivileged user that a twin runs as when we are root.

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{Gid, Uid};
use rustix::thread::{
    UnshareFlags, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// The first of the users that twins run as, and how many they are: each twin gets one by chance, so that no twin can
/// signal, trace or read another. Source: "Users, Groups, UIDs and GIDs on systemd systems", where 1879048192 to
/// 2147483647 belong to nobody.
const FIRST: u32 = 1_879_048_192;
const COUNT: u32 = 1 << 24;
/// `nobody` and `nogroup`, where the range is not to be had: in a container that maps fewer users. Source: Debian's
/// base-passwd, the kernel's overflow ids.
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
    /// Whom to become, if we are root: a user of its own each time; otherwise nobody else than we are.
    ///
    /// Its group is that of `/dev/kvm` if that group may use it, so that a twin can have KVM.
    pub fn unprivileged() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let mapped = |file: &str, id| std::fs::read_to_string(file).is_ok_and(|map| maps(&map, id));
        let own =
            one_of_ours().filter(|id| mapped("/proc/self/uid_map", *id) && mapped("/proc/self/gid_map", *id));
        let id = own.unwrap_or(NOBODY);
        let kvm =
            std::fs::metadata("/dev/kvm").ok().filter(|kvm| kvm.mode() & 0o060 == 0o060 && kvm.gid() != 0);
        Some(Self { uid: id, gid: kvm.map_or(id, |kvm| kvm.gid()) })
    }

    /// Gives the user a file or folder.
    ///
    /// # Errors
    /// The kernel's.
    pub fn give(self, path: &Path) -> io::Result<()> {
        chown(path, Some(self.uid), Some(self.gid))
    }

    /// Lets a command run as the user, in no other group, where there is no network, with no way to become more, and
    /// without leaving its memory in a core file.
    pub fn run_as(self, command: &mut Command) {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let step_down = move || {
            // SAFETY: it concerns this process only, which has one thread and no file descriptor table to unshare.
            // Refused in a container without the right to: QEMU has no network device all the same.
            let _alone = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
            setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
            set_thread_groups(&[])?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
            set_no_new_privs(true)?;
            Ok(())
        };
        // SAFETY: between fork and exec this makes system calls and allocates nothing.
        unsafe { command.pre_exec(step_down) };
    }
}

fn one_of_ours() -> Option<u32> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).ok()?;
    Some(FIRST + u32::from_le_bytes(bytes) % COUNT)
}

/// Whether a user namespace's map has an id. Source: `user_namespaces(7)`: lines of first id inside, outside, count.
fn maps(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(numbers[..], [inside, _, count] if (inside..inside + count).contains(&u64::from(id)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_of_its_own_is_taken_only_where_it_exists() {
        assert!(maps("         0          0 4294967295\n", FIRST + COUNT - 1));
        assert!(!maps("0 100000 65536\n", FIRST));
        assert!(!maps("0 1000 1\n1 100000 65535\n", FIRST));
        assert!(!maps("", FIRST));
        let ids: std::collections::BTreeSet<_> = (0..8).filter_map(|_| one_of_ours()).collect();
        assert!(ids.len() > 1 && ids.iter().all(|id| (FIRST..FIRST + COUNT).contains(id)), "{ids:?}");
    }
}
