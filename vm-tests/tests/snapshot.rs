//! `snapshot`, `restore`, `verify` and `delete` on guests that work meanwhile: what is promised is what is there.

use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use vm_tests::{Agent, Guest, Stillpoint, snapshot_id};

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_guest_without_our_agent_gets_the_level_that_can_be_shown_and_nothing_when_more_is_required() {
    let guest = Guest::builder()
        .agent(Agent::Stock)
        .append("stillpoint.postgresql=off")
        .start()
        .expect("QEMU starts");
    println!("stock agent after {:.1?}", guest.agent_ready(LIMIT));
    guest.booted(LIMIT);
    guest.start_writers();
    guest.writes_go_on(LIMIT);
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    stillpoint.register("stock", &guest.qmp_socket(), Some(&guest.agent_socket())).expect("registered");
    stillpoint.register("bare", &guest.qmp_socket(), None).expect("registered");

    let refused = |vm: &str, code: &str| {
        let before = guest.block_graph();
        let ended = stillpoint.run(&["snapshot", vm, "--require", "application"]).expect("it ends");
        ended.assert_refused(4, "application-consistent");
        println!("{vm} ({code}), application required:\n{}", ended.stderr.trim_end());
        assert_eq!(guest.block_graph(), before, "the block graph is as before");
        println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
        assert_eq!(listed(&stillpoint), 0, "no snapshot is left");
    };
    let stock_says_thawed = || {
        let mut agent = vm::agent::Agent::connect(&guest.agent_socket(), LIMIT).expect("it answers");
        assert!(!agent.fsfreeze_is_frozen().expect("a status"), "qemu-ga says that it is frozen");
    };
    refused("stock", "stock_agent");
    stock_says_thawed();
    refused("bare", "no_agent");
    let stock_agent = |signal: &str| {
        // The harness is a qemu-ga too: the parent of this shell.
        let others =
            format!("for p in $(busybox pidof qemu-ga); do [ $p = $PPID ] || kill -{signal} $p; done");
        guest.exec(&others).success();
    };
    stock_agent("STOP");
    refused("stock", "silent agent");

    let silent = stillpoint.must(&["snapshot", "stock", "--disk", "disk-data"]);
    assert_level(&silent, "crash", "no_agent");
    stock_agent("CONT");

    let stock = stillpoint.must(&["snapshot", "stock"]);
    assert_level(&stock, "filesystem", "stock_agent");
    stock_says_thawed();
    let bare = stillpoint.must(&["snapshot", "bare", "--disk", "disk-data"]);
    assert_level(&bare, "crash", "no_agent");
    guest.writes_go_on(LIMIT);
    assert_eq!(
        guest.block_graph().count("stillpoint-"),
        2,
        "nothing but two disks' bitmaps: {:#?}",
        guest.block_graph()
    );
}

#[test]
fn increments_are_small_restores_are_equal_and_a_deleted_parent_is_not_missed() {
    let guest = Guest::builder().start().expect("QEMU starts");
    println!(
        "our agent after {:.1?}, PostgreSQL after {:.1?}",
        guest.agent_ready(LIMIT),
        guest.postgresql_ready(LIMIT)
    );
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    stillpoint.register("db1", &guest.qmp_socket(), Some(&guest.agent_socket())).expect("registered");
    guest.start_load();
    guest.writes_go_on(LIMIT);

    let full = stillpoint.must(&["snapshot", "db1", "--require", "application"]);
    let increment = stillpoint.must(&["snapshot", "db1", "--require", "application"]);
    assert_eq!(full["level"], "application", "{full}");
    assert_eq!(increment["level"], "application", "{increment}");
    assert_eq!(increment["parent"], full["snapshot"]);
    for (disk, name) in [(0, "disk-root"), (1, "disk-data")] {
        let (all, changed) = (&full["disks"][disk], &increment["disks"][disk]);
        assert_eq!((&all["name"], &changed["name"]), (&Value::from(name), &Value::from(name)));
        assert_eq!((&all["method"], &changed["method"]), (&Value::from("full"), &Value::from("bitmap")));
        let (all, read) = (number(all, "read_bytes"), number(changed, "read_bytes"));
        println!("{name}: full read {all} bytes, increment {read}, stored {}", changed["stored_bytes"]);
        assert!(read > 0 && read < all / 4, "the load wrote a little: {read} of {all} bytes");
    }
    let (full, increment) = (id(&full), id(&increment));

    println!("restore, as raw and as qcow2");
    let (raw, qcow2) = (stillpoint.path("data.raw"), stillpoint.path("data.qcow2"));
    restore(&stillpoint, &increment, &raw, "raw");
    restore(&stillpoint, &increment, &qcow2, "qcow2");
    assert_same(&raw, &qcow2, "qcow2");
    let of_full = stillpoint.path("full.raw");
    restore(&stillpoint, &full, &of_full, "raw");
    assert!(!same(&raw, &of_full, "raw"), "the load wrote between the two");
    std::fs::remove_file(of_full).expect("it is there");
    let exists = stillpoint
        .run(&["restore", &increment, "--disk", &format!("disk-data={}", raw.display())])
        .expect("it ends");
    assert_eq!(exists.code(), 1, "nothing is overwritten unasked: {}", exists.stderr);

    println!("verify, delete the full one, verify, restore again");
    stillpoint.assert_sound(2);
    stillpoint.must(&["delete", &full]);
    assert_eq!(stillpoint.run(&["show", &full]).expect("it ends").code(), 3);
    stillpoint.assert_sound(1);
    let again = stillpoint.path("again.raw");
    restore(&stillpoint, &increment, &again, "raw");
    assert_same(&raw, &again, "raw");

    println!("only the data disk");
    let data = stillpoint.must(&["snapshot", "db1", "--disk", "disk-data"]);
    assert_level(&data, "application", "filesystem_left_out");
    assert_eq!(data["disks"].as_array().map(Vec::len), Some(1), "{data}");
    assert_eq!(data["disks"][0]["method"], "bitmap", "{data}");

    println!("no data, and policies");
    let none = stillpoint.must(&["snapshot", "db1", "--no-data"]);
    assert_level(&none, "none", "no_point");
    let off = stillpoint.must(&["snapshot", "db1", "--application", "postgresql=off"]);
    assert_level(&off, "filesystem", "policy_off");
    assert_eq!(off["disks"][0]["method"], "bitmap", "the disk that was left out in between: {off}");

    println!("PostgreSQL stands still, and is required");
    let before = guest.block_graph();
    let before_listed = listed(&stillpoint);
    guest.exec("busybox killall -STOP postgres").success();
    let asked = Instant::now();
    let ended =
        stillpoint.run(&["snapshot", "db1", "--application", "postgresql=required"]).expect("it ends");
    println!("after {:.1?}:\n{}", asked.elapsed(), ended.stderr.trim_end());
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    guest.exec("busybox killall -CONT postgres").success();
    ended.assert_refused(4, "postgresql");
    assert_eq!(guest.block_graph(), before);
    assert_eq!(listed(&stillpoint), before_listed);
    let commits = guest.acks().highest('c');
    assert!(guest.acks().wait_for('c', commits + 5, 6 * LIMIT), "commits go on");
    let well = stillpoint.must(&["snapshot", "db1", "--application", "postgresql=required"]);
    assert_eq!(well["level"], "application", "{well}");
    stillpoint.assert_sound(before_listed + 1);
}

fn id(object: &Value) -> String {
    snapshot_id(object).expect("a snapshot").to_owned()
}

fn listed(stillpoint: &Stillpoint) -> usize {
    stillpoint.must(&["snapshots"])["snapshots"].as_array().expect("a list").len()
}

fn number(object: &Value, member: &str) -> u64 {
    object[member].as_u64().unwrap_or_else(|| panic!("no {member} in {object}"))
}

#[track_caller]
fn assert_level(object: &Value, level: &str, reason: &str) {
    assert_eq!(object["level"], level, "{object}");
    let reasons = object["reasons"].as_array().expect("a list");
    assert!(reasons.iter().any(|found| found["code"] == reason), "no {reason}: {object}");
}

#[track_caller]
fn restore(stillpoint: &Stillpoint, snapshot: &str, path: &Path, format: &str) {
    let target = format!("disk-data={}", path.display());
    stillpoint.must(&["restore", snapshot, "--disk", &target, "--format", format]);
}

fn same(raw: &Path, other: &Path, format: &str) -> bool {
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-q", "-f", "raw", "-F", format]).arg(raw).arg(other);
    match command.status().expect("qemu-img starts").code() {
        Some(0) => true,
        Some(1) => false,
        other => panic!("{command:?} ended with {other:?}"),
    }
}

#[track_caller]
fn assert_same(raw: &Path, other: &Path, format: &str) {
    assert!(same(raw, other, format), "{} and {} differ", raw.display(), other.display());
}
