//! The agent's side of a worker: start it with the application's rights, ask it with a deadline, end it for certain.

use super::super::channel::{self, Answer, Phase, Request};
use super::WORKER_ARGUMENT;
use crate::program::Program;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a wait looks whether the run was aborted.
const TICK: Duration = Duration::from_millis(50);
/// A worker gets this much less time than the agent waits for it, so that its own words arrive; at most a fifth of
/// the whole.
const GRACE_MAX: Duration = Duration::from_millis(500);
/// A killed worker is gone at once, unless it hangs in the kernel; longer than this nobody waits for it.
const REAP: Duration = Duration::from_secs(1);

/// What a worker is started for.
#[derive(Debug)]
pub(in crate::quiesce) struct Errand {
    /// User and group that it runs as: the application's own.
    pub(in crate::quiesce) uid: u32,
    pub(in crate::quiesce) gid: u32,
    /// The application's socket, opened as a mere place: the only way out that the worker gets.
    pub(in crate::quiesce) socket: OwnedFd,
    /// What its kind wants to know, as JSON.
    pub(in crate::quiesce) order: serde_json::Value,
}

/// Why a worker gave no answer.
#[derive(Debug, thiserror::Error)]
pub(in crate::quiesce) enum Lost {
    #[error("it did not answer in time")]
    TimedOut,
    #[error("the run was aborted")]
    Aborted,
    #[error("its process ended")]
    Ended,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A running worker. Dropping it kills it.
#[derive(Debug)]
pub(in crate::quiesce) struct Worker {
    child: Option<Child>,
    channel: UnixStream,
}

impl Worker {
    /// Starts a worker for one application and hands it its order.
    /// # Errors
    /// As `fork`, `setuid` and `exec`.
    pub(in crate::quiesce) fn start(program: &Program, kind: &str, errand: &Errand) -> io::Result<Self> {
        let (channel, theirs) = UnixStream::pair()?;
        channel.set_read_timeout(Some(TICK))?;
        channel.set_write_timeout(Some(REAP))?;
        let socket = errand.socket.as_raw_fd();
        let (uid, gid) = (errand.uid, errand.gid);
        let mut command = Command::new(program.path());
        command.arg0("stillpoint-agent").arg(WORKER_ARGUMENT).arg(kind).arg(socket.to_string());
        command.env_clear().current_dir("/");
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: the closure makes system calls only; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(move || become_user(uid, gid, socket)) };
        let worker = Self { child: Some(command.spawn()?), channel };
        channel::send(&worker.channel, &errand.order)?;
        Ok(worker)
    }

    pub(in crate::quiesce) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Has it go through one phase. After any error it is of no more use.
    /// # Errors
    /// When no answer came until the deadline, the run was aborted, or the worker is gone.
    pub(in crate::quiesce) fn ask(
        &mut self,
        phase: Phase,
        until: Instant,
        abort: &AtomicBool,
    ) -> Result<Answer, Lost> {
        let left = until.saturating_duration_since(Instant::now());
        let budget = left.saturating_sub(GRACE_MAX.min(left / 5));
        let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
        channel::send(&self.channel, &Request { phase, budget_ms }).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Lost::Ended,
            _ => Lost::Io(error),
        })?;
        let bounded = Bounded { stream: &self.channel, until, abort };
        match channel::receive(bounded) {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Lost::Ended),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::TimedOut => Lost::TimedOut,
                io::ErrorKind::ConnectionAborted => Lost::Aborted,
                io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => Lost::Ended,
                _ => Lost::Io(error),
            }),
        }
    }

    /// Lets it end by itself, which closes its session in good order; kills it if it does not.
    pub(in crate::quiesce) fn end(mut self, patience: Duration) {
        // A worker that is gone already cannot be told.
        let _told = self.channel.shutdown(Shutdown::Write).is_ok();
        if let Some(child) = &mut self.child
            && reaped(child, patience)
        {
            self.child = None;
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // Fails only if it was reaped, and then it is gone.
        let _killed = child.kill().is_ok();
        if !reaped(&mut child, REAP) {
            // It hangs in the kernel. A thread waits for it, so that no zombie stays; without a thread one does.
            let _thread = std::thread::Builder::new().stack_size(64 << 10).spawn(move || child.wait());
        }
    }
}

fn reaped(child: &mut Child, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) => return false,
            // An error here says that there is no such child.
            Ok(Some(_)) | Err(_) => return true,
        }
    }
}

/// A stream whose reads end at a deadline, however the bytes trickle, and when the run is aborted.
struct Bounded<'a> {
    stream: &'a UnixStream,
    until: Instant,
    abort: &'a AtomicBool,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        loop {
            if self.abort.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= self.until {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                other => return other,
            }
        }
    }
}

/// In the forked child: takes the application's rights and nothing more.
fn become_user(uid: u32, gid: u32, socket: i32) -> io::Result<()> {
    // The agent is spared by the kernel's out-of-memory killer; a worker has no such privilege.
    crate::oom::be_taken_like_others();
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls on values; each is async-signal-safe.
    unsafe {
        let _session = libc::setsid();
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::fcntl(socket, libc::F_SETFD, 0))?;
        if libc::geteuid() == 0 {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(gid, gid, gid))?;
            check(libc::setresuid(uid, uid, uid))?;
        } else if libc::geteuid() != uid {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
    }
    Ok(())
}
