//! The scenes. The list of their names is what is promised.

use super::client::Inside;
use super::compare::{self, Tally, Version, masked};
use super::differences::Run;
use super::peer::Peer;
use super::private_root::Build;
use super::scripts::SCRIPTS;
use super::{soak, stock, streams};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

/// One test: what it mounts, and what happens.
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) build: fn(&mut Build),
    pub(crate) play: fn(&Inside),
}

macro_rules! scenes {
    ($($(#[$doc:meta])* $name:ident: $build:expr, $play:expr;)+) => {
        pub(crate) const SCENES: &[Scene] = &[$(Scene { name: stringify!($name), build: $build, play: $play }),+];
    };
}

pub(crate) fn all() -> impl Iterator<Item = &'static Scene> {
    SCENES.iter()
}

pub(crate) fn find(name: &str) -> &'static Scene {
    all().find(|scene| scene.name == name).unwrap_or_else(|| panic!("no scene {name}"))
}

/// Those that take minutes: `make test-long` runs them, with `--ignored`.
pub(crate) const LONG: &[&str] =
    &["a_hundred_thousand_requests_leave_no_trace", "a_thousand_freezes_and_thaws_leave_no_trace"];

scenes! {
    answers_as_qemu_ga_7_2_does: |build| guest(build, "7.2"), |_| same_answers("7.2", (7, 2));
    answers_as_qemu_ga_10_0_does: |build| guest(build, "10.0"), |_| same_answers("10.0", (10, 0));
    answers_as_qemu_ga_11_1_does: |build| guest(build, "11.1"), |_| same_answers("11.1", (11, 1));

    freezes_as_qemu_ga_7_2_does: |build| disks(build, "7.2"), |_| same_freezes("7.2", (7, 2));
    freezes_as_qemu_ga_10_0_does: |build| disks(build, "10.0"), |_| same_freezes("10.0", (10, 0));
    freezes_as_qemu_ga_11_1_does: |build| disks(build, "11.1"), |_| same_freezes("11.1", (11, 1));

    a_hundred_thousand_requests_leave_no_trace: system, |_| soak::requests();

    a_thousand_freezes_and_thaws_leave_no_trace: |build| {
        build.filesystem("ext4", "/a");
        build.filesystem("xfs", "/x");
        build.filesystem("btrfs", "/b");
    }, soak::freezes;
}

/// A small guest: programs, users, and scripts in place of what would end or change the machine.
fn system(build: &mut Build) {
    for program in ["/bin/sh", "/bin/cat", "/usr/bin/head", "/bin/sleep"] {
        assert!(build.program(program), "no {program}");
    }
    for folder in ["etc", "sbin", "home/u", "root", "var/run", "usr/lib"] {
        build.folder(folder);
    }
    let write = |path: &str, text: &str| {
        std::fs::write(build.outside(path), text).unwrap();
        let mode = std::fs::Permissions::from_mode(if text.starts_with("#!") { 0o755 } else { 0o644 });
        std::fs::set_permissions(build.outside(path), mode).unwrap();
    };
    write(
        "/etc/os-release",
        "ID=test\nNAME=\"A \\\"test\\\"\"\nVERSION_ID=1\nPRETTY_NAME='of words'\nVARIANT_ID=x\n",
    );
    write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nu:x:1234:1234:a user:/home/u:/bin/sh\n");
    write("/etc/group", "root:x:0:\nu:x:1234:\n");
    std::os::unix::fs::chown(build.outside("/home/u"), Some(1234), Some(1234)).unwrap();
    for name in ["poweroff", "halt", "reboot", "shutdown", "hwclock"] {
        write(&format!("/sbin/{name}"), "#!/bin/sh\necho \"$0 $*\" >>/run/called\n");
    }
    let chpasswd = "#!/bin/sh\n{ echo \"chpasswd $*\"; cat; } >/run/called\n\
                    while read -r line; do case $line in fails:*) echo told why >&2; exit 3;; esac; done </run/called\n";
    write("/bin/chpasswd", chpasswd);
    std::fs::write(build.outside("/var/run/utmp"), user_record("somebody", 1_700_000_000, 250_000)).unwrap();
}

/// A record of a user who is logged in. Source: utmp(5), as laid out on 64-bit machines.
fn user_record(user: &str, seconds: i32, microseconds: i32) -> Vec<u8> {
    let mut record = vec![0; 384];
    record[0] = 7; // USER_PROCESS
    record[4] = 42;
    record[8..12].copy_from_slice(b"tty1");
    record[44..44 + user.len()].copy_from_slice(user.as_bytes());
    record[340..344].copy_from_slice(&seconds.to_le_bytes());
    record[344..348].copy_from_slice(&microseconds.to_le_bytes());
    record
}

fn guest(build: &mut Build, version: &str) {
    system(build);
    stock::install(build, version);
}

fn disks(build: &mut Build, version: &str) {
    guest(build, version);
    build.filesystem("ext4", "/a");
    let device = build.filesystem("xfs", "/x");
    build.mount_again(&device, "xfs", "/second", "");
    build.filesystem("squashfs", "/sq");
}

fn ours(options: &[&str]) -> Peer {
    Peer::start("ours", &["/bin/stillpoint-agent".to_owned()], options)
}

fn same_answers(name: &str, version: Version) {
    let Some(program) = stock::program(name) else { return };
    let (mut stock, mut ours) = (Peer::start("stock", &program, &[]), ours(&[]));
    let mut tally = Tally::default();
    same_lists(&mut tally, version, &mut stock, &mut ours);
    compare::compare(&mut tally, version, &mut stock, &mut ours, &streams::all());
    let known = [stock.commands(), ours.commands()];
    for script in SCRIPTS {
        let missing: Vec<&str> = script
            .needs
            .iter()
            .copied()
            .filter(|need| known.iter().any(|known| !known.iter().any(|one| one == need)))
            .collect();
        if missing.is_empty() {
            let answers = (script.play)(&mut stock);
            tally.script(script.name, version, &answers, &(script.play)(&mut ours));
        }
        missing.iter().for_each(|command| tally.absent(command));
    }
    assert_eq!((stock.end(), ours.end()), (Some(0), Some(0)), "both end well");
    tally.conclude(Run::Answers, name, version);
}

/// guest-info: the same commands in the same order, ours before them, and no other version.
fn same_lists(tally: &mut Tally, version: Version, stock: &mut Peer, ours: &mut Peer) {
    let listed = |peer: &mut Peer| {
        let info = peer.answer("guest-info", &json!({}));
        info["return"]["supported_commands"].as_array().unwrap().clone()
    };
    let (theirs, own) = (listed(stock), listed(ours));
    let names = |list: &[Value]| -> BTreeSet<String> {
        list.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    let (known, own_known) = (names(&theirs), names(&own));
    for absent in known.difference(&own_known) {
        tally.absent(absent);
    }
    let common = |list: Vec<Value>| -> Vec<Value> {
        let both = |one: &Value| {
            one["name"].as_str().is_some_and(|name| known.contains(name) && own_known.contains(name))
        };
        list.into_iter().filter(both).collect()
    };
    let more: Vec<&String> =
        own_known.difference(&known).filter(|name| !name.starts_with("stillpoint-")).collect();
    if version >= (11, 0) {
        assert!(more.is_empty(), "the newest agent does not have {more:?}");
    }
    tally.script("guest-info", version, &common(theirs), &common(own));
}

/// Real file systems: both agents, one after the other, on the same ones.
fn same_freezes(name: &str, version: Version) {
    let Some(program) = stock::program(name) else { return };
    let mut tally = Tally::default();
    let both: Vec<BTreeSet<String>> = [Peer::start("stock", &program, &[]), ours(&[])]
        .into_iter()
        .map(|mut peer| peer.commands().into_iter().collect())
        .collect();
    let known: BTreeSet<String> = both[0].intersection(&both[1]).cloned().collect();
    let play = |mut peer: Peer| {
        let steps = [freezes(&mut peer), lists(&mut peer, &["/second"]), mounts(&mut peer, &known)];
        assert_eq!(peer.end(), Some(0));
        steps
    };
    let [theirs, own] = [play(Peer::start("stock", &program, &[])), play(ours(&[]))];
    for (part, (stock, ours)) in
        ["freezes", "freezes of /second alone", "mounts"].into_iter().zip(theirs.iter().zip(&own))
    {
        tally.script(part, version, stock, ours);
    }
    tally.conclude(Run::Freezes, name, version);
}

/// Asks, and puts each answer beside its request.
fn ask(peer: &mut Peer, requests: &[(&str, Value)]) -> Vec<Value> {
    requests
        .iter()
        .map(|(command, arguments)| json!([command, arguments, peer.answer(command, arguments)]))
        .collect()
}

/// Freezes everything; what may be asked meanwhile; then lists of every kind.
fn freezes(peer: &mut Peer) -> Vec<Value> {
    let none = || json!({});
    let mut all = ask(
        peer,
        &[
            ("guest-fsfreeze-status", none()),
            ("guest-fsfreeze-thaw", none()),
            ("guest-fsfreeze-freeze", none()),
            ("guest-fsfreeze-status", none()),
            ("guest-ping", none()),
            ("guest-fsfreeze-freeze", none()),
            ("guest-fsfreeze-freeze-list", none()),
            ("guest-get-osinfo", none()),
            ("guest-get-time", none()),
            ("guest-exec", none()),
            ("guest-get-fsinfo", none()),
            ("nope", none()),
            ("guest-sync", json!({"id": 7})),
            ("guest-ping", json!({"x": 1})),
            ("guest-fsfreeze-thaw", none()),
            ("guest-fsfreeze-status", none()),
            ("guest-fsfreeze-thaw", none()),
        ],
    );
    for list in [
        &["/a"][..],
        &["/x", "/a"],
        &["/a", "/a"],
        &["/x", "/second"],
        &["/a/"],
        &["/nope"],
        &[],
        &["/sq"],
        &["/"],
        &["a"],
        &[""],
        &["/x", "/nope", "/a"],
    ] {
        all.extend(lists(peer, list));
    }
    all
}

fn lists(peer: &mut Peer, mountpoints: &[&str]) -> Vec<Value> {
    ask(
        peer,
        &[
            ("guest-fsfreeze-freeze-list", json!({"mountpoints": mountpoints})),
            ("guest-fsfreeze-status", json!({})),
            ("guest-fsfreeze-thaw", json!({})),
        ],
    )
}

/// What else is said about the mounts; sizes change between the two.
fn mounts(peer: &mut Peer, known: &BTreeSet<String>) -> Vec<Value> {
    let commands =
        ["guest-get-fsinfo", "guest-fstrim"].into_iter().filter(|command| known.contains(*command));
    commands.map(|command| json!([command, masked(peer.answer(command, &json!({})))])).collect()
}
