//! One step of a point or of its undoing, as data, and how it is carried out.

use crate::monitor::{Asked, COMMAND_TIMEOUT, Monitor, MonitorError};
use qmp::bitmap::BlockDirtyBitmapAdd;
use qmp::block::{BlockdevAdd, BlockdevCreate, BlockdevDel, CreateOptions};
use qmp::command::Nothing;
use qmp::export::{
    BlockExportAdd, BlockExportDel, NbdServerStart, NbdServerStop, QueryBlockExports, RemoveMode,
    SocketAddress,
};
use qmp::job::{JobDismiss, QueryJobs};
use qmp::machine::Cont;
use qmp::qom::QomSet;
use qmp::transaction::{Action, Transaction};
use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long formatting a scratch image, or the end of an export, may take.
const WAIT: Duration = Duration::from_secs(20);
/// Between two looks at a job or an export.
const LOOK: Duration = Duration::from_millis(2);

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Makes a private folder.
    MakeFolder(PathBuf),
    /// Makes an empty private file.
    MakeFile(PathBuf),
    /// Opens a node.
    Open(BlockdevAdd),
    /// Writes an empty qcow2 image into a node.
    Format {
        /// Id of the job.
        job: String,
        /// The node.
        node: String,
        /// Virtual size in bytes.
        size_bytes: u64,
    },
    /// Starts QEMU's NBD server.
    StartServer(PathBuf),
    /// Adds a bitmap, which records from now on.
    Record(BlockDirtyBitmapAdd),
    /// Changes bitmaps, all or none.
    Change(Vec<Action>),
    /// Lets a guest's device use a node. Never the node that it uses: QEMU 7.2 dies of that.
    SetDrive {
        /// The device.
        device: String,
        /// The node.
        node: String,
    },
    /// Exports a node.
    Export(BlockExportAdd),
    /// Lets the vCPUs run.
    Resume,
    /// Ends an export and waits until it is gone.
    EndExport(String),
    /// Closes a node.
    Close(String),
    /// Forgets a concluded job.
    DismissJob(String),
    /// Ends QEMU's NBD server.
    StopServer,
    /// Removes a file.
    RemoveFile(PathBuf),
    /// Removes an empty folder.
    RemoveFolder(PathBuf),
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// In QEMU.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// On the host.
    #[error("{path}: {source}")]
    File {
        /// What it was about.
        path: PathBuf,
        /// The kernel's words.
        source: io::Error,
    },
    /// A scratch image could not be formatted.
    #[error("the scratch image cannot be formatted: {0}")]
    Format(String),
    /// QEMU serves NBD already, and not on our socket.
    #[error("this QEMU already runs an NBD server; another backup seems to be under way")]
    ServerTaken,
    /// It did not end in time.
    #[error("{0} did not end in time")]
    Unfinished(String),
}

impl StepError {
    /// The host's disk, or a quota on it, has no room for scratch. QEMU says so in the C library's words only.
    pub fn is_out_of_space(&self) -> bool {
        let told =
            |words: &str| words.contains("No space left on device") || words.contains("Disk quota exceeded");
        match self {
            Self::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Monitor(MonitorError::Failed { error, .. }) => told(&error.desc),
            Self::Format(words) => told(words),
            _ => false,
        }
    }
}

impl Step {
    /// Carries the step out. Files and folders are given to the user that made the monitor's socket, if that is
    /// another than ours and we may.
    ///
    /// # Errors
    /// See [`StepError`].
    pub fn run(&self, monitor: &mut Monitor) -> Result<(), StepError> {
        match self.begin(monitor)? {
            Some(asked) => monitor.hear(asked, COMMAND_TIMEOUT).map(|Nothing {}| ()).map_err(StepError::from),
            None => Ok(()),
        }
    }

    /// Begins the step, and waits for nothing if it is one command: its answer is still to be heard then. Any other step is
    /// carried out.
    ///
    /// # Errors
    /// See [`StepError`].
    pub fn begin(&self, monitor: &mut Monitor) -> Result<Option<Asked<Nothing>>, StepError> {
        let asked = match self {
            Self::Open(node) => monitor.ask(node)?,
            Self::Record(bitmap) => monitor.ask(bitmap)?,
            Self::Change(actions) => monitor.ask(&Transaction { actions: actions.clone() })?,
            Self::SetDrive { device, node } => monitor.ask(&QomSet {
                path: device.clone(),
                property: "drive".to_owned(),
                value: node.as_str().into(),
            })?,
            Self::Export(export) => monitor.ask(export)?,
            Self::Resume => monitor.ask(&Cont {})?,
            Self::Close(node) => monitor.ask(&BlockdevDel { node_name: node.clone() })?,
            Self::DismissJob(id) => monitor.ask(&JobDismiss { id: id.clone() })?,
            Self::StopServer => monitor.ask(&NbdServerStop {})?,
            Self::MakeFolder(path) => {
                DirBuilder::new().mode(0o700).create(path).map_err(at(path))?;
                return give(monitor, path).map(|()| None);
            }
            Self::MakeFile(path) => {
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(at(path))?;
                return give(monitor, path).map(|()| None);
            }
            Self::Format { job, node, size_bytes } => {
                return format(monitor, job, node, *size_bytes).map(|()| None);
            }
            Self::StartServer(socket) => return start_server(monitor, socket).map(|()| None),
            Self::EndExport(id) => return end_export(monitor, id).map(|()| None),
            Self::RemoveFile(path) => return std::fs::remove_file(path).map_err(at(path)).map(|()| None),
            Self::RemoveFolder(path) => return std::fs::remove_dir(path).map_err(at(path)).map(|()| None),
        };
        Ok(Some(asked))
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StepError {
    let path = path.to_owned();
    move |source| StepError::File { path, source }
}

fn give(monitor: &Monitor, path: &Path) -> Result<(), StepError> {
    let Some(peer) = monitor.peer() else { return Ok(()) };
    let ours = rustix::process::geteuid();
    if !ours.is_root() || peer.uid == ours.as_raw() {
        return Ok(());
    }
    std::os::unix::fs::chown(path, Some(peer.uid), Some(peer.gid)).map_err(at(path))
}

fn format(monitor: &mut Monitor, job: &str, node: &str, size_bytes: u64) -> Result<(), StepError> {
    let deadline = Instant::now() + WAIT;
    let options = CreateOptions::Qcow2 { file: node.to_owned(), size: size_bytes };
    monitor.run(&BlockdevCreate { job_id: job.to_owned(), options })?;
    loop {
        let jobs = monitor.run(&QueryJobs {})?;
        let Some(found) = jobs.into_iter().find(|found| found.id == job) else {
            return Err(StepError::Format("the job vanished".to_owned()));
        };
        if found.status == "concluded" {
            monitor.run(&JobDismiss { id: job.to_owned() })?;
            return found.error.map_or(Ok(()), |error| Err(StepError::Format(error)));
        }
        if Instant::now() > deadline {
            return Err(StepError::Unfinished(format!("job {job}")));
        }
        std::thread::sleep(LOOK);
    }
}

fn start_server(monitor: &mut Monitor, socket: &Path) -> Result<(), StepError> {
    let addr = SocketAddress::Unix { path: socket.to_string_lossy().into_owned() };
    match monitor.run(&NbdServerStart { addr, max_connections: None }) {
        Ok(_) => Ok(()),
        Err(MonitorError::Failed { error, .. }) if error.desc.contains("already running") => {
            Err(StepError::ServerTaken)
        }
        Err(error) => Err(error.into()),
    }
}

fn end_export(monitor: &mut Monitor, id: &str) -> Result<(), StepError> {
    let deadline = Instant::now() + WAIT;
    monitor.run(&BlockExportDel { id: id.to_owned(), mode: RemoveMode::Hard })?;
    while monitor.run(&QueryBlockExports {})?.iter().any(|export| export.id == id) {
        if Instant::now() > deadline {
            return Err(StepError::Unfinished(format!("export {id}")));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
