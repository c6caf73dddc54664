//! Key files, flags and what they come to.

use crate::guest::Agent;
use std::process::{Command, Output};

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut agent = Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
    agent.args(arguments).env_clear().envs(environment.iter().copied()).output().expect("it runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    file
}

#[test]
fn a_key_file_is_named_by_the_environment_or_by_a_flag_and_flags_win() {
    let first = file("[general]\nverbose=true\nmethod=isa-serial\n");
    let second = file("[general]\nmethod=unix-listen\npath=/p\n");
    let (first, second) = (first.path().to_str().expect("plain"), second.path().to_str().expect("plain"));
    let dumped = run(&["-D"], &[("QGA_CONF", first)]);
    assert_eq!(dumped.status.code(), Some(0));
    assert!(said(&dumped).contains("method=isa-serial\npath=/dev/ttyS0\n"), "{}", said(&dumped));
    let dumped = said(&run(&["-p", "/q", "-c", second, "-D"], &[("QGA_CONF", first)]));
    assert!(dumped.contains("method=unix-listen\npath=/q\n") && dumped.contains("verbose=false"), "{dumped}");
}

#[test]
fn a_key_file_that_is_wrong_or_was_named_and_is_missing_ends_the_start() {
    for (text, words) in [
        ("verbose=true\n", "Key file does not start with a group"),
        ("[general]\ndaemon=maybe\n", "cannot be interpreted as a boolean"),
        ("[stillpoint]\nfreeze-exclud=/a\n", "which does not exist"),
    ] {
        let file = file(text);
        let output = run(&["-D"], &[("QGA_CONF", file.path().to_str().expect("plain"))]);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            said(&output).contains(": critical: error loading configuration from path: "),
            "{}",
            said(&output)
        );
        assert!(said(&output).contains(words), "{}", said(&output));
    }
    let missing = run(&["-c", "/nope/file", "-D"], &[]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(said(&missing).contains("/nope/file, No such file or directory"), "{}", said(&missing));
    assert_eq!(run(&["-D"], &[("QGA_CONF", "/nope/file")]).status.code(), Some(0));
}

#[test]
fn an_unknown_flag_is_told_in_the_words_of_qemu_ga() {
    let output = run(&["--nope"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let words = said(&output);
    assert!(words.contains("unrecognized option '--nope'"), "{words}");
    assert!(
        words.contains("Unknown option, try '") && words.contains("--help' for more information."),
        "{words}"
    );
    assert!(run(&["-m", "carrier-pigeon"], &[]).status.code() == Some(1));
    let folder = tempfile::tempdir().expect("a folder");
    let pathless = run(&["-m", "unix-listen", "-t", folder.path().to_str().expect("plain")], &[]);
    assert!(said(&pathless).contains("must specify a path for this channel"));
}

#[test]
fn what_a_key_file_blocks_is_refused_and_told_in_info() {
    for (text, ping, time) in [
        ("block-rpcs=guest-ping\n", false, true),
        ("blacklist=guest-ping\n", false, true),
        ("allow-rpcs=guest-ping,guest-info\n", true, false),
        ("allow-rpcs=guest-ping,guest-get-time\nblock-rpcs=guest-ping\n", false, true),
        ("allow-rpcs=\n", true, true),
    ] {
        let file = file(&format!("[general]\n{text}"));
        let agent = Agent::start_with(&[], &[("QGA_CONF", file.path().to_str().expect("plain"))]);
        let mut client = agent.client();
        for (command, allowed) in [("guest-ping", ping), ("guest-get-time", time)] {
            let answer = client.ask(&format!(r#"{{"execute":"{command}"}}"#));
            assert_eq!(answer.contains("return"), allowed, "{text}: {answer}");
            assert!(allowed || answer.contains("CommandNotFound"), "{answer}");
        }
    }
}

#[test]
fn the_reported_version_can_be_set_in_the_key_file() {
    let file = file("[stillpoint]\nreport-version=7.2.22\n");
    let agent = Agent::start_with(&[], &[("QGA_CONF", file.path().to_str().expect("plain"))]);
    assert_eq!(agent.client().call("guest-info", serde_json::json!({}))["version"], "7.2.22");
}

#[test]
fn a_damaged_or_missing_state_folder_ends_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    let start = |statedir: &str| {
        run(&["-m", "unix-listen", "-p", socket.to_str().expect("plain"), "-t", statedir], &[])
    };
    assert_eq!(start("/nope").status.code(), Some(1));
    std::fs::write(folder.path().join("qga.state"), "garbage").expect("written");
    let output = start(folder.path().to_str().expect("plain"));
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("qga.state is no state file"), "{}", said(&output));
}
