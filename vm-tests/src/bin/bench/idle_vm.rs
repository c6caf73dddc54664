//! A QEMU with one disk and a virtual CPU that stays at reset.

use crate::data::{self, Fill};
use qmp::Nothing;
use qmp::block::BlockdevAdd;
use qmp::command::HumanMonitorCommand;
use qmp::export::{BlockExportAdd, ExportKind, NbdServerStart, NbdServerStop, SocketAddress};
use qmp::job::{JobDismiss, QueryJobs};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vm::monitor::Monitor;

const START_LIMIT: Duration = Duration::from_secs(60);
const JOB_LIMIT: Duration = Duration::from_secs(300);
/// The disk's name for the product, and its node's for QEMU.
pub(crate) const DISK: &str = "data";

/// Killed when dropped.
pub(crate) struct IdleVm {
    child: Child,
    monitor: Monitor,
    folder: tempfile::TempDir,
}

impl IdleVm {
    /// Makes a qcow2 image and starts QEMU on it.
    pub(crate) fn start(size_bytes: u64, pattern: &[Fill]) -> Result<Self, String> {
        let folder = tempfile::Builder::new().prefix("stillpoint-bench-").tempdir().map_err(words)?;
        let at = |name: &str| folder.path().join(name);
        data::fill(&at("raw"), size_bytes, pattern).map_err(words)?;
        run(Command::new("qemu-img")
            .args(["convert", "-q", "-W", "-f", "raw", "-O", "qcow2"])
            .args([at("raw"), at("disk")]))?;
        std::fs::remove_file(at("raw")).map_err(words)?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-no-user-config", "-S"])
            .args(["-blockdev", &format!("driver=file,node-name=file,filename={}", at("disk").display())])
            .args(["-blockdev", &format!("driver=qcow2,node-name={DISK},file=file")])
            .args(["-device", &format!("virtio-blk-pci,id={DISK},drive={DISK},serial={DISK}")]);
        for name in ["qmp", "qmp2"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", at(name).display())]);
        }
        let log = File::create(at("log")).map_err(words)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = vm_tests::spawn(command).map_err(words)?;
        let end = Instant::now() + START_LIMIT;
        let monitor = loop {
            match Monitor::connect(&at("qmp2"), START_LIMIT) {
                Ok(monitor) => break monitor,
                Err(error) if Instant::now() >= end || matches!(child.try_wait(), Ok(Some(_))) => {
                    let said = std::fs::read_to_string(at("log")).unwrap_or_default();
                    return Err(format!("QEMU did not start: {error}\n{said}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        Ok(Self { child, monitor, folder })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A place in its folder: `qmp` is the monitor for the product, `disk` the image.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a command on the bench's own monitor.
    pub(crate) fn ask<C: qmp::Command>(&mut self, command: &C) -> Result<C::Answer, String> {
        self.monitor.run(command).map_err(|error| error.to_string())
    }

    /// Writes one block through the guest's device, so that whatever watches the disk sees it.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let source = self.path("block");
        // Not `fs::write`: a file that is cut and written again is synced by some file systems.
        let file = File::options().write(true).create(true).truncate(false).open(&source).map_err(words)?;
        file.write_all_at(bytes, 0).map_err(words)?;
        // The drive belongs to the virtio device inside the PCI device.
        let device = format!("/machine/peripheral/{DISK}/virtio-backend");
        let command_line =
            format!("qemu-io -d {device} \"write -q -s {} {offset} {}\"", source.display(), bytes.len());
        let said = self.ask(&HumanMonitorCommand { command_line })?;
        if said.trim().is_empty() { Ok(()) } else { Err(format!("qemu-io: {said}")) }
    }

    /// Exports the disk over NBD as QEMU does by itself; returns the address.
    pub(crate) fn export(&mut self) -> Result<String, String> {
        let path = self.path("nbd").display().to_string();
        let address = format!("nbd+unix:///{DISK}?socket={path}");
        self.ask(&NbdServerStart { addr: SocketAddress::Unix { path }, max_connections: None })?;
        self.ask(&BlockExportAdd {
            kind: ExportKind::Nbd,
            id: "bench".to_owned(),
            node_name: DISK.to_owned(),
            name: DISK.to_owned(),
            writable: false,
            bitmaps: Vec::new(),
        })?;
        Ok(address)
    }

    pub(crate) fn end_export(&mut self) -> Result<(), String> {
        self.ask(&NbdServerStop {})?;
        // Some versions of QEMU leave the socket's file behind.
        let socket = self.path("nbd");
        if socket.exists() { std::fs::remove_file(socket).map_err(words) } else { Ok(()) }
    }

    /// QEMU's own incremental backup, into a new qcow2 image without a backing file: what `bitmap` holds.
    pub(crate) fn incremental_backup(&mut self, target: &str, bitmap: &str) -> Result<(), String> {
        let filename = self.path(target).display().to_string();
        let node = |end: &str| format!("{target}-{end}");
        self.ask(&BlockdevAdd::File { node_name: node("file"), filename, cache: None })?;
        self.ask(&BlockdevAdd::Qcow2 { node_name: node("qcow2"), file: node("file"), cache: None })?;
        self.ask(&BlockdevBackup {
            job_id: target.to_owned(),
            device: DISK.to_owned(),
            target: node("qcow2"),
            sync: "incremental",
            bitmap: bitmap.to_owned(),
            auto_dismiss: false,
        })?;
        let end = Instant::now() + JOB_LIMIT;
        loop {
            let jobs = self.ask(&QueryJobs {})?;
            match jobs.into_iter().find(|job| job.id == target) {
                Some(job) if job.status != "concluded" => {}
                Some(qmp::job::Job { error: Some(error), .. }) => {
                    return Err(format!("QEMU's backup: {error}"));
                }
                Some(_) => break,
                None => return Err("QEMU's backup job is gone".to_owned()),
            }
            if Instant::now() >= end {
                return Err("QEMU's backup does not end".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.ask(&JobDismiss { id: target.to_owned() })?;
        for end in ["qcow2", "file"] {
            self.ask(&qmp::block::BlockdevDel { node_name: node(end) })?;
        }
        Ok(())
    }
}

impl Drop for IdleVm {
    fn drop(&mut self) {
        // Fails only for a process that has ended and been waited for: what was wanted.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// A backup job inside QEMU. Only a peer for figures: the product does not use it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct BlockdevBackup {
    job_id: String,
    device: String,
    target: String,
    sync: &'static str,
    bitmap: String,
    auto_dismiss: bool,
}

impl qmp::Command for BlockdevBackup {
    const NAME: &'static str = "blockdev-backup";
    type Answer = Nothing;
}

/// Runs a program to its end; an error is what it said.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// Fails unless a raw image holds what the VM's disk holds.
pub(crate) fn compare(vm: &IdleVm, raw: &Path) -> Result<(), String> {
    run(Command::new("qemu-img")
        .args(["compare", "-q", "-U", "-f", "raw", "-F", "qcow2"])
        .arg(raw)
        .arg(vm.path("disk")))
    .map_err(|error| format!("what was restored is not what is on the disk: {error}"))
}

pub(crate) fn words(error: std::io::Error) -> String {
    error.to_string()
}
