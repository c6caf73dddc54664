//! One started program: its own process (the leader), the process group that it leads, and its pipes.
//!
//! A leader that has ended stays a zombie for as long as its group may have to be killed: so long the kernel gives the
//! group's id to nobody else.

use super::output::{Input, Output};
use super::spawn::Spawned;
use crate::log;
use crate::poll::Poll;
use crate::quiesce::group_has_others;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, waitid};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

/// How long after a program's end what helpers of its own still write (`exec > >(tee log)`) counts as its output. They
/// need a moment to read the rest and end; who holds a pipe for longer is a service that the program left behind.
pub(super) const TAIL: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// The group, while its id is nobody else's: until the leader is reaped.
    group: Option<Pid>,
    end: Option<End>,
    /// Its end was told, or will never be asked for; only its pipes and its time limit are still looked after.
    is_over: bool,
    /// When the group is killed.
    deadline: Option<Instant>,
    /// The leader was killed because of that.
    was_too_long: bool,
    pub(super) input: Option<Input>,
    pub(super) out: Option<Output>,
    pub(super) err: Option<Output>,
}

/// The leader's end.
#[derive(Clone, Copy, Debug)]
struct End {
    status: ExitStatus,
    /// Until then its output is waited for; `None` when nothing more is kept.
    tail_until: Option<Instant>,
}

impl Process {
    /// `token` names the events of a stream: 0 what it reads, 1 and 2 what it writes.
    pub(super) fn new(
        Spawned { child, input, out, err }: Spawned,
        bytes: Option<Vec<u8>>,
        output_bytes_max: usize,
        deadline: Option<Instant>,
        poll: &Poll,
        token: impl Fn(u64) -> u64,
    ) -> Process {
        let output = |pipe, stream| Output::new(pipe, output_bytes_max, poll, token(stream));
        Process {
            group: Some(Pid::from_child(&child)),
            child,
            end: None,
            is_over: false,
            deadline,
            was_too_long: false,
            input: input.zip(bytes).and_then(|(pipe, bytes)| Input::new(pipe, bytes, poll, token(0))),
            out: out.and_then(|pipe| output(pipe, 1)),
            err: err.and_then(|pipe| output(pipe, 2)),
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The leader runs.
    pub(super) fn runs(&self) -> bool {
        self.end.is_none()
    }

    /// How it ended, once all of its output is here.
    pub(super) fn status(&self) -> Option<ExitStatus> {
        self.end.filter(|end| end.tail_until.is_none()).map(|end| end.status)
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// It ended because of its time limit.
    pub(super) fn was_too_long(&self) -> bool {
        self.was_too_long
    }

    /// When to look at it though nothing happens: at its time limit, or when its tail is waited for no longer.
    pub(super) fn next_look(&self) -> Option<Instant> {
        [self.deadline, self.end.and_then(|end| end.tail_until)].into_iter().flatten().min()
    }

    /// Notes what has become of it.
    pub(super) fn look(&mut self, now: Instant) {
        let is_new = self.end.is_none();
        if is_new {
            self.end = self.look_for_end(now);
        }
        let Some(End { tail_until: Some(tail_until), .. }) = self.end else { return };
        let is_last = now >= tail_until;
        self.input = None;
        let mut is_complete = true;
        for output in [&mut self.out, &mut self.err].into_iter().flatten() {
            if is_new || is_last {
                // What was written before lies in the pipe, and mostly the end of the stream behind it. In between events
                // tell, which heed what there is room for.
                output.drain();
            }
            if is_last {
                output.stop_keeping();
            }
            is_complete &= !output.is_open();
        }
        if let Some(end) = &mut self.end
            && (is_complete || is_last)
        {
            end.tail_until = None;
        }
    }

    /// Without reaping it.
    fn look_for_end(&mut self, now: Instant) -> Option<End> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = match waitid(WaitId::Pid(Pid::from_child(&self.child)), options) {
            Ok(None) => return None,
            Ok(Some(status)) => exit_status(&status),
            Err(error) => {
                log!(Error, "cannot wait for process {}: {error}", self.id());
                (self.group, self.deadline) = (None, None);
                ExitStatus::from_raw(0xFF00)
            }
        };
        // Where the clock cannot be added to, nothing is waited for.
        Some(End { status, tail_until: Some(now.checked_add(TAIL).unwrap_or(now)) })
    }

    /// Sends a signal to all of its group, also where the leader has ended.
    pub(super) fn kill(&self, signal: Signal) {
        if let Some(group) = self.group
            && let Err(error) = kill_process_group(group, signal)
        {
            log!(Error, "cannot kill process group {}: {error}", self.id());
        }
    }

    /// Kills its group if its time is over.
    pub(super) fn keep_to_limit(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.deadline = None;
        // A leader that has ended meanwhile is not to be blamed for what it left running.
        self.was_too_long = self.runs();
        log!(Info, "process group {} has reached its time limit", self.id());
        self.kill(Signal::KILL);
    }

    /// Its end was told: now only what it left running matters, if it has a time limit.
    pub(super) fn told(&mut self) {
        self.is_over = true;
        if self.deadline.is_some() && !group_has_others(self.id()) {
            self.deadline = None;
        }
    }

    /// Nobody will ask for its end, and there is no room to keep anything of it.
    pub(super) fn give_up(&mut self) {
        (self.is_over, self.deadline, self.out, self.err) = (true, None, None, None);
    }

    /// Nobody will ask for its end or its output.
    pub(super) fn forget_end(&mut self) {
        self.is_over = true;
        for output in [&mut self.out, &mut self.err].into_iter().flatten() {
            output.stop_keeping();
            drop(output.take());
        }
    }

    /// Whether nothing is left to be done. Reaps the leader as soon as its group is no longer of interest.
    pub(super) fn is_done(&mut self) -> bool {
        if !self.is_over || self.deadline.is_some() {
            return false;
        }
        if self.group.take().is_some() {
            // It has ended, so this waits for nothing.
            let _reaped = self.child.try_wait().is_ok();
        }
        let is_open = |output: &Option<Output>| output.as_ref().is_some_and(Output::is_open);
        !is_open(&self.out) && !is_open(&self.err)
    }

    /// Bytes of its output that are kept.
    pub(super) fn kept(&self) -> usize {
        [&self.out, &self.err].into_iter().flatten().map(Output::kept).sum()
    }
}

fn exit_status(status: &WaitIdStatus) -> ExitStatus {
    // As wait(2) would pack them.
    let code = status.exit_status().map_or(0, |code| (code & 0xFF) << 8);
    ExitStatus::from_raw(status.terminating_signal().unwrap_or(code))
}
