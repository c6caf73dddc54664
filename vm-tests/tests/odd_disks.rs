//! Disks that change between snapshots, and disks that look like something else: each snapshot holds what its disks held.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Command;
use vm_tests::bare::{self, fill, image, same};
use vm_tests::{Bare, BareDisk, Stillpoint};

const MIB: u64 = 1 << 20;

/// What a snapshot said of each disk's copy.
fn methods(snapshot: &Value) -> BTreeMap<String, String> {
    let disks = snapshot["disks"].as_array().expect("a list").iter();
    let word = |value: &Value| value.as_str().expect("a word").to_owned();
    disks.map(|disk| (word(&disk["name"]), word(&disk["method"]))).collect()
}

fn expect(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, method)| ((*name).to_owned(), (*method).to_owned())).collect()
}

/// Restores every disk of a snapshot, and compares it with the image that the VM has open under that name.
#[track_caller]
fn assert_equal(stillpoint: &Stillpoint, snapshot: &Value, bare: &Bare, disks: &[BareDisk]) {
    let id = snapshot["snapshot"].as_str().expect("an id");
    assert_eq!(methods(snapshot).len(), disks.len(), "{snapshot}");
    let target = |disk: &BareDisk| stillpoint.path(&format!("restored-{}", disk.id));
    let wishes: Vec<String> =
        disks.iter().map(|disk| format!("{}={}", disk.id, target(disk).display())).collect();
    let mut words = vec!["restore", id, "--overwrite"];
    words.extend(wishes.iter().flat_map(|wish| ["--disk", wish]));
    stillpoint.must(&words);
    for disk in disks {
        assert!(
            same(&target(disk), "raw", &bare.path(&disk.image), disk.format),
            "{} differs: {snapshot}",
            disk.id
        );
    }
}

#[test]
fn disks_may_be_exchanged_resized_added_and_removed_and_every_snapshot_restores_equal() {
    let folder = Bare::folder();
    let at = folder.path();
    for (name, format, pattern) in [
        ("one.qcow2", "qcow2", 0x11),
        ("two.qcow2", "qcow2", 0x22),
        ("three.raw", "raw", 0x33),
        ("four.raw", "raw", 0x44),
    ] {
        image(at, name, format, "16M");
        fill(at, name, format, pattern, 0, 12 * MIB);
    }
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let mut disks = vec![
        BareDisk::new("a", "one.qcow2", "qcow2"),
        BareDisk::new("b", "two.qcow2", "qcow2"),
        BareDisk::new("c", "three.raw", "raw"),
    ];
    let mut bare = Bare::start(folder, &disks, &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    // Each new QEMU has its sockets elsewhere.
    let restart = |bare: Bare, disks: &[BareDisk], change: &dyn Fn(&std::path::Path)| {
        let folder = bare.quit();
        change(folder.path());
        let bare = Bare::start(folder, disks, &[]);
        stillpoint.must(&["vm", "remove", "vm"]);
        stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
        bare
    };
    let snapshot = || stillpoint.must(&["snapshot", "vm"]);

    println!("-- the first, and an increment");
    let first = snapshot();
    assert_eq!(methods(&first), expect(&[("a", "full"), ("b", "full"), ("c", "full")]));
    assert_equal(&stillpoint, &first, &bare, &disks);
    bare.write("a", 0xa1, MIB, MIB);
    let second = snapshot();
    assert_eq!(methods(&second), expect(&[("a", "bitmap"), ("b", "bitmap"), ("c", "bitmap")]));
    assert_equal(&stillpoint, &second, &bare, &disks);

    println!("-- two disks exchange their names: a bitmap must not vouch for the other's data");
    bare.write("b", 0xb2, 2 * MIB, MIB);
    (disks[0].image, disks[1].image) = (disks[1].image.clone(), disks[0].image.clone());
    bare = restart(bare, &disks, &|_| ());
    bare.write("a", 0xa3, 3 * MIB, MIB);
    let exchanged = snapshot();
    assert_equal(&stillpoint, &exchanged, &bare, &disks);
    assert_eq!(methods(&exchanged), expect(&[("a", "compared"), ("b", "compared"), ("c", "compared")]));

    println!("-- they stand in another order, under their own names");
    disks.reverse();
    bare = restart(bare, &disks, &|_| ());
    bare.write("b", 0xb4, 0, MIB);
    let reordered = snapshot();
    assert_equal(&stillpoint, &reordered, &bare, &disks);
    assert_eq!(methods(&reordered), expect(&[("a", "bitmap"), ("b", "bitmap"), ("c", "compared")]));

    println!("-- grown while the VM runs");
    for (number, size) in [(0, 20 * MIB), (2, 24 * MIB + 1024)] {
        bare.command("block_resize", &json!({ "node-name": format!("n{number}"), "size": size }));
    }
    bare.write("a", 0xa5, 18 * MIB, MIB);
    bare.write("c", 0xc5, 17 * MIB, MIB);
    let grown = snapshot();
    assert_equal(&stillpoint, &grown, &bare, &disks);
    assert_eq!(methods(&grown), expect(&[("a", "compared"), ("b", "bitmap"), ("c", "compared")]));
    bare.write("a", 0xa6, 19 * MIB, 4096);
    let after = snapshot();
    assert_equal(&stillpoint, &after, &bare, &disks);
    assert_eq!(methods(&after), expect(&[("a", "bitmap"), ("b", "bitmap"), ("c", "bitmap")]));

    println!("-- shrunk, then grown again: what lay behind the cut does not come back");
    bare = restart(bare, &disks, &|at| {
        resize(at, "raw", "three.raw", 5 * MIB + 512);
        // A bitmap forbids it to qcow2, so that image is made anew.
        bare::run(Command::new("qemu-img").current_dir(at).args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "two.qcow2",
            "4M",
        ]));
    });
    let shrunk = snapshot();
    assert_equal(&stillpoint, &shrunk, &bare, &disks);
    bare = restart(bare, &disks, &|at| resize(at, "raw", "three.raw", 16 * MIB));
    bare.command("block_resize", &json!({ "node-name": "n2", "size": 16 * MIB }));
    let regrown = snapshot();
    assert_equal(&stillpoint, &regrown, &bare, &disks);

    println!("-- one is removed, one is added, one is plugged in while the VM runs");
    disks.remove(1);
    disks.push(BareDisk::new("d", "four.raw", "raw"));
    bare = restart(bare, &disks, &|at| image(at, "five.qcow2", "qcow2", "8M"));
    let node = json!({
        "driver": "qcow2", "node-name": "plugged", "file": { "driver": "file", "filename": bare.path("five.qcow2") },
    });
    bare.command("blockdev-add", &node);
    bare.command("device_add", &bare::device("e", "plugged", 9));
    bare.write("e", 0xe1, MIB, MIB);
    disks.push(BareDisk::new("e", "five.qcow2", "qcow2"));
    let added = snapshot();
    assert_equal(&stillpoint, &added, &bare, &disks);
    assert_eq!(methods(&added)["d"], "full");
    assert_eq!(methods(&added)["e"], "full");
    bare.write("e", 0xe2, 2 * MIB, MIB);
    let last = snapshot();
    assert_equal(&stillpoint, &last, &bare, &disks);
    assert_eq!(methods(&last)["e"], "bitmap");
    stillpoint.assert_sound(10);
}

fn resize(at: &std::path::Path, format: &str, name: &str, size: u64) {
    let size = size.to_string();
    bare::run(
        Command::new("qemu-img")
            .current_dir(at)
            .args(["resize", "-q", "--shrink", "-f", format, name, &size]),
    );
}

#[test]
fn a_raw_disk_that_begins_as_a_qcow2_image_stays_what_it_is() {
    let folder = Bare::folder();
    let at = folder.path();
    // A guest can write this to its own disk: an image whose backing file is the host's.
    std::fs::write(at.join("secret"), "secret of the host".repeat(8192)).expect("written");
    let backing = at.join("secret").display().to_string();
    bare::run(
        Command::new("qemu-img")
            .current_dir(at)
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &backing, "evil", "64M"]),
    );
    image(at, "d.raw", "raw", "16M");
    bare::run(Command::new("dd").current_dir(at).args([
        "if=evil",
        "of=d.raw",
        "conv=notrunc",
        "status=none",
    ]));
    let looks = bare::run(Command::new("qemu-img").current_dir(at).args(["info", "d.raw"]));
    assert!(
        looks.contains("file format: qcow2") && looks.contains("secret"),
        "whoever probes falls for it: {looks}"
    );

    let disks = [BareDisk::new("d", "d.raw", "raw")];
    let bare = Bare::start(folder, &disks, &[]);
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    let first = stillpoint.must(&["snapshot", "vm"]);
    bare.write("d", 0xd1, 8 * MIB, MIB);
    let second = stillpoint.must(&["snapshot", "vm"]);
    assert_eq!(methods(&second), expect(&[("d", "bitmap")]));
    let graph = || vm_tests::BlockGraph::of(&bare.second_qmp_socket()).expect("it answers");
    let before = graph();
    assert_equal(&stillpoint, &second, &bare, &disks);
    let id = second["snapshot"].as_str().expect("an id");
    let qcow2 = stillpoint.path("restored.qcow2");
    stillpoint.must(&["restore", id, "--format", "qcow2", "--disk", &format!("d={}", qcow2.display())]);
    assert!(same(&qcow2, "qcow2", &bare.path("d.raw"), "raw"), "as qcow2");
    assert_eq!(
        (before.count("raw"), before.count("qcow2")),
        (1, 0),
        "its own format is left as found: {before:#?}"
    );

    for id in [first["snapshot"].as_str().expect("an id"), id] {
        let twin = stillpoint.start_twin(id, std::time::Duration::from_secs(60)).expect("it boots");
        let monitor = std::path::Path::new(twin.said["monitor"].as_str().expect("a socket"));
        let mut monitor =
            vm::monitor::Monitor::connect(monitor, std::time::Duration::from_secs(60)).expect("it answers");
        let mut ask = |name: &str| {
            monitor.run_raw(name, &json!({}), std::time::Duration::from_secs(60)).expect("it answers")
        };
        let drives = ask("query-block");
        let drive = drives
            .as_array()
            .expect("a list")
            .iter()
            .find(|drive| !drive["inserted"].is_null())
            .expect("a disk");
        assert_eq!(drive["inserted"]["image"]["virtual-size"], 16 * MIB, "{drive}");
        let nodes = ask("query-named-block-nodes");
        let mut drivers: Vec<&str> =
            nodes.as_array().expect("a list").iter().filter_map(|node| node["drv"].as_str()).collect();
        drivers.sort_unstable();
        assert_eq!(drivers, ["file", "nbd", "qcow2", "raw"], "{nodes}");
        assert!(!nodes.to_string().contains("secret"), "{nodes}");
    }
    stillpoint.must(&["delete", first["snapshot"].as_str().expect("an id")]);
    assert_eq!(graph(), before, "restores, twins and deletions leave the running VM alone");
}
