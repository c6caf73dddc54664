//! A twin started for real: closed in, unprivileged, over a snapshot that it cannot change.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{device_io, image, run};
use vm::disks::Bus;
use vm::machine::{Accelerator, drives};
use vm::twin::{Family, Machine, Twin, TwinBoot, TwinDisk, TwinError, TwinFolder, TwinSpec, User};

const LIMIT: Duration = Duration::from_secs(60);
/// A boot sector that writes `twin` to the first serial port and halts.
const BOOT: &[u8] = &[
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b't', 0xee, 0xb0, b'w', 0xee, 0xb0, b'i', 0xee, 0xb0, b'n', 0xee, // out dx, al, four times
    0xf4, 0xeb, 0xfd, // hlt for ever
];

/// The snapshot, served by another program under export names `a` and `b`.
struct Snapshot {
    servers: Vec<Child>,
    folder: tempfile::TempDir,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        for server in &mut self.servers {
            server.kill().ok();
            server.wait().ok();
        }
    }
}

fn snapshot() -> Snapshot {
    let folder = tempfile::tempdir().unwrap();
    // The twin's user has to get through to its own folder within.
    run(Command::new("chmod").arg("755").arg(folder.path()));
    image(folder.path(), "a.raw", "raw", "8M");
    let mut sector = vec![0; 512];
    sector[..BOOT.len()].copy_from_slice(BOOT);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(folder.path().join("sector"), sector).unwrap();
    run(Command::new("dd").current_dir(folder.path()).args([
        "if=sector",
        "of=a.raw",
        "conv=notrunc",
        "status=none",
    ]));
    Snapshot { servers: vec![], folder }
}

impl Snapshot {
    fn serve(&mut self, image: &str, socket: &Path) {
        let server = Command::new("qemu-nbd")
            .current_dir(self.folder.path())
            .args([
                "--read-only",
                "--persistent",
                "--shared=0",
                "--format=raw",
                "--export-name=e",
                "--socket",
            ])
            .args([socket.as_os_str(), image.as_ref()])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd (package qemu-utils) is needed");
        self.servers.push(server);
        let deadline = Instant::now() + LIMIT;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn digest(&self) -> String {
        run(Command::new("sha256sum").current_dir(self.folder.path()).arg("a.raw"))
    }
}

fn spec(bus: Bus) -> TwinSpec {
    TwinSpec {
        machine: Machine { family: Family::Q35, version: None },
        accelerator: Accelerator::Tcg,
        cpus: 1,
        memory_bytes: 64 << 20,
        boot: TwinBoot::Bios,
        disks: vec![TwinDisk { export: "e".into(), size_bytes: 8 << 20, bus, serial: Some("S1".into()) }],
    }
}

fn start(snapshot: &mut Snapshot, name: &str, spec: &TwinSpec) -> Twin {
    let folder = TwinFolder::create(&snapshot.folder.path().join(name), User::unprivileged()).unwrap();
    snapshot.serve("a.raw", &folder.files().nbd());
    Twin::start(Path::new("qemu-system-x86_64"), spec, &folder, LIMIT).unwrap()
}

fn status(pid: u32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_twin_boots_from_the_snapshot_on_every_bus() {
    let mut snapshot = snapshot();
    for (name, bus) in [("v", Bus::VirtioBlk), ("s", Bus::Scsi), ("i", Bus::Ide), ("n", Bus::Nvme)] {
        let mut twin = start(&mut snapshot, name, &spec(bus));
        let deadline = Instant::now() + LIMIT;
        while !twin.console_tail().contains("twin") {
            twin.check_alive().unwrap();
            assert!(Instant::now() < deadline, "{bus:?}: {:?}", twin.console_tail());
            std::thread::sleep(Duration::from_millis(20));
        }
        let found = drives(&mut twin.monitor(LIMIT).unwrap()).unwrap();
        assert_eq!(found.disks.len(), 1, "{found:#?}");
        assert_eq!((found.disks[0].bus, found.disks[0].serial.as_deref()), (bus, Some("S1")));
        twin.kill().unwrap();
    }
}

#[test]
fn a_twin_is_unprivileged_and_sandboxed_and_ends_with_its_value() {
    let mut snapshot = snapshot();
    let twin = start(&mut snapshot, "t", &spec(Bus::VirtioBlk));
    let pid = twin.pid();
    assert_eq!(status(pid, "Seccomp"), "2", "a filter is in force");
    assert_eq!(status(pid, "CapEff").trim_start_matches('0'), "", "no capability");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    if rustix::process::geteuid().is_root() {
        let uid: u32 = status(pid, "Uid").parse().unwrap();
        assert!(uid != 0 && std::fs::metadata(twin.files().folder()).unwrap().uid() == uid);
    }
    drop(twin);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_twin_ends_with_whoever_started_it_even_if_nobody_drops_it() {
    let mut snapshot = snapshot();
    let pid = std::thread::scope(|scope| {
        let starter = scope.spawn(|| {
            let twin = start(&mut snapshot, "twin", &spec(Bus::VirtioBlk));
            let pid = twin.pid();
            std::mem::forget(twin); // as a killed program would
            pid
        });
        starter.join().unwrap()
    });
    let limit = Instant::now() + LIMIT;
    let dead =
        || std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    while !dead() {
        assert!(Instant::now() < limit, "the twin {pid} lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_a_twin_writes_stays_in_its_overlay() {
    let mut snapshot = snapshot();
    let before = snapshot.digest();
    let mut twin = start(&mut snapshot, "t", &spec(Bus::VirtioBlk));
    let mut monitor = twin.monitor(LIMIT).unwrap();
    device_io(&mut monitor, "/machine/peripheral/d0/virtio-backend", "write -P 0xee 1M 1M");
    device_io(&mut monitor, "/machine/peripheral/d0/virtio-backend", "flush");
    let overlay = twin.files().overlay(0);
    assert!(std::fs::metadata(&overlay).unwrap().len() > 1 << 20, "the write is in the overlay");
    drop(monitor);
    drop(twin);
    assert_eq!(snapshot.digest(), before);
}

#[test]
fn a_twin_that_cannot_start_says_why_in_qemus_words() {
    let snapshot = snapshot();
    let folder = TwinFolder::create(&snapshot.folder.path().join("t"), User::unprivileged()).unwrap();
    let error =
        Twin::start(Path::new("qemu-system-x86_64"), &spec(Bus::VirtioBlk), &folder, LIMIT).unwrap_err();
    assert!(matches!(&error, TwinError::Ended { log, .. } if log.contains("nbd")), "{error}");
    let error = Twin::start(Path::new("/no/such/qemu"), &spec(Bus::VirtioBlk), &folder, LIMIT).unwrap_err();
    assert!(matches!(error, TwinError::Start { .. } | TwinError::Overlay(_)), "{error}");
}

#[test]
fn the_folder_of_a_twin_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let mut snapshot = snapshot();
    let twin = start(&mut snapshot, "t", &spec(Bus::VirtioBlk));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(twin.files().folder()), 0o700);
    assert_eq!(mode(&twin.files().overlay(0)), 0o600);
}
