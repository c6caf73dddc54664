//! A connection to QEMU's monitor.

use crate::unix::{self, Peer};
use qmp::command::{Command, QmpCapabilities};
use qmp::schema::{QueryQmpSchema, Schema};
use qmp::session::RequestId;
use qmp::{CommandError, Event, Greeting, Session, WireError};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long an ordinary command may take. `stop` flushes every disk; give such commands their own limit.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// A command that failed, or a connection that did.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The socket could not be connected to.
    #[error("the monitor socket {} cannot be connected to: {source}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Connected, but nothing greeted: QEMU serves one client at a time.
    #[error("nothing greets at {}: another program holds this monitor, or this is no monitor socket", .path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// QEMU closed the connection (or ended) before it answered.
    #[error("QEMU closed the monitor before it answered {command}")]
    Closed {
        /// The command.
        command: String,
    },
    /// No answer in time. The connection stays usable: a late answer is dropped.
    #[error("QEMU did not answer {command} within {} ms", .limit.as_millis())]
    Timeout {
        /// The command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// QEMU refused or failed the command.
    #[error("QEMU failed {command}: {error}")]
    Failed {
        /// The command.
        command: String,
        /// QEMU's words.
        error: CommandError,
    },
    /// The answer does not have the form that we know.
    #[error("QEMU's answer to {command} is not understood: {source}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// What arrived is not the monitor's protocol.
    #[error("this is not a QEMU monitor: {0}")]
    Wire(#[from] WireError),
    /// Reading or writing failed.
    #[error("the monitor connection broke: {0}")]
    Io(#[source] io::Error),
}

impl MonitorError {
    /// Nobody listens at the socket, or there is none: no QEMU is there.
    pub fn is_nobody(&self) -> bool {
        let gone = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
        matches!(self, Self::Connect { source, .. } if gone.contains(&source.kind()))
    }

    /// The connection is of no more use; QEMU may live on.
    pub fn is_broken(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Io(_) | Self::Wire(_))
    }
}

/// A command that was sent, and whose answer is still to be heard. QEMU carries out what it is sent in order, so several
/// may be.
#[derive(Debug)]
#[must_use = "whether the command succeeded is not known before its answer was heard"]
pub struct Asked<A> {
    id: RequestId,
    command: &'static str,
    answer: PhantomData<A>,
}

/// A connection to QEMU's monitor. One thread uses it at a time; every wait has a limit.
#[derive(Debug)]
pub struct Monitor {
    path: PathBuf,
    stream: UnixStream,
    session: Session,
    greeting: Greeting,
    peer: Option<Peer>,
}

impl Monitor {
    /// Connects and ends the negotiation.
    ///
    /// # Errors
    /// `Connect`, `Busy` and those of a command.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, MonitorError> {
        let deadline = Instant::now() + limit;
        let stream = unix::connect(path, deadline).map_err(|error| {
            let path = path.to_owned();
            if unix::is_timeout(&error) {
                MonitorError::Busy { path }
            } else {
                MonitorError::Connect { path, source: error }
            }
        })?;
        let peer = unix::peer(&stream).ok();
        let mut monitor = Self {
            path: path.to_owned(),
            stream,
            session: Session::new(),
            greeting: Greeting::default(),
            peer,
        };
        monitor.greeting = loop {
            if let Some(greeting) = monitor.session.greeting() {
                break greeting.clone();
            }
            if !monitor.receive(deadline, "the greeting")? {
                return Err(MonitorError::Busy { path: path.to_owned() });
            }
        };
        monitor.run_within(&QmpCapabilities {}, limit)?;
        Ok(monitor)
    }

    /// Connects anew after the connection broke. What became of the command that was under way is not known.
    ///
    /// # Errors
    /// As [`Monitor::connect`].
    pub fn reconnect(&mut self, limit: Duration) -> Result<(), MonitorError> {
        *self = Self::connect(&self.path.clone(), limit)?;
        Ok(())
    }

    /// What QEMU said first.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Who made the socket; normally QEMU itself.
    pub fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// A second handle to the connection's socket, for a program that may only write to it after our death.
    ///
    /// # Errors
    /// The kernel's.
    pub fn duplicate_socket(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Runs a command within [`COMMAND_TIMEOUT`].
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn run<C: Command>(&mut self, command: &C) -> Result<C::Answer, MonitorError> {
        self.run_within(command, COMMAND_TIMEOUT)
    }

    /// Runs a command within a limit.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn run_within<C: Command>(
        &mut self,
        command: &C,
        limit: Duration,
    ) -> Result<C::Answer, MonitorError> {
        let asked = self.ask(command)?;
        self.hear(asked, limit)
    }

    /// Sends a command, and does not wait for its answer.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn ask<C: Command>(&mut self, command: &C) -> Result<Asked<C::Answer>, MonitorError> {
        let (id, bytes) = self
            .session
            .request(command)
            .map_err(|source| MonitorError::Answer { command: C::NAME.to_owned(), source })?;
        self.send(&bytes, Instant::now() + COMMAND_TIMEOUT)?;
        Ok(Asked { id, command: C::NAME, answer: PhantomData })
    }

    /// Waits for the answer to a command that was sent, within a limit.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn hear<A: DeserializeOwned>(&mut self, asked: Asked<A>, limit: Duration) -> Result<A, MonitorError> {
        let answer = self.hear_raw(asked.id, asked.command, limit)?;
        serde_json::from_value(answer)
            .map_err(|source| MonitorError::Answer { command: asked.command.to_owned(), source })
    }

    /// Runs a command given as name and arguments.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn run_raw(&mut self, name: &str, arguments: &Value, limit: Duration) -> Result<Value, MonitorError> {
        let (id, bytes) = self.session.request_raw(name, arguments);
        self.send(&bytes, Instant::now() + limit)?;
        self.hear_raw(id, name, limit)
    }

    fn hear_raw(&mut self, id: RequestId, name: &str, limit: Duration) -> Result<Value, MonitorError> {
        match self.answer(id, name, Instant::now() + limit) {
            Ok(Some(Ok(answer))) => Ok(answer),
            Ok(Some(Err(error))) => Err(MonitorError::Failed { command: name.to_owned(), error }),
            Ok(None) => {
                self.session.abandon(id);
                Err(MonitorError::Timeout { command: name.to_owned(), limit })
            }
            Err(error) => Err(error),
        }
    }

    /// QEMU's schema.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn schema(&mut self) -> Result<Schema, MonitorError> {
        self.run(&QueryQmpSchema {}).map(Schema::new)
    }

    /// Takes whatever QEMU has said by now, without waiting for more, and forgets the events that fit. Whether there were any.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn has_told(&mut self, fits: impl Fn(&Event) -> bool) -> Result<bool, MonitorError> {
        let mut bytes = [0; 65536];
        loop {
            match rustix::net::recv(&self.stream, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(MonitorError::Closed { command: "an event".to_owned() }),
                Ok((_, count)) => self.session.receive(&bytes[..count])?,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(MonitorError::Io(error.into())),
            }
        }
        let mut has_told = false;
        while self.session.take_event_where(&fits).is_some() {
            has_told = true;
        }
        Ok(has_told)
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), MonitorError> {
        // A request is far smaller than the socket's buffer, so one limit for all of it is enough.
        let left = unix::time_left(deadline).map_err(MonitorError::Io)?;
        self.stream.set_write_timeout(Some(left)).map_err(MonitorError::Io)?;
        self.stream.write_all(bytes).map_err(MonitorError::Io)
    }

    fn answer(
        &mut self,
        id: RequestId,
        name: &str,
        deadline: Instant,
    ) -> Result<Option<Result<Value, CommandError>>, MonitorError> {
        loop {
            if let Some(answer) = self.session.take_answer(id) {
                return Ok(Some(answer));
            }
            if !self.receive(deadline, name)? {
                return Ok(None);
            }
        }
    }

    /// Reads once; `false` at the deadline.
    fn receive(&mut self, deadline: Instant, command: &str) -> Result<bool, MonitorError> {
        let Ok(left) = unix::time_left(deadline) else { return Ok(false) };
        self.stream.set_read_timeout(Some(left)).map_err(MonitorError::Io)?;
        let mut bytes = [0; 65536];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(MonitorError::Closed { command: command.to_owned() }),
            Ok(count) => {
                self.session.receive(&bytes[..count])?;
                Ok(true)
            }
            Err(error) if unix::is_timeout(&error) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                Err(MonitorError::Closed { command: command.to_owned() })
            }
            Err(error) => Err(MonitorError::Io(error)),
        }
    }
}
