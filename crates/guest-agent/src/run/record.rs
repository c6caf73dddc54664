//! The undo record in the state folder: the ledger, and beside it what a restarted agent needs to act on it.
//!
//! `freeze-undo` is the ledger (`freeze::ledger`), locked while its agent or its guard lives; `freeze-undo.json` names
//! the run and the mount points. Both exist from before the first quiesce until everything is thawed.

use crate::freeze::facts::View;
use crate::freeze::ledger::Ledger;
use crate::freeze::mountinfo::DeviceNumber;
use crate::freeze::plan::{Place, Superblock};
use guest_protocol::stillpoint::FilesystemReport;
use rustix::fs::{FlockOperation, FsWord, flock, statfs};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Most bytes of a record that are read back.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// Most bytes of a message that is read back.
const ENDED_BYTES_MAX: u64 = 4 << 10;

/// tmpfs and ramfs. Source: `linux/magic.h`, Linux `fs/ramfs`.
const IN_MEMORY: &[FsWord] = &[0x0102_1994, 0x8584_58f6];

/// What a restarted agent needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) plain: bool,
    pub(super) boot_id: String,
    pub(super) lease_ms: u64,
    /// In the order of the ledger.
    pub(super) filesystems: Vec<Recorded>,
    /// The hooks, in the order of the freeze; the ledger says how many are owed their thaw.
    #[serde(default, with = "any_paths")]
    pub(super) hooks: Vec<PathBuf>,
}

/// One superblock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Recorded {
    pub(super) report: FilesystemReport,
    /// The place by which it was opened: a process of its mount namespace, or none for the agent's own.
    pub(super) pid: Option<u32>,
    #[serde(with = "any_path")]
    pub(super) mountpoint: PathBuf,
}

/// A path as text, or as bytes where it is none: a name may be any bytes.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum AnyPath {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&PathBuf> for AnyPath {
    fn from(path: &PathBuf) -> Self {
        match path.to_str() {
            Some(text) => Self::Text(text.to_owned()),
            None => Self::Bytes(path.as_os_str().as_bytes().to_owned()),
        }
    }
}

impl From<AnyPath> for PathBuf {
    fn from(path: AnyPath) -> Self {
        match path {
            AnyPath::Text(text) => text.into(),
            AnyPath::Bytes(bytes) => OsString::from_vec(bytes).into(),
        }
    }
}

mod any_path {
    use super::{AnyPath, Deserialize, PathBuf, Serialize};

    pub(super) fn serialize<S: serde::Serializer>(path: &PathBuf, to: S) -> Result<S::Ok, S::Error> {
        AnyPath::from(path).serialize(to)
    }

    pub(super) fn deserialize<'d, D: serde::Deserializer<'d>>(from: D) -> Result<PathBuf, D::Error> {
        AnyPath::deserialize(from).map(PathBuf::from)
    }
}

mod any_paths {
    use super::{AnyPath, Deserialize, PathBuf};

    pub(super) fn serialize<S: serde::Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(paths.iter().map(AnyPath::from))
    }

    pub(super) fn deserialize<'d, D: serde::Deserializer<'d>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
        Ok(Vec::<AnyPath>::deserialize(from)?.into_iter().map(PathBuf::from).collect())
    }
}

impl Recorded {
    /// As much of a superblock as opening it needs.
    pub(super) fn superblock(&self) -> Option<Superblock> {
        let device: DeviceNumber = self.report.device_number.parse().ok()?;
        let view = self.pid.map_or(View::Own, View::Process);
        Some(Superblock {
            device,
            kind: self.report.kind.clone(),
            source: self.report.device.clone(),
            read_only: self.report.read_only,
            places: vec![Place { view, mountpoint: self.mountpoint.clone() }],
            disks: Vec::new(),
            lies_on: std::collections::BTreeSet::new(),
        })
    }
}

/// The mark of a stock agent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    /// When it was made.
    pub(super) at: SystemTime,
    /// Its folder is still there after a boot.
    pub(super) outlives_boots: bool,
}

/// Where records lie.
#[derive(Clone, Debug)]
pub(super) struct Records {
    folder: PathBuf,
}

impl Records {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    pub(super) fn ledger_path(&self) -> PathBuf {
        self.folder.join("freeze-undo")
    }

    fn record_path(&self) -> PathBuf {
        self.folder.join("freeze-undo.json")
    }

    /// qemu-ga's own mark of a frozen guest, which a stock agent in our place would find.
    fn mark_path(&self) -> PathBuf {
        self.folder.join("qga.state.isfrozen")
    }

    /// What a host must be told of a freeze that ended by itself, kept in case the agent dies before.
    fn ended_path(&self) -> PathBuf {
        self.folder.join("freeze-ended")
    }

    /// Writes a new record. The ledger comes last: without it nothing was frozen.
    pub(super) fn create(&self, record: &Record, queues: &[DeviceNumber]) -> io::Result<(Ledger, Written)> {
        let written = Written { records: self.clone() };
        let path = self.record_path();
        let new = self.folder.join("freeze-undo.json.new");
        let bytes = serde_json::to_vec(record)?;
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        if let Err(error) = file.write_all(&bytes).and_then(|()| fs::rename(&new, &path)) {
            // A full tmpfs: half a record would only take more of its room.
            let _removed = fs::remove_file(&new).is_ok();
            return Err(error);
        }
        let devices: Vec<DeviceNumber> = record
            .filesystems
            .iter()
            .filter_map(|recorded| recorded.report.device_number.parse().ok())
            .collect();
        let ledger = Ledger::create(&self.ledger_path(), &devices, queues)?;
        // The lock belongs to the open file, which the guard inherits: it is held until both are gone.
        flock(ledger.file(), FlockOperation::NonBlockingLockExclusive)?;
        Ok((ledger, written))
    }

    /// What a dead agent left, if anything.
    pub(super) fn left(&self) -> Option<(Record, Ledger)> {
        let ledger = Ledger::open(&self.ledger_path()).ok()?;
        let bytes = crate::freeze::gather::read_bounded(&self.record_path(), RECORD_BYTES_MAX).ok()?;
        let record: Record = serde_json::from_slice(&bytes).ok()?;
        (record.filesystems.len() == ledger.count()).then_some((record, ledger))
    }

    /// Whether the agent or the guard of a record still lives.
    pub(super) fn is_held(ledger: &Ledger) -> bool {
        flock(ledger.file(), FlockOperation::NonBlockingLockExclusive).is_err()
    }

    pub(super) fn remove(&self) {
        for path in [self.ledger_path(), self.record_path()] {
            // Gone already is as good.
            let _removed = fs::remove_file(path).is_ok();
        }
    }

    /// Keeps what the next plain thaw must be told.
    pub(super) fn note_ended(&self, message: &str) {
        // This agent tells it all the same; it is lost only if the agent dies as well.
        let file =
            File::options().write(true).create(true).truncate(true).mode(0o600).open(self.ended_path());
        let _written = file.and_then(|mut file| file.write_all(message.as_bytes())).is_ok();
    }

    /// What an agent before this one had to tell.
    pub(super) fn ended(&self) -> Option<String> {
        let bytes = crate::freeze::gather::read_bounded(&self.ended_path(), ENDED_BYTES_MAX).ok()?;
        String::from_utf8(bytes).ok().filter(|message| !message.is_empty())
    }

    /// It was told, or a new freeze makes it pointless.
    pub(super) fn forget_ended(&self) {
        let _removed = fs::remove_file(self.ended_path()).is_ok(); // mostly there is none
    }

    /// Sets qemu-ga's mark.
    pub(super) fn mark(&self) -> io::Result<()> {
        File::options().write(true).create(true).truncate(true).mode(0o600).open(self.mark_path()).map(|_| ())
    }

    /// Removes qemu-ga's mark.
    pub(super) fn unmark(&self) {
        // An administrator may have removed it by hand.
        let _removed = fs::remove_file(self.mark_path()).is_ok();
    }

    /// qemu-ga's mark, if there is one.
    pub(super) fn marked(&self) -> Option<Mark> {
        let path = self.mark_path();
        // What cannot say its age is as new as can be.
        let found = fs::symlink_metadata(&path).ok()?;
        let at = found.modified().unwrap_or_else(|_| SystemTime::now());
        // In doubt the folder is one that outlives no boot, so that no freeze is forgotten.
        let outlives_boots = statfs(&self.folder).is_ok_and(|fs| !IN_MEMORY.contains(&fs.f_type));
        Some(Mark { at, outlives_boots })
    }
}

/// A record of this agent's own, removed with the value: by then everything is thawed, or was never frozen.
#[derive(Debug)]
pub(super) struct Written {
    records: Records,
}

impl Written {
    pub(super) fn records(&self) -> &Records {
        &self.records
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        self.records.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_any_bytes_come_back_and_those_of_earlier_agents_are_read() {
        let odd = PathBuf::from(OsString::from_vec(b"/mnt/caf\xe9".to_vec()));
        let recorded = Recorded { report: FilesystemReport::default(), pid: None, mountpoint: odd.clone() };
        let hooks = vec![odd.clone(), PathBuf::from("/etc/qemu/fsfreeze-hook.d/10-a")];
        let record = Record {
            id: "r".to_owned(),
            plain: true,
            boot_id: String::new(),
            lease_ms: 1,
            filesystems: vec![recorded],
            hooks: hooks.clone(),
        };
        let text = serde_json::to_string(&record).unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!((&read.filesystems[0].mountpoint, &read.hooks), (&odd, &hooks));
        assert!(text.contains(r#""/etc/qemu/fsfreeze-hook.d/10-a""#), "as an earlier agent wrote it: {text}");
    }
}
