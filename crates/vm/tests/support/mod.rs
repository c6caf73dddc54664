//! A real QEMU for a test: stopped at reset unless the test lets it run, ended with the test.

#![allow(dead_code, reason = "each test file uses a part of this, some all of it")]
#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test's plumbing: what fails here fails the test")]

use qmp::command::HumanMonitorCommand;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vm::monitor::Monitor;

pub struct Qemu {
    child: Child,
    pub folder: tempfile::TempDir,
}

impl Qemu {
    /// Starts QEMU in a folder of its own in which `prepare` has put the images; relative names work.
    pub fn start(prepare: impl FnOnce(&Path), arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        Self { child: spawn(folder.path(), arguments), folder }
    }

    /// The same, with a small tmpfs at `name` that only this QEMU sees; others reach it by `/proc/PID/root`.
    pub fn start_with_small_tmpfs(
        prepare: impl FnOnce(&Path),
        arguments: &[&str],
        name: &str,
        size: &str,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        std::fs::create_dir(folder.path().join(name)).unwrap();
        let script = format!("mount -t tmpfs -o size={size} none {name} && exec qemu-system-x86_64 \"$@\"");
        let mut command = Command::new("unshare");
        // Without root, a user namespace of our own gives the right to mount.
        let flags = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
        command.args([flags, "sh", "-c", &script, "qemu"]);
        Self { child: spawn_by(command, folder.path(), arguments), folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("qmp")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects, waiting for QEMU to open its socket.
    pub fn monitor(&mut self) -> Monitor {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match Monitor::connect(&self.socket(), Duration::from_secs(20)) {
                Ok(monitor) => return monitor,
                Err(error) if Instant::now() > deadline => panic!("no monitor: {error}\n{}", self.log()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("QEMU ended with {status}\n{}", self.log());
            }
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends QEMU and starts it again over the same images.
    pub fn restart(&mut self, arguments: &[&str], kill: bool) {
        if kill {
            self.child.kill().unwrap();
        } else {
            let mut monitor = self.monitor();
            monitor.run(&qmp::machine::Quit {}).unwrap();
        }
        self.child.wait().unwrap();
        std::fs::remove_file(self.socket()).ok();
        self.child = spawn(self.folder.path(), arguments);
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn spawn(folder: &Path, arguments: &[&str]) -> Child {
    spawn_by(Command::new("qemu-system-x86_64"), folder, arguments)
}

fn spawn_by(mut command: Command, folder: &Path, arguments: &[&str]) -> Child {
    let log = File::create(folder.join("log")).unwrap();
    command
        .current_dir(folder)
        .args(["-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-no-user-config", "-S"])
        .args(["-qmp", "unix:qmp,server=on,wait=off"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("qemu-system-x86_64 (package qemu-system-x86) is needed")
}

pub fn image(folder: &Path, name: &str, format: &str, size: &str) {
    run(Command::new("qemu-img").current_dir(folder).args(["create", "-q", "-f", format, name, size]));
}

pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs one qemu-io command on a device, through whatever filter is in place, as the guest would.
pub fn device_io(monitor: &mut Monitor, qdev: &str, line: &str) -> String {
    let command_line = format!("qemu-io -d {qdev} \"{line}\"");
    monitor.run(&HumanMonitorCommand { command_line }).unwrap()
}
