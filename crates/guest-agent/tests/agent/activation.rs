//! A listening socket that is passed by whoever starts the agent.

use crate::guest::{Client, until};
use crate::vsock;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts an agent with a socket as descriptor 3, as systemd does. `said` is how many it says that there are, and to whom.
fn start(socket: impl AsFd, said: &str, folder: &Path) -> Child {
    let mut command = Command::new("sh");
    // The shell's process id becomes the agent's.
    command.args(["-c", &format!("{said} exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_stillpoint-agent")]);
    command.args(["-m", "isa-serial", "-p", "/nope", "-v", "-t"]).arg(folder);
    command.stdin(Stdio::null()).stderr(std::fs::File::create(folder.join("said")).expect("a file"));
    let passed = socket.as_fd().as_raw_fd();
    // SAFETY: two plain system calls. The descriptor is open until `spawn` returns.
    unsafe {
        command.pre_exec(move || {
            if passed != 3 && libc::dup2(passed, 3) < 0 || libc::fcntl(3, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command.spawn().expect("it starts")
}

const ONE: &str = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=x";

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.0.kill().is_ok();
        let _waited = self.0.wait().is_ok();
    }
}

#[test]
fn a_unix_socket_that_is_passed_counts_more_than_method_and_path() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let _agent = Ended(start(&listener, ONE, folder.path()));
    drop(listener);
    let mut client = Client::new(UnixStream::connect(&path).expect("it listens"));
    assert_eq!(client.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
    // What the agent starts is told nothing of it.
    let started = client.call("guest-exec", json!({"path": "env", "capture-output": true}));
    let mut status = Value::Null;
    until("it ends", || {
        status = client.call("guest-exec-status", started.clone());
        status["exited"] == true
    });
    let environment = status["out-data"].as_str().unwrap_or_default();
    let names = std::str::from_utf8(&decoded(environment)).expect("text").to_owned();
    assert!(!names.contains("LISTEN_") && names.contains("PWD="), "{names}");
}

/// The agent's own decoder is not asked: this is about what it says.
fn decoded(base64: &str) -> Vec<u8> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(base64).expect("base64")
}

#[test]
fn a_vsock_socket_that_is_passed_is_served() {
    let Some(listener) = vsock::listener(vsock::PORT + 1) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut agent = Ended(start(&listener, ONE, folder.path()));
    let said = || std::fs::read_to_string(folder.path().join("said")).expect("a file");
    until("it serves, or says why not", || {
        folder.path().join("qga.state").exists() || agent.0.try_wait().expect("a child").is_some()
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(agent.0.try_wait().expect("a child").is_none(), "{}", said());
    drop(listener);
    let Some(mut client) = vsock::connect(vsock::PORT + 1) else { return };
    assert_eq!(client.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
}

#[test]
fn what_cannot_be_served_ends_the_start() {
    let listening = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (pair, _other) = UnixStream::pair().expect("a pair");
    let unix =
        || UnixListener::bind(tempfile::tempdir().expect("a folder").path().join("s")).expect("a socket");
    let two = "LISTEN_PID=$$ LISTEN_FDS=2";
    for (fd, said, words) in [
        (std::os::fd::OwnedFd::from(listening), ONE, "unsupported listen fd type"),
        (pair.into(), ONE, "unsupported listen fd type"),
        (unix().into(), two, "only one listening socket can be served"),
        // Meant for somebody else: `-m` and `-p` count.
        (unix().into(), "LISTEN_PID=1 LISTEN_FDS=1", "failed to open the channel"),
        (unix().into(), "LISTEN_FDS=1", "failed to open the channel"),
        (unix().into(), "LISTEN_PID=$$ LISTEN_FDS=0", "failed to open the channel"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut agent = Ended(start(fd, said, folder.path()));
        until("it ends", || agent.0.try_wait().expect("a child").is_some());
        let text = std::fs::read_to_string(folder.path().join("said")).expect("a file");
        assert_eq!(agent.0.wait().expect("a child").code(), Some(1), "{words}");
        assert!(text.contains(": critical: ") && text.contains(words), "{text}");
    }
}
