//! `guest-exec` and `guest-exec-status`.
//!
//! A program runs in a process group of its own; what it writes is read as it comes, kept up to a limit, and the
//! rest dropped. It counts as exited when it has exited and its output is complete. A grandchild that still holds the output
//! delays that by a moment at most, and what it writes later is read and dropped, so that it neither blocks nor dies of a
//! closed pipe.
//!
//! A host may give a program a time limit, kill its process group, and take its output while it runs.

mod output;
mod process;
mod spawn;
mod timer;

use crate::poll::Poll;
use crate::{errno, note};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest_protocol::Error;
use guest_protocol::answers::{ExecStarted, ExecStatus};
use guest_protocol::arguments::exec::{self as arguments, Exec, Kill};
use output::{Input, Kept, Output};
use process::Process;
use rustix::process::Signal;
use serde_json::Value;
use spawn::Spawned;
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use timer::Timer;

/// Most programs: running, ended and not asked for, or with a time limit that what they left running has to keep. The longest
/// ended make room for new ones, and their limits go with them.
const PROCESSES_MAX: usize = 256;
/// Most output kept of programs that have ended and were not asked for.
const ENDED_BYTES_MAX: usize = 64 << 20;
/// Most output kept of all programs together; beyond it each one's is cut as at its own limit.
const ALL_BYTES_MAX: usize = 128 << 20;
/// Token of the timer; programs count from 1.
const TIMER: u64 = 0;

/// All programs that were started.
#[derive(Debug)]
pub(super) struct Processes {
    poll: Rc<Poll>,
    send: Sender<Started>,
    receive: Receiver<Started>,
    serial: u64,
    processes: BTreeMap<u64, Process>,
    timer: Timer,
}

/// What a starting thread hands over.
#[derive(Debug)]
pub(super) struct Started {
    spawned: Spawned,
    input: Option<Vec<u8>>,
    output_bytes_max: usize,
    deadline: Option<Instant>,
}

impl Processes {
    pub(super) fn new(poll: Rc<Poll>) -> Processes {
        let (send, receive) = channel();
        Processes { poll, send, receive, serial: 0, processes: BTreeMap::new(), timer: Timer::default() }
    }

    /// For the thread that starts a program.
    pub(super) fn starter(&self) -> Sender<Started> {
        self.send.clone()
    }

    /// Whether another may be started: those that run hold pipes and a place in the table.
    pub(super) fn have_room(&self) -> bool {
        self.processes.values().filter(|process| process.runs()).count() < PROCESSES_MAX
    }

    /// What became of a program, after killing it if that is asked for. The end is told once.
    pub(super) fn status(&mut self, asked: arguments::ExecStatus) -> Result<ExecStatus, Error> {
        self.reap();
        let pid = asked.pid;
        // Of two with the same id the later one is meant: the first had ended when the kernel gave it anew.
        let mut newest_first = self.processes.values_mut().rev();
        let process = newest_first.find(|process| !process.is_over() && i64::from(process.id()) == pid);
        let process = process.ok_or_else(|| Error::generic(format!("PID {pid} does not exist")))?;
        if let Some(kill) = asked.kill {
            note!("guest-exec-status called, pid: {pid}, to kill its process group");
            process.kill(match kill {
                Kill::Term => Signal::TERM,
                Kill::Kill => Signal::KILL,
            });
        }
        let status = process.status();
        if status.is_none() && !asked.stream {
            return Ok(ExecStatus::default());
        }
        let [out, err] = [&mut process.out, &mut process.err].map(|output| output.as_mut().map(Output::take));
        let time_limit_reached = (status.is_some() && process.was_too_long()).then_some(true);
        if status.is_some() {
            process.told();
            // Not each time: hosts ask again and again, and would fill the system's log with it.
            note!("guest-exec-status called, pid: {pid}");
        }
        self.forget_done();
        let data = |taken: &Option<Kept>| {
            taken.as_ref().filter(|kept| !kept.bytes.is_empty()).map(|kept| STANDARD.encode(&kept.bytes))
        };
        let truncated = |taken: &Option<Kept>| taken.as_ref().filter(|kept| kept.truncated).map(|_| true);
        Ok(ExecStatus {
            exited: status.is_some(),
            exitcode: status.and_then(|status| status.code()).map(i64::from),
            signal: status.and_then(|status| status.signal()).map(i64::from),
            out_data: data(&out),
            err_data: data(&err),
            out_truncated: truncated(&out),
            err_truncated: truncated(&err),
            time_limit_reached,
        })
    }

    /// Takes up programs that were started and notes those that have ended.
    pub(super) fn reap(&mut self) {
        while let Ok(started) = self.receive.try_recv() {
            self.adopt(started);
        }
        let now = Instant::now();
        for process in self.processes.values_mut() {
            process.look(now);
        }
        self.make_room();
        self.set_timer();
    }

    /// One of the pipes can go on.
    pub(super) fn pipe_event(&mut self, token: u64) {
        if token == TIMER {
            return self.keep_to_limits();
        }
        let kept: usize = self.processes.values().map(Process::kept).sum();
        let room = ALL_BYTES_MAX.saturating_sub(kept);
        let Some(process) = self.processes.get_mut(&(token >> 2)) else { return };
        let (poll, token) = (&*self.poll, token | super::EXEC_TOKEN);
        match token & 3 {
            0 => {
                if process.input.as_mut().is_some_and(Input::write) {
                    process.input = None;
                }
            }
            1 => Output::event(process.out.as_mut(), room, poll, token),
            _ => Output::event(process.err.as_mut(), room, poll, token),
        }
        self.forget_done();
    }

    fn adopt(&mut self, started: Started) {
        self.serial += 1;
        let token = |stream: u64| super::EXEC_TOKEN | self.serial << 2 | stream;
        let Started { spawned, input, output_bytes_max, deadline } = started;
        let process = Process::new(spawned, input, output_bytes_max, deadline, &self.poll, token);
        self.processes.insert(self.serial, process);
    }

    /// Kills what takes too long.
    fn keep_to_limits(&mut self) {
        // One that has ended meanwhile is not to be blamed.
        self.reap();
        let now = Instant::now();
        for process in self.processes.values_mut() {
            process.keep_to_limit(now);
        }
        self.forget_done();
        self.set_timer();
    }

    fn set_timer(&mut self) {
        let next = self.processes.values().filter_map(Process::next_look).min();
        self.timer.set(next, &self.poll, super::EXEC_TOKEN | TIMER);
    }

    /// Forgets the ends that nobody asked for, oldest first, where they are too many or too large.
    fn make_room(&mut self) {
        let is_waiting = |process: &Process| !process.runs() && !process.is_over();
        let mut kept: usize =
            self.processes.values().filter(|process| is_waiting(process)).map(Process::kept).sum();
        let mut count = self.processes.len();
        for process in self.processes.values_mut().filter(|process| !process.runs()) {
            if count <= PROCESSES_MAX && kept <= ENDED_BYTES_MAX {
                break;
            }
            kept -= if process.is_over() { 0 } else { process.kept() };
            if count > PROCESSES_MAX {
                count -= 1;
                process.give_up();
            } else {
                process.forget_end();
            }
        }
        self.forget_done();
    }

    fn forget_done(&mut self) {
        self.processes.retain(|_, process| !process.is_done());
    }
}

/// Starts a program; runs in a thread of its own, since even looking for it may wait for a disk.
pub(super) fn start(exec: Exec, starter: &Sender<Started>) -> Result<Value, Error> {
    note!("guest-exec called: \"{}\"", [std::slice::from_ref(&exec.path), &exec.arg].concat().join(" "));
    let spawned = spawn::spawn(&exec).map_err(|error| {
        let (path, words) = (&exec.path, errno::words(&error));
        Error::generic(format!("Failed to execute child process \u{201C}{path}\u{201D} ({words})"))
    })?;
    let pid = i64::from(spawned.child.id());
    let started = Started {
        spawned,
        input: exec.input,
        output_bytes_max: exec.output_bytes_max,
        deadline: exec.time_limit.and_then(|limit: Duration| Instant::now().checked_add(limit)),
    };
    // The loop takes it up before it sends our answer, so the pid is known when the host asks for it.
    starter.send(started).map_err(|_| Error::generic("the agent is ending"))?;
    super::answer(&ExecStarted { pid })
}
