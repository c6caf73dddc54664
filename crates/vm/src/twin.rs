//! A twin: an isolated VM started from a snapshot. It has no network, no path of the original, and no privilege.

pub mod command_line;
mod console;
pub mod user;

pub use command_line::{CPU, Family, Files, Machine, SpecError, TwinBoot, TwinDisk, TwinSpec, arguments};
pub use user::User;

use crate::agent::{Agent, AgentError};
use crate::monitor::{Monitor, MonitorError};
use crate::program::{end_with_us, in_our_path};
use console::Console;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at a twin that is starting or ending.
const LOOK: Duration = Duration::from_millis(20);
/// Most of QEMU's own words that an error repeats, in bytes.
const LOG_BYTES_MAX: usize = 2048;

/// A twin that could not be started, or asked.
#[derive(Debug, thiserror::Error)]
pub enum TwinError {
    /// The description is not one of a twin.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A file of its folder could not be made.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// The kernel's words.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("{program} cannot be started: {source}")]
    Start {
        /// Which.
        program: String,
        /// The kernel's words.
        source: io::Error,
    },
    /// An overlay could not be made.
    #[error("the overlay image cannot be made: {0}")]
    Overlay(String),
    /// QEMU ended.
    #[error("the twin's QEMU ended with {status}: {log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        log: String,
    },
    /// Its monitor did not answer.
    #[error("the twin's monitor does not answer: {0}")]
    Monitor(#[from] MonitorError),
}

/// The folder in which a twin's files are put before its start; private to the user that will run it.
#[derive(Debug)]
pub struct TwinFolder {
    files: Files,
    user: Option<User>,
}

impl TwinFolder {
    /// Makes the folder, which must not exist yet. Every folder above must be open to the twin's user.
    ///
    /// # Errors
    /// `Spec` and `File`.
    pub fn create(folder: &Path, user: Option<User>) -> Result<Self, TwinError> {
        let files = Files::new(folder)?;
        DirBuilder::new().mode(0o700).create(folder).map_err(at(folder))?;
        let made = Self { files, user };
        made.give(folder)?;
        Ok(made)
    }

    /// Where the files go.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Gives a file or socket in the folder to the twin's user: the kernel after it was written, the NBD socket after
    /// it was bound.
    ///
    /// # Errors
    /// `File`.
    pub fn give(&self, path: &Path) -> Result<(), TwinError> {
        self.user.map_or(Ok(()), |user| user.give(path)).map_err(at(path))
    }
}

/// A running twin. Dropping it ends it; its folder is its maker's to remove.
#[derive(Debug)]
#[must_use = "dropping a twin ends it"]
pub struct Twin {
    child: Child,
    files: Files,
    console: Console,
}

impl Twin {
    /// Makes the overlays, starts QEMU and waits for its monitor. What boots needs from the folder must be there, and
    /// the NBD server must listen.
    ///
    /// # Errors
    /// See [`TwinError`].
    pub fn start(
        qemu: &Path,
        spec: &TwinSpec,
        folder: &TwinFolder,
        limit: Duration,
    ) -> Result<Self, TwinError> {
        let files = folder.files.clone();
        let arguments = arguments(spec, &files)?;
        for (number, disk) in spec.disks.iter().enumerate() {
            let overlay = files.overlay(number);
            make_overlay(&overlay, disk.size_bytes)?;
            folder.give(&overlay)?;
        }
        for path in
            [files.kernel(), files.initrd(), files.firmware_code(), files.firmware_variables(), files.nbd()]
        {
            if path.exists() {
                folder.give(&path)?;
            }
        }
        let log = File::create(files.log()).map_err(at(&files.log()))?;
        let mut command = Command::new(in_our_path(qemu));
        command.args(arguments).current_dir(files.folder()).env_clear();
        // QEMU looks for its own data beside its program; nothing else of our environment is its business.
        command.env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        if let Some(user) = folder.user {
            user.run_as(&mut command);
        }
        end_with_us(&mut command);
        let child = command
            .spawn()
            .map_err(|source| TwinError::Start { program: qemu.display().to_string(), source })?;
        let mut twin = Self { child, console: Console::new(), files };
        // On every error from here on the twin is dropped, and QEMU ends.
        drop(twin.monitor(limit)?);
        twin.console.follow(&twin.files.console()).map_err(at(&twin.files.console()))?;
        Ok(twin)
    }

    /// Connects to its monitor.
    ///
    /// # Errors
    /// `Ended` and `Monitor`.
    pub fn monitor(&mut self, limit: Duration) -> Result<Monitor, TwinError> {
        let deadline = Instant::now() + limit;
        loop {
            self.check_alive()?;
            match Monitor::connect(&self.files.monitor(), deadline.saturating_duration_since(Instant::now()))
            {
                Ok(monitor) => return Ok(monitor),
                Err(error) if Instant::now() >= deadline => {
                    self.check_alive()?;
                    return Err(error.into());
                }
                Err(_) => std::thread::sleep(LOOK),
            }
        }
    }

    /// Connects to the agent in it, waiting until the guest has started it.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn agent(&self, limit: Duration) -> Result<Agent, AgentError> {
        Agent::connect(&self.files.agent(), limit)
    }

    /// Where its sockets are.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Its QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of what the guest wrote to its serial console. It comes from a guest: escape it before showing it.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }

    /// `Ended` if QEMU has.
    ///
    /// # Errors
    /// `Ended`.
    pub fn check_alive(&mut self) -> Result<(), TwinError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(TwinError::Ended { status, log: self.log() }),
            Ok(None) => Ok(()),
            Err(source) => Err(TwinError::Start { program: "waiting for QEMU".to_owned(), source }),
        }
    }

    /// Waits for QEMU to end by itself, as after a shutdown in the guest; absent if it did not in time.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(Some(status)),
                None if Instant::now() >= deadline => return Ok(None),
                None => std::thread::sleep(LOOK),
            }
        }
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kill(mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    fn log(&self) -> String {
        let text = std::fs::read(self.files.log()).unwrap_or_default();
        let from = text.len().saturating_sub(LOG_BYTES_MAX);
        String::from_utf8_lossy(&text[from..]).trim().to_owned()
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// An empty qcow2 without a backing reference in it: the command line names the backing node.
fn make_overlay(path: &Path, size_bytes: u64) -> Result<(), TwinError> {
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|source| TwinError::Start { program: "qemu-img".to_owned(), source })?;
    if !output.status.success() {
        return Err(TwinError::Overlay(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(at(path))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> TwinError {
    let path = path.to_owned();
    move |source| TwinError::File { path, source }
}
