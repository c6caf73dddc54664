//! Finds processes that have files open for writing on file systems that will be frozen.
//!
//! Reads only `/proc/PID/fdinfo`: a look at the open file itself could wait for a dead server.

use super::gather::read_bounded;
use super::mountinfo::DeviceNumber;
use super::reach::MountDevices;
use guest_protocol::stillpoint::UnknownWriter;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Most writers reported: beyond that, nobody reads on.
pub const WRITERS_MAX: usize = 256;
/// Most descriptors of one process that are looked at.
const DESCRIPTORS_MAX: usize = 4096;

/// Every process, except those named, that may write to one of these superblocks (number → name for people).
/// What it writes through memory alone, with the file closed, is not seen. Answers whether it saw all in time.
pub fn writers(
    proc: &Path,
    mounts: &MountDevices,
    superblocks: &BTreeMap<DeviceNumber, String>,
    except: &BTreeSet<u32>,
    deadline: Instant,
) -> (Vec<UnknownWriter>, bool) {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(proc) else { return (found, false) };
    let mut pids: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    for pid in pids.into_iter().filter(|pid| !except.contains(pid)) {
        if found.len() == WRITERS_MAX || Instant::now() >= deadline {
            return (found, false);
        }
        let folder = proc.join(pid.to_string());
        let Ok(descriptors) = fs::read_dir(folder.join("fdinfo")) else { continue };
        let mountpoints: BTreeSet<&String> = descriptors
            .flatten()
            .take(DESCRIPTORS_MAX)
            .filter_map(|descriptor| written_mount(&fs::read_to_string(descriptor.path()).ok()?))
            .filter_map(|mount| superblocks.get(mounts.get(&mount)?))
            .collect();
        // A server starts children all the time: one that came after `except` was listed is known by its parent.
        let stat = || read_bounded(&folder.join("stat"), 1024).unwrap_or_default();
        if !mountpoints.is_empty() && !parent(&stat()).is_some_and(|parent| except.contains(&parent)) {
            let command = read_bounded(&folder.join("comm"), 64).unwrap_or_default();
            found.push(UnknownWriter {
                pid,
                command: String::from_utf8_lossy(&command).trim_end().to_owned(),
                mountpoints: mountpoints.into_iter().cloned().collect(),
            });
        }
    }
    (found, true)
}

/// The parent's pid. Source: `proc_pid_stat(5)`; the command may hold any byte, so it is looked for from the end.
pub fn parent(stat: &[u8]) -> Option<u32> {
    let text = String::from_utf8_lossy(stat);
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The mount of a descriptor that is open for writing. Source: `proc_pid_fdinfo(5)`; `flags` is octal.
pub fn written_mount(info: &str) -> Option<u64> {
    let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let flags = i32::from_str_radix(value("flags:")?, 8).ok()?;
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY && flags & libc::O_PATH == 0;
    if writes { value("mnt_id:")?.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_found_behind_any_command() {
        assert_eq!(parent(b"7 (a) 1 (b) S 42 7 7 0"), Some(42));
        assert_eq!(parent(b"7 (sh"), None);
    }

    #[test]
    fn a_descriptor_counts_when_it_can_write() {
        assert_eq!(written_mount("pos:\t0\nflags:\t0100001\nmnt_id:\t27\n"), Some(27));
        assert_eq!(written_mount("pos:\t0\nflags:\t02100002\nmnt_id:\t27\n"), Some(27));
        assert_eq!(written_mount("pos:\t0\nflags:\t0100000\nmnt_id:\t27\n"), None);
    }

    #[test]
    fn names_the_process_and_the_file_system_that_it_writes_to() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("41/fdinfo/3", "flags:\t0100002\nmnt_id:\t9\n");
        put("41/comm", "writer\n");
        put("42/fdinfo/3", "flags:\t0100002\nmnt_id:\t9\n");
        put("43/fdinfo/3", "flags:\t0100002\nmnt_id:\t8\n");
        let data = DeviceNumber { major: 8, minor: 2 };
        let mounts = [(9, data), (8, DeviceNumber { major: 8, minor: 3 })].into_iter().collect();
        let superblocks = [(data, "/data".to_owned())].into_iter().collect();
        let soon = Instant::now() + std::time::Duration::from_secs(5);
        let (found, all) = writers(folder.path(), &mounts, &superblocks, &BTreeSet::from([42]), soon);
        assert_eq!(
            found,
            [UnknownWriter { pid: 41, command: "writer".into(), mountpoints: vec!["/data".into()] }]
        );
        assert!(all);
    }
}
