//! `guest-exec` and `guest-exec-status`, as in qemu-ga and with our own arguments.

use crate::guest::{Agent, Client, until};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

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
    let words = format!("PID {pid} does not exist");
    assert_eq!(client.error("guest-exec-status", json!({"pid": pid})), words, "D31: it is named");
    assert_eq!(run(&mut client, shell("kill -9 $$", json!(true))), json!({"exited": true, "signal": 9}));
    assert!(agent.log().contains("info: guest-exec called: \"/bin/sh -c exit 3\""), "{}", agent.log());
}

#[test]
fn d22_exec_captures_each_stream_as_asked() {
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
    let env = ["Z=1", "PATH=/usr/bin:/bin", "A=b c", "Z=2", "odd"];
    let arguments = json!({"path": "env", "env": env, "capture-output": true});
    assert_eq!(run(&mut client, arguments)["out-data"], "Z=1\nPATH=/usr/bin:/bin\nA=b c\nZ=2\nodd\n");
    let arguments =
        json!({"path": "sh", "arg": ["-c", "echo $0"], "env": ["PATH=/nope"], "capture-output": true});
    assert!(client.error("guest-exec", arguments).ends_with("(No such file or directory)"));
    let missing = client.error("guest-exec", json!({"path": "/nope/nope"}));
    assert_eq!(missing, "Failed to execute child process “/nope/nope” (No such file or directory)");
    let missing = client.error("guest-exec", json!({"path": "true", "env": ["PATH=/nope"]}));
    assert_eq!(missing, "Failed to execute child process “true” (No such file or directory)");
}

#[test]
fn d24_exec_is_not_held_up_by_a_grandchild_and_does_not_kill_it() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mark = tempfile::tempdir().expect("a folder");
    let mark = mark.path().join("mark");
    let script = format!("(sleep 3; echo late; echo done > {}) & echo early", mark.display());
    assert_eq!(run(&mut client, shell(&script, json!(true)))["out-data"], "early\n");
    assert!(!mark.exists(), "the end was told before the grandchild's");
    until("the grandchild ends by itself", || mark.exists());
}

#[test]
fn exec_tells_what_a_helper_of_the_program_writes_just_after_its_end() {
    let agent = Agent::start();
    let mut client = agent.client();
    // As `exec > >(tee log)` does it. Asked for again, because a busy machine may let the helper sleep for longer.
    until("the tail is told", || {
        let status = run(&mut client, shell("(sleep 0.05; echo tail) & echo head", json!("stdout")));
        status["out-data"] == "head\ntail\n"
    });
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

#[test]
fn exec_refuses_in_the_words_of_qemu_ga() {
    let agent = Agent::start();
    let mut client = agent.client();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("written");
    for (path, words) in [
        (file.to_str().expect("a plain path"), "Permission denied"),
        ("/etc", "Permission denied"),
        ("/etc/passwd/x", "Not a directory"),
        ("", "No such file or directory"),
        ("a\0b", "Invalid argument"),
    ] {
        let refused = client.error("guest-exec", json!({"path": path}));
        assert_eq!(refused, format!("Failed to execute child process \u{201C}{path}\u{201D} ({words})"));
    }
    let bad = client.error("guest-exec", json!({"path": "true", "input-data": "*"}));
    assert_eq!(bad, "Base64 data contains invalid characters");
}

#[test]
fn exec_gives_a_script_without_an_interpreter_to_the_shell() {
    use std::os::unix::fs::PermissionsExt;
    let agent = Agent::start();
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("script");
    std::fs::write(&script, "echo \"$0 $*\"\n").expect("written");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("changed");
    let script = script.to_str().expect("a plain path");
    let arguments = json!({"path": script, "arg": ["a", "b"], "capture-output": true});
    assert_eq!(run(&mut agent.client(), arguments)["out-data"], format!("{script} a b\n"));
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

/// Whether a process of this id runs.
fn runs(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Whether there is a process of this id, be it a zombie.
fn exists(pid: &Value) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn d23_a_program_beyond_its_time_limit_is_killed_with_its_children() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut arguments = shell("sleep 600 & echo $!; sleep 600", json!("stdout"));
    arguments["stillpoint-time-limit-ms"] = json!(400);
    let begin = Instant::now();
    let status = run(&mut client, arguments);
    assert!(begin.elapsed() >= Duration::from_millis(400), "it was killed too early");
    assert_eq!(status["signal"], 9);
    assert_eq!(status["stillpoint-time-limit-reached"], true);
    let child = status["out-data"].as_str().expect("its number").to_owned();
    until("the child is dead, too", || !runs(&child));
    // One that keeps to its limit is as any other.
    let mut arguments = shell("exit 4", json!(false));
    arguments["stillpoint-time-limit-ms"] = json!(60_000);
    assert_eq!(run(&mut client, arguments), json!({"exited": true, "exitcode": 4}));
}

#[test]
fn d23_what_a_program_left_running_is_killed_at_its_time_limit_whether_its_end_was_told_or_not() {
    let agent = Agent::start();
    let mut client = agent.client();
    let folder = tempfile::tempdir().expect("a folder");
    let start = |name: &str, client: &mut Client| {
        let file = folder.path().join(name);
        let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}", file.display());
        let mut arguments = shell(&script, json!(false));
        arguments["stillpoint-time-limit-ms"] = json!(1_500);
        let pid = client.call("guest-exec", arguments)["pid"].clone();
        until("it has started its child", || file.exists());
        (pid, std::fs::read_to_string(file).expect("its number"))
    };
    let begin = Instant::now();
    let (told, told_child) = start("told", &mut client);
    let (untold, untold_child) = start("untold", &mut client);
    let mut status = Value::Null;
    until("the first ends", || {
        status = client.call("guest-exec-status", json!({"pid": told}));
        status["exited"] == true
    });
    assert_eq!(status, json!({"exited": true, "exitcode": 0}), "its own end, before its child's");
    until("both children are dead", || !runs(&told_child) && !runs(&untold_child));
    assert!(begin.elapsed() >= Duration::from_millis(1_500), "they were killed too early");
    let status = client.call("guest-exec-status", json!({"pid": untold}));
    assert_eq!(status, json!({"exited": true, "exitcode": 0}), "it was not too slow itself");
    until("nothing is left of either", || !exists(&told) && !exists(&untold));
}

#[test]
fn d23_a_program_that_left_nothing_running_is_gone_when_its_end_was_told() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut arguments = shell("exit 4", json!(false));
    arguments["stillpoint-time-limit-ms"] = json!(600_000);
    let pid = client.call("guest-exec", arguments)["pid"].clone();
    until("it ends", || client.call("guest-exec-status", json!({"pid": pid}))["exited"] == true);
    assert!(!exists(&pid), "no zombie waits for the time limit");
}

#[test]
fn d23_a_kill_reaches_what_a_program_left_running_before_its_end_was_told() {
    let agent = Agent::start();
    let mut client = agent.client();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("child");
    let script = format!("sleep 600 & echo $! > {}", file.display());
    let pid = client.call("guest-exec", shell(&script, json!(false)))["pid"].clone();
    until("it has ended", || !runs(&pid.to_string()));
    let child = std::fs::read_to_string(file).expect("its number");
    assert!(runs(&child));
    let status = client.call("guest-exec-status", json!({"pid": pid, "stillpoint-kill": "kill"}));
    assert_eq!(status, json!({"exited": true, "exitcode": 0}));
    until("the child is dead", || !runs(&child));
}

#[test]
fn d23_of_several_time_limits_each_is_kept() {
    let agent = Agent::start();
    let mut client = agent.client();
    let pids: Vec<Value> = [60_000, 300, 900]
        .map(|limit| json!({"path": "sleep", "arg": ["600"], "stillpoint-time-limit-ms": limit}))
        .map(|arguments| client.call("guest-exec", arguments)["pid"].clone())
        .into();
    let mut exited = |pid: &Value| client.call("guest-exec-status", json!({"pid": pid}))["exited"] == true;
    until("the second is killed", || exited(&pids[1]));
    until("the third is killed", || exited(&pids[2]));
    assert!(!exited(&pids[0]));
    let killed = client.call("guest-exec-status", json!({"pid": pids[0], "stillpoint-kill": "kill"}));
    assert_eq!(killed["stillpoint-time-limit-reached"], Value::Null);
}

#[test]
fn d23_a_program_and_its_children_are_killed_on_demand() {
    let agent = Agent::start();
    let mut client = agent.client();
    let script = "trap 'echo bye; exit 5' TERM; sleep 600 & echo $!; wait";
    let pid = client.call("guest-exec", shell(script, json!("stdout")))["pid"].clone();
    let mut child = String::new();
    until("it has started its child", || {
        let status = client.call("guest-exec-status", json!({"pid": pid, "stillpoint-stream": true}));
        assert_eq!(status["exited"], false);
        let data = STANDARD.decode(status["out-data"].as_str().unwrap_or_default()).expect("base64");
        child.push_str(&String::from_utf8_lossy(&data));
        child.ends_with('\n')
    });
    // Until then it is the shell's copy, which the shell's trap protects.
    let name = format!("/proc/{}/comm", child.trim());
    until("the child is another program", || std::fs::read(&name).is_ok_and(|name| name == b"sleep\n"));
    let mut status = client.call("guest-exec-status", json!({"pid": pid, "stillpoint-kill": "term"}));
    until("it has ended", || {
        if status["exited"] == false {
            status = client.call("guest-exec-status", json!({"pid": pid}));
        }
        status["exited"] == true
    });
    assert_eq!((&status["exitcode"], &status["out-data"]), (&json!(5), &json!(STANDARD.encode("bye\n"))));
    until("the child is dead, too", || !runs(&child));
    let words = client.error("guest-exec-status", json!({"pid": pid, "stillpoint-kill": "kill"}));
    assert_eq!(words, format!("PID {pid} does not exist"));
}

#[test]
fn d23_output_is_told_while_a_program_runs_and_is_then_forgotten() {
    let agent = Agent::start();
    let mut client = agent.client();
    let folder = tempfile::tempdir().expect("a folder");
    let go = folder.path().join("go");
    let script =
        format!("echo one; echo two >&2; until [ -e {} ]; do sleep 0.05; done; echo three", go.display());
    let pid = client.call("guest-exec", shell(&script, json!("separated")))["pid"].clone();
    let ask = json!({"pid": pid, "stillpoint-stream": true});
    let (mut out, mut err) = (String::new(), String::new());
    until("the first lines are told", || {
        let status = client.call("guest-exec-status", ask.clone());
        assert_eq!(status["exited"], false);
        out.push_str(status["out-data"].as_str().unwrap_or_default());
        err.push_str(status["err-data"].as_str().unwrap_or_default());
        !out.is_empty() && !err.is_empty()
    });
    assert_eq!((out, err), (STANDARD.encode("one\n"), STANDARD.encode("two\n")));
    assert_eq!(client.call("guest-exec-status", ask.clone()), json!({"exited": false}), "told once");
    std::fs::write(go, "").expect("written");
    let mut status = Value::Null;
    until("it ends", || {
        status = client.call("guest-exec-status", json!({"pid": pid}));
        status["exited"] == true
    });
    assert_eq!(status, json!({"exited": true, "exitcode": 0, "out-data": STANDARD.encode("three\n")}));
}

#[test]
fn exec_keeps_no_more_output_than_it_is_told_to() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut arguments = shell("printf 1234567890; printf abc >&2", json!("separated"));
    arguments["stillpoint-output-bytes-max"] = json!(4);
    assert_eq!(
        run(&mut client, arguments),
        json!({"exited": true, "exitcode": 0, "out-data": "1234", "out-truncated": true, "err-data": "abc"})
    );
}

#[test]
fn d23_too_many_programs_at_once_are_refused_and_a_place_is_given_back() {
    let agent = Agent::start();
    let mut client = agent.client();
    let sleep = json!({"path": "sleep", "arg": ["600"], "stillpoint-time-limit-ms": 120_000});
    let pids: Vec<Value> =
        (0..256).map(|_| client.call("guest-exec", sleep.clone())["pid"].clone()).collect();
    assert_eq!(client.error("guest-exec", sleep.clone()), "too many programs are running");
    client.call("guest-exec-status", json!({"pid": pids[7], "stillpoint-kill": "kill"}));
    until("it has ended", || client.call("guest-exec-status", json!({"pid": pids[7]}))["exited"] == true);
    let next = client.call("guest-exec", sleep)["pid"].clone();
    for pid in pids.iter().enumerate().filter(|(index, _)| *index != 7).map(|(_, pid)| pid).chain([&next]) {
        client.call("guest-exec-status", json!({"pid": pid, "stillpoint-kill": "kill"}));
    }
    assert_eq!(client.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
}
