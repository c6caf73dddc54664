//! The program itself: how it starts, idles and ends.

use crate::guest::Agent;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::Write;
use std::process::Command;
use std::time::Duration;

#[test]
fn it_ends_well_when_told_to() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut agent = Agent::start();
        agent.signal(signal);
        assert_eq!(agent.ends().code(), Some(0), "{signal:?}");
    }
}

#[test]
fn d21_it_sleeps_while_nobody_talks() {
    let agent = Agent::start();
    let client = agent.client();
    let switches = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("the agent runs");
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"))
            .expect("counted")
            .to_owned();
        line.rsplit('\t').next().expect("a value").parse::<u64>().expect("a number")
    };
    std::thread::sleep(Duration::from_millis(300));
    let before = switches();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(switches(), before, "it woke up for nothing");
    drop(client);
}

#[test]
fn the_kernel_spares_it_when_memory_runs_out_and_not_what_it_starts() {
    let may =
        Command::new("sh").args(["-c", "echo -1000 >/proc/self/oom_score_adj"]).output().expect("a shell");
    if !may.status.success() {
        writeln!(std::io::stderr(), "SKIPPED: who runs this may not be spared").expect("a standard error");
        return;
    }
    let agent = Agent::start();
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.pid())).expect("it runs");
    assert_eq!(score.trim(), "-1000");
    let mut client = agent.client();
    let arguments = json!({"path": "cat", "arg": ["/proc/self/oom_score_adj"], "capture-output": true});
    let started = client.call("guest-exec", arguments);
    let mut status = Value::Null;
    crate::guest::until("it ends", || {
        status = client.call("guest-exec-status", started.clone());
        status["exited"] == true
    });
    assert_eq!(status["out-data"], "MAo=", "0 and a newline, in base64");
}

#[test]
fn a_second_start_takes_the_place_of_a_socket_left_behind() {
    let mut agent = Agent::start();
    agent.signal(Signal::KILL);
    agent.ends();
    assert!(agent.socket().exists());
    let mut again = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
    again
        .args(["-m", "unix-listen", "-p"])
        .arg(agent.socket())
        .arg("-t")
        .arg(agent.socket().parent().expect("a folder"));
    let mut child = again.spawn().expect("the agent starts");
    crate::guest::until("it listens", || std::os::unix::net::UnixStream::connect(agent.socket()).is_ok());
    child.kill().expect("it runs");
    child.wait().expect("it ended");
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut agent = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
    let folder = tempfile::tempdir().expect("a folder");
    agent.args(["-m", "unix-listen", "-t"]).arg(folder.path()).arg("-p").arg(file.path());
    let output = agent.output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(file.path().exists());
}

#[test]
fn the_command_line_answers_for_itself() {
    let run = |word: &str| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_stillpoint-agent")).arg(word).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, version) = run("-V");
    assert_eq!(code, Some(0));
    // The first line is what a stock agent says, and all of it.
    assert!(version.starts_with("QEMU Guest Agent 11.1.3\nstillpoint-agent "), "{version}");
    let (code, help) = run("--help");
    assert!(code == Some(0) && help.contains("--block-rpcs"), "{help}");
    let (code, names) = run("-b?");
    assert!(code == Some(0) && names.starts_with("guest-sync-delimited\nguest-sync\n"), "{names}");
    assert_eq!(run("-m").0, Some(1));
}

#[test]
fn a_missing_port_is_fatal_unless_it_is_to_be_waited_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
        command.arg("-t").arg(folder.path()).arg("-p").arg(folder.path().join("port"));
        command
    };
    assert_eq!(command().output().expect("it runs").status.code(), Some(1));
    let mut waiting = command().arg("-r").spawn().expect("it runs");
    std::thread::sleep(Duration::from_millis(500));
    assert!(waiting.try_wait().expect("a child").is_none());
    waiting.kill().expect("it runs");
    waiting.wait().expect("it ended");
}

#[test]
fn a_log_file_that_cannot_be_opened_is_fatal() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut agent = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
    agent.args(["-m", "unix-listen", "-l", "/nope/log", "-p"]).arg(folder.path().join("s"));
    let output = agent.arg("-t").arg(folder.path()).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("unable to open specified log file: No such file or directory"), "{said}");
}

#[test]
fn a_log_file_that_does_not_open_holds_up_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    // Opening a pipe without a reader waits, as opening a file on a frozen file system does.
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .expect("a pipe");
    let agent = Agent::start_with(&["-l", pipe.to_str().expect("a plain path")], &[]);
    assert_eq!(agent.client().ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
}

#[test]
fn its_socket_is_open_to_its_own_user_only() {
    use std::os::unix::fs::PermissionsExt;
    let agent = Agent::start();
    let mode = std::fs::metadata(agent.socket()).expect("it listens").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "mode {mode:o}");
}
