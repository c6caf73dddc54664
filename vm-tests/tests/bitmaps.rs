//! What a run knows of the writes since the last one, after QEMU ended and started again; and two runs at once.

use serde_json::Value;
use std::time::Duration;
use vm_tests::{Disk, DiskFormat, Guest, Image, Stillpoint};

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_qcow2_disk_keeps_its_bitmap_over_a_clean_shutdown_and_a_raw_one_is_compared() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = Image::get();
    let disk = |name, base: &std::path::Path, format| {
        Disk::fresh(name, base, format, folder.path()).expect("a disk")
    };
    let disks =
        vec![disk("root", &image.root(), DiskFormat::Qcow2), disk("data", &image.data(), DiskFormat::Raw)];
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let start = |disks: Vec<Disk>| {
        let guest =
            Guest::builder().disks(disks).append("stillpoint.postgresql=off").start().expect("QEMU starts");
        println!("our agent after {:.1?}", guest.agent_ready(LIMIT));
        guest.booted(LIMIT);
        guest.start_writers();
        guest.writes_go_on(LIMIT);
        guest
    };
    let register = |guest: &Guest| {
        stillpoint.register("db1", &guest.qmp_socket(), Some(&guest.agent_socket())).expect("registered");
    };
    let guest = start(disks.clone());
    register(&guest);

    println!("-- two runs at once");
    let first = stillpoint.start(&["snapshot", "db1"]).expect("it starts");
    std::thread::sleep(Duration::from_millis(1500));
    let second = stillpoint.run(&["snapshot", "db1"]).expect("it ends");
    println!("{}", second.stderr.trim_end());
    second.assert_refused(8, "db1");
    let full = first.wait().and_then(vm_tests::Ended::success).expect("the first is not disturbed");
    assert_eq!(methods(&full), ["full", "full"], "{full}");

    println!("-- a clean shutdown");
    println!("powered off in {:.1?}", guest.power_off(LIMIT));
    let off = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(methods(&off), ["bitmap", "compared"], "{off}");
    assert_eq!((&off["level"], &off["parent"]), (&"crash".into(), &full["snapshot"]), "{off}");
    let guest = start(disks.clone());
    stillpoint.must(&["vm", "remove", "db1"]);
    register(&guest);
    let increment = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(increment["parent"], full["snapshot"]);
    assert_eq!(methods(&increment), ["bitmap", "compared"], "{increment}");
    for disk in increment["disks"].as_array().expect("a list") {
        let stored = disk["stored_bytes"].as_u64().expect("a number");
        println!(
            "{}: {} of {} bytes read, {stored} stored",
            disk["name"], disk["read_bytes"], disk["size_bytes"]
        );
        assert!(stored < 16 << 20, "both are small in the store: {disk}");
    }

    println!("-- QEMU is killed: a bitmap on disk cannot be relied on");
    let (_folder, _) = guest.kill();
    let guest = start(disks);
    stillpoint.must(&["vm", "remove", "db1"]);
    register(&guest);
    let after_kill = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(methods(&after_kill), ["compared", "compared"], "{after_kill}");
    stillpoint.assert_sound(4);
}

fn methods(snapshot: &Value) -> Vec<&str> {
    let disks = snapshot["disks"].as_array().expect("a list");
    disks.iter().map(|disk| disk["method"].as_str().expect("a word")).collect()
}
