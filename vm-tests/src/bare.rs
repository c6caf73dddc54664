//! A QEMU without a guest system: disks, two monitors, and writes that the test makes in the guest's place. It starts at
//! once, and is enough for whatever concerns the host alone.

use crate::process::spawn;
use serde_json::{Value, json};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vm::monitor::Monitor;

/// QEMU needs a fraction of a second, on a machine with other things to do.
const LIMIT: Duration = Duration::from_secs(60);

/// How fast slow disks are read, in bytes a second: most of a minute for the images of a test. Slower, and a reset, which waits
/// for all reads that are under way, would take minutes.
const SLOW_BYTES_PER_S: u64 = 256 << 10;

/// A QEMU with virtio-blk disks, killed when dropped.
pub struct Bare {
    child: Child,
    folder: tempfile::TempDir,
}

/// One disk: a virtio-blk device with this id and serial number.
#[derive(Clone, Debug)]
pub struct BareDisk {
    /// Id of the device; the serial number is the same.
    pub id: String,
    /// The image, by its name in the folder.
    pub image: String,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// Reading is held back until [`Bare::unthrottle`]: a copy that takes as long as the test wants.
    pub slow: bool,
}

impl BareDisk {
    /// A disk as fast as it is.
    pub fn new(id: &str, image: &str, format: &'static str) -> Self {
        Self { id: id.to_owned(), image: image.to_owned(), format, slow: false }
    }

    /// The same, read slowly.
    #[must_use]
    pub fn slow(mut self) -> Self {
        self.slow = true;
        self
    }
}

impl Bare {
    /// A folder for images, with no QEMU yet: [`Bare::start`] takes it.
    ///
    /// # Panics
    /// If none can be made.
    #[must_use]
    pub fn folder() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("stillpoint-bare-").tempdir().expect("a folder")
    }

    /// Starts QEMU over images in the folder.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(folder: tempfile::TempDir, disks: &[BareDisk], more: &[&str]) -> Self {
        Self::start_by(Command::new("qemu-system-x86_64"), folder, disks, more)
    }

    /// The same as another user, to whom the folder is given with all that is in it.
    ///
    /// # Panics
    /// If it does not start, as it does not without root.
    #[must_use]
    pub fn start_as(user: u32, folder: tempfile::TempDir, disks: &[BareDisk], more: &[&str]) -> Self {
        let inside =
            std::fs::read_dir(folder.path()).expect("a folder").map(|entry| entry.expect("an entry").path());
        for path in inside.chain([folder.path().to_owned()]) {
            std::os::unix::fs::chown(&path, Some(user), Some(user)).expect("root may");
        }
        let mut command = Command::new("qemu-system-x86_64");
        command.uid(user).gid(user);
        Self::start_by(command, folder, disks, more)
    }

    fn start_by(mut command: Command, folder: tempfile::TempDir, disks: &[BareDisk], more: &[&str]) -> Self {
        command
            .current_dir(folder.path())
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-m", "64"])
            .args(["-accel", "tcg", "-smp", "1", "-object"])
            .arg(json!({ "qom-type": "throttle-group", "id": "slow", "limits": { "bps-read": SLOW_BYTES_PER_S } }).to_string());
        for name in ["qmp", "qmp2"] {
            command.args(["-chardev", &format!("socket,id={name},path={name},server=on,wait=off")]);
            command.args(["-mon", &format!("chardev={name},mode=control")]);
        }
        for (number, disk) in disks.iter().enumerate() {
            let file = json!({ "driver": "file", "filename": disk.image, "discard": "unmap" });
            let file = if disk.slow {
                json!({ "driver": "throttle", "throttle-group": "slow", "file": file })
            } else {
                file
            };
            let node = json!({ "driver": disk.format, "node-name": format!("n{number}"), "file": file, "discard": "unmap" });
            command.args(["-blockdev", &node.to_string()]);
            command.args(["-device", &device(&disk.id, &format!("n{number}"), number).to_string()]);
        }
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        command.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = spawn(command).expect("qemu-system-x86_64 (package qemu-system-x86) is needed");
        let mut bare = Self { child, folder };
        let end = Instant::now() + LIMIT;
        while let Err(error) = Monitor::connect(&bare.second_qmp_socket(), LIMIT) {
            let ended = !matches!(bare.child.try_wait(), Ok(None));
            assert!(!ended && Instant::now() < end, "no monitor: {error}; QEMU printed: {}", bare.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        bare
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The monitor for the program under test.
    pub fn qmp_socket(&self) -> PathBuf {
        self.path("qmp")
    }

    /// A second monitor, for the test, or for another program.
    pub fn second_qmp_socket(&self) -> PathBuf {
        self.path("qmp2")
    }

    /// What QEMU printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command in the second monitor.
    ///
    /// # Errors
    /// QEMU's, in words.
    pub fn try_command(&self, name: &str, arguments: &Value) -> Result<Value, String> {
        let mut monitor = Monitor::connect(&self.second_qmp_socket(), LIMIT).map_err(|e| e.to_string())?;
        monitor.run_raw(name, arguments, LIMIT).map_err(|error| error.to_string())
    }

    /// Runs a command in the second monitor that must succeed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn command(&self, name: &str, arguments: &Value) -> Value {
        self.try_command(name, arguments)
            .unwrap_or_else(|error| panic!("{error}; QEMU printed: {}", self.log()))
    }

    /// Writes to a disk as the guest would, through whatever filter is in place.
    ///
    /// # Panics
    /// If the write fails.
    #[track_caller]
    pub fn write(&self, disk: &str, pattern: u8, offset: u64, bytes: u64) {
        let line = format!(
            "qemu-io -d /machine/peripheral/{disk}/virtio-backend \"write -P {pattern} {offset} {bytes}\""
        );
        let printed = self.command("human-monitor-command", &json!({ "command-line": line }));
        // QEMU prints the numbers itself, and in the monitor what went wrong.
        assert_eq!(printed, "", "{line}");
    }

    /// Lets slow disks be read at full speed.
    pub fn unthrottle(&self) {
        self.limit_reads(0);
    }

    /// Holds slow disks back again.
    pub fn throttle(&self) {
        self.limit_reads(SLOW_BYTES_PER_S);
    }

    fn limit_reads(&self, bytes_per_s: u64) {
        let value = json!({ "bps-read": bytes_per_s });
        self.command("qom-set", &json!({ "path": "/objects/slow", "property": "limits", "value": value }));
    }

    /// Ends QEMU at once, as a crash does.
    pub fn kill(&mut self) {
        // Fails only if it has ended.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }

    /// Whether QEMU still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for QEMU's own end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn ended(&mut self) {
        let end = Instant::now() + LIMIT;
        while self.is_alive() {
            assert!(Instant::now() < end, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends QEMU properly, as a shutdown does, and gives its folder for the next.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn quit(mut self) -> tempfile::TempDir {
        // QEMU may close the monitor before it answers.
        let _answered = self.try_command("quit", &json!({}));
        self.ended();
        let folder = std::mem::replace(&mut self.folder, Self::folder());
        for socket in ["qmp", "qmp2"] {
            std::fs::remove_file(folder.path().join(socket)).ok();
        }
        folder
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A virtio-blk device; each has its own place, so that disks can be exchanged without one moving.
pub fn device(id: &str, node: &str, number: usize) -> Value {
    json!({
        "driver": "virtio-blk-pci", "id": id, "serial": id, "drive": node, "addr": format!("{:#x}", 4 + number),
    })
}

/// Makes an image with `qemu-img`.
///
/// # Panics
/// If it cannot.
pub fn image(folder: &Path, name: &str, format: &str, size: &str) {
    run(Command::new("qemu-img").current_dir(folder).args(["create", "-q", "-f", format, name, size]));
}

/// Fills a part of an image that no QEMU has open.
///
/// # Panics
/// If it cannot.
pub fn fill(folder: &Path, name: &str, format: &str, pattern: u8, offset: u64, bytes: u64) {
    let line = format!("write -P {pattern} {offset} {bytes}");
    run(Command::new("qemu-io").current_dir(folder).args(["-f", format, "-c", &line, name]));
}

/// Runs a program that must succeed, and returns what it printed.
///
/// # Panics
/// If it does not.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output =
        command.stdin(Stdio::null()).output().unwrap_or_else(|e: io::Error| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Whether two images hold the same, whatever their formats; the second may be open in a QEMU.
///
/// # Panics
/// If they cannot be compared.
pub fn same(one: &Path, one_format: &str, other: &Path, other_format: &str) -> bool {
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-q", "-U", "-f", one_format, "-F", other_format]).arg(one).arg(other);
    match command.status().expect("qemu-img starts").code() {
        // Without the sizes, zeroes behind the end of one are no difference to it.
        Some(0) => size(one, one_format) == size(other, other_format),
        Some(1) => false,
        code => panic!("{command:?} ended with {code:?}"),
    }
}

fn size(image: &Path, format: &str) -> u64 {
    let text = run(Command::new("qemu-img").args(["info", "-U", "--output=json", "-f", format]).arg(image));
    let info: Value = serde_json::from_str(&text).expect("qemu-img prints JSON");
    info["virtual-size"].as_u64().expect("a size")
}
