//! The agent connection, against a real qemu-ga and against a scripted one that misbehaves.

#![expect(clippy::disallowed_methods, reason = "a test's own server has room in its queue")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm::agent::{Agent, AgentError, Kind};

const SHORT: Duration = Duration::from_millis(400);
/// A cancel flag that nobody raises.
static GO_ON: AtomicBool = AtomicBool::new(false);
const LONG: Duration = Duration::from_secs(10);

/// What the scripted agent does with a request.
enum Reply {
    Answer(Value),
    Error(guest_protocol::Error),
    /// Says nothing, ever.
    Nothing,
    /// Answers after a while, as one that was busy does.
    Late(Duration, Value),
    /// The other end of the channel closes.
    Close,
    /// Raw bytes instead of an answer.
    Bytes(Vec<u8>),
}

type Script = fn(&str, u32) -> Reply;

/// Serves one client after the other, as a chardev does, until the folder is gone.
struct Scripted {
    folder: tempfile::TempDir,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl Scripted {
    fn start(script: Script) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("agent")).unwrap();
        let thread = std::thread::spawn(move || {
            let mut seen = vec![];
            for connection in 0.. {
                let (stream, _) = listener.accept().unwrap();
                if serve(stream, script, connection, &mut seen) {
                    break;
                }
            }
            seen
        });
        Self { folder, thread: Some(thread) }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    /// The commands that were received, syncs left out.
    fn end(mut self) -> Vec<String> {
        UnixStream::connect(self.path()).unwrap().write_all(b"{\"execute\": \"test-end\"}\n").unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

fn serve(mut stream: UnixStream, script: Script, connection: u32, seen: &mut Vec<String>) -> bool {
    let mut bytes = [0; 4096];
    loop {
        let Ok(count @ 1..) = stream.read(&mut bytes) else { return false };
        // Our client writes whole lines, so a piece never ends within one here.
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        for line in text.split('\n').filter(|line| !line.is_empty()) {
            let clean = line.trim_start_matches('\u{FFFD}');
            let request: Value = serde_json::from_str(clean).unwrap();
            let name = request["execute"].as_str().unwrap().to_owned();
            if name == "test-end" {
                return true;
            }
            let mut answer = |result: &Value| {
                let mut line = json!({ "return": result });
                if let Some(id) = request.get("id") {
                    line["id"] = id.clone();
                }
                let mut bytes = if name == "guest-sync-delimited" { vec![0xFF] } else { vec![] };
                bytes.extend(line.to_string().into_bytes());
                bytes.push(b'\n');
                stream.write_all(&bytes).is_ok()
            };
            if name == "guest-sync-delimited" {
                answer(&request["arguments"]["id"]);
                continue;
            }
            seen.push(name.clone());
            match script(&name, connection) {
                Reply::Answer(value) => assert!(answer(&value)),
                Reply::Late(pause, value) => {
                    std::thread::sleep(pause);
                    answer(&value);
                }
                Reply::Nothing => (),
                Reply::Close => return false,
                Reply::Bytes(bytes) => {
                    if stream.write_all(&bytes).is_err() {
                        return false;
                    }
                }
                Reply::Error(error) => {
                    let line = json!({ "error": error, "id": request["id"] }).to_string() + "\n";
                    stream.write_all(line.as_bytes()).unwrap();
                }
            }
        }
    }
}

fn info(ours: bool) -> Reply {
    let name = if ours { "stillpoint-freeze" } else { "guest-fsfreeze-freeze" };
    Reply::Answer(json!({
        "version": "9.9.9", "new-member": 1,
        "supported_commands": [{ "enabled": false, "name": name, "success-response": true }],
    }))
}

fn thaw_report() -> Reply {
    Reply::Answer(json!({
        "id": "r1", "agent_version": "0.1.0", "boot_id": "b", "lease_ms": 1, "thawed_by": "host", "prepare_ms": 0,
        "quiesce_ms": 0, "flush_rounds_ms": [], "freeze_ms": 0, "frozen_ms": 0, "thaw_ms": 0, "filesystems": [],
        "applications": [], "uncovered": [], "unknown_writers": [], "reasons": [], "member_of_the_future": true,
    }))
}

fn freeze() -> guest_protocol::stillpoint::FreezeArguments {
    serde_json::from_value(json!({ "id": "r1", "lease_ms": 1000 })).unwrap()
}

fn thaw() -> guest_protocol::stillpoint::ThawArguments {
    guest_protocol::stillpoint::ThawArguments { id: "r1".into() }
}

#[test]
fn the_kind_of_agent_is_known_by_its_commands_even_while_they_are_disabled() {
    for ours in [true, false] {
        let scripted = Scripted::start(if ours { |_, _| info(true) } else { |_, _| info(false) });
        let agent = Agent::connect(&scripted.path(), LONG).unwrap();
        assert_eq!(agent.kind(), if ours { Kind::Stillpoint } else { Kind::Stock });
        drop(agent);
        scripted.end();
    }
}

#[test]
fn a_thaw_gets_through_after_a_call_that_was_never_answered() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "guest-get-osinfo" => Reply::Nothing,
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    let error = agent.call::<Value>("guest-get-osinfo", None, SHORT).unwrap_err();
    assert!(matches!(error, AgentError::Timeout { .. }), "{error}");
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    drop(agent);
    assert_eq!(scripted.end(), ["guest-info", "guest-get-osinfo", "stillpoint-thaw"]);
}

#[test]
fn a_wait_that_is_interrupted_ends_at_once_and_the_thaw_gets_through() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "stillpoint-freeze" => Reply::Nothing,
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    let cancel = AtomicBool::new(false);
    let began = Instant::now();
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(SHORT);
            cancel.store(true, Ordering::SeqCst);
        });
        agent.stillpoint_freeze(&freeze(), &cancel).unwrap_err()
    });
    assert!(matches!(error, AgentError::Interrupted { .. }), "{error}");
    assert!(began.elapsed() >= SHORT && began.elapsed() < Duration::from_secs(5));
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    drop(agent);
    scripted.end();
}

#[test]
fn a_late_answer_is_not_taken_for_that_of_the_next_call() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "guest-fsfreeze-freeze" => Reply::Late(Duration::from_millis(900), json!(7)),
        _ => Reply::Answer(json!(2)),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    assert!(matches!(agent.fsfreeze_freeze(SHORT, &GO_ON), Err(AgentError::Timeout { .. })));
    assert_eq!(agent.fsfreeze_thaw(LONG).unwrap(), 2);
    drop(agent);
    scripted.end();
}

#[test]
fn a_freeze_whose_agent_died_is_given_up_as_soon_as_the_next_one_answers() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "stillpoint-freeze" => Reply::Nothing,
        "stillpoint-status" => Reply::Answer(json!({ "state": "thawed" })),
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    let began = Instant::now();
    let error = agent.stillpoint_freeze(&freeze(), &GO_ON).unwrap_err();
    assert!(matches!(error, AgentError::Restarted { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    drop(agent);
    let asked =
        ["guest-info", "stillpoint-freeze", "stillpoint-status", "stillpoint-status", "stillpoint-thaw"];
    assert_eq!(scripted.end(), asked);
}

#[test]
fn a_freeze_that_takes_long_is_waited_for_while_the_agent_holds_the_run() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "stillpoint-freeze" => Reply::Nothing,
        // What was asked for comes behind the second look.
        "stillpoint-status" => Reply::Answer(json!({ "state": "quiescing", "id": "r1" })),
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    let cancel = std::sync::Arc::new(AtomicBool::new(false));
    let later = std::sync::Arc::clone(&cancel);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(7));
        later.store(true, Ordering::SeqCst);
    });
    let error = agent.stillpoint_freeze(&freeze(), &cancel).unwrap_err();
    assert!(matches!(error, AgentError::Interrupted { .. }), "{error}");
    drop(agent);
    let seen = scripted.end();
    assert!(seen.iter().filter(|name| *name == "stillpoint-status").count() >= 2, "{seen:?}");
}

#[test]
fn a_channel_that_closes_in_the_middle_is_connected_anew_for_the_thaw() {
    let scripted = Scripted::start(|name, connection| match (name, connection) {
        ("guest-info", _) => info(true),
        ("stillpoint-freeze", 0) => Reply::Close,
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    assert!(matches!(agent.stillpoint_freeze(&freeze(), &GO_ON), Err(AgentError::Io(_))));
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    drop(agent);
    assert_eq!(scripted.end(), ["guest-info", "stillpoint-freeze", "stillpoint-thaw"]);
}

#[test]
fn a_thaw_that_was_sent_ahead_is_answered_to_the_call_that_follows() {
    let scripted = Scripted::start(|name, _| if name == "guest-info" { info(true) } else { thaw_report() });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    agent.send_thaw_ahead(&thaw());
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1", "and may be repeated");
    drop(agent);
    assert_eq!(
        scripted.end(),
        ["guest-info", "stillpoint-thaw", "stillpoint-thaw"],
        "sent once for each call"
    );
}

#[test]
fn a_thaw_that_was_sent_ahead_is_sent_again_if_its_channel_closes() {
    let scripted = Scripted::start(|name, connection| match (name, connection) {
        ("guest-info", _) => info(true),
        (_, 0) => Reply::Close,
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    agent.send_thaw_ahead(&thaw());
    assert!(matches!(agent.stillpoint_thaw(&thaw(), LONG), Err(AgentError::Io(_))));
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    drop(agent);
    assert_eq!(scripted.end(), ["guest-info", "stillpoint-thaw", "stillpoint-thaw"]);
}

#[test]
fn another_call_does_not_take_the_answer_to_a_thaw_that_was_sent_ahead() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "guest-fsfreeze-status" => Reply::Answer(json!("frozen")),
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    agent.send_thaw_ahead(&thaw());
    assert!(agent.fsfreeze_is_frozen().unwrap());
    assert_eq!(agent.stillpoint_thaw(&thaw(), LONG).unwrap().id, "r1");
    drop(agent);
    scripted.end();
}

#[test]
fn an_error_of_the_agent_leaves_the_channel_usable() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        "stillpoint-freeze" => Reply::Error(guest_protocol::Error::generic("budget_exceeded: too slow")),
        "guest-fsfreeze-status" => Reply::Error(guest_protocol::Error::not_found("guest-fsfreeze-status")),
        _ => thaw_report(),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    let error = agent.stillpoint_freeze(&freeze(), &GO_ON).unwrap_err();
    assert!(
        matches!(&error, AgentError::Failed { desc, .. } if desc.starts_with("budget_exceeded:")),
        "{error}"
    );
    assert!(matches!(agent.fsfreeze_is_frozen(), Err(AgentError::NotOffered { .. })));
    agent.stillpoint_thaw(&thaw(), LONG).unwrap();
    drop(agent);
    scripted.end();
}

#[test]
fn a_guest_that_sends_an_endless_line_is_cut_off() {
    let scripted = Scripted::start(|name, _| match name {
        "guest-info" => info(true),
        _ => Reply::Bytes(vec![b'x'; (16 << 20) + 2]),
    });
    let mut agent = Agent::connect(&scripted.path(), LONG).unwrap();
    let error = agent.call::<Value>("guest-get-osinfo", None, LONG).unwrap_err();
    assert!(matches!(error, AgentError::Io(_)), "{error}");
    drop(agent);
    scripted.end();
}

#[test]
fn a_guest_without_agent_and_a_missing_socket_are_told_apart_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let error = Agent::connect(&folder.path().join("none"), SHORT).unwrap_err();
    assert!(matches!(error, AgentError::Connect { .. }), "{error}");
    let _listener = UnixListener::bind(folder.path().join("silent")).unwrap();
    let error = Agent::connect(&folder.path().join("silent"), SHORT).unwrap_err();
    assert!(matches!(error, AgentError::Silent), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// A stock qemu-ga of the distribution on a unix socket. It is never asked to freeze anything.
struct StockAgent {
    child: Child,
    folder: tempfile::TempDir,
}

impl StockAgent {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let child = Command::new("/usr/sbin/qemu-ga")
            .args(["-m", "unix-listen", "-p", &path("agent"), "-t", &path(""), "-f", &path("pid")])
            .args(["-b", "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-shutdown,guest-fstrim"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-ga (package qemu-guest-agent) is needed");
        Self { child, folder }
    }
}

impl Drop for StockAgent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn a_real_qemu_ga_is_understood() {
    let stock = StockAgent::start();
    let path = stock.folder.path().join("agent");
    let deadline = Instant::now() + LONG;
    let mut agent = loop {
        match Agent::connect(&path, LONG) {
            Ok(agent) => break agent,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    assert_eq!(agent.kind(), Kind::Stock);
    assert!(agent.info().has("guest-exec") && !agent.info().has("guest-fsfreeze-freeze"));
    agent.ping().unwrap();
    assert!(agent.osinfo().unwrap().kernel_release.is_some());
    assert!(!agent.fsfreeze_is_frozen().unwrap());
    let output = agent.exec("/bin/sh", &["-c", "echo out; echo err >&2; exit 3"], LONG).unwrap();
    assert_eq!(
        (output.exit_code, &output.stdout[..], &output.stderr[..]),
        (Some(3), &b"out\n"[..], &b"err\n"[..])
    );
    assert!(!output.succeeded());
    let error = agent.exec("/bin/sleep", &["5"], SHORT).unwrap_err();
    assert!(matches!(error, AgentError::Timeout { .. }), "{error}");
    assert!(matches!(agent.fsfreeze_freeze(LONG, &GO_ON), Err(AgentError::NotOffered { .. })));
    assert!(matches!(agent.stillpoint_status(), Err(AgentError::NotOffered { .. })));
    // An unfinished request that an earlier program left in the channel does not spoil the conversation.
    drop(agent);
    UnixStream::connect(&path).unwrap().write_all(b"{\"execute\": \"guest-").unwrap();
    Agent::connect(&path, LONG).unwrap().ping().unwrap();
}
