//! Processes as `/proc` shows them, each held by its open `/proc/PID` folder: reads through it fail once the process
//! is gone, so a pid that the kernel gave to another process is never mistaken for the first.

use rustix::fs::{Mode, OFlags, openat};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Most bytes read from one file below `/proc/PID`; `mountinfo` of 4,096 mounts stays below 1 MiB.
const PROC_BYTES_MAX: u64 = 4 << 20;

/// One process.
#[derive(Debug)]
pub(super) struct Process {
    /// Its pid in our namespace.
    pub(super) pid: u32,
    /// Its pid in its own namespace.
    pub(super) own_pid: u32,
    /// Real, effective, saved and file-system user ids.
    pub(super) uids: [u32; 4],
    /// Effective group id.
    pub(super) gid: u32,
    /// When it started, in clock ticks since boot.
    pub(super) start_ticks: u64,
    folder: OwnedFd,
}

impl Process {
    /// # Errors
    /// When it ended meanwhile, or `/proc` has another form than known.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let folder = rustix::fs::open(
            format!("/proc/{pid}"),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut process =
            Self { pid, own_pid: pid, uids: [0; 4], gid: 0, start_ticks: stat(&folder)?.start_ticks, folder };
        let status = String::from_utf8_lossy(&process.read("status")?).into_owned();
        let numbers = |name: &str| -> io::Result<Vec<u32>> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(malformed)?;
            line.split_whitespace().map(|number| number.parse().map_err(|_| malformed())).collect()
        };
        process.uids = numbers("Uid:")?.try_into().map_err(|_| malformed())?;
        process.gid = *numbers("Gid:")?.get(1).ok_or_else(malformed)?;
        // Absent before Linux 4.1: then the namespaces are taken to be the same.
        process.own_pid = numbers("NSpid:").ok().and_then(|pids| pids.last().copied()).unwrap_or(pid);
        Ok(process)
    }

    /// Is it still the process that was opened, and not a zombie?
    pub(super) fn runs(&self) -> bool {
        stat(&self.folder).is_ok_and(|now| now.start_ticks == self.start_ticks && now.state != b'Z')
    }

    /// A file of its `/proc` folder.
    /// # Errors
    /// As opening and reading it, or `InvalidData` when it is longer than any sane one.
    pub(super) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        read_below(&self.folder, Path::new(name), PROC_BYTES_MAX)
    }

    /// Where one of its `/proc` links points, as text.
    /// # Errors
    /// As `readlink`.
    pub(super) fn link(&self, name: &str) -> io::Result<PathBuf> {
        let target = rustix::fs::readlinkat(&self.folder, name, Vec::new())?;
        Ok(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }

    /// What one of its `/proc` links (`root`, `cwd`, `exe`) points to, opened as a mere place.
    /// # Errors
    /// As `open`.
    pub(super) fn place(&self, name: &str) -> io::Result<OwnedFd> {
        Ok(openat(&self.folder, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// The pids of all processes.
/// # Errors
/// When `/proc` cannot be listed.
pub(super) fn all_pids() -> io::Result<Vec<u32>> {
    let entries = std::fs::read_dir("/proc")?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Every process with its parent.
/// # Errors
/// When `/proc` cannot be listed.
pub(super) fn parents() -> io::Result<Vec<(u32, u32)>> {
    let parent = |pid: u32| {
        let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        Some((pid, parse_stat(&text)?.parent))
    };
    Ok(all_pids()?.into_iter().filter_map(parent).collect())
}

/// When each process of a session started, in nanoseconds since boot.
pub(crate) fn members_of_session(session: u32) -> Vec<u64> {
    // Source: `proc_pid_stat(5)`: in clock ticks, of which user space is always shown 100 a second on Linux.
    const TICK_NS: u64 = 10_000_000;
    let stat = |pid: u32| parse_stat(&std::fs::read(format!("/proc/{pid}/stat")).ok()?);
    let all = all_pids().unwrap_or_default();
    let members = all.into_iter().filter_map(stat).filter(|stat| stat.session == session);
    members.map(|stat| stat.start_ticks.saturating_mul(TICK_NS)).collect()
}

/// Whether a process group has living members besides its leader. True where that cannot be told: the list of processes is
/// not read, or is longer than is looked through.
pub(crate) fn group_has_others(leader: u32) -> bool {
    /// As many take some 20 ms.
    const LOOKED_AT_MAX: usize = 4096;
    let Ok(pids) = all_pids() else { return true };
    let is_other = |pid: &u32| {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok().and_then(|text| parse_stat(&text));
        stat.is_some_and(|stat| stat.group == leader && !matches!(stat.state, b'Z' | b'X'))
    };
    pids.len() > LOOKED_AT_MAX || pids.iter().filter(|pid| **pid != leader).any(is_other)
}

/// Reads a regular (or `/proc`) file below a folder, not following a symbolic link at its end.
/// # Errors
/// As opening and reading it; `InvalidData` when it is longer than `bytes_max`.
pub(super) fn read_below(folder: impl AsFd, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    // Non-blocking, so that a FIFO put in the place of a file holds nobody up.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(folder, path, flags, Mode::empty())?);
    let mut content = Vec::new();
    let _length = file.take(bytes_max + 1).read_to_end(&mut content)?;
    if content.len() as u64 > bytes_max { Err(malformed()) } else { Ok(content) }
}

struct Stat {
    state: u8,
    parent: u32,
    group: u32,
    session: u32,
    start_ticks: u64,
}

fn stat(folder: &OwnedFd) -> io::Result<Stat> {
    parse_stat(&read_below(folder, Path::new("stat"), PROC_BYTES_MAX)?).ok_or_else(malformed)
}

/// The name in parentheses may hold anything, parentheses and blanks too: what counts comes after the last one.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let end = text.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        state: *fields.first()?.as_bytes().first()?,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        session: fields.get(3)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not in the form that /proc has")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_stat_line_whose_name_looks_like_the_fields_after_it() {
        let mut line = b"7 (a) S 1 2) R 42 ".to_vec();
        line.extend((5..=21).flat_map(|number: u32| format!("{number} ").into_bytes()));
        line.extend(b"9000 0 0");
        let stat = parse_stat(&line).unwrap();
        assert_eq!((stat.state, stat.parent, stat.start_ticks), (b'R', 42, 9000));
    }

    #[test]
    fn knows_a_process_again_and_notices_its_end() {
        let own = Process::open(std::process::id()).unwrap();
        assert!(own.runs());
        assert_eq!(own.own_pid, own.pid);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        assert!(process.runs());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.runs());
    }
}
