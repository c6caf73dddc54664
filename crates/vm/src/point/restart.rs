//! Lets the vCPUs run again even if we die while they are stopped.
//!
//! QEMU drops the queued commands of a client that vanishes, so a `cont` that was sent ahead is not enough. A shell, in a
//! process group of its own, holds a second handle to the monitor's connection and a pipe from us. The first word on it
//! says that we are about to stop the vCPUs, the second that they run again, or that we could not let them. When the pipe closes between
//! the two, or that is said, it sends `cont`; before and after it does nothing: the VM may be paused by its owner, or have migrated.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

/// Ignores the signals of a terminal. The new line ends what a dying program may have begun. QEMU drops what it has not read when the
/// last client is gone, and it reads nothing while a `stop` flushes slow disks: so the connection stays open until the answer
/// is there, which only this shell can read after our death. While we live we read it, and nothing may be taken from us.
const SCRIPT: &str = r#"trap '' HUP INT QUIT TERM
read -r word || exit 0
read -r word || word=dead
[ "$word" != done ] || exit 0
printf '\n{"execute": "cont", "id": "stillpoint-restart"}\n'
[ "$word" = dead ] || exec sleep 1
exec timeout 600 grep -q '"id": "stillpoint-restart"' <&1 >/dev/null"#;

/// While this is armed, the death of this process makes the vCPUs run. Dropping it does so too, and does not wait until they do: a
/// panic drops it in a process that may live on, and whoever unwinds then reads QEMU's answers itself.
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

    /// Lets the shell say `cont` too, for QEMU did not answer ours. Takes a second.
    pub fn try_once_more(mut self) {
        self.say(b"alive\n");
        self.child.wait().ok();
    }

    /// Ends the shell without a word to QEMU. Its end is waited for when the answer is dropped: not in the freeze.
    pub fn disarm(mut self) -> Disarmed {
        self.say(b"done\n");
        Disarmed(self)
    }

    /// The word after which nothing more is said.
    fn say(&mut self, word: &[u8]) {
        if let Some(mut pipe) = self.pipe.take().filter(|_| self.is_armed) {
            // If the shell is gone already, it cannot do anything either.
            pipe.write_all(word).ok();
        }
        self.is_armed = false;
    }
}

impl Drop for Restarter {
    fn drop(&mut self) {
        let acts = self.is_armed;
        if std::thread::panicking() {
            self.say(b"alive\n");
        }
        // Closing the pipe is what makes the shell act, or end. One that acts waits for QEMU, and this may be the end of our process.
        drop(self.pipe.take());
        if !acts {
            self.child.wait().ok();
        }
    }
}

/// A restarter that was told to end.
#[derive(Debug)]
pub struct Disarmed(#[expect(dead_code, reason = "held for its Drop, which reaps the shell")] Restarter);
