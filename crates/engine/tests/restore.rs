//! Restores of a small snapshot to files, as a user asks for them.

use engine::restore::{RestoreError, Target, to_qcow2, to_raw};
use engine::watch::{Cancel, Unwatched, Watch};
use repository::{DiskReader, Manifest, Options, Repository, Secret};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Once;
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

type Restore = fn(&DiskReader, Target, &dyn Watch, &Cancel) -> Result<(), RestoreError>;

fn restore(
    how: Restore,
    disk: &DiskReader,
    path: &Path,
    overwrite: bool,
    watch: &dyn Watch,
    cancel: &Cancel,
) -> Result<(), RestoreError> {
    how(disk, Target::claim(path, overwrite)?, watch, cancel)
}

#[test]
fn a_disk_comes_back_as_raw_and_as_qcow2_and_nothing_lies_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, bytes) = disk(folder.path());
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    let (raw, qcow2) = (target.join("a.raw"), target.join("a.qcow2"));
    restore(to_raw, &disk, &raw, false, &Unwatched, &Cancel::default()).unwrap();
    assert_eq!(fs::read(&raw).unwrap(), bytes);
    restore(to_qcow2, &disk, &qcow2, false, &Unwatched, &Cancel::default()).unwrap();
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
    assert!(matches!(Target::claim(&there, false), Err(RestoreError::Exists(_))));
    assert!(matches!(Target::claim(folder.path(), true), Err(RestoreError::NotAFile(_))));
    assert!(matches!(Target::claim(&folder.path().join("no/a.raw"), false), Err(RestoreError::NoFolder(_))));
    Target::claim(&there, true).map(drop).unwrap();
    Target::claim(&folder.path().join("new.raw"), false).map(drop).unwrap();
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
        let refused = matches!(Target::claim(&image, true), Err(RestoreError::InUse(_)));
        if refused || Instant::now() >= end {
            break refused;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let restored = restore(to_raw, &disk, &image, true, &Unwatched, &Cancel::default());
    vm.kill().unwrap();
    vm.wait().unwrap();
    assert!(refused, "QEMU's lock was not seen");
    assert!(matches!(restored, Err(RestoreError::InUse(_))), "{restored:?}");
    assert_eq!(fs::read(&image).unwrap(), vec![7; 1 << 20]);
    restore(to_raw, &disk, &image, true, &Unwatched, &Cancel::default()).expect("it is free again");
}

/// Does something once while a disk is written.
struct Meanwhile<'d>(&'d (dyn Fn() + Sync), Once);

impl Watch for Meanwhile<'_> {
    fn step(&self, _name: &str) {}

    fn progress(&self, _done_bytes: u64, _total_bytes: u64) {
        self.1.call_once(self.0);
    }
}

/// How many files a folder holds.
fn files(folder: &Path) -> usize {
    fs::read_dir(folder).expect("it is there").count()
}

#[test]
fn no_vm_can_be_started_on_an_image_that_is_being_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, bytes) = disk(folder.path());
    let image = folder.path().join("old.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let open = || {
        let ended = Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write -P 9 0 512"])
            .arg(&image)
            .output()
            .expect("qemu-io comes with QEMU");
        (ended.status.success(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    let attempt = std::sync::Mutex::new(None);
    let meanwhile = || *attempt.lock().unwrap() = Some(open());
    // What is only looked at beforehand, by path, must not let go of it.
    Target::claim(&image, true).map(drop).unwrap();
    restore(to_raw, &disk, &image, true, &Meanwhile(&meanwhile, Once::new()), &Cancel::default()).unwrap();
    let (opened, said) = attempt.into_inner().unwrap().expect("it was tried");
    assert!(!opened && said.contains("lock"), "{said}");
    assert_eq!(fs::read(&image).unwrap(), bytes);
    assert!(open().0, "it is free afterwards");
}

#[test]
fn what_appears_at_a_target_while_the_disk_is_written_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, _) = disk(folder.path());
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    let image = target.join("a.raw");
    let put = || fs::write(&image, "precious").unwrap();
    for overwrite in [false, true] {
        let restored =
            restore(to_raw, &disk, &image, overwrite, &Meanwhile(&put, Once::new()), &Cancel::default());
        assert!(matches!(restored, Err(RestoreError::Exists(_))), "{restored:?}");
        assert_eq!((fs::read(&image).unwrap(), files(&target)), (b"precious".to_vec(), 1));
        fs::remove_file(&image).unwrap();
    }
    let restored = restore(to_qcow2, &disk, &image, false, &Meanwhile(&put, Once::new()), &Cancel::default());
    assert!(matches!(restored, Err(RestoreError::Exists(_))), "{restored:?}");
    assert_eq!(fs::read(&image).unwrap(), b"precious");

    // Nor one that came in the place of what was to be replaced.
    let exchange = || {
        fs::write(target.join("new"), "of somebody else").unwrap();
        fs::rename(target.join("new"), &image).unwrap();
    };
    let restored =
        restore(to_raw, &disk, &image, true, &Meanwhile(&exchange, Once::new()), &Cancel::default());
    assert!(matches!(restored, Err(RestoreError::Changed(_))), "{restored:?}");
    assert_eq!((fs::read(&image).unwrap(), files(&target)), (b"of somebody else".to_vec(), 1));
}

#[test]
fn a_replaced_image_keeps_its_owner_and_mode() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, bytes) = disk(folder.path());
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("not root: the owner is not looked at");
    }
    for (name, qcow2) in [("a.raw", false), ("a.qcow2", true)] {
        let image = folder.path().join(name);
        fs::write(&image, "old").unwrap();
        if root {
            std::os::unix::fs::chown(&image, Some(1), Some(2)).unwrap();
        }
        fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).unwrap();
        let before = fs::metadata(&image).unwrap();
        if qcow2 {
            restore(to_qcow2, &disk, &image, true, &Unwatched, &Cancel::default()).unwrap();
        } else {
            restore(to_raw, &disk, &image, true, &Unwatched, &Cancel::default()).unwrap();
            assert_eq!(fs::read(&image).unwrap(), bytes);
        }
        let after = fs::metadata(&image).unwrap();
        let rights = |facts: &fs::Metadata| (facts.uid(), facts.gid(), facts.mode());
        assert_eq!(rights(&after), rights(&before), "{name}");
        assert_ne!(after.ino(), before.ino(), "{name} was replaced");
    }
    // A new one is its maker's alone.
    let new = folder.path().join("new.raw");
    restore(to_raw, &disk, &new, false, &Unwatched, &Cancel::default()).unwrap();
    assert_eq!(fs::metadata(&new).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_target_is_held_from_the_claim_on_and_by_one_claim_only() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, bytes) = disk(folder.path());
    let [one, two] = ["one.raw", "two.raw"].map(|name| folder.path().join(name));
    for image in [&one, &two] {
        fs::write(image, "old").unwrap();
    }
    let targets = [&one, &two].map(|image| Target::claim(image, true).unwrap());
    // The same file by another name would be two disks in one place.
    std::os::unix::fs::symlink(&two, folder.path().join("link")).unwrap();
    assert!(matches!(Target::claim(&folder.path().join("link"), true), Err(RestoreError::InUse(_))));
    let [first, second] = targets;
    to_raw(&disk, first, &Unwatched, &Cancel::default()).unwrap();
    // A VM that has both disks does not start yet.
    assert!(matches!(Target::claim(&two, true), Err(RestoreError::InUse(_))));
    to_raw(&disk, second, &Unwatched, &Cancel::default()).unwrap();
    Target::claim(&two, true).map(drop).unwrap();
    assert!([one, two].iter().all(|image| fs::read(image).unwrap() == bytes));
}
