//! An agent that cannot change this machine: it has mounts, a network and a name of its own, sees stubs in the place of the
//! system's programs, and may neither set the clock nor restart the machine.
//!
//! Where any of that cannot be had, the agent is not started at all.

use crate::guest::{Agent, program};
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, remove_capability_from_bounding_set, unshare_unsafe};
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

/// Folders of this machine that the agent sees others in the place of.
const HIDDEN: [&str; 5] = ["/etc", "/usr/sbin", "/home", "/run", "/sys/power"];
/// Where stubs are. On some systems `/sbin` is a folder of its own; it is hidden, too.
const SBIN: (&str, &str) = ("/usr/sbin", "/sbin");

pub(crate) struct Sandbox {
    folder: tempfile::TempDir,
    clock_pretends: bool,
}

impl Sandbox {
    /// Nothing, with a word about it, where the rights for it are missing.
    pub(crate) fn new() -> Option<Sandbox> {
        if !rustix::process::geteuid().is_root() {
            writeln!(io::stderr(), "SKIPPED: namespaces take root").expect("a standard error");
            return None;
        }
        let sandbox = Sandbox { folder: tempfile::tempdir().expect("a folder"), clock_pretends: false };
        fs::set_permissions(sandbox.folder.path(), fs::Permissions::from_mode(0o755)).expect("changed");
        for place in HIDDEN {
            fs::create_dir_all(sandbox.path(place)).expect("created");
        }
        sandbox.file("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n");
        sandbox.file("/etc/group", "root:x:0:\n");
        Some(sandbox)
    }

    /// Setting the clock answers success and does nothing.
    pub(crate) fn with_a_clock_that_pretends(mut self) -> Sandbox {
        self.clock_pretends = true;
        self
    }

    /// Where a place of the agent's lies on this machine.
    pub(crate) fn path(&self, place: &str) -> PathBuf {
        self.folder.path().join(place.trim_start_matches('/'))
    }

    pub(crate) fn file(&self, place: &str, text: impl AsRef<[u8]>) {
        let path = self.path(place);
        fs::create_dir_all(path.parent().expect("a folder")).expect("created");
        fs::write(path, text).expect("written");
    }

    /// A program in the place of the system's. It notes how it was called, and what it read.
    pub(crate) fn stub(&self, name: &str, script: &str) {
        let place = format!("/usr/sbin/{name}");
        let calls = self.path("calls");
        let calls = calls.display();
        self.file(&place, format!("#!/bin/sh\nPATH=/usr/bin:/bin\necho \"{name} $*\" >>{calls}\n{script}\n"));
        fs::set_permissions(self.path(&place), fs::Permissions::from_mode(0o755)).expect("changed");
    }

    /// How stubs were called since the last time, a line each.
    pub(crate) fn calls(&self) -> String {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        fs::write(self.path("calls"), "").expect("written");
        calls
    }

    pub(crate) fn start(&self) -> Agent {
        self.start_with(&[])
    }

    pub(crate) fn start_with(&self, environment: &[(&str, &str)]) -> Agent {
        // Everything that allocates happens before the fork.
        let c_string = |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("a plain path");
        let hidden = HIDDEN.iter().map(|place| (*place, *place)).chain(std::iter::once(SBIN));
        let binds: Vec<(CString, CString)> =
            hidden.map(|(ours, place)| (c_string(&self.path(ours)), c_string(Path::new(place)))).collect();
        let clock_pretends = self.clock_pretends;
        let mut command = program();
        // Only stubs are found by name.
        command.env("PATH", "/usr/sbin").env_remove("TZ");
        // SAFETY: system calls alone, in a child that becomes the agent.
        unsafe {
            command.pre_exec(move || {
                close_in(&binds)?;
                if clock_pretends { pretend_clock() } else { Ok(()) }
            });
        }
        Agent::start_as(command, environment)
    }
}

fn close_in(binds: &[(CString, CString)]) -> io::Result<()> {
    // SAFETY: the child has one thread and no descriptors table of others.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWUTS)? };
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    for (from, to) in binds {
        mount_bind(from.as_c_str(), to.as_c_str())?;
        // A mount that cannot be told from this machine's would be no protection.
        let (from, to) = (rustix::fs::stat(from.as_c_str())?, rustix::fs::stat(to.as_c_str())?);
        if (from.st_dev, from.st_ino) != (to.st_dev, to.st_ino) {
            return Err(io::Error::from_raw_os_error(libc::EXDEV));
        }
    }
    rustix::system::sethostname(b"a-guest")?;
    for capability in [CapabilitySet::SYS_TIME, CapabilitySet::SYS_BOOT] {
        remove_capability_from_bounding_set(capability)?;
    }
    Ok(())
}

/// The system calls that set the clock answer 0 and are not carried out.
fn pretend_clock() -> io::Result<()> {
    let code = |code: u32| u16::try_from(code).unwrap_or(0);
    let answer = |k| libc::sock_filter { code: code(libc::BPF_RET | libc::BPF_K), jt: 0, jf: 0, k };
    let equals = |number: libc::c_long, jt| libc::sock_filter {
        code: code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K),
        jt,
        jf: 0,
        k: u32::try_from(number).unwrap_or(u32::MAX),
    };
    let mut filter = [
        // The number of the system call is first.
        libc::sock_filter { code: code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), jt: 0, jf: 0, k: 0 },
        equals(libc::SYS_clock_settime, 2),
        equals(libc::SYS_settimeofday, 1),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_ERRNO),
    ];
    let program = libc::sock_fprog { len: 5, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which is alive.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if set { Ok(()) } else { Err(io::Error::last_os_error()) }
}
