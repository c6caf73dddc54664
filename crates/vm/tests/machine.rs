//! What is asked from a real QEMU about drives and definition.

mod support;

use support::{Qemu, image, run};
use vm::disks::{Bus, Left};
use vm::machine::{Accelerator, definition, drives};
use vm::monitor::{Monitor, MonitorError};

use std::process::Command;
use std::time::Duration;

#[test]
fn disks_on_every_bus_are_found_and_everything_else_is_left_out_with_its_reason() {
    let mut qemu = Qemu::start(
        |folder| {
            for name in ["a.raw", "ide.raw", "nvme.raw", "ro.raw", "cd.iso", "code.raw"] {
                image(folder, name, "raw", "4M");
            }
            image(folder, "fl.raw", "raw", "1440K");
            image(folder, "base.qcow2", "qcow2", "8M");
            image(folder, "d.qcow2", "qcow2", "16M");
            run(Command::new("qemu-img")
                .current_dir(folder)
                .args("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2".split(' ')));
        },
        &[
            "-machine",
            "q35,pflash0=code",
            "-name",
            "db1",
            "-smp",
            "2",
            "-cpu",
            "max",
            "-uuid",
            "12345678-1234-1234-1234-123456789abc",
            "-blockdev",
            "driver=raw,read-only=on,node-name=code,file.driver=file,file.filename=code.raw",
            "-drive",
            "file=a.raw,format=raw,if=virtio,id=olddrive",
            "-blockdev",
            "driver=file,filename=top.qcow2,node-name=topfile",
            "-blockdev",
            "driver=qcow2,node-name=top,file=topfile",
            "-device",
            "pcie-root-port,id=rp1,chassis=1,slot=1",
            "-device",
            "virtio-blk-pci,drive=top,id=vd1,serial=SERTOP,bus=rp1",
            "-device",
            "virtio-scsi-pci,id=scsi0,addr=0x9",
            "-blockdev",
            "driver=qcow2,node-name=d,file.driver=file,file.filename=d.qcow2",
            "-device",
            "scsi-hd,drive=d,id=sd0,bus=scsi0.0,serial=SERD",
            "-blockdev",
            "driver=raw,node-name=cd,file.driver=file,file.filename=cd.iso,read-only=on",
            "-device",
            "scsi-cd,drive=cd,id=cd0,bus=scsi0.0",
            "-device",
            "scsi-cd,id=cd1,bus=scsi0.0",
            "-blockdev",
            "driver=raw,node-name=ro,file.driver=file,file.filename=ro.raw,read-only=on",
            "-device",
            "virtio-blk-pci,drive=ro,id=ro0",
            "-drive",
            "file=ide.raw,format=raw,if=none,id=ided",
            "-device",
            "ide-hd,drive=ided,bus=ide.0,serial=SERI",
            "-drive",
            "file=nvme.raw,format=raw,if=none,id=nvmed",
            "-device",
            "nvme,drive=nvmed,serial=SERN,addr=0xa",
            "-device",
            "isa-fdc,id=fdc0",
            "-drive",
            "if=none,format=raw,file=fl.raw,id=fld",
            "-device",
            "floppy,drive=fld,bus=fdc0.0",
        ],
    );
    let mut monitor = qemu.monitor();
    let found = drives(&mut monitor).unwrap();
    let disk = |name: &str| found.disks.iter().find(|disk| disk.name == name).unwrap();
    let left = |name: &str| found.left_out.iter().find(|left| left.name == name).unwrap().why;

    assert_eq!(found.disks.len(), 5, "{found:#?}");
    let top = disk("vd1");
    assert_eq!(
        (top.node.as_str(), top.bus, top.size_bytes, top.keeps_bitmaps),
        ("top", Bus::VirtioBlk, 8 << 20, true)
    );
    assert_eq!(
        (top.serial.as_deref(), top.device.as_str()),
        (Some("SERTOP"), "/machine/peripheral/vd1/virtio-backend")
    );
    // Firmware has not run, so the bus behind the root port has no number yet.
    assert_eq!(top.pci.as_deref(), Some("0000:00:00.0"));
    let scsi = disk("sd0");
    assert_eq!(
        (scsi.bus, scsi.pci.as_deref(), scsi.serial.as_deref()),
        (Bus::Scsi, Some("0000:00:09.0"), Some("SERD"))
    );
    assert_eq!((disk("olddrive").bus, disk("olddrive").keeps_bitmaps), (Bus::VirtioBlk, false));
    assert_eq!((disk("ided").bus, disk("ided").pci.as_deref()), (Bus::Ide, Some("0000:00:1f.2")));
    assert_eq!((disk("nvmed").bus, disk("nvmed").pci.as_deref()), (Bus::Nvme, Some("0000:00:0a.0")));
    assert_eq!((left("cd0"), left("cd1"), left("fld")), (Left::Removable, Left::Removable, Left::Removable));
    assert_eq!(left("ro0"), Left::ReadOnly);
    assert!(found.left_out.iter().any(|left| left.why == Left::Firmware), "{found:#?}");

    let definition = definition(&mut monitor).unwrap();
    assert!(definition.machine.starts_with("pc-q35-"), "{definition:?}");
    assert_eq!(
        (definition.cpus, definition.memory_bytes, definition.accelerator),
        (2, 64 << 20, Accelerator::Tcg)
    );
    assert_eq!((definition.cpu_model.as_str(), definition.name.as_deref()), ("max", Some("db1")));
    assert_eq!(definition.uuid.as_deref(), Some("12345678-1234-1234-1234-123456789abc"));
    assert_eq!(definition.boot.flash.len(), 1);
    let code = &definition.boot.flash[0];
    assert!(code.read_only && code.is_plain(), "{code:?}");
    // QEMU was given it relative to its own folder.
    let file = std::path::Path::new(&code.file);
    assert!(file.is_absolute() && file.ends_with("code.raw") && file.is_file(), "{code:?}");
}

#[test]
fn the_schema_of_a_real_qemu_shows_what_a_point_needs() {
    let mut qemu = Qemu::start(|_| (), &[]);
    let schema = qemu.monitor().schema().unwrap();
    for command in
        ["transaction", "block-export-add", "blockdev-create", "qom-set", "query-named-block-nodes"]
    {
        assert!(schema.has_command(command), "{command}");
    }
    assert!(schema.has_driver("copy-before-write") && schema.has_driver("snapshot-access"));
    assert!(schema.has_driver_option("copy-before-write", "on-cbw-error"));
    assert!(schema.exports_foreign_bitmaps() && schema.has_transaction_action("block-dirty-bitmap-merge"));
    assert!(!schema.has_driver("no-such-driver") && !schema.has_transaction_action("no-such-action"));
}

#[test]
fn a_monitor_that_another_client_holds_is_reported_as_busy_in_time() {
    let mut qemu = Qemu::start(|_| (), &[]);
    let _first = qemu.monitor();
    for _ in 0..3 {
        let error = Monitor::connect(&qemu.socket(), Duration::from_millis(300)).unwrap_err();
        assert!(matches!(error, MonitorError::Busy { .. }), "{error:?}");
    }
}

#[test]
fn a_qemu_that_ends_is_reported_with_the_command_that_was_under_way() {
    let mut qemu = Qemu::start(|_| (), &[]);
    let mut monitor = qemu.monitor();
    monitor.run(&qmp::machine::Quit {}).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let error = monitor.run(&qmp::machine::QueryStatus {}).unwrap_err();
    assert!(matches!(error, MonitorError::Closed { .. } | MonitorError::Io(_)), "{error:?}");
}
