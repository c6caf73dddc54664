//! Real NBD programs for tests: QEMU's server and tools, libnbd's tools.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a busy machine, short enough for a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a program to its end and returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = run_anyhow(program, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a program to its end, at most 60 seconds, however it ends.
pub(crate) fn run_anyhow(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap()
}

/// A process that ends with the test.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn signal(&self, name: &str) {
        run("kill", &["-s", name, &self.0.id().to_string()]);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// qemu-nbd serving an image read-only on a unix socket.
pub(crate) struct QemuNbd {
    pub(crate) process: Running,
    pub(crate) socket: PathBuf,
}

impl QemuNbd {
    /// `options` end with the image.
    pub(crate) fn serve(folder: &Path, options: &[&str]) -> Self {
        let socket = folder.join("qemu-nbd.sock");
        let ready = folder.join("qemu-nbd.pid");
        let child = Command::new("qemu-nbd")
            .arg(format!("--pid-file={}", ready.display()))
            .args(["--read-only", "--persistent", "--shared=4", "--export-name=disk", "--socket"])
            .arg(&socket)
            .args(options)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let process = Running(child);
        let began = Instant::now();
        // The socket's file is there before anybody listens; this one is written later.
        while !ready.exists() {
            assert!(began.elapsed() < PATIENCE, "qemu-nbd does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { process, socket }
    }

    pub(crate) fn uri(&self) -> String {
        uri(&self.socket, "disk")
    }
}

pub(crate) fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// A raw image with data of many lengths between holes; its bytes tell their place.
pub(crate) fn raw_image(folder: &Path, size_bytes: u64) -> PathBuf {
    use std::os::unix::fs::FileExt;
    let path = folder.join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(size_bytes).unwrap();
    let (mut offset, mut length) = (0, 4096);
    while offset < size_bytes {
        let stretch = usize::try_from(length.min(size_bytes - offset)).unwrap();
        let data: Vec<u8> = (0..stretch).map(|place| pattern(offset + place as u64)).collect();
        file.write_all_at(&data, offset).unwrap();
        offset += length + length / 4096 % 5 * 65_536 + 4096;
        length = length * 7 % (3 << 20) / 4096 * 4096 + 4096;
    }
    file.sync_all().unwrap();
    path
}

fn pattern(at: u64) -> u8 {
    let mixed = (at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    mixed.to_le_bytes()[usize::try_from(at % 4).unwrap()] | 1
}
