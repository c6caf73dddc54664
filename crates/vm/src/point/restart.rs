//! Lets the vCPUs run again even if we die while they are stopped.
//!
//! QEMU drops the queued commands of a client that vanishes, so a `cont` that was sent ahead is not enough. A shell, in a
//! process group of its own, holds a second handle to the monitor's connection and a pipe from us. The first word on it
//! says that we are about to stop the vCPUs, the second that they run again. When the pipe closes between the two, it sends `cont`;
//! before and after it does nothing: the VM may be paused by its owner, or have migrated.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

/// Ignores the signals of a terminal. The new line ends what a dying program may have begun. The sleep keeps the
/// connection open until QEMU has read the command: it drops what it has not read when the last client is gone.
const SCRIPT: &str = r#"trap '' HUP INT QUIT TERM; read -r word || exit 0
read -r word || { printf '\n{"execute": "cont"}\n'; exec sleep 1; }"#;

/// While this is armed, the death of this process makes the vCPUs run. Dropping it does so too.
#[derive(Debug)]
#[must_use = "dropping this, once armed, lets the vCPUs run"]
pub struct Restarter {
    child: Child,
    pipe: Option<ChildStdin>,
    is_armed: bool,
}

impl Restarter {
    /// Starts the shell, which takes milliseconds: do it before the guest is frozen.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(connection: UnixStream) -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(connection))
            .stderr(Stdio::null())
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe, is_armed: false })
    }

    /// From now on our death makes the vCPUs run: say so right before they are stopped.
    ///
    /// # Errors
    /// When the shell is gone; then nothing may be stopped.
    pub fn arm(&mut self) -> io::Result<()> {
        self.pipe.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(b"stop\n")?;
        self.is_armed = true;
        Ok(())
    }

    /// Ends the shell without a word to QEMU. Its end is waited for when the answer is dropped: not in the freeze.
    pub fn disarm(mut self) -> Disarmed {
        if let Some(mut pipe) = self.pipe.take().filter(|_| self.is_armed) {
            // If the shell is gone already, it cannot do anything either.
            pipe.write_all(b"done\n").ok();
        }
        Disarmed(self)
    }
}

impl Drop for Restarter {
    fn drop(&mut self) {
        // Closing the pipe is what makes the shell act, or end; one that acted ends by itself a second later.
        drop(self.pipe.take());
        self.child.wait().ok();
    }
}

/// A restarter that was told to end.
#[derive(Debug)]
pub struct Disarmed(#[expect(dead_code, reason = "held for its Drop, which reaps the shell")] Restarter);
