//! An agent that was started for one test, and clients that talk to it.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running agent with a folder of its own. It is killed when dropped.
pub(crate) struct Agent {
    child: Child,
    folder: tempfile::TempDir,
    command: Command,
}

impl Agent {
    pub(crate) fn start() -> Agent {
        Self::start_with(&[], &[])
    }

    pub(crate) fn start_with(arguments: &[&str], environment: &[(&str, &str)]) -> Agent {
        let agent = Agent::spawn(program(), arguments, environment);
        until("the agent listens", || UnixStream::connect(agent.socket()).is_ok());
        agent
    }

    /// One that is not expected at its socket.
    pub(crate) fn start_without_wait(arguments: &[&str]) -> Agent {
        Agent::spawn(program(), arguments, &[])
    }

    /// One whose start was prepared.
    pub(crate) fn start_as(command: Command, environment: &[(&str, &str)]) -> Agent {
        let agent = Agent::spawn(command, &[], environment);
        until("the agent listens", || UnixStream::connect(agent.socket()).is_ok());
        agent
    }

    fn spawn(mut command: Command, arguments: &[&str], environment: &[(&str, &str)]) -> Agent {
        let folder = tempfile::tempdir().expect("a folder");
        command
            .args(["-m", "unix-listen", "-v", "-p"])
            .arg(folder.path().join("agent.sock"))
            .arg("-t")
            .arg(folder.path())
            .arg("-l")
            .arg(folder.path().join("log"))
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null());
        let child = command.spawn().expect("the agent starts");
        Agent { child, folder, command }
    }

    /// Kills it and starts it again, with the same folder.
    pub(crate) fn restart(&mut self) {
        self.signal(rustix::process::Signal::KILL);
        self.ends();
        self.child = self.command.spawn().expect("the agent starts");
        until("the agent listens", || UnixStream::connect(self.socket()).is_ok());
    }

    /// Its state folder, which its log and its socket are in too.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// A line of its `/proc/PID/status`, in bytes.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kibibytes = line.expect("told").trim().trim_end_matches(" kB").parse::<u64>();
        kibibytes.expect("a number") << 10
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    pub(crate) fn log(&self) -> String {
        // It may not have come to it yet.
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(UnixStream::connect(self.socket()).expect("the agent listens"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("the agent runs");
    }

    pub(crate) fn ends(&mut self) -> ExitStatus {
        let mut status = None;
        until("the agent ends", || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        status.expect("just seen")
    }

    pub(crate) fn resident_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the agent runs");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("counted").to_owned();
        line.split_whitespace().nth(1).expect("a value").parse::<u64>().expect("a number") / 1024
    }

    /// Processor time used so far, in clock ticks.
    pub(crate) fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("the agent runs");
        let after_name = stat.rsplit_once(')').expect("a name").1;
        after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().expect("a number"))
            .sum()
    }
}

/// To be started by `Agent::start_as`.
pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"))
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.child.kill().is_ok();
        let _waited = self.child.wait().is_ok();
    }
}

/// Waits until something is so.
#[track_caller]
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A client of the agent.
pub(crate) struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    pub(crate) fn new(stream: UnixStream) -> Client {
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream.set_write_timeout(Some(PATIENCE)).expect("a time limit");
        Client { lines: BufReader::new(stream.try_clone().expect("a descriptor")), stream }
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("the agent reads");
    }

    /// Whether the agent took all of it.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Waits until there is something to read, and leaves it there.
    pub(crate) fn wait_for_something(&self) {
        let mut watched = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec::try_from(PATIENCE).expect("a time");
        let seen = rustix::event::poll(&mut watched, Some(&patience)).expect("a socket");
        assert!(seen > 0, "no answer in time");
    }

    /// The next line, without its newline.
    pub(crate) fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.lines.read_until(b'\n', &mut line).expect("the agent answers in time");
        assert_eq!(line.pop(), Some(b'\n'), "an answer ends with a newline");
        String::from_utf8_lossy(&line).into_owned()
    }

    /// Waits until the agent has written something, and reads none of it.
    pub(crate) fn wait_readable(&mut self) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let patience = Timespec::try_from(PATIENCE).expect("short");
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "the agent answers in time");
    }

    pub(crate) fn ask(&mut self, request: &str) -> String {
        self.send(request);
        self.line()
    }

    /// Calls a command and gives its `return`.
    #[track_caller]
    pub(crate) fn call(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.answer(command, arguments);
        answer.get("return").unwrap_or_else(|| panic!("{command}: {answer}")).clone()
    }

    /// Calls a command and gives its error's text.
    #[track_caller]
    pub(crate) fn error(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.answer(command, arguments);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    }

    fn answer(&mut self, command: &str, arguments: Value) -> Value {
        let request = serde_json::json!({"execute": command, "arguments": arguments});
        let line = self.ask(&request.to_string());
        serde_json::from_str(&line).expect("an answer is JSON")
    }

    pub(crate) fn close_input(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Write).expect("a socket");
    }

    /// Everything until the agent closes.
    pub(crate) fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("the agent closes in time");
        rest
    }

    /// Writes until the agent takes no more, never reading; gives how much it took.
    pub(crate) fn stuff(&mut self, request: &[u8]) -> usize {
        self.stream.set_nonblocking(true).expect("a socket");
        let mut taken = 0;
        let mut refused = 0;
        while refused < 20 {
            match self.stream.write(request) {
                Ok(bytes) => {
                    taken += bytes;
                    refused = 0;
                }
                Err(_) => {
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        taken
    }
}
