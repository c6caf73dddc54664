//! `guest-exec` and `guest-exec-status`.
//!
//! A program runs in a process group of its own; what it writes is read as it comes, kept up to a limit, and the
//! rest dropped. It counts as exited when it has exited: a grandchild that still holds its output delays nothing,
//! and what that one writes later is read and dropped, so that it neither blocks nor dies of a closed pipe.

mod output;

use crate::poll::Poll;
use crate::{log, note};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest_protocol::Error;
use guest_protocol::answers::{ExecStarted, ExecStatus};
use guest_protocol::arguments::{Capture, Exec};
use output::{Input, Output};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Most programs, running or ended and not asked for; the longest ended make room for new ones.
const PROCESSES_MAX: usize = 256;
/// Most output kept of programs that have ended and were not asked for.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// All programs that were started.
#[derive(Debug)]
pub(super) struct Processes {
    poll: Rc<Poll>,
    send: Sender<Started>,
    receive: Receiver<Started>,
    serial: u64,
    processes: BTreeMap<u64, Process>,
}

/// What a starting thread hands over.
#[derive(Debug)]
pub(super) struct Started {
    child: Child,
    input: Option<(OwnedFd, Vec<u8>)>,
    out: Option<OwnedFd>,
    err: Option<OwnedFd>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    status: Option<ExitStatus>,
    /// Its end was told, or will never be asked for; only its pipes are still looked after.
    is_over: bool,
    input: Option<Input>,
    out: Option<Output>,
    err: Option<Output>,
}

impl Processes {
    pub(super) fn new(poll: Rc<Poll>) -> Processes {
        let (send, receive) = channel();
        Processes { poll, send, receive, serial: 0, processes: BTreeMap::new() }
    }

    /// For the thread that starts a program.
    pub(super) fn starter(&self) -> Sender<Started> {
        self.send.clone()
    }

    /// What became of the program with this process id. The end is told once.
    pub(super) fn status(&mut self, pid: i64) -> Result<ExecStatus, Error> {
        self.reap();
        // Of two with the same id the later one is meant: the first had ended when the kernel gave it anew.
        let mut newest_first = self.processes.values_mut().rev();
        let process = newest_first.find(|process| !process.is_over && i64::from(process.child.id()) == pid);
        let process = process.ok_or_else(|| Error::generic(format!("PID {pid} does not exist")))?;
        let Some(status) = process.status else { return Ok(ExecStatus::default()) };
        let out = process.out.as_mut().map(Output::take);
        let err = process.err.as_mut().map(Output::take);
        process.is_over = true;
        self.forget_closed();
        let data = |taken: &Option<output::Kept>| {
            taken.as_ref().filter(|kept| !kept.bytes.is_empty()).map(|kept| STANDARD.encode(&kept.bytes))
        };
        let truncated =
            |taken: &Option<output::Kept>| taken.as_ref().filter(|kept| kept.truncated).map(|_| true);
        Ok(ExecStatus {
            exited: true,
            exitcode: status.code().map(i64::from),
            signal: status.signal().map(i64::from),
            out_data: data(&out),
            err_data: data(&err),
            out_truncated: truncated(&out),
            err_truncated: truncated(&err),
        })
    }

    /// Takes up programs that were started and notes those that have ended.
    pub(super) fn reap(&mut self) {
        while let Ok(started) = self.receive.try_recv() {
            self.adopt(started);
        }
        for process in self.processes.values_mut().filter(|process| process.status.is_none()) {
            match process.child.try_wait() {
                Ok(None) => continue,
                Ok(Some(status)) => process.status = Some(status),
                Err(error) => {
                    log!(Error, "cannot wait for process {}: {error}", process.child.id());
                    process.status = Some(ExitStatus::from_raw(0xFF00));
                }
            }
            process.input = None;
            for output in [&mut process.out, &mut process.err].into_iter().flatten() {
                // What it wrote before it ended lies in the pipe; what comes later is not its own.
                output.drain();
                output.stop_keeping();
            }
        }
        self.make_room();
    }

    /// One of the pipes can go on.
    pub(super) fn pipe_event(&mut self, token: u64) {
        let Some(process) = self.processes.get_mut(&(token >> 2)) else { return };
        let (poll, token) = (&*self.poll, token | super::EXEC_TOKEN);
        match token & 3 {
            0 => {
                if process.input.as_mut().is_some_and(Input::write) {
                    process.input = None;
                }
            }
            1 => Output::event(process.out.as_mut(), poll, token),
            _ => Output::event(process.err.as_mut(), poll, token),
        }
        self.forget_closed();
    }

    fn adopt(&mut self, started: Started) {
        self.serial += 1;
        let token = |stream: u64| super::EXEC_TOKEN | self.serial << 2 | stream;
        let poll = &*self.poll;
        let process = Process {
            child: started.child,
            status: None,
            is_over: false,
            input: started.input.and_then(|(pipe, bytes)| Input::new(pipe, bytes, poll, token(0))),
            out: started.out.and_then(|pipe| Output::new(pipe, poll, token(1))),
            err: started.err.and_then(|pipe| Output::new(pipe, poll, token(2))),
        };
        self.processes.insert(self.serial, process);
    }

    /// Forgets the ends that nobody asked for, oldest first, where they are too many or too large.
    fn make_room(&mut self) {
        let is_waiting = |process: &Process| process.status.is_some() && !process.is_over;
        let mut kept: usize =
            self.processes.values().filter(|process| is_waiting(process)).map(Process::kept).sum();
        let mut count = self.processes.len();
        for process in self.processes.values_mut().filter(|process| process.status.is_some()) {
            if count <= PROCESSES_MAX && kept <= KEPT_BYTES_MAX {
                break;
            }
            kept -= if process.is_over { 0 } else { process.kept() };
            process.is_over = true;
            if count > PROCESSES_MAX {
                count -= 1;
                (process.out, process.err) = (None, None);
            }
        }
        self.forget_closed();
    }

    fn forget_closed(&mut self) {
        let is_open = |output: &Option<Output>| output.as_ref().is_some_and(Output::is_open);
        self.processes
            .retain(|_, process| !process.is_over || is_open(&process.out) || is_open(&process.err));
    }
}

impl Process {
    fn kept(&self) -> usize {
        [&self.out, &self.err].into_iter().flatten().map(Output::kept).sum()
    }
}

/// Starts a program; runs in a thread of its own, since even looking for it may wait for a disk.
pub(super) fn start(exec: &Exec, starter: &Sender<Started>) -> Result<Value, Error> {
    note!("guest-exec called: \"{}\"", [std::slice::from_ref(&exec.path), &exec.arg].concat().join(" "));
    let started = spawn(exec).map_err(|error| {
        let path = &exec.path;
        Error::generic(format!(
            "Failed to execute child process \u{201C}{path}\u{201D} ({})",
            without_number(&error)
        ))
    })?;
    let pid = i64::from(started.child.id());
    // The loop takes it up before it sends our answer, so the pid is known when the host asks for it.
    starter.send(started).map_err(|_| Error::generic("the agent is ending"))?;
    super::answer(&ExecStarted { pid })
}

fn spawn(exec: &Exec) -> io::Result<Started> {
    let program = find(&exec.path, exec.env.as_deref())?;
    let mut command = Command::new(&program);
    command.arg0(&exec.path).args(&exec.arg);
    match try_spawn(command, exec) {
        // A script without its interpreter's name is the shell's, as for execvp(3).
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            let mut command = Command::new("/bin/sh");
            command.arg(&program).args(&exec.arg);
            try_spawn(command, exec)
        }
        spawned => spawned,
    }
}

fn try_spawn(mut command: Command, exec: &Exec) -> io::Result<Started> {
    if let Some(env) = &exec.env {
        command.env_clear().envs(env.iter().filter_map(|entry| entry.split_once('=')));
    }
    let piped = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
    command.stdin(piped(exec.input.is_some()));
    command.stdout(piped(matches!(exec.capture, Capture::Stdout | Capture::Separated)));
    command.stderr(piped(matches!(exec.capture, Capture::Stderr | Capture::Separated)));
    let mut merged = None;
    if exec.capture == Capture::Merged {
        let (reader, writer) = io::pipe()?;
        command.stdout(writer.try_clone()?).stderr(writer);
        merged = Some(OwnedFd::from(reader));
    }
    // SAFETY: it makes plain system calls only, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            crate::oom::be_like_others();
            Ok(())
        });
    }
    // A signal meant for the agent's group, or one that the program sends to its own, stays where it belongs.
    let mut child = command.process_group(0).spawn()?;
    // With `command` the writing ends of a merged pipe are dropped, so that its end will be seen.
    drop(command);
    Ok(Started {
        input: child.stdin.take().map(OwnedFd::from).zip(exec.input.clone()),
        out: merged.or(child.stdout.take().map(OwnedFd::from)),
        err: child.stderr.take().map(OwnedFd::from),
        child,
    })
}

/// Looks in the `PATH` that the program will have, or else in the agent's.
fn find(path: &str, env: Option<&[String]>) -> io::Result<PathBuf> {
    if path.contains('/') {
        return Ok(path.into());
    }
    let own =
        env.into_iter().flatten().rev().find_map(|entry| entry.strip_prefix("PATH=").map(OsString::from));
    let places = own.or_else(|| std::env::var_os("PATH")).unwrap_or_else(|| "/bin:/usr/bin".into());
    let mut refused = io::Error::from_raw_os_error(libc::ENOENT);
    for place in std::env::split_paths(&places) {
        let candidate = place.join(path);
        match rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK) {
            Ok(()) if !Path::is_dir(&candidate) => return Ok(candidate),
            Err(rustix::io::Errno::ACCESS) => refused = io::Error::from_raw_os_error(libc::EACCES),
            _ => {}
        }
    }
    Err(refused)
}

/// The system's words alone, as C programs print them.
fn without_number(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
