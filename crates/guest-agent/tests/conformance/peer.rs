//! One agent of the two, in a folder of its own, and the one connection that everything is said on.
//!
//! One connection for all streams: a stock agent counts the lines and columns of its parse errors over the life of its
//! channel, and so the positions can be compared too.

use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest wait for an answer: stock agents take seconds for the largest messages, on a loaded machine more.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(60);

/// What no agent here may do, root or not: set the clock, start the machine anew, load modules.
const RIGHTS_TAKEN: [libc::c_ulong; 3] = [
    25, // CAP_SYS_TIME
    22, // CAP_SYS_BOOT
    16, // CAP_SYS_MODULE
];

/// A line without its newline.
pub(crate) type Line = Vec<u8>;

/// A running agent.
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    child: Child,
    stream: UnixStream,
    lines: Receiver<Line>,
    markers: u64,
}

impl Peer {
    /// Starts an agent in `/NAME`, which becomes its state folder; it works in `/NAME/work`.
    pub(crate) fn start(name: &str, program: &[String], options: &[&str]) -> Peer {
        let folder = PathBuf::from("/").join(name);
        fs::create_dir_all(folder.join("work")).unwrap();
        let socket = folder.join("socket");
        let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]).args(["-m", "unix-listen", "-p"]).arg(&socket).arg("-t").arg(&folder);
        command.args(options).env_clear().env("PATH", "/bin").current_dir(folder.join("work"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: plain system calls in the single thread of the fresh child.
        unsafe {
            command.pre_exec(|| {
                libc::umask(0o022);
                for right in RIGHTS_TAKEN {
                    if libc::prctl(libc::PR_CAPBSET_DROP, right, 0, 0, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        // A stock agent serves the first connection alone, so this must be the one that stays.
        let begun = Instant::now();
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                break stream;
            }
            assert!(begun.elapsed() < ANSWER_MAX, "{name} does not listen: {}", log_of(&folder));
            std::thread::sleep(Duration::from_millis(10));
        };
        let lines = read_lines(stream.try_clone().unwrap());
        Peer { name: name.to_owned(), folder, child, stream, lines, markers: 0 }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        // An agent that has ended is noticed by its missing answers.
        let _sent = self.stream.write_all(bytes).is_ok();
    }

    /// The next line, if one comes in time.
    pub(crate) fn line(&mut self, at_most: Duration) -> Option<Line> {
        self.lines.recv_timeout(at_most).ok()
    }

    /// Everything that is answered to these pieces. A request for a command that nobody has marks the end: unlike a
    /// sync, it drops nothing that our agent still owes. Of `at_least` lines, those that come late are waited for.
    pub(crate) fn hear(&mut self, pieces: &[Vec<u8>], at_least: usize) -> Vec<Line> {
        for (index, piece) in pieces.iter().enumerate() {
            if index > 0 {
                // So that the piece before is read alone, now and then at least.
                std::thread::sleep(Duration::from_micros(100));
            }
            self.send(piece);
        }
        self.markers += 1;
        let marker = format!("marker-{}", self.markers);
        self.send(format!("{{\"execute\": \"{marker}\"}}").as_bytes());
        let mut heard = Vec::new();
        let end = format!("The command {marker} has not been found");
        loop {
            let Some(line) = self.line(ANSWER_MAX) else {
                panic!("{} fell silent after {}\n{}", self.name, shown(pieces), log_of(&self.folder))
            };
            if contains(&line, end.as_bytes()) {
                break;
            }
            heard.push(line);
        }
        while heard.len() < at_least
            && let Some(line) = self.line(Duration::from_secs(2))
        {
            heard.push(line);
        }
        heard
    }

    /// The answer to one request.
    pub(crate) fn answer(&mut self, command: &str, arguments: &Value) -> Value {
        self.send(format!("{}\n", json!({"execute": command, "arguments": arguments})).as_bytes());
        let line = self
            .line(ANSWER_MAX)
            .unwrap_or_else(|| panic!("{}: no answer to {command} {arguments}", self.name));
        serde_json::from_slice(&line).unwrap_or_else(|error| panic!("{}: {error}: {line:?}", self.name))
    }

    /// Names of the commands that it knows, last first.
    pub(crate) fn commands(&mut self) -> Vec<String> {
        let info = self.answer("guest-info", &json!({}));
        let commands = info["return"]["supported_commands"].as_array().unwrap();
        commands.iter().map(|command| command["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Tells it to end, and gives its exit code.
    pub(crate) fn end(mut self) -> Option<i32> {
        super::client::kill(i32::try_from(self.pid()).unwrap(), libc::SIGTERM);
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begun.elapsed() < ANSWER_MAX, "{} does not end", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A figure of `/proc/PID/status`, in the file's unit.
    pub(crate) fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.child.kill().is_ok();
        let _waited = self.child.wait().is_ok();
    }
}

fn read_lines(mut stream: UnixStream) -> Receiver<Line> {
    let (send, lines) = channel();
    std::thread::spawn(move || {
        let (mut buffer, mut line) = ([0; 1 << 16], Vec::new());
        while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
            for byte in &buffer[..bytes] {
                if *byte == b'\n' {
                    if send.send(std::mem::take(&mut line)).is_err() {
                        return;
                    }
                } else {
                    line.push(*byte);
                }
            }
        }
    });
    lines
}

fn log_of(folder: &Path) -> String {
    fs::read_to_string(folder.join("log")).unwrap_or_default()
}

/// Bytes as a person can read them, cut to a bounded length.
pub(crate) fn shown(pieces: &[Vec<u8>]) -> String {
    let bytes = pieces.concat();
    let text: String = bytes.iter().take(400).flat_map(|byte| byte.escape_ascii()).map(char::from).collect();
    format!(
        "{text}{} ({} bytes in {} pieces)",
        if bytes.len() > 400 { "…" } else { "" },
        bytes.len(),
        pieces.len()
    )
}

pub(crate) fn contains(line: &[u8], words: &[u8]) -> bool {
    line.windows(words.len()).any(|window| window == words)
}
