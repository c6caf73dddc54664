//! The tests' own small client of a qemu-ga compatible agent: one request at a time, every wait bounded.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection to one agent's socket on the host.
///
/// QEMU serves one connection to a socket at a time: while this lives, another one to the same socket waits unanswered.
pub struct AgentClient {
    stream: BufReader<UnixStream>,
    sync: u64,
}

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
    #[must_use]
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, 0, "the command in the guest failed: {}{}", self.out, self.err);
        self.out
    }
}

impl AgentClient {
    /// Connects, without talking yet: the agent behind the socket may not run.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        // Answers of an earlier client may still be on their way: a number of our own tells them apart.
        let sync = u64::from(std::process::id()) << 16;
        Ok(Self { stream: BufReader::new(stream), sync })
    }

    /// Waits until the agent answers a `guest-sync` of ours, which also drops what an earlier client left behind.
    ///
    /// # Errors
    /// `TimedOut` if it does not within `limit`; those of the socket.
    pub fn ready(&mut self, limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        loop {
            self.sync += 1;
            let id = self.sync;
            self.send(&json!({ "execute": "guest-sync", "arguments": { "id": id } }))?;
            // An emulated guest may need seconds; asked again only so that a request lost with an ended agent is replaced.
            let patience = Instant::now() + Duration::from_secs(5);
            loop {
                match self.receive(patience.min(end)) {
                    Ok(answer) if answer["return"] == json!(id) => return Ok(()),
                    Ok(_of_an_earlier_client) => {}
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => break,
                    Err(error) => return Err(error),
                }
            }
            if Instant::now() >= end {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no agent answered within {limit:?}"),
                ));
            }
        }
    }

    /// One command, and what it returned.
    ///
    /// # Errors
    /// The agent's own error as `Other`; `TimedOut` if no answer came within `limit`; those of the socket.
    pub fn call(&mut self, command: &str, arguments: Value, limit: Duration) -> io::Result<Value> {
        self.send(&json!({ "execute": command, "arguments": arguments }))?;
        let mut answer = self.receive(Instant::now() + limit)?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(io::Error::other(format!("{command}: {}", answer["error"]["desc"]))),
        }
    }

    /// Runs a shell command in the guest and waits for its end.
    ///
    /// # Errors
    /// As [`AgentClient::call`]; after `TimedOut` the command may still be running.
    pub fn shell(&mut self, command: &str, limit: Duration) -> io::Result<Output> {
        let end = Instant::now() + limit;
        let pid = self.start(command, true)?;
        let text = |value: &Value| {
            let bytes = BASE64.decode(value.as_str().unwrap_or_default()).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let mut pause = Duration::from_millis(10);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let status = self.call("guest-exec-status", json!({ "pid": pid }), left)?;
            if status["exited"] == json!(true) {
                let code =
                    status["exitcode"].as_i64().or(status["signal"].as_i64().map(|signal| 128 + signal));
                return Ok(Output {
                    code: code.unwrap_or(-1),
                    out: text(&status["out-data"]),
                    err: text(&status["err-data"]),
                });
            }
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("still running after {limit:?}: {command}"),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(200));
        }
    }

    /// Starts a shell command in the guest and leaves it running; returns its pid there.
    ///
    /// # Errors
    /// As [`AgentClient::call`].
    pub fn start(&mut self, command: &str, capture: bool) -> io::Result<i64> {
        let arguments = json!({ "path": "/bin/sh", "arg": ["-c", command], "capture-output": capture });
        let started = self.call("guest-exec", arguments, Duration::from_secs(30))?;
        started["pid"].as_i64().ok_or_else(|| io::Error::other(format!("guest-exec answered {started}")))
    }

    /// Sends a request and waits for no answer: `guest-shutdown` gives none.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send(&mut self, request: &Value) -> io::Result<()> {
        let mut line = request.to_string();
        line.push('\n');
        let stream = self.stream.get_mut();
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(line.as_bytes())
    }

    /// The next line, as JSON; a part that came before the end stays buffered in the caller's next line.
    fn receive(&mut self, end: Instant) -> io::Result<Value> {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_mut().set_read_timeout(Some(left))?;
        let mut line = Vec::new();
        match self.stream.read_until(b'\n', &mut line) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed the agent's socket")),
            Ok(_) => Ok(serde_json::from_slice(line.trim_ascii())?),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the agent did not answer in time"))
            }
            Err(error) => Err(error),
        }
    }
}
