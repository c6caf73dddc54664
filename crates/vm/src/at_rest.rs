//! The images of a VM that is shut off, read through a QEMU storage daemon of ours.
//!
//! They are opened read-only and without locks: whoever starts the VM meanwhile is not kept from it. That it was not
//! started is shown by [`Untouched`](crate::untouched::Untouched).

use crate::disks::{Disk, Layer};
use crate::machine;
use crate::monitor::{Monitor, MonitorError};
use crate::point::DiskExport;
use crate::program::end_with_us;
use qmp::block::{Locking, Node, OpenFile, OpenImage};
use qmp::export::{BitmapReference, BlockExportAdd, ExportKind, NbdServerStart, SocketAddress};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The program, looked for in the usual places.
const DAEMON: &str = "qemu-storage-daemon";
/// How long it may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(20);
/// Longest path of a socket in its folder, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = crate::point::plan::SOCKET_PATH_BYTES_MAX;

/// Why images cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum AtRestError {
    /// It is made of something that only a QEMU with its whole configuration can open.
    #[error("disk '{disk}' cannot be read while the VM is shut off: {why}")]
    Unreadable {
        /// Its name.
        disk: String,
        /// Why.
        why: String,
    },
    /// An image cannot be opened.
    #[error("disk '{disk}' cannot be opened: {source}")]
    Open {
        /// Its name.
        disk: String,
        /// The daemon's words.
        source: MonitorError,
    },
    /// The daemon's folder.
    #[error("{}: {source}", .path.display())]
    Folder {
        /// The folder, or a file in it.
        path: PathBuf,
        /// The kernel's words.
        source: io::Error,
    },
    /// The daemon cannot be started.
    #[error("{DAEMON}, which comes with QEMU, cannot be started: {0}")]
    Start(#[source] io::Error),
    /// It ended.
    #[error("{DAEMON} ended with {status}: {log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it said.
        log: String,
    },
    /// It does not answer.
    #[error("{DAEMON}: {0}")]
    Monitor(#[from] MonitorError),
}

/// Opened images. Dropping them ends the daemon and removes its folder.
#[derive(Debug)]
pub struct Images {
    child: Child,
    monitor: Monitor,
    folder: Folder,
}

/// A private folder, removed with everything in it.
#[derive(Debug)]
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // sockets without a listener; the next run removes them
    }
}

/// How the disks of a VM will be opened.
#[derive(Debug)]
pub struct Chains(Vec<(String, OpenImage)>);

impl Chains {
    /// Decides it, each disk under the node name that it carries.
    ///
    /// # Errors
    /// `Unreadable`.
    pub fn of(disks: &[Disk]) -> Result<Self, AtRestError> {
        disks.iter().map(|disk| Ok((disk.name.clone(), chain(disk)?))).collect::<Result<_, _>>().map(Self)
    }
}

impl Images {
    /// Opens the disks. What a daemon that died left in the folder is removed.
    ///
    /// # Errors
    /// See [`AtRestError`].
    pub fn open(folder: &Path, chains: &Chains) -> Result<Self, AtRestError> {
        let at = |source| AtRestError::Folder { path: folder.to_owned(), source };
        let monitor = folder.join("qmp");
        if monitor.to_str().is_none_or(|path| path.len() > SOCKET_PATH_BYTES_MAX) {
            return Err(at(io::Error::other("the path is too long for a socket in it")));
        }
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(folder).map_err(at)?;
        let mut images = Self::start(Folder(folder.to_owned()), &monitor)?;
        for (disk, chain) in &chains.0 {
            let failed = |source| AtRestError::Open { disk: disk.clone(), source };
            images.monitor.run(chain).map_err(failed)?;
        }
        Ok(images)
    }

    fn start(folder: Folder, monitor: &Path) -> Result<Self, AtRestError> {
        let log = folder.0.join("log");
        let at = |source| AtRestError::Folder { path: log.clone(), source };
        // In QEMU's lists of options a comma is written twice.
        let path = monitor.display().to_string().replace(',', ",,");
        let mut command = Command::new(DAEMON);
        command
            .arg("--chardev")
            .arg(format!("socket,id=monitor,path={path},server=on,wait=off"))
            .args(["--monitor", "chardev=monitor"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).map_err(at)?);
        end_with_us(&mut command);
        let mut child = command.spawn().map_err(AtRestError::Start)?;
        let deadline = Instant::now() + START_TIMEOUT;
        let connected = loop {
            match Monitor::connect(monitor, deadline.saturating_duration_since(Instant::now())) {
                Ok(monitor) => break Ok(monitor),
                Err(error) if Instant::now() >= deadline => break Err(error.into()),
                Err(_) => match child.try_wait() {
                    Ok(None) => std::thread::sleep(LOOK),
                    Ok(Some(status)) => {
                        let said = fs::read(&log).unwrap_or_default(); // without its words the status says enough
                        let log = String::from_utf8_lossy(&said[..said.len().min(2048)]).trim().to_owned();
                        break Err(AtRestError::Ended { status, log });
                    }
                    Err(error) => break Err(AtRestError::Start(error)),
                },
            }
        };
        match connected {
            Ok(monitor) => Ok(Self { child, monitor, folder }),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    /// Every node, with the bitmaps that the images keep.
    ///
    /// # Errors
    /// Those of the monitor.
    pub fn nodes(&mut self) -> Result<Vec<Node>, AtRestError> {
        Ok(machine::nodes(&mut self.monitor)?)
    }

    /// Where the disks are served.
    pub fn socket(&self) -> PathBuf {
        self.folder.0.join("nbd")
    }

    /// Serves the disks, each with the bitmap that says what changed, if it has one to rely on.
    ///
    /// # Errors
    /// Those of the monitor.
    pub fn serve<'d>(
        &mut self,
        disks: impl IntoIterator<Item = (&'d Disk, Option<&'d str>)>,
    ) -> Result<Vec<DiskExport>, AtRestError> {
        let path = self.socket().display().to_string();
        self.monitor.run(&NbdServerStart { addr: SocketAddress::Unix { path }, max_connections: None })?;
        let mut exports = Vec::new();
        for (disk, base) in disks {
            let base = base.map(|name| BitmapReference { node: disk.node.clone(), name: name.to_owned() });
            let context = base.as_ref().map(|base| format!("qemu:dirty-bitmap:{}", base.name));
            self.monitor.run(&BlockExportAdd {
                kind: ExportKind::Nbd,
                id: disk.node.clone(),
                node_name: disk.node.clone(),
                name: disk.node.clone(),
                writable: false,
                bitmaps: base.into_iter().collect(),
            })?;
            exports.push(DiskExport {
                disk: disk.name.clone(),
                export: disk.node.clone(),
                changed_context: context,
                size_bytes: disk.size_bytes,
            });
        }
        Ok(exports)
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // Both fail only if it has ended already.
    child.kill().ok();
    child.wait().ok();
}

/// How to open a disk's images: every layer with the format that QEMU was told when the VM ran.
fn chain(disk: &Disk) -> Result<OpenImage, AtRestError> {
    let unreadable = |why: String| AtRestError::Unreadable { disk: disk.name.clone(), why };
    let mut opened = None;
    for (number, layer) in disk.layers.iter().enumerate().rev() {
        let node_name = (number == 0).then(|| disk.node.clone());
        let file = file(layer).map_err(unreadable)?;
        opened = Some(match layer.format.as_str() {
            "qcow2" => OpenImage::Qcow2 { node_name, read_only: true, file, backing: opened.map(Box::new) },
            "raw" | "file" | "host_device" if opened.is_none() => {
                OpenImage::Raw { node_name, read_only: true, file }
            }
            other => return Err(unreadable(format!("its image {} has the format {other}", layer.file))),
        });
    }
    opened.ok_or_else(|| unreadable("it was not seen what it is made of".to_owned()))
}

fn file(layer: &Layer) -> Result<OpenFile, String> {
    let path = Path::new(&layer.file);
    if !path.is_absolute() {
        return Err(format!("{} is no file of this host", layer.file));
    }
    if layer.data_elsewhere {
        return Err(format!("the data of its image {} lie in another file", layer.file));
    }
    let kind = fs::metadata(path).map_err(|error| format!("{}: {error}", layer.file))?.file_type();
    let (filename, read_only, locking) = (layer.file.clone(), true, Locking::Off);
    Ok(if kind.is_block_device() {
        OpenFile::HostDevice { filename, read_only, locking }
    } else {
        OpenFile::File { filename, read_only, locking }
    })
}
