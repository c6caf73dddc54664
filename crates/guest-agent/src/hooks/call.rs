//! One call of a hook: started in a session of its own, read while it runs, ended when it takes too long.
//!
//! Its own end counts, not that of its children: one that holds a lock until the thaw, and the hook's output with it, is what
//! many hooks are for.

use super::Stop;
use super::output::Output;
use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::Ledger;
use guest_protocol::stillpoint::HookOutcome;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a hook that was told to end may take to let go of what it holds.
const TERM_MAX: Duration = Duration::from_secs(2);
/// How long a killed one may take to be gone; longer, and it hangs in the kernel.
const KILL_MAX: Duration = Duration::from_secs(1);
/// How much longer than its limit a call may take.
pub(super) const END_MAX: Duration = Duration::from_secs(3);
/// How often an end is looked for where the kernel cannot tell it (before Linux 5.3).
const LOOK: Duration = Duration::from_millis(10);
/// Most bytes read at a time, between two looks at the clock.
const TURN_BYTES: usize = 1 << 20;
/// How far a process's start, which the kernel tells in ticks, may lie before the call that started it.
const START_SLACK_NS: u64 = 1_000_000_000;

/// A call to be made.
pub(super) struct Call<'c> {
    pub(super) program: &'c Path,
    pub(super) verb: &'static str,
    /// The run's id, for the hook to know.
    pub(super) run: &'c str,
    pub(super) limit: Duration,
    pub(super) ledger: &'c Arc<Ledger>,
    /// Before the freeze only: the call after the thaw is made whatever happens.
    pub(super) stop: Option<Stop<'c>>,
}

/// What came of it.
pub(super) struct Ended {
    pub(super) outcome: HookOutcome,
    pub(super) status: Option<ExitStatus>,
    pub(super) took: Duration,
    pub(super) output: Output,
    /// Its output, where a child of it still has it open.
    pub(super) pipe: Option<OwnedFd>,
    /// Why it could not be started.
    pub(super) error: Option<String>,
}

impl Call<'_> {
    pub(super) fn make(&self) -> Ended {
        let begun = Instant::now();
        // Written before the process is there, so that whoever finds its number can tell it from a later one.
        self.ledger.note_hook_call(boottime_ns());
        let ended = match self.spawn() {
            Ok((child, pipe)) => self.attend(child, pipe, begun),
            Err(error) => {
                let words = error.to_string();
                let words = words.split(" (os error").next().unwrap_or_default().to_owned();
                Ended {
                    outcome: HookOutcome::NotStarted,
                    status: None,
                    took: begun.elapsed(),
                    output: Output::default(),
                    pipe: None,
                    error: Some(words),
                }
            }
        };
        self.ledger.note_hook_process(0);
        ended
    }

    fn spawn(&self) -> io::Result<(Child, OwnedFd)> {
        let mut command = Command::new(self.program);
        command.arg(self.verb);
        match self.try_spawn(command) {
            // A script without its interpreter's name is the shell's, as for execvp(3).
            Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
                let mut command = Command::new("/bin/sh");
                command.arg(self.program).arg(self.verb);
                self.try_spawn(command)
            }
            spawned => spawned,
        }
    }

    fn try_spawn(&self, mut command: Command) -> io::Result<(Child, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        rustix::io::ioctl_fionbio(&reader, true)?;
        command
            .env("STILLPOINT_RUN", self.run)
            .env("STILLPOINT_LIMIT_MS", self.limit.as_millis().to_string());
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let ledger = Arc::clone(self.ledger);
        let agent = rustix::process::getpid();
        let dies_with_agent = self.stop.is_some();
        // SAFETY: between fork and exec it makes plain system calls and a store to memory that parent and child share;
        // all of them are async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                rustix::process::setsid()?;
                crate::children::be_like_others();
                // By the child itself: an agent that dies right after the fork could not say it any more.
                ledger.note_hook_process(u64::from(libc::getpid().unsigned_abs()));
                if dies_with_agent {
                    // The next agent calls it with `thaw`; by then it must have stopped taking locks.
                    if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                    if rustix::process::getppid() != Some(agent) {
                        return Err(io::Error::from_raw_os_error(libc::ECANCELED));
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        // With `command` the writing ends are dropped, so that the output's end will be seen.
        drop(command);
        Ok((child, reader.into()))
    }

    /// Reads what it writes until it ends, and sees to it that it does.
    fn attend(&self, mut child: Child, pipe: OwnedFd, begun: Instant) -> Ended {
        let process = Pid::from_child(&child);
        let end = pidfd_open(process, PidfdFlags::empty()).ok();
        let mut output = Output::default();
        let mut pipe = Some(pipe);
        let mut ending: Option<Ending> = None;
        let mut status = None;
        loop {
            if pipe.as_ref().is_some_and(|pipe| read(pipe, &mut output) == Read::Closed) {
                pipe = None;
            }
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(ended)) => {
                    status = Some(ended);
                    break;
                }
                // There is no such child: nobody knows how it ended.
                Err(_) => break,
            }
            let now = Instant::now();
            let is_stopped = self.stop.is_some_and(|stop| (stop.is_stopped)());
            match &mut ending {
                None if is_stopped => ending = Some(Ending::begin(process, HookOutcome::Aborted)),
                None if begun.elapsed() >= self.limit => {
                    ending = Some(Ending::begin(process, HookOutcome::TimedOut));
                }
                Some(ending) if !ending.killed && now >= ending.next => ending.kill(process),
                Some(ending) if now >= ending.next => break,
                _ => {}
            }
            let until = ending.as_ref().map_or(begun + self.limit, |ending| ending.next);
            let mut left = until.saturating_duration_since(Instant::now());
            if end.is_none() {
                left = left.min(LOOK);
            }
            let mut watched = Vec::with_capacity(3);
            watched.extend(end.as_ref().map(|end| PollFd::new(end, PollFlags::IN)));
            watched.extend(pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            // Once it is being ended, that bell has been heard.
            let wake = self.stop.as_ref().filter(|_| ending.is_none()).map(|stop| stop.wake);
            watched.extend(wake.as_ref().map(|wake| PollFd::new(wake, PollFlags::IN)));
            // Interrupted or not: everything is looked at again.
            let _polled = poll(&mut watched, Timespec::try_from(left).ok().as_ref()).is_ok();
        }
        let outcome = match (ending, status) {
            (Some(ending), _) => {
                // What it started in the foreground ends with it.
                kill_all(process, Signal::KILL);
                if status.is_none() {
                    reap_later(child);
                }
                ending.outcome
            }
            (None, Some(status)) if status.success() => HookOutcome::Succeeded,
            (None, _) => HookOutcome::Failed,
        };
        // What it wrote before it ended lies in the pipe still.
        if pipe.as_ref().is_some_and(|pipe| read(pipe, &mut output) == Read::Closed) {
            pipe = None;
        }
        Ended { outcome, status, took: begun.elapsed(), output, pipe, error: None }
    }
}

/// A hook that is being ended.
struct Ending {
    outcome: HookOutcome,
    killed: bool,
    /// When the next, harder step is due.
    next: Instant,
}

impl Ending {
    fn begin(process: Pid, outcome: HookOutcome) -> Self {
        kill_all(process, Signal::TERM);
        Self { outcome, killed: false, next: Instant::now() + TERM_MAX }
    }

    fn kill(&mut self, process: Pid) {
        kill_all(process, Signal::KILL);
        (self.killed, self.next) = (true, Instant::now() + KILL_MAX);
    }
}

/// The whole group, which a session's first process leads.
fn kill_all(process: Pid, signal: Signal) {
    let _sent = kill_process_group(process, signal).is_ok(); // nobody may be left in it
}

/// One that hangs in the kernel is waited for by a thread, so that no zombie stays.
fn reap_later(mut child: Child) {
    // Without a thread a zombie does stay, and harms nobody.
    let _thread = std::thread::Builder::new().stack_size(64 << 10).spawn(move || child.wait());
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Read {
    /// There may be more later.
    Open,
    /// Nobody has it open any more.
    Closed,
}

fn read(pipe: impl AsFd, output: &mut Output) -> Read {
    let mut buffer = [0; 16 << 10];
    for _ in 0..TURN_BYTES / buffer.len() {
        match rustix::io::read(&pipe, &mut buffer) {
            Ok(0) => return Read::Closed,
            Ok(length) => output.take(&buffer[..length]),
            Err(Errno::INTR) => {}
            Err(_) => return Read::Open,
        }
    }
    Read::Open
}

/// Ends what a dead agent was calling: the hook and what it started, of which only the hook itself died with the agent.
pub(super) fn end_left(ledger: &Ledger) {
    let (process, called_ns) = (ledger.hook_process(), ledger.hook_called_ns());
    let Some(process) = i32::try_from(process).ok().filter(|process| *process > 1).and_then(Pid::from_raw)
    else {
        return;
    };
    ledger.note_hook_process(0);
    let began = called_ns.saturating_sub(START_SLACK_NS);
    let members = crate::quiesce::members_of_session(process.as_raw_nonzero().get().unsigned_abs());
    // As long as one of them lives, the kernel gives their session's number to nobody else; one that is older than the
    // call belongs to another session, whose number came round again.
    if members.iter().any(|started_ns| *started_ns >= began) && members.iter().all(|ns| *ns >= began) {
        kill_all(process, Signal::KILL);
    }
}
