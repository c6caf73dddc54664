//! The QEMU process: its disks, ports and sockets, bounded in time.

use crate::guest::DiskFormat;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// QEMU's emulated machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// PCI Express, as new machines are defined.
    Q35,
    /// The old PC.
    Pc,
}

impl Machine {
    /// As QEMU calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }
}

/// One disk of a guest: a virtio-blk device with id `disk-NAME` over a block node called NAME.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The device's serial number and the block node's name.
    pub name: String,
    /// The image file.
    pub path: PathBuf,
    /// `qcow2` or `raw`.
    pub format: &'static str,
}

impl Disk {
    /// A disk that starts as `base` and keeps its own changes, in `folder`.
    ///
    /// # Errors
    /// If `qemu-img` or `cp` fails.
    pub fn fresh(name: &str, base: &Path, format: DiskFormat, folder: &Path) -> io::Result<Self> {
        let (word, mut command) = match format {
            DiskFormat::Qcow2 => {
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(base);
                ("qcow2", command)
            }
            DiskFormat::Raw => {
                let mut command = Command::new("cp");
                command.args(["--sparse=always", "--reflink=auto"]).arg(base);
                ("raw", command)
            }
        };
        let path = folder.join(format!("{name}.{word}"));
        let output = command.arg(&path).output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!(
                "{command:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            )));
        }
        Ok(Self { name: name.to_owned(), path, format: word })
    }
}

/// The virtio ports: (socket's name on the host, port's name in the guest).
const PORTS: [(&str, &str); 3] = [
    ("agent", "org.qemu.guest_agent.0"),
    ("acks", "org.stillpoint.acks"),
    ("harness", "org.stillpoint.harness"),
];

/// A running QEMU, killed when dropped.
pub(crate) struct Qemu {
    child: Arc<Mutex<Child>>,
    pid: u32,
    folder: PathBuf,
}

impl Qemu {
    /// Starts QEMU with its sockets in `folder`; `arguments` say what machine it is and what it boots.
    pub(crate) fn start(
        folder: &Path,
        disks: &[Disk],
        arguments: Vec<String>,
        lifetime: Duration,
    ) -> io::Result<Self> {
        let socket = |name: &str| folder.join(format!("{name}.sock")).display().to_string();
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-name",
            "stillpoint-test",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        command.args(arguments);
        command.arg("-serial").arg(format!("file:{}", folder.join("serial.log").display()));
        for name in ["qmp", "qmp2"] {
            command.args(["-chardev", &format!("socket,id={name},path={},server=on,wait=off", socket(name))]);
            command.args(["-mon", &format!("chardev={name},mode=control")]);
        }
        command.args(["-device", "virtio-serial-pci,id=ports"]);
        for (name, port) in PORTS {
            command.args(["-chardev", &format!("socket,id={name},path={},server=on,wait=off", socket(name))]);
            command.args([
                "-device",
                &format!("virtserialport,bus=ports.0,chardev={name},id=port-{name},name={port}"),
            ]);
        }
        let in_io_thread = allows_io_threads();
        if in_io_thread {
            command.args(["-object", "iothread,id=io0"]);
        }
        for Disk { name, path, format } in disks {
            // Nothing of a test outlives a power cut of the host: its flushes are left out.
            let file = format!(
                "driver=file,node-name={name}-file,filename={},discard=unmap,cache.no-flush=on",
                path.display()
            );
            let node =
                format!("driver={format},node-name={name},file={name}-file,discard=unmap,cache.no-flush=on");
            command.args(["-blockdev", &file, "-blockdev", &node]);
            let thread = if in_io_thread { ",iothread=io0" } else { "" };
            command.args([
                "-device",
                &format!("virtio-blk-pci,id=disk-{name},drive={name},serial={name}{thread}"),
            ]);
        }
        let errors = folder.join("qemu.log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&errors)?);
        let child = crate::process::spawn(command)?;
        let pid = child.id();
        let qemu = Self { child: Arc::new(Mutex::new(child)), pid, folder: folder.to_owned() };
        qemu.watch(lifetime);
        // A socket's file is there before it listens: only a greeting says that everything on the command line was made.
        let end = Instant::now() + START_TIME_MAX;
        while let Err(error) = qemu.greeted() {
            if qemu.ended() || Instant::now() >= end {
                let printed = std::fs::read_to_string(&errors).unwrap_or_default();
                return Err(io::Error::other(format!("QEMU did not start: {error}; it printed: {printed}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(qemu)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.sock"))
    }

    /// Connects to one of its sockets.
    pub(crate) fn connect(&self, name: &str) -> io::Result<UnixStream> {
        UnixStream::connect(self.socket(name))
    }

    /// Succeeds once QEMU's main loop greets on the second monitor, which nobody uses yet.
    fn greeted(&self) -> io::Result<()> {
        let mut stream = self.connect("qmp2")?;
        stream.set_read_timeout(Some(START_TIME_MAX))?;
        stream.read_exact(&mut [0; 1])
    }

    /// Waits for QEMU's own end; false if it still runs after `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while !self.ended() {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// The last lines of the serial console, and what became of QEMU.
    pub(crate) fn serial_tail(&self) -> String {
        let bytes = std::fs::read(self.folder.join("serial.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let shown = &lines[lines.len().saturating_sub(SERIAL_LINES_SHOWN)..];
        let printed = std::fs::read_to_string(self.folder.join("qemu.log")).unwrap_or_default();
        let status = self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
        format!(
            "--- the guest's serial console ends with:\n{}\n--- QEMU's end: {status:?}; it printed: {printed}---",
            shown.join("\n")
        )
    }

    fn ended(&self) -> bool {
        has_ended(&self.child)
    }

    /// Kills QEMU at the end of its lifetime, if it lives that long.
    fn watch(&self, lifetime: Duration) {
        let child = Arc::clone(&self.child);
        let end = Instant::now() + lifetime;
        std::thread::spawn(move || {
            while !has_ended(&child) {
                if Instant::now() >= end {
                    eprintln!("a guest outlived its {lifetime:?} and is killed");
                    end_child(&child);
                    return;
                }
                std::thread::sleep(Duration::from_millis(250));
            }
        });
    }
}

/// Whether snapshots of disks in I/O threads are allowed with this QEMU: then every guest's are, so that all tests show it.
fn allows_io_threads() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        let help = Command::new("qemu-system-x86_64").args(["-device", "virtio-blk-pci,help"]).output();
        help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("iothread-vq-mapping"))
    })
}

/// QEMU needs a fraction of a second, on a machine with other things to do.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// Enough for a kernel's oops with its trace.
const SERIAL_LINES_SHOWN: usize = 60;

impl Drop for Qemu {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.serial_tail());
        }
        end_child(&self.child);
    }
}

fn has_ended(child: &Mutex<Child>) -> bool {
    let ended = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
    matches!(ended, Ok(Some(_)) | Err(_))
}

fn end_child(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    // Fails only for a process that has ended and been waited for: what was wanted.
    let _ended = child.kill().and_then(|()| child.wait());
}
