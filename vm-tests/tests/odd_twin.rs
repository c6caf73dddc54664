//! Stored definitions full of traps: a twin boots from its own disks, and reaches nothing else.

use repository::{Manifest, Part, Repository, Role, Secret, Writer};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vm::monitor::Monitor;
use vm_tests::{Image, Stillpoint, Twin};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// A word that may appear nowhere but where it was put.
const TRAP: &str = "trap";

/// What a trap would reach if it closed: a listening socket, and a file that only root reads.
struct Traps {
    socket: UnixListener,
    folder: tempfile::TempDir,
}

impl Traps {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix(TRAP).tempdir().expect("a folder");
        let private = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(folder.path().join("disk.raw"));
        private.and_then(|mut file| file.write_all(&[0x55; 4096])).expect("written");
        let socket = UnixListener::bind(folder.path().join("socket")).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        Self { socket, folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Options of QEMU that would reach them, as a text in a definition.
    fn options(&self) -> String {
        format!(
            ",if=none -drive file={0},format=raw,if=virtio -chardev socket,id=t,path={1} -netdev user,id=n -device e1000,netdev=n \
             -virtfs local,path=/,mount_tag=trap,security_model=none -device vfio-pci,host=00:00.0 -monitor unix:{1},server \
             \"}}' \n -incoming unix:{1} \u{1b}[2J",
            self.path("disk.raw"),
            self.path("socket"),
        )
    }

    fn assert_untouched(&self) {
        let error = self.socket.accept().map(drop).expect_err("somebody connected to the trap");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}

/// A definition as a snapshot of today would hold it, and with everything in it that one might wish to be used.
fn definition(traps: &Traps) -> Value {
    json!({
        "name": traps.options(), "uuid": traps.options(), "machine": "pc-q35-7.2", "accelerator": "kvm",
        "cpu_model": format!("host{}", traps.options()), "cpus": 1, "memory_bytes": 128 * MIB,
        "boot": {
            "kernel": traps.path("disk.raw"), "initrd": traps.path("disk.raw"),
            "append": format!("console=ttyS0 panic=-1 init=/{TRAP} {}", traps.options().replace('\n', " ")),
            "flash": [{ "file": traps.path("disk.raw"), "format": "qcow2", "size_bytes": 4096, "read_only": false }],
        },
        "qemu_version": traps.options(),
        "sockets": [{ "path": traps.path("socket") }], "shares": [{ "path": "/", "tag": TRAP }],
        "devices": [traps.options()], "arguments": ["-drive", traps.path("disk.raw")], "agent": traps.path("socket"),
        "qmp": traps.path("socket"), "netdev": [{ "type": "user" }], "hostdev": ["0000:00:00.0"],
    })
}

/// A boot sector that reads nothing else and halts.
fn boot_sector() -> Vec<u8> {
    let mut sector = vec![0; 4096];
    sector[..3].copy_from_slice(&[0xf4, 0xeb, 0xfd]);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn part(writer: &Writer, name: &str, role: Role, facts: &[(&str, &str)]) -> Part {
    let mut disk = writer.disk(MIB, None).expect("a disk");
    disk.write(0, &boot_sector()).expect("written");
    let (root, _) = disk.finish().expect("written");
    let facts = facts.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Part { name: name.to_owned(), role, size_bytes: MIB, root, facts }
}

fn file(writer: &Writer, role: Role, path: &Path) -> Part {
    let bytes = std::fs::read(path).expect("it is there");
    let root = writer.blob(&bytes).expect("stored");
    Part { name: format!("../../{TRAP}"), role, size_bytes: bytes.len() as u64, root, facts: BTreeMap::new() }
}

fn commit(stillpoint: &Stillpoint, definition: Value, parts: impl FnOnce(&Writer) -> Vec<Part>) -> String {
    let secret = Secret::KeyFile(stillpoint.path("key"));
    let repository = Repository::open(&stillpoint.repository(), &secret).expect("it opens");
    let writer = repository.begin().expect("a writer");
    let manifest = Manifest {
        vm: "crafted".to_owned(),
        parent: None,
        created_at_ms: 1_700_000_000_000,
        description: None,
        level: "clean".to_owned(),
        parts: parts(&writer),
        definition,
        receipt: json!({}),
    };
    writer.commit(manifest).expect("committed").to_string()
}

#[test]
fn a_definition_full_of_traps_boots_its_own_disks_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        let told = writeln!(io::stderr(), "SKIPPED: without root, twins run as the user who started them");
        return told.expect("standard error is there");
    }
    let traps = Traps::new();
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let hostile = traps.options();
    let disks = |writer: &Writer| {
        vec![
            part(
                writer,
                &hostile,
                Role::Disk,
                &[("serial", &hostile), ("bus", &hostile), ("format", "qcow2"), ("file", &hostile)],
            ),
            part(writer, "../../../etc/shadow", Role::Disk, &[("serial", "a,b=c"), ("bus", "scsi")]),
            // The same name twice: each is served its own content all the same.
            part(writer, "../../../etc/shadow", Role::Disk, &[("serial", "\u{1b}\u{0}"), ("bus", "nvme")]),
        ]
    };
    let image = Image::get();
    let with_kernel = commit(&stillpoint, definition(&traps), |writer| {
        let mut parts = disks(writer);
        parts.push(file(writer, Role::Kernel, &image.kernel()));
        parts.push(file(writer, Role::Initrd, &image.initrd()));
        parts
    });
    let mut bios = definition(&traps);
    bios["boot"] = json!({});
    bios["machine"] = "pc".into();
    let with_bios = commit(&stillpoint, bios, disks);

    let twins = [&with_kernel, &with_bios].map(|id| stillpoint.start_twin(id, LIMIT).expect("it boots"));
    for (number, twin) in twins.iter().enumerate() {
        let pid = twin.said["pid"].as_u64().expect("a process");
        let folder = PathBuf::from(twin.said["folder"].as_str().expect("a folder"));
        println!("-- twin {number}: process {pid}, {}", folder.display());
        assert_process(pid, &folder);
        assert_command_line(pid, &folder, number == 0);
        assert_devices(twin, number == 0);
    }
    traps.assert_untouched();

    println!("-- the two have nothing of each other, nor of root");
    let facts = twins.each_ref().map(|twin| {
        let pid = twin.said["pid"].as_u64().expect("a process");
        (
            pid,
            ids(pid, "Uid")[0],
            ids(pid, "Gid")[0],
            twin.said["folder"].as_str().expect("a folder").to_owned(),
        )
    });
    let [(one, uid, gid, mine), (other, other_uid, _, theirs)] = facts;
    assert_ne!(uid, other_uid);
    let as_first = |script: &str| {
        let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={gid}"));
        let words = [&*uid, &gid, "--clear-groups", "--no-new-privs", "sh", "-c", script];
        Command::new("setpriv").args(words).output().expect("setpriv (package util-linux)").status.success()
    };
    assert!(
        as_first(&format!("kill -0 {one} && cat {mine}/disk-0.qcow2 >/dev/null")),
        "what is its own it has"
    );
    for script in [
        format!("kill -0 {other}"),
        format!("cat {theirs}/disk-0.qcow2"),
        format!("ls {theirs}"),
        format!("cat /proc/{other}/environ"),
        format!("cat {}", stillpoint.path("key").display()),
        format!("ls {}", stillpoint.repository().display()),
        format!("ls {}", stillpoint.state().display()),
        format!("cat {}", traps.path("disk.raw")),
    ] {
        assert!(!as_first(&script), "{script}");
    }
    let folders = [mine, theirs];
    drop(twins);
    assert!(!folders.iter().any(|folder| Path::new(folder).exists()), "their folders end with them");
}

#[test]
fn what_cannot_be_a_twin_is_refused_and_leaves_nothing() {
    let traps = Traps::new();
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    type Change<'t> = (&'t str, &'t str, Value);
    let append = |text: &str| json!({ "kernel": "k", "append": text });
    let changes: [Change<'_>; 11] = [
        ("machine", "/machine", "q35,accel=kvm,kernel=/etc/shadow".into()),
        ("machine", "/machine", "microvm".into()),
        ("machine", "/machine", "q35\n-drive".into()),
        ("machine", "/machine", "pc-q35-7.2,usb=on".into()),
        ("vCPUs", "/cpus", 0.into()),
        ("vCPUs", "/cpus", u32::MAX.into()),
        ("understood", "/cpus", (-1).into()),
        ("memory", "/memory_bytes", 0.into()),
        ("command line", "/boot", append("a\0b")),
        ("command line", "/boot", append(&"x".repeat(4096))),
        ("firmware", "/boot/kernel", Value::Null),
    ];
    let started = |id: &str| stillpoint.run(&["boot", id, "--accel", "tcg"]).expect("it ends");
    for (word, place, value) in changes {
        let mut definition = definition(&traps);
        *definition.pointer_mut(place).expect("a member") = value;
        let id = commit(&stillpoint, definition, |writer| {
            vec![
                part(writer, "d", Role::Disk, &[]),
                part(writer, "k", Role::Kernel, &[]),
                part(writer, "i", Role::Initrd, &[]),
            ]
        });
        let ended = started(&id);
        println!("{}", ended.stderr.trim_end());
        ended.assert_refused(1, word);
    }
    let many = commit(&stillpoint, definition(&traps), |writer| {
        let kernel = ["k", "i"].into_iter().zip([Role::Kernel, Role::Initrd]);
        let mut parts: Vec<Part> = kernel.map(|(name, role)| part(writer, name, role, &[])).collect();
        parts.extend((0..30).map(|number| part(writer, &format!("d{number}"), Role::Disk, &[])));
        parts
    });
    started(&many).assert_refused(1, "disks");
    let none = commit(&stillpoint, definition(&traps), |_| vec![]);
    started(&none).assert_refused(1, "no disk");
    let left = std::fs::read_dir(stillpoint.state().join("twins")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "folders of twins that never were");
    traps.assert_untouched();
}

fn ids(pid: u64, field: &str) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("a field");
    line.split_whitespace().map(|word| word.parse().unwrap_or(u32::MAX)).collect()
}

fn status(pid: u64, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("a field");
    line.trim().to_owned()
}

/// Who it is, what it may do, and what it has open.
fn assert_process(pid: u64, folder: &Path) {
    let (uids, gids) = (ids(pid, "Uid"), ids(pid, "Gid"));
    assert!(uids.iter().all(|uid| *uid == uids[0] && *uid != 0), "{uids:?}");
    assert!(gids.iter().all(|gid| *gid == gids[0] && *gid != 0), "{gids:?}");
    assert_eq!(status(pid, "Groups"), "");
    assert_eq!((&*status(pid, "Seccomp"), &*status(pid, "NoNewPrivs")), ("2", "1"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(pid, set).trim_start_matches('0'), "", "{set}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("it runs");
    assert!(limits.lines().any(|line| line.starts_with("Max core file size        0 ")), "{limits}");

    let mut sockets = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let name = target.to_string_lossy().into_owned();
        if let Some(inode) = name.strip_prefix("socket:[") {
            sockets.insert(inode.trim_end_matches(']').to_owned());
        }
        assert!(
            !name.starts_with('/') || target.starts_with(folder) || name == "/dev/null",
            "{name} is open"
        );
    }
    let table = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    for protocol in ["tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "icmp", "packet", "netlink"] {
        let words: BTreeSet<String> = table(protocol).split_whitespace().map(str::to_owned).collect();
        assert!(words.is_disjoint(&sockets), "a socket of {protocol}");
    }
    // Lines end with the path of a socket that has one.
    for line in table("unix").lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, _, _, _, _, inode, path] = words[..]
            && sockets.contains(inode)
        {
            assert!(Path::new(path).starts_with(folder), "{path}");
        }
    }
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("it runs");
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    let interfaces: Vec<String> = table("dev")
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect();
    assert_eq!(interfaces, ["lo"]);
}

/// Nothing of the definition is in it but serial numbers and, as one argument, the kernel's command line.
fn assert_command_line(pid: u64, folder: &Path, kernel: bool) {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).expect("it runs");
    let text = String::from_utf8_lossy(&bytes);
    let words: Vec<&str> = text.split_terminator('\0').collect();
    let mut appended = 0;
    for (number, word) in words.iter().enumerate().skip(1) {
        if number > 0 && words[number - 1] == "-append" {
            assert!(word.contains("-drive") && word.contains(TRAP), "it is there as it was: {word}");
            appended += 1;
            continue;
        }
        assert!(!word.contains(TRAP) && !word.contains("shadow"), "{word}");
        for path in word.split(['"', '=', ',']).filter(|part| part.starts_with('/')) {
            assert!(Path::new(path).starts_with(folder), "{path} in {word}");
        }
    }
    assert_eq!(appended, usize::from(kernel));
    for option in
        ["-netdev", "-nic", "-net", "-virtfs", "-fsdev", "-drive", "-incoming", "-monitor", "-vnc", "-spice"]
    {
        assert!(!words.contains(&option), "{option}");
    }
    let environ = std::fs::read(format!("/proc/{pid}/environ")).expect("it runs");
    assert_eq!(String::from_utf8_lossy(&environ), "PATH=/usr/bin:/bin\0");
}

/// What the guest sees: three disks, of which the machine reads, and no network.
fn assert_devices(twin: &Twin, kernel: bool) {
    let mut monitor = Monitor::connect(Path::new(twin.said["monitor"].as_str().expect("a socket")), LIMIT)
        .expect("it answers");
    let mut ask =
        |name: &str, arguments: Value| monitor.run_raw(name, &arguments, LIMIT).expect("it answers");
    let drives = ask("query-block", json!({}));
    let used: Vec<&Value> =
        drives.as_array().expect("a list").iter().filter(|drive| !drive["inserted"].is_null()).collect();
    assert_eq!(used.len(), 3, "{drives}");
    for drive in used {
        assert_eq!(drive["inserted"]["drv"], "qcow2", "{drive}");
        assert_eq!(drive["inserted"]["backing_file_depth"], 1, "{drive}");
    }
    let chardevs = ask("query-chardev", json!({}));
    let names: BTreeSet<&str> =
        chardevs.as_array().expect("a list").iter().filter_map(|c| c["label"].as_str()).collect();
    assert!(
        names.is_subset(&BTreeSet::from(["agent", "console", "monitor", "parallel0", "compat_monitor0"])),
        "{names:?}"
    );
    for line in ["info network", "info usernet"] {
        assert_eq!(ask("human-monitor-command", json!({ "command-line": line })), "", "{line}");
    }
    let pci = ask("query-pci", json!({}));
    for device in pci[0]["devices"].as_array().expect("a list") {
        let class = device["class_info"]["class"].as_u64().expect("a class");
        assert_ne!(class >> 8, 2, "a network controller: {device}");
    }
    let end = Instant::now() + LIMIT;
    let mut boots = || {
        if kernel {
            let registers = ask("human-monitor-command", json!({ "command-line": "info registers" }));
            return registers.as_str().is_some_and(|text| text.contains("RIP=ffffffff"));
        }
        let stats = ask("query-blockstats", json!({}));
        stats
            .as_array()
            .is_some_and(|list| list.iter().any(|one| one["stats"]["rd_operations"].as_u64() > Some(0)))
    };
    while !boots() {
        assert!(Instant::now() < end, "it does not boot");
        std::thread::sleep(Duration::from_millis(100));
    }
}
