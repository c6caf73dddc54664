//! Guests that lie, and texts that want to do something to a terminal.

use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_tests::bare::{fill, image};
use vm_tests::{Bare, BareDisk, Stillpoint, lying_agent};

const LIMIT: Duration = Duration::from_secs(60);
/// Clears the screen, sets the title, turns text around, hides, and begins a line of its own; in 7 bits and in 8.
const HOSTILE: &str = "\u{1b}[2J\u{1b}]0;x\u{7}\u{9b}31m\u{7f}\u{202e}\u{200b}\u{2066}\r\nerror: all is lost";
/// Part of it that must be seen in writing.
const SEEN: &str = "all is lost";

/// Nothing that acts on a terminal; and nobody else's text begins a line.
#[track_caller]
fn assert_plain(printed: &str) {
    let acts = |c: &char| {
        (c.is_control() && *c != '\n')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
    };
    let found: Vec<char> = printed.chars().filter(acts).collect();
    assert!(found.is_empty(), "{found:?} in {printed:?}");
    assert!(!printed.lines().skip(1).any(|line| line.starts_with("error: all")), "{printed}");
}

/// Every text of a report becomes hostile, every number as large as it can be.
fn exaggerate(value: &mut Value, keeps: &[&str]) {
    match value {
        Value::String(text) => text.push_str(HOSTILE),
        Value::Number(number) => *number = u64::MAX.into(),
        Value::Array(list) => list.iter_mut().for_each(|value| exaggerate(value, keeps)),
        Value::Object(members) => {
            for (name, value) in members.iter_mut() {
                if !keeps.contains(&&**name) {
                    exaggerate(value, keeps);
                }
            }
        }
        _ => (),
    }
}

const OURS: [&str; 5] =
    ["stillpoint-check", "stillpoint-freeze", "stillpoint-thaw", "guest-info", "guest-get-fsinfo"];

/// What the agent does with a perfect answer to thaw, or to freeze, before it sends it.
type Lie = Box<dyn Fn(&str, &mut Value) + Send>;

struct Liar {
    stillpoint: Stillpoint,
    bare: Bare,
    lie: Arc<Mutex<Lie>>,
}

impl Liar {
    fn new() -> Self {
        let folder = Bare::folder();
        image(folder.path(), "d.raw", "raw", "1M");
        fill(folder.path(), "d.raw", "raw", 0x11, 0, 65536);
        let bare = Bare::start(folder, &[BareDisk::new("d", "d.raw", "raw")], &[]);
        let lie: Arc<Mutex<Lie>> = Arc::new(Mutex::new(Box::new(|_, _| ())));
        let lies = Arc::clone(&lie);
        let answers = move |command: &str, arguments: &Value| {
            let run = arguments["id"].as_str().unwrap_or_default();
            let mut answer = match command {
                "guest-info" => lying_agent::info("10.0.0", &OURS),
                "stillpoint-freeze" => {
                    json!({ "return": { "id": run, "frozen": 1, "lease_ms": 10_000, "freeze_ms": 1 } })
                }
                "stillpoint-thaw" => json!({ "return": lying_agent::perfect_report(run, "d") }),
                "stillpoint-check" => {
                    let mut report = lying_agent::perfect_report(run, "d");
                    for (name, value) in [("budget_ms", 1), ("dirty_bytes", 1), ("predicted_freeze_ms", 1)] {
                        report[name] = value.into();
                    }
                    report["filesystems"][0]["state"] = "freezable".into();
                    json!({ "return": report })
                }
                _ => json!({ "error": { "class": "CommandNotFound", "desc": "no" } }),
            };
            (lies.lock().expect("no lie panics"))(command, &mut answer);
            answer
        };
        lying_agent::serve(&bare.path("agent"), Arc::new(answers)).expect("a socket");
        let stillpoint = Stillpoint::with_key_file().expect("a repository");
        stillpoint.register("vm", &bare.qmp_socket(), Some(&bare.path("agent"))).expect("registered");
        Self { stillpoint, bare, lie }
    }

    fn lies(&self, lie: impl Fn(&str, &mut Value) + Send + 'static) {
        *self.lie.lock().expect("no lie panics") = Box::new(lie);
    }

    fn snapshot(&self) -> Value {
        self.stillpoint.must(&["snapshot", "vm"])
    }
}

fn codes(snapshot: &Value) -> Vec<&str> {
    snapshot["reasons"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|reason| reason["code"].as_str())
        .collect()
}

#[test]
fn a_guest_that_lies_in_every_field_gets_no_level_above_its_evidence_and_breaks_nothing() {
    let liar = Liar::new();
    let honest = liar.snapshot();
    assert_eq!(honest["level"], "application", "what every lie below begins with: {honest}");

    type Case = (&'static str, fn(&mut Value), &'static str);
    let thaw_lies: [Case; 12] = [
        ("another run's report", |answer| answer["return"]["id"] = "other".into(), "freeze_unproven"),
        ("negative times", |answer| answer["return"]["frozen_ms"] = (-1).into(), "thaw_failed"),
        ("times that are no numbers", |answer| answer["return"]["lease_ms"] = "∞".into(), "thaw_failed"),
        (
            "an unknown state",
            |answer| answer["return"]["filesystems"][0]["state"] = "perfect".into(),
            "thaw_failed",
        ),
        ("no report", |answer| answer["return"] = json!([]), "thaw_failed"),
        (
            "an error in hostile words",
            |answer| {
                *answer = json!({ "error": { "class": "GenericError", "desc": HOSTILE.repeat(100_000) } });
            },
            "thaw_failed",
        ),
        (
            "the same file system, held and not",
            |answer| {
                let mut second = answer["return"]["filesystems"][0].clone();
                second["state"] = "not_frozen".into();
                let list = answer["return"]["filesystems"].as_array_mut().expect("a list");
                list.insert(0, second);
            },
            "filesystem_not_frozen",
        ),
        (
            "frozen in the end, but never frozen",
            |answer| {
                answer["return"]["filesystems"][0]["state"] = "freezable".into();
            },
            "filesystem_not_frozen",
        ),
        (
            "too many file systems",
            |answer| {
                let one = answer["return"]["filesystems"][0].clone();
                answer["return"]["filesystems"] = vec![one; 5000].into();
            },
            "thaw_failed",
        ),
        (
            "too many applications",
            |answer| {
                let one = answer["return"]["applications"][0].clone();
                answer["return"]["applications"] = vec![one; 300].into();
            },
            "thaw_failed",
        ),
        (
            "too large a report",
            |answer| {
                let mut one = answer["return"]["filesystems"][0].clone();
                one["detail"] = "x".repeat(1000).into();
                answer["return"]["filesystems"] = vec![one; 4096].into();
                answer["return"]["unknown_writers"] =
                    vec![json!({ "pid": 1, "command": "y".repeat(1000), "mountpoints": [] }); 4096].into();
            },
            "thaw_failed",
        ),
        (
            "nested beyond reason",
            |answer| {
                answer["return"]["filesystems"][0]["disks"] =
                    (0..100).fold(json!([]), |inner, _| json!([inner]));
            },
            "thaw_failed",
        ),
    ];
    for (name, lie, reason) in thaw_lies {
        liar.lies(move |command, answer| {
            if command == "stillpoint-thaw" {
                lie(answer)
            }
        });
        let asked = Instant::now();
        let snapshot = liar.snapshot();
        println!("{name}: {} {:?} after {:.1?}", snapshot["level"], codes(&snapshot), asked.elapsed());
        assert_eq!(snapshot["level"], "crash", "{name}: {snapshot}");
        assert!(codes(&snapshot).contains(&reason), "{name}: {reason} is not in {snapshot}");
        assert!(
            asked.elapsed() < LIMIT,
            "{name}: an answer that is understood as none is not asked for again and again"
        );
    }

    for (name, lie, reason) in [
        (
            "frozen for another run",
            (|answer| answer["return"]["id"] = "other".into()) as fn(&mut Value),
            "freeze_failed",
        ),
        ("frozen −1 file systems", |answer| answer["return"]["frozen"] = (-1).into(), "freeze_failed"),
    ] {
        liar.lies(move |command, answer| {
            if command == "stillpoint-freeze" {
                lie(answer)
            }
        });
        let snapshot = liar.snapshot();
        assert_eq!(snapshot["level"], "crash", "{name}: {snapshot}");
        assert!(codes(&snapshot).contains(&reason), "{name}: {reason} is not in {snapshot}");
    }

    println!("-- a stock agent that exaggerates");
    liar.lies(|command, answer| match command {
        "guest-info" => *answer = lying_agent::info(&"9".repeat(1 << 20), &["guest-info"; 5000]),
        "guest-get-fsinfo" => {
            let one =
                json!({ "name": HOSTILE.repeat(1000), "mountpoint": HOSTILE, "type": "ext4", "disk": [] });
            *answer = json!({ "return": vec![one; 20] });
        }
        "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => *answer = json!({ "return": i64::MIN }),
        "guest-fsfreeze-status" => *answer = json!({ "return": HOSTILE }),
        _ => (),
    });
    let snapshot = liar.snapshot();
    assert_eq!(snapshot["level"], "crash", "{snapshot}");

    liar.lies(|_, _| ());
    assert_eq!(liar.snapshot()["level"], "application", "nothing of it lasts");
    let shown = liar.stillpoint.text(&["snapshots"]).expect("a list");
    assert_plain(&shown);
    let stored = bytes_in(&liar.stillpoint.repository());
    assert!(stored < 8 << 20, "a guest cannot fill the repository with words: {stored} bytes");
    drop(liar.bare);
}

#[test]
fn an_agent_whose_socket_vanishes_during_the_freeze_is_not_waited_for_long_and_costs_the_level() {
    let liar = Liar::new();
    let (socket, hidden) = (liar.bare.path("agent"), liar.bare.path("hidden"));
    for (step, code) in [("stillpoint-freeze", "freeze_failed"), ("stillpoint-thaw", "thaw_failed")] {
        println!("-- at {step}");
        let (from, to) = (socket.clone(), hidden.clone());
        liar.lies(move |command, answer| {
            if command == step {
                // Once more it is gone already.
                let _gone = std::fs::rename(&from, &to);
                *answer = "hangs up".into();
            }
        });
        let asked = Instant::now();
        let taken = liar.snapshot();
        println!("{} {:?} after {:.1?}", taken["level"], codes(&taken), asked.elapsed());
        assert_eq!(taken["level"], "crash", "{taken}");
        assert!(codes(&taken).contains(&code), "{taken}");
        assert!(
            asked.elapsed() < Duration::from_secs(40),
            "behind a socket that is gone nobody is left to thaw"
        );
        let refused = liar.stillpoint.run(&["snapshot", "vm", "--require", "filesystem"]).expect("it ends");
        println!("{}", refused.stderr.trim_end());
        refused.assert_refused(4, "vm");
        std::fs::rename(&hidden, &socket).expect("it was hidden");
    }
    liar.lies(|_, _| ());
    assert_eq!(liar.snapshot()["level"], "application", "it is back");
    liar.stillpoint.assert_sound(3);
}

fn bytes_in(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn no_text_of_a_guest_or_a_vm_reaches_the_terminal_as_it_is() {
    let liar = Liar::new();
    // Ids are QEMU's to check, serial numbers are not: a disk without an id is called by its serial number.
    image(liar.bare.path("").as_path(), "h.raw", "raw", "1M");
    let node = json!({ "driver": "raw", "node-name": "h", "file": { "driver": "file", "filename": liar.bare.path("h.raw") } });
    liar.bare.command("blockdev-add", &node);
    let serial = "\u{1b}[2J=\u{9b}\u{202e}all is lost";
    liar.bare.command("device_add", &json!({ "driver": "virtio-blk-pci", "drive": "h", "serial": serial }));
    // Everything but what decides the level, so that the receipt has it all.
    let keeps = ["id", "state", "thawed_by", "policy", "serial", "device_number", "device_numbers"];
    liar.lies(move |command, answer| match command {
        "guest-info" => answer["return"]["version"] = HOSTILE.into(),
        "stillpoint-thaw" | "stillpoint-check" => {
            let report = &mut answer["return"];
            for list in ["uncovered", "reasons"] {
                report[list] = json!([{ "code": "c", "subject": "s", "message": "m" }]);
            }
            report["unknown_writers"] = json!([{ "pid": 1, "command": "w", "mountpoints": ["/"] }]);
            report["applications"][0]["attested_by"] = "hook".into();
            report["applications"][0]["reasons"] = json!([{ "code": "c", "subject": "s", "message": "m" }]);
            exaggerate(report, &keeps);
            report["unknown_writers"][0]["pid"] = 1.into();
        }
        _ => (),
    });
    let description = format!("note {HOSTILE}");
    let disk = format!("{serial}={}", liar.stillpoint.path("h").display());
    let commands: [&[&str]; 8] = [
        &["snapshot", "vm", "--description", &description],
        &["check", "vm"],
        &["show", "vm"],
        &["snapshots"],
        &["vm", "show", "vm"],
        &["vm", "list"],
        &["restore", "vm", "--disk", &disk, "--overwrite"],
        &["verify"],
    ];
    for words in commands {
        for json in [false, true] {
            let mut command = liar.stillpoint.command(words);
            if json {
                command.arg("--json");
            }
            let output = command.output().expect("it runs");
            let printed = String::from_utf8(output.stdout).expect("text");
            let errors = String::from_utf8(output.stderr).expect("text");
            assert!(output.status.success(), "{words:?}: {errors}");
            assert_plain(&printed);
            assert_plain(&errors);
            let names_none = matches!(words[..], ["vm", "list"] | ["verify"]);
            assert!(names_none || printed.contains(SEEN), "{words:?} shows it in writing: {printed}");
        }
    }

    println!("-- errors");
    liar.lies(|command, answer| {
        if command.starts_with("stillpoint-") {
            *answer = json!({ "error": { "class": "GenericError", "desc": HOSTILE } });
        }
    });
    let missing = format!("{HOSTILE}=x");
    let commands: [&[&str]; 5] = [
        &["snapshot", "vm", "--require", "application"],
        &["snapshot", "vm", "--disk", "missing"],
        &["check", "vm"],
        &["restore", "vm", "--disk", &missing],
        &["show", HOSTILE],
    ];
    for words in commands {
        let output = liar.stillpoint.command(words).arg("--json").output().expect("it runs");
        let (printed, errors) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        let (printed, errors) = (printed.expect("text"), errors.expect("text"));
        assert!(!output.status.success(), "{words:?}: {printed}");
        assert_plain(&printed);
        assert_plain(&errors);
        assert_eq!(errors.lines().count(), 3, "{words:?}: {errors}");
        assert!(errors.contains(SEEN), "{words:?} shows it in writing: {errors}");
    }
}
