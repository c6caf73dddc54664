//! What the commands answer.

use crate::guest::{Agent, Client, until};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::time::Duration;

#[track_caller]
fn run(client: &mut Client, arguments: Value) -> Value {
    let pid = client.call("guest-exec", arguments)["pid"].clone();
    let mut status = Value::Null;
    until("the program ends", || {
        status = client.call("guest-exec-status", json!({"pid": pid}));
        status["exited"] == true
    });
    for name in ["out-data", "err-data"] {
        if let Some(data) = status[name].as_str() {
            let bytes = STANDARD.decode(data).expect("base64");
            status[name] = String::from_utf8_lossy(&bytes).into_owned().into();
        }
    }
    status
}

fn shell(script: &str, capture: Value) -> Value {
    json!({"path": "/bin/sh", "arg": ["-c", script], "capture-output": capture})
}

#[test]
fn ping_and_sync_answer_as_qemu_ga_does() {
    let agent = Agent::start();
    let mut client = agent.client();
    assert_eq!(client.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
    assert_eq!(
        client.ask(r#"{'execute':'guest-sync','arguments':{'id':7},"id":[1]}"#),
        r#"{"return": 7, "id": [1]}"#
    );
    let delimited = client.ask(r#"{"execute":"guest-sync-delimited","arguments":{"id":8}}"#);
    assert_eq!(delimited, "\u{FFFD}{\"return\": 8}");
}

#[test]
fn info_lists_our_commands_beside_qemu_gas_last_first() {
    let agent = Agent::start();
    let info = agent.client().call("guest-info", json!({}));
    assert_eq!(info["version"], "11.1.3");
    let commands = info["supported_commands"].as_array().expect("a list");
    let names: Vec<_> = commands.iter().map(|command| command["name"].as_str().expect("a name")).collect();
    assert_eq!(names.first(), Some(&"stillpoint-status"));
    assert_eq!(names.last(), Some(&"guest-sync-delimited"));
    let shutdown = commands.iter().find(|command| command["name"] == "guest-shutdown").expect("listed");
    assert_eq!(*shutdown, json!({"enabled": true, "name": "guest-shutdown", "success-response": false}));
}

#[test]
fn blocked_commands_are_refused_and_shown_as_disabled() {
    let agent = Agent::start_with(&["-b", "guest-ping,stillpoint-freeze"], &[]);
    let mut client = agent.client();
    let refused = "Command guest-ping has been disabled: the command is not allowed";
    assert_eq!(client.error("guest-ping", json!({})), refused);
    let info = client.call("guest-info", json!({}));
    let disabled = info["supported_commands"].as_array().expect("a list").iter();
    let disabled: Vec<_> =
        disabled.filter(|command| command["enabled"] == false).map(|command| &command["name"]).collect();
    assert_eq!(disabled, ["stillpoint-freeze", "guest-ping"]);

    let agent = Agent::start_with(&["-a", "guest-info,guest-ping", "-b", "guest-ping"], &[]);
    let mut client = agent.client();
    assert_eq!(client.error("guest-ping", json!({})), refused);
    assert!(client.error("guest-exec", json!({"path": "true"})).contains("has been disabled"));
    client.call("guest-info", json!({}));
}

#[test]
fn time_is_in_nanoseconds() {
    let agent = Agent::start();
    let told = agent.client().call("guest-get-time", json!({})).as_u64().expect("a number");
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos();
    assert!(u128::from(told).abs_diff(now) < 60_000_000_000, "{told} is not {now}");
}

#[test]
fn osinfo_is_read_from_the_file_that_the_environment_names() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "ID=qemu-ga-test\nPRETTY_NAME=\"Fedora 20 \\\"x\\\"\"\nVARIANT_ID=server\n")
        .expect("written");
    let agent = Agent::start_with(&[], &[("QGA_OS_RELEASE", file.path().to_str().expect("a plain path"))]);
    let osinfo = agent.client().call("guest-get-osinfo", json!({}));
    assert_eq!(osinfo["id"], "qemu-ga-test");
    assert_eq!(osinfo["pretty-name"], "Fedora 20 \"x\"");
    assert_eq!(osinfo["variant-id"], "server");
    assert_eq!(osinfo.get("version"), None);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    assert_eq!(osinfo["kernel-release"], release.trim_end());
}

#[test]
fn fsinfo_lists_what_lies_on_block_devices() {
    let agent = Agent::start();
    let filesystems = agent.client().call("guest-get-fsinfo", json!({}));
    for filesystem in filesystems.as_array().expect("a list") {
        assert_ne!(filesystem["type"], "proc");
        assert!(filesystem["mountpoint"].is_string() && filesystem["disk"].is_array(), "{filesystem}");
    }
}

#[test]
fn a_thawed_guest_says_so() {
    let agent = Agent::start();
    let mut client = agent.client();
    assert_eq!(client.call("guest-fsfreeze-status", json!({})), "thawed");
    assert_eq!(client.call("stillpoint-status", json!({}))["state"], "thawed");
}

#[test]
fn exec_runs_a_program_and_tells_its_end_once() {
    let agent = Agent::start();
    let mut client = agent.client();
    let pid = client.call("guest-exec", shell("exit 3", json!(false)))["pid"].clone();
    let mut status = Value::Null;
    until("the program ends", || {
        status = client.call("guest-exec-status", json!({"pid": pid}));
        status["exited"] == true
    });
    assert_eq!(status, json!({"exited": true, "exitcode": 3}));
    assert_eq!(client.error("guest-exec-status", json!({"pid": pid})), format!("PID {pid} does not exist"));
    assert_eq!(run(&mut client, shell("kill -9 $$", json!(true))), json!({"exited": true, "signal": 9}));
    assert!(agent.log().contains("info: guest-exec called: \"/bin/sh -c exit 3\""), "{}", agent.log());
}

#[test]
fn signals_reach_what_exec_starts() {
    let agent = Agent::start();
    let mut client = agent.client();
    for signal in [1, 2, 15, 17] {
        // SIGCHLD kills nobody: whether it is let through shows in the shell's own mask.
        let script = if signal == 17 {
            "grep -q '^SigBlk:.0*$' /proc/self/status && kill -9 $$".to_owned()
        } else {
            format!("kill -{signal} $$; sleep 1")
        };
        let status = run(&mut client, shell(&script, json!(false)));
        assert_eq!(
            status,
            json!({"exited": true, "signal": if signal == 17 { 9 } else { signal }}),
            "{script}"
        );
    }
}

#[test]
fn exec_captures_each_stream_as_asked() {
    let agent = Agent::start();
    let mut client = agent.client();
    let script = "echo out; echo err >&2";
    for (capture, expected) in [
        (json!(true), json!({"exited": true, "exitcode": 0, "out-data": "out\n", "err-data": "err\n"})),
        (
            json!("separated"),
            json!({"exited": true, "exitcode": 0, "out-data": "out\n", "err-data": "err\n"}),
        ),
        (json!("stdout"), json!({"exited": true, "exitcode": 0, "out-data": "out\n"})),
        (json!("stderr"), json!({"exited": true, "exitcode": 0, "err-data": "err\n"})),
        (json!("merged"), json!({"exited": true, "exitcode": 0, "out-data": "out\nerr\n"})),
        (json!("none"), json!({"exited": true, "exitcode": 0})),
        (json!(false), json!({"exited": true, "exitcode": 0})),
    ] {
        assert_eq!(run(&mut client, shell(script, capture.clone())), expected, "{capture}");
    }
}

#[test]
fn exec_gives_input_environment_and_path() {
    let agent = Agent::start();
    let mut client = agent.client();
    let input = "x".repeat(300_000);
    let arguments =
        json!({"path": "wc", "arg": ["-c"], "input-data": STANDARD.encode(&input), "capture-output": true});
    assert_eq!(run(&mut client, arguments)["out-data"], "300000\n");
    let arguments = json!({"path": "env", "env": ["PATH=/usr/bin:/bin", "A=b c"], "capture-output": true});
    assert_eq!(run(&mut client, arguments)["out-data"], "A=b c\nPATH=/usr/bin:/bin\n");
    let missing = client.error("guest-exec", json!({"path": "/nope/nope"}));
    assert_eq!(missing, "Failed to execute child process “/nope/nope” (No such file or directory)");
    let missing = client.error("guest-exec", json!({"path": "true", "env": ["PATH=/nope"]}));
    assert_eq!(missing, "Failed to execute child process “true” (No such file or directory)");
}

#[test]
fn exec_is_not_held_up_by_a_grandchild_and_does_not_kill_it() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mark = tempfile::tempdir().expect("a folder");
    let mark = mark.path().join("mark");
    let script = format!("(sleep 1; echo late; echo done > {}) & echo early", mark.display());
    assert_eq!(run(&mut client, shell(&script, json!(true)))["out-data"], "early\n");
    assert!(!mark.exists(), "the end was told before the grandchild's");
    until("the grandchild ends by itself", || mark.exists());
}

#[test]
fn exec_keeps_no_more_than_sixteen_mebibytes() {
    let agent = Agent::start();
    let mut client = agent.client();
    let status = run(&mut client, shell("head -c 20000000 /dev/zero", json!("stdout")));
    assert_eq!(status["out-data"].as_str().map(str::len), Some(16 << 20));
    assert_eq!(status["out-truncated"], true);
}

#[test]
fn a_program_that_writes_without_end_holds_up_nobody() {
    let mut agent = Agent::start();
    let mut client = agent.client();
    let pid = client.call("guest-exec", json!({"path": "yes", "capture-output": "stdout"}))["pid"].clone();
    std::thread::sleep(Duration::from_millis(300));
    client.call("guest-ping", json!({}));
    assert_eq!(client.call("guest-exec-status", json!({"pid": pid})), json!({"exited": false}));
    let raw = i32::try_from(pid.as_i64().expect("a number")).expect("a pid");
    let raw = rustix::process::Pid::from_raw(raw).expect("a pid");
    rustix::process::kill_process(raw, rustix::process::Signal::KILL).expect("it runs");
    until("the end is noticed", || client.call("guest-exec-status", json!({"pid": pid}))["exited"] == true);
    assert!(agent.is_running());
}
