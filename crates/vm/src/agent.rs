//! A connection to the guest's agent, over the host's end of a virtio-serial port.
//!
//! Such a port is one channel without beginnings and ends: what an earlier program left in it is still there, and a
//! guest that does not answer now may answer later. So every conversation begins with a synchronization, and begins
//! again with one after any error; the call after a failed freeze is a thaw, and it must get through.

mod calls;
mod line;

pub use calls::{EXEC_OUTPUT_BYTES_MAX, ExecOutput, freeze_limit};
pub use line::{Line, Socket};

use crate::unix;
use guest_protocol::answers::Info;
use guest_protocol::client::{Event, LineTooLong};
use guest_protocol::stillpoint::{State, StatusReport};
use guest_protocol::{Class, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a call may take that waits for nothing in the guest.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A synchronization is sent again after this time: bytes sent while nobody in the guest has the port open are lost.
const SYNC_AGAIN: Duration = Duration::from_secs(1);

/// How long it may take to send what is sent ahead: the virtual CPUs stand still meanwhile.
const SEND_AHEAD_MAX: Duration = Duration::from_millis(100);

/// How long a raised cancel flag may stay unseen.
const CANCEL_LATENCY: Duration = Duration::from_millis(100);
/// How often an agent that is at work on a run is asked whether it still is: the answer of one that died never comes.
const LOOK_AFTER_RUN: Duration = Duration::from_secs(2);
/// Ours answers that at any time. One that has not for so long is dead, or the VM does not run.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Which agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours: freezes under a lease, quiesces applications, reports.
    Stillpoint,
    /// Another that speaks the same language, such as qemu-ga.
    Stock,
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket cannot be connected to.
    #[error("the agent socket {} cannot be connected to: {source}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Connected, but nobody in the guest answers; or another program holds the channel, which takes one at a time.
    #[error("no agent answers in the guest (or another program holds its channel)")]
    Silent,
    /// No answer in time. What the guest does about the call is not known.
    #[error("the agent did not answer {command} within {} ms", .limit.as_millis())]
    Timeout {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// The agent has no such command, or does not allow it (now).
    #[error("the agent does not offer {command}: {desc}")]
    NotOffered {
        /// The command.
        command: String,
        /// The agent's words.
        desc: String,
    },
    /// The agent refused or failed.
    #[error("the agent failed {command}: {desc}")]
    Failed {
        /// The command.
        command: String,
        /// The agent's words; ours begin with a stable code.
        desc: String,
    },
    /// The answer does not have the form that we know, or is larger than a guest may make it.
    #[error("the agent's answer to {command} is not understood: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The agent does not know of the run any more: it died, and another was started in its place.
    #[error("the agent was restarted while it carried out {command}")]
    Restarted {
        /// The command.
        command: String,
    },
    /// Someone wanted the wait to end. What the guest does about the call is not known.
    #[error("the wait for the agent's answer to {command} was interrupted")]
    Interrupted {
        /// The command.
        command: String,
    },
    /// The channel broke. The next call connects anew.
    #[error("the agent channel broke: {0}")]
    Io(#[source] io::Error),
}

impl From<LineTooLong> for AgentError {
    fn from(error: LineTooLong) -> Self {
        Self::Io(io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

/// What may end the wait for an answer before its time.
#[derive(Clone, Copy, Debug, Default)]
struct Unless<'a> {
    /// Someone raised this flag.
    cancel: Option<&'a AtomicBool>,
    /// The agent does not hold this run any more.
    run: Option<&'a str>,
}

/// A request that was sent before anybody waits for its answer.
#[derive(Debug)]
struct Ahead {
    request: u64,
    command: &'static str,
    arguments: Value,
}

/// A connection to the guest's agent. Errors do not end it: the next call synchronizes, and connects anew if it must.
#[derive(Debug)]
pub struct Agent<L = Socket> {
    line: L,
    client: Client,
    info: Info,
    kind: Kind,
    ahead: Option<Ahead>,
}

impl Agent {
    /// Connects, synchronizes, and asks what the agent can do.
    ///
    /// # Errors
    /// `Connect` if there is no channel, `Silent` if no agent answers in time, and those of a call.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, AgentError> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(|error| AgentError::Io(io::Error::other(error)))?;
        Self::over(Socket::new(path), u64::from_le_bytes(seed), limit)
    }
}

impl<L: Line> Agent<L> {
    /// The same over any line. The seed keeps this conversation's numbers apart from those of others.
    ///
    /// # Errors
    /// As `connect`.
    pub fn over(line: L, seed: u64, limit: Duration) -> Result<Self, AgentError> {
        let mut agent = Self {
            line,
            // JSON numbers are exact up to 2^53 with every reader.
            client: Client::new(seed >> 13),
            info: Info { version: String::new(), supported_commands: vec![] },
            kind: Kind::Stock,
            ahead: None,
        };
        agent.synchronize(agent.line.now() + limit)?;
        agent.info = agent.call_bounded("guest-info", None, limit, Unless::default())?;
        // While frozen commands are disabled, but listed.
        if agent.info.supported_commands.iter().any(|command| command.name == "stillpoint-freeze") {
            agent.kind = Kind::Stillpoint;
        }
        Ok(agent)
    }

    /// What the conversation stands on.
    pub fn line(&mut self) -> &mut L {
        &mut self.line
    }

    /// Which agent answers.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What the agent said of itself when the conversation began.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Calls a command.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn call<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        limit: Duration,
    ) -> Result<T, AgentError> {
        let answer = self.call_raw(command, arguments, limit, Unless::default())?;
        understand(command, answer)
    }

    /// Calls a command whose answer may take long; `cancel` ends the wait.
    fn call_unless<T: DeserializeOwned>(
        &mut self,
        command: &str,
        limit: Duration,
        cancel: &AtomicBool,
    ) -> Result<T, AgentError> {
        let answer = self.call_raw(command, None, limit, Unless { cancel: Some(cancel), run: None })?;
        understand(command, answer)
    }

    /// Calls one of our own commands.
    fn call_ours<A: Serialize, T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: &A,
        limit: Duration,
        unless: Unless<'_>,
    ) -> Result<T, AgentError> {
        let arguments = serde_json::to_value(arguments)
            .map_err(|error| AgentError::Answer { command: command.to_owned(), reason: error.to_string() })?;
        self.call_bounded(command, Some(arguments), limit, unless)
    }

    /// Calls a command whose answer is kept, or shown: within the limits of a report.
    fn call_bounded<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        limit: Duration,
        unless: Unless<'_>,
    ) -> Result<T, AgentError> {
        let mut answer = self.call_raw(command, arguments, limit, unless)?;
        calls::bound(&mut answer).map_err(|reason| AgentError::Answer {
            command: command.to_owned(),
            reason: reason.to_owned(),
        })?;
        understand(command, answer)
    }

    fn call_raw(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        limit: Duration,
        unless: Unless<'_>,
    ) -> Result<Value, AgentError> {
        let asked = self.line.now();
        let deadline = asked + limit;
        let mut ahead = self.ahead.take();
        if !self.line.is_connected() || !self.client.is_synchronized() {
            ahead = None;
            self.synchronize(deadline)?;
        }
        let sent =
            ahead.filter(|ahead| ahead.command == command && arguments.as_ref() == Some(&ahead.arguments));
        let request = match sent {
            Some(ahead) => Ok(ahead.request),
            None => self.ask(command, arguments, deadline),
        };
        let outcome = request.and_then(|request| self.await_answer(request, command, deadline, unless));
        let cancelled = unless.cancel.is_some_and(|cancel| cancel.load(Ordering::SeqCst));
        let failed = |desc| AgentError::Failed { command: command.to_owned(), desc };
        match outcome {
            Ok(Some(Ok(answer))) => Ok(answer),
            Ok(Some(Err(mut error))) => {
                calls::cut(&mut error.desc);
                Err(match error.class {
                    Class::CommandNotFound => {
                        AgentError::NotOffered { command: command.to_owned(), desc: error.desc }
                    }
                    Class::GenericError => failed(error.desc),
                })
            }
            Ok(None) => {
                // Begins the conversation afresh in the agent too: whatever it still owes us is dropped there.
                let resync = self.client.resync();
                let now = self.line.now();
                if self.send(&resync, now + CALL_TIMEOUT).is_err() {
                    self.line.hang_up();
                }
                let command = command.to_owned();
                Err(if cancelled {
                    AgentError::Interrupted { command }
                } else {
                    AgentError::Timeout { command, limit: limit.min(now.saturating_duration_since(asked)) }
                })
            }
            Err(error) => {
                self.line.hang_up();
                Err(error)
            }
        }
    }

    /// Sends a request whose answer the next call of the same will hear. Where nothing can be sent at once, that call sends it.
    fn send_ahead(&mut self, command: &'static str, arguments: Value) {
        self.ahead = None;
        if !self.line.is_connected() || !self.client.is_synchronized() {
            return;
        }
        match self.ask(command, Some(arguments.clone()), self.line.now() + SEND_AHEAD_MAX) {
            Ok(request) => self.ahead = Some(Ahead { request, command, arguments }),
            // Perhaps in the middle of it: the conversation begins anew.
            Err(_) => self.line.hang_up(),
        }
    }

    fn ask(&mut self, command: &str, arguments: Option<Value>, deadline: Instant) -> Result<u64, AgentError> {
        let (request, bytes) = self.client.request(command, arguments);
        self.send(&bytes, deadline).map(|()| request)
    }

    fn await_answer(
        &mut self,
        request: u64,
        command: &str,
        deadline: Instant,
        unless: Unless<'_>,
    ) -> Result<Option<Result<Value, guest_protocol::Error>>, AgentError> {
        let impatient = unless.cancel.is_some() || unless.run.is_some();
        let mut look = Look::new(self.line.now());
        loop {
            let until = if impatient { deadline.min(self.line.now() + CANCEL_LATENCY) } else { deadline };
            let Some(events) = self.receive(until)? else {
                let cancelled = unless.cancel.is_some_and(|cancel| cancel.load(Ordering::SeqCst));
                let now = self.line.now();
                if now >= deadline || cancelled || now.saturating_duration_since(look.heard) >= SILENCE_MAX {
                    return Ok(None);
                }
                if unless.run.is_some() && now.saturating_duration_since(look.asked) >= LOOK_AFTER_RUN {
                    self.client.give_up(look.request);
                    let bytes;
                    (look.request, bytes) = self.client.request("stillpoint-status", None);
                    look.asked = now;
                    self.send(&bytes, deadline)?;
                }
                if unless.run.is_none() {
                    look.heard = now; // an agent that cannot be asked may take all the time
                }
                continue;
            };
            for event in events {
                let Event::Answer { request: answered, result } = event else { continue };
                if answered == request {
                    return Ok(Some(result));
                }
                if answered == look.request && look.is_over(unless.run, result, self.line.now()) {
                    return Err(AgentError::Restarted { command: command.to_owned() });
                }
            }
        }
    }

    /// Connects if need be, and begins the conversation (afresh).
    fn synchronize(&mut self, deadline: Instant) -> Result<(), AgentError> {
        loop {
            if !self.line.is_connected() {
                self.line.connect(deadline).map_err(|error| {
                    if unix::is_timeout(&error) {
                        AgentError::Silent
                    } else {
                        AgentError::Connect { path: self.line.path().to_owned(), source: error }
                    }
                })?;
            }
            let again = deadline.min(self.line.now() + SYNC_AGAIN);
            let bytes = self.client.resync();
            let outcome = self.send(&bytes, deadline).and_then(|()| self.await_sync(again));
            match outcome {
                Ok(()) if self.client.is_synchronized() => return Ok(()),
                Ok(()) => (),
                Err(AgentError::Io(error)) if !unix::is_timeout(&error) => self.line.hang_up(),
                Err(AgentError::Io(_)) => (),
                Err(error) => return Err(error),
            }
            if self.line.now() >= deadline {
                return Err(AgentError::Silent);
            }
            if !self.line.is_connected() {
                self.line.pause(Duration::from_millis(50));
            }
        }
    }

    fn await_sync(&mut self, until: Instant) -> Result<(), AgentError> {
        while !self.client.is_synchronized() && self.receive(until)?.is_some() {}
        Ok(())
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), AgentError> {
        self.line.send(bytes, deadline).map_err(AgentError::Io)
    }

    /// Reads once; `None` at the deadline.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Vec<Event>>, AgentError> {
        let mut bytes = [0; 65536];
        match self.line.receive(&mut bytes, deadline) {
            Ok(0) => Err(AgentError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => Ok(Some(self.client.receive(&bytes[..count])?)),
            Err(error) if unix::is_timeout(&error) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(vec![])),
            Err(error) => Err(AgentError::Io(error)),
        }
    }
}

/// What is known of a run whose answer is awaited.
struct Look {
    /// The latest question about it, and when it was asked.
    request: u64,
    asked: Instant,
    /// When one was answered.
    heard: Instant,
    /// The latest answer said that nothing holds the guest.
    missed: bool,
}

impl Look {
    fn new(now: Instant) -> Self {
        Self { request: 0, asked: now, heard: now, missed: false }
    }

    /// Takes an answer. Believed when it comes twice: the answer to the run itself may be on its way.
    fn is_over(
        &mut self,
        run: Option<&str>,
        answer: Result<Value, guest_protocol::Error>,
        now: Instant,
    ) -> bool {
        self.heard = now;
        let status = answer.ok().and_then(|answer| serde_json::from_value::<StatusReport>(answer).ok());
        // An agent that may not say is believed to be at it.
        let holds = status.is_none_or(|status| status.state != State::Thawed && status.id.as_deref() == run);
        let over = !holds && self.missed;
        self.missed = !holds;
        over
    }
}

fn understand<T: DeserializeOwned>(command: &str, answer: Value) -> Result<T, AgentError> {
    serde_json::from_value(answer).map_err(|error| {
        // It may repeat what the guest sent.
        let mut reason = error.to_string();
        calls::cut(&mut reason);
        AgentError::Answer { command: command.to_owned(), reason }
    })
}
