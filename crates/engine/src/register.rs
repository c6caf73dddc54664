//! The host's register: which VMs Stillpoint knows, and by which sockets it reaches them.
//!
//! One small file a VM in a private folder, replaced by rename: a crash leaves the old entry or the new one.

use crate::journal::Journal;
use crate::seen::Seen;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use vm::point::undo::release_files;
use vm::unix::nobody_listens;

/// Longest VM name, in bytes: it becomes a file name.
pub const NAME_BYTES_MAX: usize = 64;

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmEntry {
    /// Name on this host.
    pub name: String,
    /// QEMU's monitor: a unix socket that speaks QMP.
    pub qmp: PathBuf,
    /// The guest agent's channel: the host end of `org.qemu.guest_agent.0`; absent: no agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
}

/// Why the register could not do it.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// A name that cannot be one.
    #[error(
        "'{0}' cannot be a VM's name: use 1 to 64 letters, digits, '-', '_' or '.', beginning with a letter or digit"
    )]
    BadName(String),
    /// Not registered.
    #[error("no VM named '{0}' is registered")]
    Unknown(String),
    /// Already registered.
    #[error("a VM named '{0}' is registered already")]
    Exists(String),
    /// Another run works on the VM.
    #[error("another run is working on '{0}'")]
    Busy(String),
    /// What a run that died put into the VM is still there.
    #[error("a run of '{0}' died, and what it put into the VM was not taken out yet")]
    Unfinished(String),
    /// Scratch of a run that died cannot be removed.
    #[error("what a run of '{name}' that died left on the host cannot be removed: {cause}")]
    Scratch {
        /// The VM.
        name: String,
        /// What the system said.
        cause: String,
    },
    /// The entry cannot be read.
    #[error("the entry {path} cannot be read: {cause}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The state folder failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The state folder of this host.
#[derive(Clone, Debug)]
pub struct Register {
    folder: PathBuf,
}

/// Held while a run works on a VM; another process meanwhile gets `Busy`. The kernel drops it with the process.
#[derive(Debug)]
pub struct VmLock {
    _file: File,
}

impl Register {
    /// Opens the state folder, making it if there is none. What is in it is 0700. Root's state folder itself and its `scratch` let
    /// others pass (0711), since a QEMU of another user has to reach its own folder there; they can list nothing.
    ///
    /// # Errors
    /// `Io` if it cannot be made.
    pub fn open(folder: &Path) -> Result<Self, RegisterError> {
        for part in ["vms", "seen", "journal", "scratch"] {
            make_private(&folder.join(part))?;
        }
        let register = Self { folder: folder.to_owned() };
        // Nobody but root could give another user's QEMU anything there.
        if rustix::process::geteuid().is_root() {
            let_pass(&register.folder)?;
            let_pass(&register.scratch())?;
        }
        Ok(register)
    }

    /// The state folder itself.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Folder of what was last seen of each VM.
    pub(crate) fn seen(&self) -> PathBuf {
        self.folder.join("seen")
    }

    /// Folder of the journals.
    pub fn journals(&self) -> PathBuf {
        self.folder.join("journal")
    }

    /// Folder under which each run makes its private one.
    pub fn scratch(&self) -> PathBuf {
        self.folder.join("scratch")
    }

    /// Adds a VM.
    ///
    /// # Errors
    /// `BadName`, `Exists`, `Io`.
    pub fn add(&self, entry: &VmEntry) -> Result<(), RegisterError> {
        let path = self.path(&entry.name)?;
        if path.exists() {
            return Err(RegisterError::Exists(entry.name.clone()));
        }
        let text = serde_json::to_vec_pretty(entry).map_err(|e| damaged(&path, &e))?;
        write_private(&path, &text)
    }

    /// One VM.
    ///
    /// # Errors
    /// `BadName`, `Unknown`, `Damaged`, `Io`.
    pub fn get(&self, name: &str) -> Result<VmEntry, RegisterError> {
        let path = self.path(name)?;
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(RegisterError::Unknown(name.to_owned()));
            }
            other => other.map_err(|source| RegisterError::Io { path: path.clone(), source })?,
        };
        serde_json::from_slice(&text).map_err(|e| damaged(&path, &e))
    }

    /// Every VM, by name.
    ///
    /// # Errors
    /// `Damaged`, `Io`.
    pub fn list(&self) -> Result<Vec<VmEntry>, RegisterError> {
        let folder = self.folder.join("vms");
        let io = |source| RegisterError::Io { path: folder.clone(), source };
        let mut names = Vec::new();
        for file in fs::read_dir(&folder).map_err(io)? {
            let file = file.map_err(io)?.file_name();
            names.extend(file.to_str().and_then(|name| name.strip_suffix(".json")).map(str::to_owned));
        }
        names.sort();
        names.iter().map(|name| self.get(name)).collect()
    }

    /// Forgets a VM, and removes what a run of it that died left on the host. Its snapshots stay.
    ///
    /// # Errors
    /// `BadName`, `Unknown`, `Busy`, `Unfinished`, `Scratch`, `Io`.
    pub fn remove(&self, name: &str) -> Result<(), RegisterError> {
        let entry = self.get(name)?;
        let _lock = self.lock(name)?;
        self.remove_scratch(&entry)?;
        // First, so that another VM of this name never finds it.
        Seen::forget(self, name)?;
        let path = self.path(name)?;
        fs::remove_file(&path).map_err(|source| RegisterError::Io { path, source })
    }

    /// Removes the files of a dead run whose QEMU listens no more. The note stays: registered again under this name, by another
    /// socket, the same VM may still run, and its next run then takes out what is in QEMU and images. If it runs, it goes on
    /// with its open files; their names are in nobody's need.
    fn remove_scratch(&self, entry: &VmEntry) -> Result<(), RegisterError> {
        // A note that cannot be read names nothing that could be removed.
        let note = Journal::of(self, &entry.name).read().ok().flatten();
        let Some(plan) = note.and_then(|note| note.plan).filter(|plan| plan.folder.exists()) else {
            return Ok(());
        };
        if !nobody_listens(&entry.qmp) {
            return Err(RegisterError::Unfinished(entry.name.clone()));
        }
        let failed = |error: vm::point::UndoError| RegisterError::Scratch {
            name: entry.name.clone(),
            cause: error.to_string(),
        };
        release_files(&plan).map_err(failed)
    }

    /// Claims a VM for one run.
    ///
    /// # Errors
    /// `Busy` if another process holds it.
    pub fn lock(&self, name: &str) -> Result<VmLock, RegisterError> {
        let path = self.path(name)?.with_extension("lock");
        let io = |source| RegisterError::Io { path: path.clone(), source };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(VmLock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(RegisterError::Busy(name.to_owned())),
            Err(errno) => Err(io(errno.into())),
        }
    }

    /// Another name by which the same monitor is registered, and which a run works on now.
    pub(crate) fn busy_namesake(&self, entry: &VmEntry) -> Option<String> {
        let place = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        let ours = place(&entry.qmp)?;
        // An entry that cannot be read is another VM's trouble; the claim in QEMU decides in the end.
        let others = self.list().unwrap_or_default().into_iter().filter(|other| other.name != entry.name);
        let busy = |name: &str| matches!(self.lock(name), Err(RegisterError::Busy(_)));
        let mut same = others.filter(|other| place(&other.qmp) == Some(ours));
        same.find(|other| busy(&other.name)).map(|other| other.name)
    }

    fn path(&self, name: &str) -> Result<PathBuf, RegisterError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        if !first || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            return Err(RegisterError::BadName(name.to_owned()));
        }
        Ok(self.folder.join("vms").join(format!("{name}.json")))
    }
}

fn damaged(path: &Path, cause: &serde_json::Error) -> RegisterError {
    RegisterError::Damaged { path: path.to_owned(), cause: cause.to_string() }
}

/// Makes a folder that only we can enter.
pub(crate) fn make_private(path: &Path) -> Result<(), RegisterError> {
    let io = |source| RegisterError::Io { path: path.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)
}

/// Lets others pass through a folder of ours, and do nothing else that they could not do before.
fn let_pass(path: &Path) -> Result<(), RegisterError> {
    let io = |source| RegisterError::Io { path: path.to_owned(), source };
    let facts = fs::metadata(path).map_err(io)?;
    let mode = facts.mode() & 0o7777;
    if facts.uid() != rustix::process::geteuid().as_raw() || mode & 0o011 == 0o011 {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o011)).map_err(io)
}

/// Replaces a file by rename, synced before and after, so that a crash leaves the old content or the new.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), RegisterError> {
    let io = |source| RegisterError::Io { path: path.to_owned(), source };
    let new = path.with_extension("new");
    let mut file =
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new).map_err(io)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&new, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&new); // half a file on a full disk is in nobody's way but ours
        return Err(io(error));
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> VmEntry {
        VmEntry { name: name.to_owned(), qmp: "/run/db1.qmp".into(), agent: None }
    }

    #[test]
    fn a_vm_is_added_once_listed_and_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let register = Register::open(folder.path()).unwrap();
        register.add(&entry("web.1")).unwrap();
        register.add(&entry("db1")).unwrap();
        assert!(matches!(register.add(&entry("db1")), Err(RegisterError::Exists(_))));
        assert_eq!(register.list().unwrap(), [entry("db1"), entry("web.1")]);
        register.remove("db1").unwrap();
        assert!(matches!(register.get("db1"), Err(RegisterError::Unknown(_))));
    }

    #[test]
    fn others_pass_through_roots_state_folder_to_their_own_scratch_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let (open, root) = (|| Register::open(&state).unwrap(), rustix::process::geteuid().is_root());
        let passable = if root { 0o711 } else { 0o700 };
        let register = open();
        for folder in [&state, &register.scratch()] {
            assert_eq!(mode(folder), passable, "{}", folder.display());
            // As an earlier version left it.
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
        }
        open();
        assert_eq!((mode(&state), mode(&register.scratch())), (passable, passable));
        for part in ["vms", "seen", "journal"] {
            assert_eq!(mode(&state.join(part)), 0o700, "{part}");
        }
        fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
        open();
        assert_eq!(mode(&state), 0o755, "its owner's choice");
    }

    #[test]
    fn a_name_never_leaves_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let register = Register::open(folder.path()).unwrap();
        for name in ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", &"x".repeat(65)] {
            assert!(matches!(register.add(&entry(name)), Err(RegisterError::BadName(_))), "{name:?}");
        }
    }

    #[test]
    fn scratch_of_a_dead_run_goes_with_its_vm_and_a_vm_that_may_still_use_it_stays() {
        use crate::journal::Note;
        use vm::point::{DiskRequest, Outcome, Plan, Request};
        let folder = tempfile::tempdir().unwrap();
        let register = Register::open(&folder.path().join("state")).unwrap();
        let qmp = folder.path().join("qmp");
        register.add(&VmEntry { qmp: qmp.clone(), ..entry("db1") }).unwrap();
        let disk = serde_json::json!({
            "name": "d", "device": "/d", "node": "n", "format": "raw", "file": "d.raw", "size_bytes": 1 << 20, "bus": "scsi",
            "keeps_bitmaps": false,
        });
        let disk = serde_json::from_value(disk).unwrap();
        let plan = Plan::new(&Request {
            tag: "abcd1234".into(),
            repository: "repo".into(),
            snapshot: "s1".into(),
            folder: register.scratch().join("run"),
            cbw_timeout_s: 5,
            running: true,
            disks: vec![DiskRequest { disk, base: None, only_base: false }],
        });
        let plan = plan.unwrap();
        fs::create_dir(&plan.folder).unwrap();
        fs::write(&plan.disks[0].scratch_file, "much").unwrap();
        let note = Note { run: "abcd1234".into(), plan: Some(plan.clone()), outcome: Outcome::Dropped };
        Journal::of(&register, "db1").write(&note).unwrap();

        let listener = std::os::unix::net::UnixListener::bind(&qmp).unwrap();
        assert!(matches!(register.remove("db1"), Err(RegisterError::Unfinished(_))));
        assert!(register.get("db1").is_ok() && plan.disks[0].scratch_file.exists());
        drop(listener);
        register.remove("db1").unwrap();
        assert!(!plan.folder.exists() && register.get("db1").is_err());
        assert!(Journal::of(&register, "db1").read().unwrap().is_some(), "for the next run under this name");
    }

    #[test]
    fn two_runs_never_work_on_one_vm() {
        let folder = tempfile::tempdir().unwrap();
        let register = Register::open(folder.path()).unwrap();
        let first = register.lock("db1").unwrap();
        assert!(matches!(register.lock("db1"), Err(RegisterError::Busy(_))));
        drop(first);
        register.lock("db1").unwrap();
    }
}
