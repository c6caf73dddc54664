//! The agent in the background.

use crate::guest::until;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// A daemon of this test, killed at its end.
struct Daemon(Pid);

impl Daemon {
    fn of(pid_file: &Path) -> Daemon {
        Daemon(said(pid_file))
    }

    fn path(&self, of: &str) -> std::path::PathBuf {
        format!("/proc/{}/{of}", self.0.as_raw_nonzero()).into()
    }
}

fn said(pid_file: &Path) -> Pid {
    let text = std::fs::read_to_string(pid_file).expect("a pid file");
    let number = text.strip_suffix('\n').expect("a line").parse().expect("a number");
    Pid::from_raw(number).expect("not 0")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended, where the test went well.
        let _killed = kill_process(self.0, Signal::KILL).is_ok();
    }
}

fn start(folder: &Path, socket: &str) -> ExitStatus {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
    command.args(["-d", "-m", "unix-listen", "-t", ".", "-f", "pid", "-l", "log", "-p", socket]);
    // Output to files: a daemon that kept a pipe open would keep this test waiting for its end.
    let said = std::fs::File::create(folder.join("said")).expect("a file");
    command.stdin(Stdio::null()).stdout(said.try_clone().expect("a file")).stderr(said);
    command.current_dir(folder).status().expect("it runs")
}

#[test]
fn a_daemon_leaves_its_starter_and_says_where_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let pid_file = folder.path().join("pid");
    assert_eq!(start(folder.path(), "socket").code(), Some(0));
    // The starter is told when all is ready, so there is nothing to wait for.
    let daemon = Daemon::of(&pid_file);
    let mode = std::fs::metadata(&pid_file).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "mode {mode:o}");
    let stat = std::fs::read_to_string(daemon.path("stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let own = daemon.0.as_raw_nonzero().to_string();
    assert_eq!((fields[2], fields[3]), (&*own, &*own), "a session and a group of its own");
    assert_eq!(std::fs::read_link(daemon.path("cwd")).expect("it runs"), Path::new("/"));
    for fd in 0..3 {
        let open = std::fs::read_link(daemon.path(&format!("fd/{fd}"))).expect("open");
        assert_eq!(open, Path::new("/dev/null"), "descriptor {fd}");
    }
    let status = std::fs::read_to_string(daemon.path("status")).expect("it runs");
    assert!(status.contains("\nUmask:\t0077\n"), "{status}");
    assert!(folder.path().join("log").exists() && folder.path().join("qga.state").exists());

    let mut client = UnixStream::connect(folder.path().join("socket")).expect("it listens");
    client.write_all(br#"{"execute":"guest-ping"}"#).expect("it reads");
    let mut line = String::new();
    BufReader::new(client).read_line(&mut line).expect("an answer");
    assert_eq!(line, "{\"return\": {}}\n");

    let second = start(folder.path(), "other");
    let _also = second.success().then(|| Daemon::of(&pid_file));
    assert_eq!(second.code(), Some(1), "the starter is told");
    let log = std::fs::read_to_string(folder.path().join("log")).expect("a log");
    assert!(log.contains(": critical: Cannot lock pid file: "), "{log}");
    assert_eq!(said(&pid_file), daemon.0, "the file is still the first one's");

    kill_process(daemon.0, Signal::TERM).expect("it runs");
    until("the daemon ends", || test_kill_process(daemon.0).is_err());
    assert!(!pid_file.exists(), "removed at the end");
}

#[test]
fn a_daemon_that_was_killed_leaves_no_lock_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(start(folder.path(), "socket").code(), Some(0));
    let first = Daemon::of(&folder.path().join("pid"));
    kill_process(first.0, Signal::KILL).expect("it runs");
    until("the daemon is gone", || test_kill_process(first.0).is_err());
    assert_eq!(start(folder.path(), "socket").code(), Some(0));
    assert_ne!(Daemon::of(&folder.path().join("pid")).0, first.0);
}

#[test]
fn a_starter_hears_that_the_channel_cannot_be_had() {
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(start(folder.path(), "nope/socket").code(), Some(1));
    assert!(!folder.path().join("pid").exists());
    let log = std::fs::read_to_string(folder.path().join("log")).expect("a log");
    assert!(log.contains(": critical: cannot listen at "), "{log}");
}
