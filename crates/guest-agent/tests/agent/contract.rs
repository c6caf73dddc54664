//! What a program that was made for qemu-ga relies on: started as `qemu-ga -m unix-listen -t DIR -p SOCK`, with next to no
//! environment, from any folder, and ended by SIGTERM.

use crate::guest::until;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The agent under qemu-ga's name. A link, not a copy: a copy that another test's child still has open does not start.
fn installed(folder: &Path) -> PathBuf {
    let program = folder.join("qemu-ga");
    if !program.exists() {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_stillpoint-agent"), &program).expect("a link");
    }
    program
}

fn command(folder: &Path) -> Command {
    let mut command = Command::new(installed(folder));
    command.args(["-m", "unix-listen", "-t"]).arg(folder).arg("-p").arg(folder.join("sock"));
    command.env_clear().stdin(Stdio::null());
    command
}

fn connect(socket: &Path) -> BufReader<UnixStream> {
    let mut stream = None;
    until("the agent listens", || {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    let stream = stream.expect("just seen");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
    BufReader::new(stream)
}

fn ask(client: &mut BufReader<UnixStream>, request: &str) -> Value {
    client.get_mut().write_all(request.as_bytes()).expect("the agent reads");
    let mut line = String::new();
    client.read_line(&mut line).expect("the agent answers");
    serde_json::from_str(&line).expect("JSON")
}

#[track_caller]
fn ends_well(mut child: Child) {
    rustix::process::kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    let mut status = None;
    until("it ends", || {
        status = child.try_wait().expect("a child");
        status.is_some()
    });
    assert_eq!(status.expect("just seen").code(), Some(0));
}

const PING: &str = r#"{"execute":"guest-ping"}"#;

#[test]
fn it_serves_from_any_folder_with_no_environment_and_ends_with_0() {
    let folder = tempfile::tempdir().expect("a folder");
    let gone = tempfile::tempdir().expect("a folder");
    for place in [Path::new("/"), folder.path(), Path::new("/proc"), gone.path()] {
        let mut command = command(folder.path());
        command.current_dir(place);
        if place == gone.path() {
            let place = place.to_owned();
            // SAFETY: a plain system call, on a path made before.
            unsafe {
                command.pre_exec(move || rustix::fs::rmdir(&place).map_err(Into::into));
            }
        }
        let child = command.spawn().expect("it starts");
        let mut client = connect(&folder.path().join("sock"));
        assert_eq!(ask(&mut client, PING), json!({"return": {}}), "from {}", place.display());
        assert_eq!(
            ask(&mut client, r#"{"execute":"guest-get-osinfo"}"#)["return"]["machine"],
            std::env::consts::ARCH
        );
        ends_well(child);
    }
    // It was removed by the child; the guard over it has nothing left to do.
    assert!(!gone.path().exists(), "the last one stood nowhere");
}

#[test]
fn paths_may_be_relative_and_words_that_are_no_options_are_passed_over() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("state")).expect("a folder");
    let child = Command::new(installed(folder.path()))
        .args([
            "word",
            "--method=unix-listen",
            "--statedir",
            "state",
            "--path",
            "./sock",
            "--verbose",
            "more",
        ])
        .current_dir(folder.path())
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let mut client = connect(&folder.path().join("sock"));
    assert_eq!(ask(&mut client, PING), json!({"return": {}}));
    ends_well(child);
}

#[test]
fn it_ends_with_0_whatever_its_clients_are_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let child = command(folder.path()).spawn().expect("it starts");
    let socket = folder.path().join("sock");
    let (mut half, mut silent, mut deaf) = (connect(&socket), connect(&socket), connect(&socket));
    half.get_mut().write_all(br#"{"execute": "guest-pi"#).expect("it reads");
    deaf.get_mut().write_all(PING.repeat(1000).as_bytes()).expect("it reads");
    assert_eq!(ask(&mut silent, PING), json!({"return": {}}));
    ends_well(child);
    let mut rest = String::new();
    assert_eq!(silent.read_line(&mut rest).expect("closed"), 0, "its clients are told");
}

#[test]
fn its_socket_stays_behind_and_the_next_one_takes_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("sock");
    for _ in 0..3 {
        let child = command(folder.path()).spawn().expect("it starts");
        let mut client = connect(&socket);
        assert_eq!(ask(&mut client, PING), json!({"return": {}}));
        ends_well(child);
        assert!(socket.exists());
    }
}

#[test]
fn programs_are_found_without_a_path_in_its_environment() {
    let folder = tempfile::tempdir().expect("a folder");
    let child = command(folder.path()).spawn().expect("it starts");
    let mut client = connect(&folder.path().join("sock"));
    let request = json!({"execute": "guest-exec", "arguments": {"path": "sh", "arg": ["-c", "exit 7"]}});
    let pid = ask(&mut client, &request.to_string())["return"]["pid"].clone();
    assert!(pid.is_i64(), "it was started");
    let request = json!({"execute": "guest-exec-status", "arguments": {"pid": pid}}).to_string();
    let mut status = Value::Null;
    until("it ends", || {
        status = ask(&mut client, &request)["return"].clone();
        status["exited"] == true
    });
    assert_eq!(status["exitcode"], 7);
    ends_well(child);
}

#[test]
fn standard_output_stays_empty_and_standard_error_too_unless_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = command(folder.path());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it starts");
    let mut client = connect(&folder.path().join("sock"));
    ask(&mut client, PING);
    ask(&mut client, "{]");
    drop(client);
    rustix::process::kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn a_thousand_clients_one_after_the_other_are_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let child = command(folder.path()).spawn().expect("it starts");
    let socket = folder.path().join("sock");
    connect(&socket);
    let open = || std::fs::read_dir(format!("/proc/{}/fd", child.id())).expect("it runs").count();
    let before = open();
    for number in 0..1000 {
        let mut client = connect(&socket);
        let sync = json!({"execute": "guest-sync", "arguments": {"id": number}}).to_string();
        assert_eq!(ask(&mut client, &sync), json!({"return": number}));
    }
    until("their descriptors are closed", || open() <= before);
    ends_well(child);
}
