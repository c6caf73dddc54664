//! The point while a real guest writes through its own drivers: the cut is one instant over both disks.
//!
//! The guest is a boot sector. It counts, and writes each number first to one disk and then to the other, through the
//! firmware's virtio-blk and virtio-scsi drivers. So at every instant the first disk's number is the second's or one
//! more; anything else is a torn cut.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod support;

use qmp::machine::QueryStatus;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use support::{Qemu, image, run};
use vm::machine::drives;
use vm::monitor::Monitor;
use vm::point::steps::Step;
use vm::point::{self, DiskExport, DiskRequest, Outcome, Plan, Request, release};

/// 16-bit code at 0x7c00: counts in the first word of a sector at 0x600 and writes it to block 8 of drives 0x80 and
/// 0x81 in turn (interrupt 0x13, function 0x43), for ever.
const COUNTER: [u8; 50] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xa3, 0x00, 0x06, 0x66, 0xff, 0x06, 0x00, 0x06, 0xb2, 0x80, 0xe8, 0x07,
    0x00, 0xb2, 0x81, 0xe8, 0x02, 0x00, 0xeb, 0xef, 0xbe, 0x22, 0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13, 0xc3,
    0x10, 0x00, 0x01, 0x00, 0x00, 0x06, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
/// Where the guest writes, in bytes.
const AT: usize = 8 * 512;

fn counting() -> (Qemu, Monitor) {
    let prepare = |folder: &Path| {
        image(folder, "a.raw", "raw", "1M");
        image(folder, "b.qcow2", "qcow2", "1M");
        let mut sector = [0; 512];
        sector[..COUNTER.len()].copy_from_slice(&COUNTER);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(folder.join("sector"), sector).unwrap();
        run(Command::new("dd").current_dir(folder).args([
            "if=sector",
            "of=a.raw",
            "conv=notrunc",
            "status=none",
        ]));
    };
    let arguments = "-machine pc -drive file=a.raw,format=raw,if=none,id=a -device virtio-blk-pci,drive=a,id=vd0,bootindex=0 \
        -blockdev driver=file,filename=b.qcow2,node-name=bfile -blockdev driver=qcow2,node-name=b,file=bfile \
        -device virtio-scsi-pci,id=scsi0 -device scsi-hd,drive=b,id=sd0,bus=scsi0.0,bootindex=1";
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    let mut qemu = Qemu::start(prepare, &arguments);
    let mut monitor = qemu.monitor();
    monitor.run(&qmp::machine::Cont {}).unwrap();
    // Writes on the second disk show that both drivers work.
    let deadline = Instant::now() + Duration::from_secs(60);
    while writes(&mut monitor) < 20 {
        assert!(Instant::now() < deadline, "the guest does not write: {}", qemu.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    (qemu, monitor)
}

/// How many writes the second disk has seen.
fn writes(monitor: &mut Monitor) -> u64 {
    let stats = monitor.run_raw("query-blockstats", &serde_json::json!({}), Duration::from_secs(20)).unwrap();
    let second = stats.as_array().unwrap().iter().find(|stats| stats["qdev"] == "sd0").unwrap();
    second["stats"]["wr_operations"].as_u64().unwrap()
}

fn plan(qemu: &Qemu, monitor: &mut Monitor, snapshot: &str, parent: Option<&str>) -> Plan {
    let base = |number| parent.map(|parent| point::plan::bitmap_name("repo", parent, number));
    let disks = drives(monitor).unwrap().disks.into_iter().enumerate();
    Plan::new(&Request {
        tag: "abcd1234".into(),
        repository: "repo".into(),
        snapshot: snapshot.into(),
        folder: qemu.path("scratch"),
        cbw_timeout_s: 10,
        running: true,
        disks: disks
            .map(|(number, disk)| DiskRequest { disk, base: base(number), only_base: false })
            .collect(),
    })
    .unwrap()
}

/// The numbers on both disks at the point.
fn numbers(qemu: &Qemu, plan: &Plan, exports: &[DiskExport]) -> (u32, u32) {
    let read = |export: &DiskExport| {
        let uri = format!("nbd+unix:///{}?socket={}", export.export, plan.socket.display());
        let copy = qemu.path("copy.raw");
        run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&copy));
        let bytes = std::fs::read(copy).unwrap();
        u32::from_le_bytes(bytes[AT..AT + 4].try_into().unwrap())
    };
    let by_name = |name: &str| exports.iter().find(|export| export.disk == name).unwrap();
    (read(by_name("vd0")), read(by_name("sd0")))
}

#[test]
fn both_disks_are_cut_in_one_instant_again_and_again() {
    let (qemu, mut monitor) = counting();
    let mut last = 0;
    let mut parent: Option<String> = None;
    for round in 0..6 {
        let snapshot = format!("s{round}");
        let plan = plan(&qemu, &mut monitor, &snapshot, parent.as_deref());
        let prepared = point::prepare(&mut monitor, &plan).unwrap();
        let before = writes(&mut monitor);
        let cut = prepared.cut(&mut monitor, Duration::from_secs(20), || ()).unwrap();
        let exports = point::export(&mut monitor, &plan).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while writes(&mut monitor) < before + 20 {
            assert!(Instant::now() < deadline, "the guest no longer writes");
            std::thread::sleep(Duration::from_millis(10));
        }
        let (first, second) = numbers(&qemu, &plan, &exports);
        println!("cut at {first} and {second}, vCPUs stopped for {:?}", cut.stopped);
        assert!(first == second || first == second + 1, "torn: {first} and {second}");
        assert!(second > last, "the guest counts on: {second} after {last}");
        last = second;
        release(&mut monitor, &plan, Outcome::Kept).unwrap();
        parent = Some(snapshot);
    }
    assert!(monitor.run(&QueryStatus {}).unwrap().running);
}

#[test]
fn a_guest_that_is_reset_during_the_copy_harms_neither_itself_nor_the_snapshot() {
    let (mut qemu, mut monitor) = counting();
    let plan = plan(&qemu, &mut monitor, "s1", None);
    let prepared = point::prepare(&mut monitor, &plan).unwrap();
    prepared.cut(&mut monitor, Duration::from_secs(20), || ()).unwrap();
    let exports = point::export(&mut monitor, &plan).unwrap();
    let (first, second) = numbers(&qemu, &plan, &exports);
    monitor.run_raw("system_reset", &serde_json::json!({}), Duration::from_secs(20)).unwrap();
    // After the reset the guest counts from 1 again, over the numbers that the snapshot keeps.
    let before = writes(&mut monitor);
    let deadline = Instant::now() + Duration::from_secs(60);
    while writes(&mut monitor) < before + 20 {
        assert!(Instant::now() < deadline, "the guest does not write after its reset");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(numbers(&qemu, &plan, &exports), (first, second));
    release(&mut monitor, &plan, Outcome::Kept).unwrap();
    assert!(qemu.is_alive() && monitor.run(&QueryStatus {}).unwrap().running);
}

#[test]
fn a_cut_without_the_stop_is_torn_so_the_test_above_can_fail() {
    let (qemu, mut monitor) = counting();
    let plan = plan(&qemu, &mut monitor, "s1", None);
    for step in plan.prepare_steps() {
        step.run(&mut monitor).unwrap();
    }
    for step in plan.cut_steps() {
        step.run(&mut monitor).unwrap();
        if matches!(step, Step::SetDrive { .. }) {
            let seen = writes(&mut monitor);
            let deadline = Instant::now() + Duration::from_secs(20);
            while writes(&mut monitor) < seen + 20 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    for step in plan.export_steps() {
        step.run(&mut monitor).unwrap();
    }
    let (first, second) = numbers(&qemu, &plan, &plan.exports());
    assert!(first.abs_diff(second) > 5, "{first} and {second}");
    release(&mut monitor, &plan, Outcome::Dropped).unwrap();
}
