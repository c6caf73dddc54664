//! The serial line, with a pseudo-terminal in its place.

use crate::guest::{Agent, until};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Longest wait for an answer: the machine may be busy.
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
const PING: &[u8] = br#"{"execute":"guest-ping"}"#;

/// A host's end of a line, and a link to the guest's end.
struct Line {
    host: BufReader<File>,
    link: PathBuf,
}

impl Line {
    fn new(folder: &Path) -> Line {
        let host =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&host).and_then(|()| unlockpt(&host)).expect("a terminal");
        let name = ptsname(&host, Vec::new()).expect("a name");
        let link = folder.join("line");
        // The last one's, whose terminal is gone.
        let _removed = std::fs::remove_file(&link).is_ok();
        symlink(name.to_str().expect("plain"), &link).expect("a link");
        Line { host: BufReader::new(File::from(host)), link }
    }

    fn ask(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.host.get_mut().write_all(bytes).expect("there is room");
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            if self.host.buffer().is_empty() {
                let mut watched = [PollFd::new(self.host.get_ref(), PollFlags::IN)];
                let seen = poll(&mut watched, Some(&PATIENCE)).expect("a terminal");
                assert!(seen > 0, "no whole line: {}", String::from_utf8_lossy(&line));
            }
            let bytes = self.host.fill_buf().expect("a terminal");
            let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
            line.extend_from_slice(&bytes[..end]);
            self.host.consume(end);
        }
        line
    }

    fn agent(&self, arguments: &[&str]) -> Agent {
        let link = self.link.to_str().expect("plain");
        let agent = Agent::start_without_wait(&[&["-m", "isa-serial", "-p", link], arguments].concat());
        // What is said before the line is open is dropped, so it must be open first.
        until("the line is open", || {
            let open = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("it runs");
            let target = std::fs::canonicalize(&self.link).expect("a link");
            open.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|open| open == target))
        });
        // It is set up a moment after it is open, and speaks only when asked.
        std::thread::sleep(std::time::Duration::from_millis(300));
        agent
    }
}

#[test]
fn a_serial_line_carries_every_byte_and_no_echo() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut line = Line::new(folder.path());
    let _agent = line.agent(&[]);
    assert_eq!(
        line.ask(PING),
        b"{\"return\": {}}\n",
        "neither an echo before it nor a carriage return in it"
    );
    // Stop, interrupt, end of file and erase of a terminal that is not raw.
    let answer = line.ask(b"\x13\x03\x04\x7F\r");
    assert!(answer.starts_with(b"{\"error\""), "{}", String::from_utf8_lossy(&answer));
    let mut answers = Vec::new();
    let sync = b"\xFF{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":7}}";
    answers.push(line.ask(sync));
    while !answers.last().expect("one").ends_with(b"{\"return\": 7}\n") {
        answers.push(line.ask(b""));
    }
    assert_eq!(answers.last().expect("one"), b"\xFF{\"return\": 7}\n");
    assert_eq!(line.ask(PING), b"{\"return\": {}}\n");
}

#[test]
fn a_line_that_is_gone_ends_the_agent_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut line = Line::new(folder.path());
    let mut agent = line.agent(&[]);
    assert_eq!(line.ask(PING), b"{\"return\": {}}\n");
    drop(line);
    assert_eq!(agent.ends().code(), Some(0));
}

#[test]
fn a_line_that_is_gone_is_tried_again_where_that_is_wanted() {
    let folder = tempfile::tempdir().expect("a folder");
    let line = Line::new(folder.path());
    let mut agent = line.agent(&["-r"]);
    drop(line);
    until("it notices", || agent.log().contains(": warning: agent stopped unexpectedly, restarting..."));
    let mut line = Line::new(folder.path());
    until("it tries again", || agent.log().contains(": warning: waiting for channel path..."));
    assert!(agent.is_running());
    // It may have tried just before the new line was there; what is said before it is open is dropped.
    let target = std::fs::canonicalize(&line.link).expect("a link");
    until("the new line is open", || {
        let open = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("it runs");
        open.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|open| open == target))
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(line.ask(PING), b"{\"return\": {}}\n");
}

#[test]
fn d34_the_path_of_the_channel_may_be_a_symbolic_link() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut line = Line::new(folder.path());
    let second = folder.path().join("second");
    symlink(&line.link, &second).expect("a link to the link");
    line.link = second;
    let _agent = line.agent(&[]);
    assert_eq!(line.ask(PING), b"{\"return\": {}}\n");
}
