//! The tests' own way into a guest: a stock agent on a port beside the one under test.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use guest_protocol::answers::{ExecStarted, ExecStatus};
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use vm::agent::{Agent, AgentError};

/// An emulated guest on a busy machine may take as long over one answer, and is still well.
pub(crate) const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// What a command in the guest left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit code, or 128 and the signal's number.
    pub code: i64,
    /// Standard output; bytes that are no UTF-8 are replaced.
    pub out: String,
    /// Standard error, likewise.
    pub err: String,
}

impl Output {
    /// The standard output of a command that must have succeeded.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, 0, "the command in the guest failed: {}{}", self.out, self.err);
        self.out
    }
}

/// One connection, kept: a port with nobody at the host's end makes a stock agent poll.
pub(crate) struct Harness {
    path: PathBuf,
    agent: Mutex<Option<Agent>>,
}

impl Harness {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, agent: Mutex::new(None) }
    }

    /// Waits until commands can be run.
    pub(crate) fn ready(&self, limit: Duration) -> Result<(), AgentError> {
        self.with_agent(limit, |_| Ok(()))
    }

    /// Runs a shell command and waits for its end.
    pub(crate) fn shell(&self, command: &str, limit: Duration) -> Result<Output, AgentError> {
        self.with_agent(ANSWER_TIME_MAX, |agent| shell(agent, command, limit))
    }

    /// Starts a shell command and leaves it running.
    pub(crate) fn start(&self, command: &str) -> Result<(), AgentError> {
        self.with_agent(ANSWER_TIME_MAX, |agent| start(agent, command, false).map(drop))
    }

    /// Asks for a power-off, and waits until QEMU closes the channel: success has no other answer.
    pub(crate) fn power_off(&self, limit: Duration) -> Result<(), AgentError> {
        self.with_agent(ANSWER_TIME_MAX, |agent| match agent.call::<Value>("guest-shutdown", None, limit) {
            Ok(_) | Err(AgentError::Io(_) | AgentError::Timeout { .. }) => Ok(()),
            Err(error) => Err(error),
        })
    }

    /// Whoever answered is gone: the next call waits for the next one.
    pub(crate) fn forget(&self) {
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn with_agent<T>(
        &self,
        limit: Duration,
        action: impl FnOnce(&mut Agent) -> Result<T, AgentError>,
    ) -> Result<T, AgentError> {
        // A test that panicked with the connection in hand does not keep the others from it: each call synchronizes.
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        if agent.is_none() {
            *agent = Some(Agent::connect(&self.path, limit)?);
        }
        match agent.as_mut() {
            Some(agent) => action(agent),
            None => Err(AgentError::Silent),
        }
    }
}

/// Runs a shell command through any agent with guest-exec: a twin's, for example.
///
/// # Errors
/// Those of the agent; after `Timeout` the command may still be running.
pub fn shell(agent: &mut Agent, command: &str, limit: Duration) -> Result<Output, AgentError> {
    let end = Instant::now() + limit;
    let pid = start(agent, command, true)?;
    let mut pause = Duration::from_millis(10);
    loop {
        let status: ExecStatus =
            agent.call("guest-exec-status", Some(json!({ "pid": pid })), ANSWER_TIME_MAX)?;
        if status.exited {
            let code = status.exitcode.or(status.signal.map(|signal| 128 + signal)).unwrap_or(-1);
            return Ok(Output { code, out: text(status.out_data), err: text(status.err_data) });
        }
        if Instant::now() >= end {
            return Err(AgentError::Timeout { command: command.to_owned(), limit });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

fn start(agent: &mut Agent, command: &str, capture: bool) -> Result<i64, AgentError> {
    let arguments = json!({ "path": "/bin/sh", "arg": ["-c", command], "capture-output": capture });
    let started: ExecStarted = agent.call("guest-exec", Some(arguments), ANSWER_TIME_MAX)?;
    Ok(started.pid)
}

fn text(data: Option<String>) -> String {
    let bytes = BASE64.decode(data.unwrap_or_default()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits until the agent behind a socket answers, and ends the connection again.
pub(crate) fn answers(socket: &Path, limit: Duration) -> io::Result<()> {
    Agent::connect(socket, limit).map(drop).map_err(io::Error::other)
}
