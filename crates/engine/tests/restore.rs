//! Restores of a small snapshot to files, as a user asks for them.

use engine::restore::{RestoreError, check_target, to_qcow2, to_raw};
use engine::watch::{Cancel, Unwatched};
use repository::{DiskReader, Manifest, Options, Repository, Secret};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const DISK_BYTES: usize = 3 << 20;

/// A disk with data at both ends and a hole between, and its bytes.
fn disk(folder: &Path) -> (DiskReader, Vec<u8>) {
    let secret = Secret::Passphrase("correct horse battery staple".to_owned().into());
    let options = Options { cache: Some(folder.join("cache")) };
    let place = folder.join("repository");
    Repository::init(&place, &secret).expect("a temporary repository works");
    let repository = Repository::open_with(&place, &secret, &options).expect("a temporary repository works");
    let mut bytes = vec![0_u8; DISK_BYTES];
    bytes[..8192].fill(0x11);
    bytes[DISK_BYTES - 4096..].fill(0x22);
    let writer = repository.begin().expect("a temporary repository works");
    let mut disk = writer.disk(DISK_BYTES as u64, None).expect("a temporary repository works");
    disk.write(0, &bytes[..8192]).expect("a temporary repository works");
    disk.write((DISK_BYTES - 4096) as u64, &bytes[DISK_BYTES - 4096..])
        .expect("a temporary repository works");
    let (root, _) = disk.finish().expect("a temporary repository works");
    let manifest = Manifest {
        vm: "db1".to_owned(),
        parent: None,
        created_at_ms: 0,
        description: None,
        level: "crash".to_owned(),
        parts: vec![],
        definition: serde_json::Value::Null,
        receipt: serde_json::Value::Null,
    };
    writer.commit(manifest).expect("a temporary repository works");
    (repository.disk(&root), bytes)
}

#[test]
fn a_disk_comes_back_as_raw_and_as_qcow2_and_nothing_lies_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, bytes) = disk(folder.path());
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    let (raw, qcow2) = (target.join("a.raw"), target.join("a.qcow2"));
    to_raw(&disk, &raw, false, &Unwatched, &Cancel::default()).unwrap();
    assert_eq!(fs::read(&raw).unwrap(), bytes);
    to_qcow2(&disk, &qcow2, false, &Unwatched, &Cancel::default()).unwrap();
    let compare = ["compare", "-q", "-f", "raw", "-F", "qcow2"];
    let same = Command::new("qemu-img").args(compare).args([&raw, &qcow2]).status().unwrap();
    assert!(same.success(), "qcow2 holds other bytes than raw");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 2);
}

#[test]
fn a_target_that_cannot_be_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there.raw");
    fs::write(&there, "precious").unwrap();
    assert!(matches!(check_target(&there, false), Err(RestoreError::Exists(_))));
    assert!(matches!(check_target(folder.path(), true), Err(RestoreError::NotAFile(_))));
    assert!(matches!(check_target(&folder.path().join("no/a.raw"), false), Err(RestoreError::NoFolder(_))));
    check_target(&there, true).unwrap();
    check_target(&folder.path().join("new.raw"), false).unwrap();
    assert_eq!(fs::read(&there).unwrap(), b"precious");
}

#[test]
fn an_image_that_a_vm_has_open_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, _) = disk(folder.path());
    let image = folder.path().join("live.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let mut vm = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg"])
        .args(["-machine", "pc", "-device", "virtio-blk-pci,drive=live", "-blockdev"])
        .arg(format!("driver=file,node-name=live,filename={}", image.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let refused = loop {
        let refused = matches!(check_target(&image, true), Err(RestoreError::InUse(_)));
        if refused || Instant::now() >= end {
            break refused;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let restored = to_raw(&disk, &image, true, &Unwatched, &Cancel::default());
    vm.kill().unwrap();
    vm.wait().unwrap();
    assert!(refused, "QEMU's lock was not seen");
    assert!(matches!(restored, Err(RestoreError::InUse(_))), "{restored:?}");
    assert_eq!(fs::read(&image).unwrap(), vec![7; 1 << 20]);
    to_raw(&disk, &image, true, &Unwatched, &Cancel::default()).expect("it is free again");
}
