//! Key files, flags and what they come to.

use crate::guest::Agent;
use std::io::Write;
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
        ("[general]\ndaemon=maybe\n", "which has a value that cannot be interpreted"),
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

/// Debian 12's, if it is installed.
const INSTALLED: &str = "/usr/sbin/qemu-ga";
/// Folders of unpacked packages of later ones, separated by `:`; `cargo xtask stock-agents` prints them.
const UNPACKED: &str = "STILLPOINT_STOCK_AGENTS";

/// How stock agents are started here, by version. They are started to print, and serve nobody.
fn stock_agents() -> Vec<(String, Vec<String>)> {
    let unpacked = std::env::var_os(UNPACKED).unwrap_or_default();
    let unpacked = std::env::split_paths(&unpacked).filter(|root| root.is_absolute()).map(|root| {
        let at = |below: &str| root.join(below).display().to_string();
        let libraries = at("usr/lib/x86_64-linux-gnu");
        let loader = format!("{libraries}/ld-linux-x86-64.so.2");
        vec![loader, "--library-path".to_owned(), libraries, at("usr/sbin/qemu-ga")]
    });
    let all = std::iter::once(vec![INSTALLED.to_owned()]).chain(unpacked);
    all.filter_map(|words| {
        let output = Command::new(&words[0]).args(&words[1..]).arg("-V").output().ok()?;
        let version = said(&output).trim().strip_prefix("QEMU Guest Agent ")?.to_owned();
        Some((version, words))
    })
    .collect()
}

/// Exit code and dump, as far as all versions know it.
fn dumped(program: &[String], flags: &[&str], key_file: &[u8]) -> (Option<i32>, String) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), key_file).expect("written");
    let mut command = Command::new(&program[0]);
    command.args(&program[1..]).args(flags).arg("-D").env_clear().env("QGA_CONF", file.path());
    let output = command.output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).replace(&program[program.len() - 1], "qemu-ga");
    (
        output.status.code(),
        text.lines().filter(|line| *line != "allow-rpcs=").map(|line| line.to_owned() + "\n").collect(),
    )
}

#[test]
fn key_files_and_flags_come_to_what_they_come_to_for_a_stock_qemu_ga() {
    let stock_agents = stock_agents();
    for version in ["7.2", "10.0", "11.1"] {
        if !stock_agents.iter().any(|(found, _)| found.starts_with(&format!("{version}."))) {
            let told =
                writeln!(std::io::stderr(), "SKIPPED: no qemu-ga {version}: `cargo xtask stock-agents`");
            told.expect("a standard error");
        }
    }
    let files: &[&[u8]] = &[
        b"",
        b"[general]\nverbose=1\nretry-path= true \ndaemon=false\n",
        b"# c\n\n[general]\n#x\npath=#y\nlogfile= a  b \n",
        b" [general] \n  path = x\n",
        b"[general]\r\npath=x\r\n",
        b"[general]\npath=1\n[x]\npath=3\n[general]\npath=2\nmethod=isa-serial\n",
        b"[general]\npath=\\sx\\ty\\\\z\n",
        b"[general]\npath=a=b\nlogfile=\xC3\xA9\n",
        b"[general]\nblock-rpcs=a,b,c\n",
        b"[general]\nblacklist=c,d\n",
        b"[general]\na b=c\npath[de]=x\nunknown=y\n[g e]\nx=1\n",
        b"[general]\nmethod=unix-listen\npath=/s\npidfile=/p\nstatedir=/t\nfsfreeze-hook=/h",
        b"x=1\n",
        b"[general\n",
        b"[general]\nfoo\n",
        b"[general]x\n",
        b"[general]\n=x\n",
        b"[general]\n;x\n",
        b"[]\n",
        b"[gen[eral]\n",
        b"[general]\npa]th=x\n",
        b"[general]\ndaemon=yes\n",
        b"[general]\nverbose=\n",
        b"[general]\nverbose=true;\n",
        b"[general]\npath=a\\qb\n",
        b"[general]\npath=a\\\n",
        b"[general]\npath=\xFF\n",
        b"\xEF\xBB\xBF[general]\npath=x\n",
    ];
    let flags: &[&[&str]] = &[
        &[],
        &["-b", "a,b", "-b", "c", "-F", "word"],
        &["-vrd", "-misa-serial", "-F/x", "-f", "/a b", "-t/s", "-l", " l"],
        &["--method=unix-listen", "--path", "/p\tq\\", "--fsfreeze-hook=/y", "--verb"],
        &["--blacklist=x,y"],
        &["-p"],
        &["-x"],
        &["--nope"],
        &["--ver"],
        &["--verbose=1"],
    ];
    let empty: &[u8] = b"";
    let no_flags: &[&str] = &[];
    let cases = files.iter().map(|file| (no_flags, *file)).chain(flags.iter().map(|flags| (*flags, empty)));
    let ours = [env!("CARGO_BIN_EXE_stillpoint-agent").to_owned()];
    for (flags, file) in cases {
        let words = format!("{flags:?} {}", String::from_utf8_lossy(file));
        let ours = dumped(&ours, flags, file);
        for (version, stock) in &stock_agents {
            // Gone since 9.1; ours takes it still, lest what it refuses be allowed.
            if words.contains("blacklist") && !version.starts_with("7.") {
                continue;
            }
            assert_eq!(ours, dumped(stock, flags, file), "qemu-ga {version}: {words}");
        }
    }
}
