//! The guard: a process that exists only during a run and thaws when the lease ends, when the agent is gone, and
//! when neither can do anything about it. An agent that hangs is ended by it, because as long as that lives its workers
//! hold what they quiesced; the agent that is started in its place undoes the rest.
//!
//! It is this program again, executed from a sealed copy in memory, not a fork: a fork of an agent with several
//! threads inherits locks that nobody will release, and every page of the agent besides. It is started and ready
//! before the first application is quiesced. It has open: its end of a socket to the agent, the ledger, a timer, and
//! a folder on each superblock. Its pages are locked, its threads (one for each superblock, because a FITHAW waits
//! for a FIFREEZE that is still in the kernel) are running, and signals that end an agent do not end it.
//!
//! On the socket, one byte each: to the guard `L` (a deadline in the ledger has changed) and `Q` (all is thawed,
//! end); from the guard `R` (ready), `L` (the timer is set) and `E` (the lease ended, all is thawed).
//! The socket's end is the agent's end.

use super::crew::thaw_until_settled;
use super::grace;
use super::kernel::boottime_ns;
use super::ledger::{Freeze, Ledger, Phase, Thaw};
use super::queue;
use crate::program::Program;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mm::MlockAllFlags;
use rustix::net::SendFlags;
use rustix::process::Signal;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Argument 0 of the guard, by which the program knows what to be.
const NAME: &str = "stillpoint-guard";
/// The program that runs.
const FILE: &str = "/proc/self/exe";
/// Longest wait until it is ready: it copies and starts one program.
pub const START_MAX: Duration = Duration::from_secs(10);
/// Longest wait until it has set its timer.
const ARM_MAX: Duration = Duration::from_secs(1);
/// Longest wait for its end, once told.
const END_MAX: Duration = Duration::from_secs(1);
/// How often a guard whose FITHAWs still wait looks for their end, in nanoseconds.
const LOOK_AGAIN_NS: u64 = 5_000_000;
/// How long an agent that took a thaw upon itself may take to do it, before the guard does it too: the agent may hang.
const AGENT_CLAIM_MAX: Duration = Duration::from_millis(250);
/// How long after the lease's end an agent that was not heard of may live. One that is well thaws at once, and says so.
const AGENT_LATE_NS: u64 = 5_000_000_000;
/// Stack of each thread.
const STACK_BYTES: usize = 64 << 10;

/// A line that is full has unread what would be said once more, or an end that hangs: nobody waits for it.
const WITHOUT_WAITING: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

const LEASE: u8 = b'L';
const QUIT: u8 = b'Q';
const READY: u8 = b'R';
const ENDED: u8 = b'E';

/// The agent's end of the guard.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    line: UnixStream,
}

impl Guard {
    /// Starts the guard and waits until it is ready.
    /// # Errors
    /// When it cannot be started or does not answer: then nothing may be frozen.
    pub fn start(ledger: &Ledger, folders: &[Arc<OwnedFd>]) -> io::Result<Self> {
        // Where programs in memory may not be executed (`vm.memfd_noexec`, some security modules), the file must do.
        let copy = Program::copy_of(Path::new(FILE))
            .and_then(|program| Self::start_from(&program.path(), ledger, folders));
        copy.or_else(|_| Self::start_from(FILE, ledger, folders))
    }

    fn start_from(program: &str, ledger: &Ledger, folders: &[Arc<OwnedFd>]) -> io::Result<Self> {
        let (line, theirs) = UnixStream::pair()?;
        let mut inherited: Vec<RawFd> = vec![theirs.as_raw_fd(), ledger.file().as_raw_fd()];
        inherited.extend(folders.iter().map(|folder| folder.as_raw_fd()));
        let mut command = Command::new(program);
        command.arg0(NAME).args(inherited.iter().map(RawFd::to_string)).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only `setsid` and `fcntl` are called, which are async-signal-safe, and
        // nothing is allocated. The descriptors stay open in the parent until `spawn` returns.
        unsafe {
            command.pre_exec(move || {
                // Its own session: a signal to the agent's process group does not reach it.
                rustix::process::setsid()?;
                for fd in &inherited {
                    fcntl_setfd(BorrowedFd::borrow_raw(*fd), FdFlags::empty())?;
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        // Or the agent itself would keep the socket open after the guard's death.
        drop(theirs);
        let mut guard = Self { child, line };
        match guard.hear(Instant::now() + START_MAX) {
            Some(READY) => Ok(guard),
            _ => {
                guard.end();
                Err(io::Error::other("the guard process did not become ready"))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has the guard look at the ledger's deadlines (the lease's end, when the agent is due), and waits until its timer
    /// is set.
    /// # Errors
    /// When the guard does not answer: then nothing may be frozen.
    pub fn arm(&mut self) -> io::Result<()> {
        self.renewed().ring();
        match self.hear(Instant::now() + ARM_MAX) {
            Some(LEASE) => Ok(()),
            _ => Err(io::Error::other("the guard process did not set its timer")),
        }
    }

    /// A bell for renewals, which other threads may ring.
    pub fn renewed(&self) -> Bell {
        Bell { line: self.line.try_clone().ok() }
    }

    /// To watch: readable when the guard says something or is dead.
    pub fn line(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }

    /// What the guard said, without waiting. `Dead` once it is gone.
    pub fn heard(&mut self) -> Heard {
        let mut bytes = [0u8; 64];
        match rustix::net::recv(&self.line, &mut bytes[..], rustix::net::RecvFlags::DONTWAIT) {
            Ok((0, _)) => Heard::Dead,
            Ok((length, _)) if bytes[..length].contains(&ENDED) => Heard::LeaseEnded,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Heard::Nothing,
            Err(_) => Heard::Dead,
        }
    }

    /// Ends it: everything is thawed.
    pub fn end(&mut self) {
        // One that is dead already has no use for it.
        let _told = rustix::net::send(&self.line, &[QUIT], WITHOUT_WAITING).is_ok();
        let deadline = Instant::now() + END_MAX;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
        // It hangs; a thread of it in the kernel may even outlast this, and is nobody's harm.
        let _killed = self.child.kill().is_ok();
        let _reaped = self.child.try_wait().is_ok();
    }

    fn hear(&mut self, deadline: Instant) -> Option<u8> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok()?;
        let mut watched = [PollFd::new(&self.line, PollFlags::IN)];
        // An interrupted wait counts as no answer; the caller then gives up the run, which is safe.
        if poll(&mut watched, Some(&timeout)).ok()? == 0 {
            return None;
        }
        let mut byte = [0u8; 1];
        match rustix::net::recv(&self.line, &mut byte[..], rustix::net::RecvFlags::DONTWAIT) {
            Ok((1, _)) => Some(byte[0]),
            _ => None,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the guard said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing of note.
    Nothing,
    /// It thawed everything at the end of the lease.
    LeaseEnded,
    /// It is gone.
    Dead,
}

/// Tells the guard that the deadline in the ledger has changed.
#[derive(Debug)]
pub struct Bell {
    line: Option<UnixStream>,
}

impl Bell {
    /// Rings. A guard that is gone is noticed elsewhere.
    pub fn ring(&self) {
        if let Some(line) = &self.line {
            let _rung = rustix::net::send(line, &[LEASE], WITHOUT_WAITING).is_ok();
        }
    }
}

/// Becomes the guard, and never returns, if this process was started as one. Call it first in `main`.
pub fn main_if_guard() {
    let mut arguments = std::env::args();
    if arguments.next().as_deref() != Some(NAME) {
        return;
    }
    let fds: Option<Vec<RawFd>> = arguments.map(|text| text.parse().ok()).collect();
    // Without its descriptors it can do nothing; the agent sees the socket's end and freezes nothing.
    let code = match fds {
        Some(fds) if fds.len() >= 2 => i32::from(watch(&fds).is_err()),
        _ => 2,
    };
    std::process::exit(code);
}

fn watch(fds: &[RawFd]) -> io::Result<()> {
    for signal in [
        Signal::TERM,
        Signal::INT,
        Signal::HUP,
        Signal::QUIT,
        Signal::USR1,
        Signal::USR2,
        Signal::PIPE,
        Signal::ALARM,
    ] {
        // SAFETY: SIG_IGN runs no code of ours.
        unsafe { libc::signal(signal.as_raw(), libc::SIG_IGN) };
    }
    close_all_but(fds);
    // SAFETY: the agent passed exactly these descriptors, open, and nothing else in this process owns them.
    let owned: Vec<OwnedFd> = fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
    let mut owned = owned.into_iter();
    let (Some(line), Some(file)) = (owned.next(), owned.next()) else { return Err(Errno::INVAL.into()) };
    let ledger = Arc::new(Ledger::attach(file)?);
    let folders: Vec<OwnedFd> = owned.collect();
    if folders.len() != ledger.count() {
        return Err(Errno::INVAL.into());
    }
    let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let watch =
        Arc::new(Watch { go: Mutex::new(false), gone: Condvar::new(), agent_gone: AtomicBool::new(false) });
    let mut threads = Vec::with_capacity(folders.len());
    for (at, folder) in folders.into_iter().enumerate() {
        let (watch, ledger) = (Arc::clone(&watch), Arc::clone(&ledger));
        threads.push(
            thread::Builder::new().stack_size(STACK_BYTES).spawn(move || watch.thaw(&folder, &ledger, at))?,
        );
    }
    // Best effort both: without the right to lock pages or to be spared, it is still a guard.
    let _locked = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).is_ok();
    let _spared = crate::oom::be_spared();
    say(&line, READY);

    let agent = rustix::process::getppid();
    let mut armed = true;
    let mut said_ended = false;
    let mut agent_ended = false;
    set_timer(&timer, next_look_ns(&ledger, armed, said_ended, agent_ended))?;
    loop {
        let mut watched = [PollFd::new(&line, PollFlags::IN), PollFd::new(&timer, PollFlags::IN)];
        match poll(&mut watched, None) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let spoken = !watched[0].revents().is_empty();
        // Renewed meanwhile: the bell will ring, or has; the timer is set again either way.
        if armed && ledger.end_of_lease(boottime_ns()) {
            armed = false;
            watch.release();
        }
        if !agent_ended && agent_due_ns(&ledger).is_some_and(|due_ns| boottime_ns() >= due_ns) {
            // Its socket closes when its last thread is out of the kernel, and then comes what follows any agent's end.
            agent_ended = true;
            end_agent(agent);
        }
        if !armed && !said_ended && threads.iter().all(thread::JoinHandle::is_finished) {
            say(&line, ENDED);
            said_ended = true;
            // An agent that lives does this itself, unless it hangs.
            grace::undo(Path::new(grace::SWITCH), &ledger);
            queue::undo(&ledger);
        }
        set_timer(&timer, next_look_ns(&ledger, armed, said_ended, agent_ended))?;
        if !spoken {
            continue;
        }
        let mut bytes = [0u8; 64];
        match rustix::io::read(&line, &mut bytes) {
            Ok(0) => break,
            Ok(length) => {
                if bytes[..length].contains(&QUIT) {
                    return Ok(());
                }
                if armed {
                    set_timer(&timer, next_look_ns(&ledger, armed, said_ended, agent_ended))?;
                    say(&line, LEASE);
                }
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            // The agent is gone with something of ours unread.
            Err(_) => break,
        }
    }
    // The agent's end. Whatever it was about to freeze, its threads have left the kernel: the socket closed after them.
    watch.agent_gone.store(true, SeqCst);
    ledger.end(Phase::AgentGone);
    watch.release();
    for thread in threads {
        // A panic in one thread must not keep the others from being waited for.
        let _joined = thread.join().is_ok();
    }
    grace::undo(Path::new(grace::SWITCH), &ledger);
    queue::undo(&ledger);
    Ok(())
}

/// When there is something to look at, in nanoseconds since boot; 0: never.
fn next_look_ns(ledger: &Ledger, armed: bool, said_ended: bool, agent_ended: bool) -> u64 {
    if !armed && !said_ended {
        // Some FITHAW still waits; look again soon, and listen meanwhile.
        return boottime_ns() + LOOK_AGAIN_NS;
    }
    let lease = armed.then(|| ledger.deadline_ns()).filter(|deadline_ns| *deadline_ns != 0);
    let agent = agent_due_ns(ledger).filter(|_| !agent_ended);
    lease.into_iter().chain(agent).min().unwrap_or(0)
}

/// By when the agent must have been heard of.
fn agent_due_ns(ledger: &Ledger) -> Option<u64> {
    let lease = Some(ledger.deadline_ns()).filter(|deadline_ns| *deadline_ns != 0);
    let said = Some(ledger.agent_due_ns()).filter(|due_ns| *due_ns != 0);
    lease.map(|deadline_ns| deadline_ns.saturating_add(AGENT_LATE_NS)).max(said)
}

/// Ends an agent that hangs.
fn end_agent(agent: Option<rustix::process::Pid>) {
    // A child whose parent has died has another one: the number is still the agent's own.
    if let Some(agent) = agent.filter(|agent| rustix::process::getppid() == Some(*agent)) {
        let _killed = rustix::process::kill_process(agent, Signal::KILL).is_ok(); // it may end this instant
    }
}

fn say(line: &OwnedFd, byte: u8) {
    // The agent may be gone; the next read tells.
    let _said = rustix::net::send(line, &[byte], WITHOUT_WAITING).is_ok();
}

fn set_timer(timer: &OwnedFd, deadline_ns: u64) -> io::Result<()> {
    let at = Timespec {
        tv_sec: i64::try_from(deadline_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(deadline_ns % 1_000_000_000).unwrap_or(0) as _,
    };
    let never = Timespec { tv_sec: 0, tv_nsec: 0 };
    timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval: never, it_value: at })?;
    Ok(())
}

/// What the agent forgot to close on exec would live on in the guard: a client's connection, a locked file.
fn close_all_but(fds: &[RawFd]) {
    let mut kept: Vec<u32> = fds.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.extend([0, 1, 2]);
    kept.sort_unstable();
    kept.dedup();
    kept.push(u32::MAX);
    for pair in kept.windows(2) {
        let (first, last) = (pair[0] + 1, pair[1] - 1);
        if first <= last {
            // SAFETY: nothing in this fresh process owns a descriptor in that range. Kernels before 5.9 refuse it;
            // then close-on-exec, which the agent sets everywhere, has to be enough.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// What the guard's threads wait for.
struct Watch {
    go: Mutex<bool>,
    gone: Condvar,
    agent_gone: AtomicBool,
}

impl Watch {
    fn release(&self) {
        *self.go.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.gone.notify_all();
    }

    fn thaw(&self, folder: &OwnedFd, ledger: &Ledger, at: usize) {
        let mut go = self.go.lock().unwrap_or_else(PoisonError::into_inner);
        while !*go {
            go = self.gone.wait(go).unwrap_or_else(PoisonError::into_inner);
        }
        drop(go);
        let gone = || self.agent_gone.load(SeqCst);
        if ledger.settled(at) {
            return;
        }
        // Taken by an agent that lives: it does it. By one that died or hangs: it may not have come to it.
        let patience = Instant::now() + AGENT_CLAIM_MAX;
        while !ledger.claim(at, Thaw::Guard, boottime_ns()) && !gone() && Instant::now() < patience {
            if ledger.settled(at) {
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
        thaw_until_settled(folder.as_fd(), ledger, at, || ledger.frozen(at) == Freeze::Called && !gone());
    }
}
