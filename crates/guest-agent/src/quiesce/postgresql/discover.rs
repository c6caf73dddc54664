//! Finds PostgreSQL servers among the processes, and tells them from their look-alikes.

use super::Order;
use crate::quiesce::channel::Note;
use crate::quiesce::kinds::Found;
use crate::quiesce::process::{Process, read_below};
use crate::quiesce::root::{Root, UNKNOWN_DEVICE};
use crate::quiesce::worker::Errand;
use rustix::fs::{FileType, fstat, fstatvfs};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Names of the server's program.
const PROGRAMS: [&str; 2] = ["postgres", "postmaster"];
/// What is empty or worthless at a server's start, and so may well lie in memory.
/// Source: PostgreSQL's documentation, "Making a Base Backup Using the Low Level API".
const SCRATCH: [&str; 2] = ["pg_stat_tmp", "pg_dynshmem"];
/// A data directory has some 30 entries and may have as many tablespaces as its owner likes.
const ENTRIES_MAX: usize = 1024;
/// Longest `postmaster.pid`, `PG_VERSION` and `uid_map`; the first is 8 short lines.
const SMALL_FILE_BYTES_MAX: u64 = 16 << 10;
/// Longest `/etc/passwd` that is read.
const PASSWD_BYTES_MAX: u64 = 1 << 20;
/// One segment of the log: with less, the next one cannot be begun.
const ROOM_BYTES_MIN: u64 = 16 << 20;
/// Longest role name. Source: `NAMEDATALEN` in PostgreSQL's `pg_config_manual.h`.
const ROLE_BYTES_MAX: usize = 63;

/// Whether a process runs the server's program. Asks the kernel alone.
pub(super) fn is_it(pid: u32) -> bool {
    let Ok(program) = std::fs::read_link(format!("/proc/{pid}/exe")) else { return false };
    let name = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // A program that was upgraded under its running server.
    PROGRAMS.contains(&name.strip_suffix(" (deleted)").unwrap_or(name))
}

/// The server whose main process this is. One that does not run is only files, which its last shutdown or crash left
/// consistent.
/// # Errors
/// When it could not be looked at; a process that ended meanwhile, or is no server, is none.
pub(super) fn look(pid: u32) -> io::Result<Option<Found>> {
    match Server::recognise(pid) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        recognised => Ok(recognised?.map(Server::found)),
    }
}

/// A postmaster that has shown to be one.
struct Server {
    process: Process,
    root: Root,
    data: OwnedFd,
    /// The data directory as the server sees it.
    data_path: PathBuf,
    major: String,
    /// Lines of `postmaster.pid`.
    lines: Vec<String>,
}

impl Server {
    /// A postmaster runs a program of the right name in its data directory, whose `postmaster.pid` names it, and
    /// which it owns. Whatever else calls itself postgres (a backend, someone's script) is none, gets no worker,
    /// and is left to be counted as an unknown writer.
    fn recognise(pid: u32) -> io::Result<Option<Self>> {
        let process = Process::open(pid)?;
        let data = process.place("cwd")?;
        let uid = process.uids[0];
        let owner = fstat(&data)?;
        let own_directory =
            owner.st_uid == uid && FileType::from_raw_mode(owner.st_mode) == FileType::Directory;
        // The server refuses to run as root, and on a directory that others may write to.
        if uid == 0 || process.uids != [uid; 4] || !own_directory || owner.st_mode & 0o022 != 0 {
            return Ok(None);
        }
        let small = |name: &str| -> io::Result<String> {
            let text = read_below(&data, Path::new(name), SMALL_FILE_BYTES_MAX)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        let lines: Vec<String> = small("postmaster.pid")?.lines().map(str::to_owned).collect();
        if lines.first().and_then(|line| line.trim().parse().ok()) != Some(process.own_pid) {
            return Ok(None);
        }
        let major = small("PG_VERSION")?.trim().to_owned();
        let control = rustix::fs::statat(&data, "global/pg_control", rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        if control.st_uid != uid || FileType::from_raw_mode(control.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let root = Root::of(&process)?;
        let candidates = [lines.get(1).map(PathBuf::from), process.link("cwd").ok()];
        let same = |path: &PathBuf| {
            let there = root.open(path).and_then(|place| Ok(fstat(place)?));
            there.is_ok_and(|there| (there.st_dev, there.st_ino) == (owner.st_dev, owner.st_ino))
        };
        let known = candidates.iter().flatten().find(|path| same(path)).cloned();
        let data_path = known.or_else(|| candidates.into_iter().flatten().next_back());
        Ok(data_path.map(|data_path| Self { process, root, data, data_path, major, lines }))
    }

    fn found(self) -> Found {
        let mut notes = Vec::new();
        let device_numbers = self.device_numbers();
        if device_numbers.contains(UNKNOWN_DEVICE) {
            notes.push(Note::new("device_unknown", "a part of it lies where it could not be told"));
        }
        let mut facts = BTreeMap::new();
        facts.insert("postmaster_pid".to_owned(), self.process.pid.to_string());
        facts.insert("postmaster_start_ticks".to_owned(), self.process.start_ticks.to_string());
        let errand = self.errand();
        let instance = self.name();
        Found {
            instance,
            version: Some(self.major),
            device_numbers,
            facts,
            notes,
            process: self.process,
            errand,
        }
    }

    /// The data directory; in a container, with the container's control group.
    fn name(&self) -> String {
        let path = self.data_path.display();
        if self.root.is_own() {
            return path.to_string();
        }
        let groups = self.process.read("cgroup").unwrap_or_default();
        let groups = String::from_utf8_lossy(&groups).into_owned();
        let leaf = groups.lines().last().and_then(|line| line.rsplit('/').next()).unwrap_or_default();
        if leaf.is_empty() { format!("{path} (container)") } else { format!("{path} in {leaf}") }
    }

    /// Superblocks of the data directory, of what is mounted in it, and of what its links lead to: `pg_wal` and
    /// every tablespace.
    fn device_numbers(&self) -> BTreeSet<String> {
        let mut numbers = self.root.superblocks_below(&self.data_path, &SCRATCH, ENTRIES_MAX);
        numbers.extend(self.root.superblocks_below(&self.data_path.join("pg_tblspc"), &[], ENTRIES_MAX));
        // The open directory itself, in case its path led elsewhere.
        numbers.insert(self.root.superblock_of(&self.data).unwrap_or_else(|_| UNKNOWN_DEVICE.to_owned()));
        numbers
    }

    /// The way in: the socket, confined to the server's root, and the roles that its owner may have.
    fn errand(&self) -> Result<Errand, Note> {
        let unreachable = |why: String| Err(Note::new("socket_unreachable", why));
        let line = |number: usize| self.lines.get(number - 1).map(|line| line.trim()).unwrap_or_default();
        let (port, folder) = (line(4), line(5));
        if folder.is_empty() {
            return unreachable("the server listens on no unix socket, or has not begun to".to_owned());
        }
        if folder.starts_with('@') {
            return unreachable("the server listens on an abstract socket only".to_owned());
        }
        // A relative folder counts from the data directory, where the server runs.
        let path = self.data_path.join(folder).join(format!(".s.PGSQL.{port}"));
        let socket = match self.root.open(&path) {
            Ok(socket) => socket,
            Err(error) => return unreachable(format!("{}: {error}", path.display())),
        };
        let uid = self.process.uids[0];
        match fstat(&socket) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Socket && stat.st_uid == uid => {}
            _ => return unreachable(format!("{} is not the server's socket", path.display())),
        }
        if let Some(trouble) = self.short_of_room().or_else(|| self.in_exclusive_backup()) {
            return Err(trouble);
        }
        let order = Order { server_pid: self.process.pid, server_uid: uid, roles: self.roles() };
        match serde_json::to_value(order) {
            Ok(order) => Ok(Errand { uid, gid: self.process.gid, socket, order }),
            Err(error) => unreachable(error.to_string()),
        }
    }

    /// A checkpoint makes small files, and a server that cannot make them ends itself (PANIC). It would come to that by
    /// itself, but not now and not because of us.
    fn short_of_room(&self) -> Option<Note> {
        let log = self.root.open(&self.data_path.join("pg_wal"));
        let places = [fstatvfs(&self.data).ok(), log.ok().and_then(|place| fstatvfs(place).ok())];
        let free_bytes = places.into_iter().flatten().map(|facts| facts.f_bavail * facts.f_frsize).min()?;
        (free_bytes < ROOM_BYTES_MIN).then(|| {
            let message =
                format!("only {free_bytes} bytes are left to it: a checkpoint could end the server");
            Note::new("no_room", message)
        })
    }

    /// A copy that holds the label of a backup starts where that one began, and does not start at all once the log from there
    /// is gone. Source: "Making an Exclusive Low-Level Backup" in the documentation of PostgreSQL 14, the last to have them.
    fn in_exclusive_backup(&self) -> Option<Note> {
        let label = rustix::fs::statat(&self.data, "backup_label", rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
        label.is_ok().then(|| {
            let message =
                "an exclusive backup is under way (`backup_label` is there): a copy might not start";
            Note::new("exclusive_backup", message)
        })
    }

    /// The owner's name as the server sees it (what `peer` asks for), the usual name, and the one that container
    /// images are told.
    fn roles(&self) -> Vec<String> {
        let uid = self.uid_inside();
        let passwd = self.root.read(Path::new("/etc/passwd"), PASSWD_BYTES_MAX).unwrap_or_default();
        let passwd = String::from_utf8_lossy(&passwd).into_owned();
        let owner = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, number) = (fields.next()?, fields.nth(1)?);
            (number.parse() == Ok(uid)).then(|| name.to_owned())
        });
        let environment = self.process.read("environ").unwrap_or_default();
        let told =
            environment.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"POSTGRES_USER="));
        let told = told.map(|name| String::from_utf8_lossy(name).into_owned());
        let mut roles: Vec<String> = Vec::new();
        for role in owner.into_iter().chain(["postgres".to_owned()]).chain(told) {
            if !role.is_empty() && role.len() <= ROLE_BYTES_MAX && !roles.contains(&role) {
                roles.push(role);
            }
        }
        roles
    }

    /// Its user id in its own user namespace.
    fn uid_inside(&self) -> u32 {
        let outside = self.process.uids[0];
        let map = self.process.read("uid_map").unwrap_or_default();
        let inside = String::from_utf8_lossy(&map).lines().find_map(|line| {
            let mut fields = line.split_whitespace().map(str::parse::<u32>);
            let (Some(Ok(first)), Some(Ok(from)), Some(Ok(count))) =
                (fields.next(), fields.next(), fields.next())
            else {
                return None;
            };
            let offset = outside.checked_sub(from).filter(|offset| *offset < count)?;
            first.checked_add(offset)
        });
        inside.unwrap_or(outside)
    }
}
