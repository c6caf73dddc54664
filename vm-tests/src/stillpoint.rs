//! The product as a user runs it: the program `stillpoint`, its repository and its state folder.

use crate::guest::Guest;
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use vm::agent::Agent;

/// How long one command may take. A full copy of an emulated guest's disks takes a minute on a busy machine.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a twin may take to end when asked.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// A repository with a state folder, both temporary.
#[derive(Clone, Debug)]
pub struct Stillpoint {
    program: PathBuf,
    folder: Arc<tempfile::TempDir>,
    state: String,
    /// The option that names the secret, and its file.
    secret: (&'static str, &'static str),
}

/// A guest without PostgreSQL whose writers work, and an empty repository; there it is `db1`.
///
/// # Panics
/// If the guest does not come so far.
#[must_use]
pub fn writing_guest() -> (Guest, Stillpoint) {
    const LIMIT: Duration = Duration::from_secs(30);
    let guest = Guest::builder().append("stillpoint.postgresql=off").start().expect("QEMU starts");
    println!("our agent after {:.1?}", guest.agent_ready(LIMIT));
    guest.booted(LIMIT);
    guest.start_writers();
    guest.writes_go_on(LIMIT);
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    stillpoint.register("db1", &guest.qmp_socket(), Some(&guest.agent_socket())).expect("registered");
    (guest, stillpoint)
}

/// Waits for something that comes soon, looking every few milliseconds.
///
/// # Panics
/// If it has not come within a minute.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit status.
    pub status: ExitStatus,
    /// The last object on standard output; null if there was none.
    pub object: Value,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// The object of a command that must have succeeded.
    ///
    /// # Errors
    /// What it printed, if it did not.
    pub fn success(self) -> Result<Value, String> {
        if self.status.success() { Ok(self.object) } else { Err(format!("{}\n{}", self.status, self.stderr)) }
    }

    /// Asserts a failure with this exit code, told in the three lines of every error, one of which holds `word`.
    ///
    /// # Panics
    /// If it ended otherwise.
    #[track_caller]
    pub fn assert_refused(&self, code: i32, word: &str) {
        assert_eq!(self.code(), code, "{self:?}");
        let lines: Vec<&str> = self.stderr.lines().collect();
        let starts = ["error: ", "  cause: ", "  to do: "];
        let three = lines.len() == 3 && lines.iter().zip(starts).all(|(line, start)| line.starts_with(start));
        assert!(three && self.stderr.contains(word), "{word}:\n{}", self.stderr);
    }

    /// The exit code; -1 after a signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

impl Stillpoint {
    /// Makes the folders and an empty repository.
    ///
    /// The program is the one named in `STILLPOINT_PROGRAM`, else the one built beside this test or demo.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn new() -> Result<Self, String> {
        Self::opened_by(("--passphrase-file", "passphrase"))
    }

    /// The same with a key file, which opens at once: a passphrase takes a second by design.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn with_key_file() -> Result<Self, String> {
        Self::opened_by(("--key-file", "key"))
    }

    fn opened_by(secret: (&'static str, &'static str)) -> Result<Self, String> {
        let program = program()?;
        let words = |error: io::Error| error.to_string();
        let folder = tempfile::Builder::new().prefix("stillpoint-host-").tempdir().map_err(words)?;
        // A twin runs as another user, who must be able to reach its own folder below.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711)).map_err(words)?;
        std::fs::write(folder.path().join("passphrase"), "correct horse battery staple\n").map_err(words)?;
        repository::create_key_file(&folder.path().join("key")).map_err(|error| error.to_string())?;
        let made = Self { program, folder: Arc::new(folder), state: "state".to_owned(), secret };
        made.run(&["init"])?.success()?;
        Ok(made)
    }

    /// The repository's folder.
    pub fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    /// The same repository, used with another state folder: another host.
    #[must_use]
    pub fn other_host(&self, state: &str) -> Self {
        Self { state: state.to_owned(), ..self.clone() }
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.path(&self.state)
    }

    /// A file or folder beside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program with its options, ready for a command's words.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            // The deduplication cache would stay behind in the tester's home.
            .env("XDG_CACHE_HOME", self.path("cache"))
            .args(words)
            .arg("--repo")
            .arg(self.repository())
            .arg("--state")
            .arg(self.state())
            .arg(self.secret.0)
            .arg(self.path(self.secret.1))
            .stdin(Stdio::null());
        command
    }

    /// Runs a command with `--json` to its end.
    ///
    /// # Errors
    /// If it cannot be run, or does not end in time.
    pub fn run(&self, words: &[&str]) -> Result<Ended, String> {
        self.start(words)?.wait()
    }

    /// Runs a command that must succeed, and prints how long it took.
    ///
    /// # Panics
    /// If it fails; shows what it printed.
    #[track_caller]
    pub fn must(&self, words: &[&str]) -> Value {
        let began = Instant::now();
        let object = self.run(words).and_then(Ended::success);
        println!("stillpoint {}: {:.1?}", words.join(" "), began.elapsed());
        object.unwrap_or_else(|printed| panic!("{words:?}: {printed}"))
    }

    /// Asserts that everything stored is sound, and that it is so many snapshots.
    ///
    /// # Panics
    /// If it is not.
    #[track_caller]
    pub fn assert_sound(&self, snapshots: usize) {
        let verified = self.must(&["verify"]);
        assert_eq!(
            (verified["snapshots"].as_u64(), verified["damage_total"].as_u64()),
            (Some(snapshots as u64), Some(0)),
            "{verified}"
        );
    }

    /// Starts a command with `--json` and lets it run.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn start(&self, words: &[&str]) -> Result<Running, String> {
        let mut command = self.command(words);
        command.arg("--json").stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| format!("{}: {error}", self.program.display()))?;
        Ok(Running(Some(child)))
    }

    /// Registers a guest, with its agent's channel or without.
    ///
    /// # Errors
    /// What it printed, if it failed.
    pub fn register(&self, name: &str, qmp: &Path, agent: Option<&Path>) -> Result<(), String> {
        let (qmp, agent) = (qmp.to_string_lossy(), agent.map(Path::to_string_lossy));
        let mut words = vec!["vm", "add", name, "--qmp", &qmp];
        words.extend(agent.iter().flat_map(|agent| ["--agent", agent]));
        self.run(&words)?.success().map(drop)
    }

    /// Runs a command and gives what a person would read.
    ///
    /// # Errors
    /// What it printed, if it failed.
    pub fn text(&self, words: &[&str]) -> Result<String, String> {
        let output = self.command(words).output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Boots a twin and waits until its agent answers.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn boot(&self, snapshot: &str, limit: Duration) -> Result<Twin, String> {
        let mut twin = self.start_twin(snapshot, limit)?;
        let socket = twin.said["agent"].as_str().unwrap_or_default().to_owned();
        match Agent::connect(Path::new(&socket), limit) {
            Ok(agent) => twin.agent = Some(agent),
            Err(error) => return Err(format!("the twin's agent: {error}")),
        }
        Ok(twin)
    }

    /// Boots a twin and waits until its QEMU runs.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn start_twin(&self, snapshot: &str, limit: Duration) -> Result<Twin, String> {
        let started = Instant::now();
        let mut command = self.command(&["boot", snapshot, "--json"]);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        let (send, first) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(stdout).read_line(&mut line);
            // The twin may have been given up meanwhile.
            let _ = send.send(read.map(|_| line));
        });
        let line = first.recv_timeout(limit).ok().and_then(Result::ok).unwrap_or_default();
        let Ok(said) = serde_json::from_str::<Value>(&line) else {
            let ended = end(child, Duration::from_secs(5));
            return Err(format!("the twin did not start: {line} {ended:?}"));
        };
        if said["event"] != "started" {
            return Err(format!("the twin did not start: {said}"));
        }
        Ok(Twin { child, agent: None, started, said })
    }
}

/// A command that runs; killed when dropped.
#[derive(Debug)]
pub struct Running(Option<Child>);

impl Running {
    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.0.as_ref().and_then(|child| i32::try_from(child.id()).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // Fails only if it has ended already, which its status will tell.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.0.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end in time; it is killed then.
    pub fn wait(mut self) -> Result<Ended, String> {
        end(self.0.take().ok_or("it was waited for already")?, COMMAND_TIMEOUT)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill(); // it may have ended this instant
            let _ = child.wait(); // reaps it
        }
    }
}

/// A twin, as long as its command runs; ended when dropped.
pub struct Twin {
    child: Child,
    agent: Option<Agent>,
    started: Instant,
    /// What `boot` said when it had started.
    pub said: Value,
}

impl Twin {
    /// Since the command was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Runs a shell command in the twin.
    ///
    /// # Errors
    /// What it printed, if it failed; or why it could not be run.
    pub fn exec(&mut self, command: &str, limit: Duration) -> Result<String, String> {
        let agent = self.agent.as_mut().ok_or("the twin's agent is gone")?;
        let output = agent.exec("/bin/sh", &["-c", command], limit).map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.succeeded() {
            return Ok(text);
        }
        Err(format!("{command}: {:?}: {text}{}", output.exit_code, String::from_utf8_lossy(&output.stderr)))
    }

    /// Runs a command again and again until it succeeds.
    ///
    /// # Errors
    /// What it said last, after `limit`.
    pub fn wait_for(&mut self, command: &str, limit: Duration) -> Result<String, String> {
        let end = Instant::now() + limit;
        loop {
            match self.exec(command, limit) {
                Ok(text) => return Ok(text),
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.agent = None;
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            // Fails only if it has ended already.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let limit = Instant::now() + END_TIMEOUT;
        while Instant::now() < limit && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill(); // it has ended, or ignores us
        let _ = self.child.wait(); // reaps it
    }
}

fn program() -> Result<PathBuf, String> {
    if let Some(program) = std::env::var_os("STILLPOINT_PROGRAM") {
        return Ok(program.into());
    }
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = own.ancestors().skip(1).take(2).map(|folder| folder.join("stillpoint"));
    beside.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        format!("no program `stillpoint` beside {}: build it with `cargo build --package cli`", own.display())
    })
}

/// Waits for a command's end; a hanging one is killed.
fn end(mut child: Child, limit: Duration) -> Result<Ended, String> {
    let drain = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut text)).map(|_| text).unwrap_or_default()
        })
    };
    let stdout = drain(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = drain(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill(); // it may have ended this instant
            let _ = child.wait(); // reaps it
            return Err(format!("the command did not end within {limit:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let stdout = text(stdout.join().unwrap_or_default());
    let object = stdout.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
    Ok(Ended { status, object, stderr: text(stderr.join().unwrap_or_default()) })
}
