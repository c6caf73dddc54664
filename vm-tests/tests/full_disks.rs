//! The host's disks run full, or slow, at any step of a run: the snapshot breaks, the guest does not, the store stays sound.

use rustix::process::Signal;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vm_tests::bare::{fill, image};
use vm_tests::{Bare, BareDisk, BlockGraph, Ended, Guest, Running, Stillpoint, until, writing_guest};

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_full_scratch_and_a_full_repository_break_the_snapshot_and_nothing_else() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts small file systems, which takes root");
    let (guest, stillpoint) = writing_guest();
    guest.exec("busybox dd if=/dev/urandom of=/var/lib/postgresql/much bs=1M count=64 conv=fsync").success();
    let before = guest.block_graph();

    println!("-- scratch runs full");
    let scratch = Small::over(&stillpoint.path("state").join("scratch"), "4m");
    // Overwritten in place: each block that the run has to keep goes to scratch first.
    guest.start(
        "until [ -e /run/enough ]; do dd if=/dev/zero of=/var/lib/postgresql/much bs=1M count=64 conv=notrunc oflag=direct; done",
    );
    let ended = stillpoint.run(&["snapshot", "db1", "--disk", "disk-data"]).expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(1, "make room in the state folder");
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    guest.exec("touch /run/enough; busybox dmesg | busybox grep -i 'i/o error' && exit 1; true").success();
    assert_eq!(guest.block_graph(), before);
    drop(scratch);
    let well = stillpoint.must(&["snapshot", "db1", "--disk", "disk-data"]);
    assert_eq!(well["level"], "filesystem", "{well}");

    println!("-- the repository runs full");
    let repository = stillpoint.repository();
    let small = Small::with_content(&repository);
    small.leave(8 << 20);
    guest.exec("dd if=/dev/urandom of=/var/lib/postgresql/much bs=1M count=40 conv=fsync").success();
    let before = guest.block_graph();
    let ended = stillpoint.run(&["snapshot", "db1", "--disk", "disk-data"]).expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(1, "the store is full");
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    assert_eq!(guest.block_graph(), before);
    stillpoint.assert_sound(1);
    small.grow();
    let well = stillpoint.must(&["snapshot", "db1", "--disk", "disk-data"]);
    assert_eq!(well["disks"][0]["method"], "bitmap", "{well}");
    stillpoint.assert_sound(2);
}

/// Longest wait of a guest's write for a slow scratch; `SCRATCH_WAIT_S` in the engine.
const SCRATCH_WAIT: Duration = Duration::from_secs(5);
/// An emulated guest's acknowledgements come late on a loaded machine.
const LATE: Duration = Duration::from_secs(5);
/// More files than a run makes on the host, in any one folder.
const FILES_MAX: u64 = 16;

#[test]
fn a_killed_program_and_a_slow_scratch_hold_up_no_write_of_the_guest() {
    let mut host = Host::new();

    println!("-- killed in the copy, and only then scratch runs full");
    let scratch = Small::over(&host.scratch(), "4m");
    let run = host.in_the_copy();
    run.signal(Signal::KILL);
    assert_eq!(run.wait().expect("it ends").code(), -1);
    host.overwrite();
    until("a full scratch", || scratch.free_bytes() < 1 << 20);
    host.writes_were_never_refused();
    assert!(host.guest.block_graph().count("-cbw") > 0, "nobody has cleaned up yet");
    // Someone makes room in haste, and takes the socket away with it.
    drop(scratch);
    host.works("full");

    println!("-- scratch is too slow");
    match Slow::over(&host.scratch()) {
        None => {
            writeln!(io::stderr(), "SKIPPED: a slow scratch needs {THROTTLE}").unwrap_or_default();
        }
        Some(slow) => {
            host.guest
                .exec(&format!("busybox dd if=/dev/urandom of={MUCH} bs=1M count=64 conv=fsync"))
                .success();
            let run = host.in_the_copy();
            slow.write_bytes_per_second(64 << 10);
            let begun = Instant::now();
            let before = slow.used_bytes();
            host.overwrite();
            until("copies to scratch", || slow.used_bytes() > before + (64 << 10));
            run.signal(Signal::CONT);
            let ended = run.wait().expect("it ends");
            println!("ended after {:.1?}: {}", begun.elapsed(), ended.stderr.trim_end());
            let longest = host.guest.longest_silence(begun);
            println!("the writers stood for {longest:.1?}");
            assert!(longest <= SCRATCH_WAIT + LATE, "a write waited for {longest:?}");
            slow.write_bytes_per_second(1 << 30);
            // Whether the snapshot was read before it broke is a matter of luck; that nothing is left is not.
            if ended.status.success() {
                host.kept();
            } else {
                host.refused(&ended, "make room in the state folder");
            }
        }
    }
    host.works("bitmap");
    host.stillpoint.assert_sound(host.snapshots);
}

#[test]
#[ignore = "long: two minutes"]
fn whatever_write_the_host_has_no_room_for_nothing_is_lost_and_the_next_run_works() {
    let mut host = Host::new();
    host.works("full");

    println!("-- the repository has no room for one file after the other, or for so many bytes");
    let small = Small::with_content(&host.stillpoint.repository());
    for files in 0.. {
        host.change();
        small.leave_files(files);
        let ended = host.run();
        if ended.status.success() {
            assert!(files >= 3, "lease, pack and manifest were each refused once, not only {files}");
            host.kept();
            break;
        }
        assert!(files < FILES_MAX, "it never works");
        host.refused(&ended, "the store is full");
        small.leave_files(1 << 20);
        host.stillpoint.assert_sound(host.snapshots);
    }
    small.leave_files(1 << 20);
    for bytes in [0, 4096, 64 << 10, 1 << 20] {
        host.change();
        small.leave(bytes);
        let ended = host.run();
        host.refused(&ended, "the store is full");
        small.grow();
        host.stillpoint.assert_sound(host.snapshots);
    }
    host.works("bitmap");
    drop(small);

    println!("-- the state folder has no room for one file after the other, or for so many bytes");
    let small = Small::with_content(&host.stillpoint.path("state"));
    let mut refused = 0;
    for files in 0.. {
        host.change();
        small.leave_files(files);
        let ended = host.run();
        small.leave_files(1 << 20);
        if ended.status.success() {
            host.kept();
            break;
        }
        assert!(files < FILES_MAX, "it never works");
        refused += 1;
        host.refused(&ended, "space");
    }
    // The journal's note, the run's folder, the scratch file, the server's socket.
    assert!(refused >= 3, "only {refused} steps were refused a file");
    for bytes in [0, 4096] {
        host.change();
        small.leave(bytes);
        let ended = host.run();
        small.grow();
        host.refused(&ended, "space");
    }
    host.works("bitmap");
    drop(small);

    println!("-- no room for the cache, which nothing depends on");
    let small = Small::with_content(&host.stillpoint.path("cache"));
    small.leave(0);
    host.works("bitmap");
    drop(small);
    host.stillpoint.assert_sound(host.snapshots);
}

#[test]
fn scratch_beside_the_vms_own_images_leaves_them_room_to_grow() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts small file systems, which takes root");
    let elsewhere = Stillpoint::with_key_file().expect("a repository");
    let beside = elsewhere.path("beside");
    std::fs::create_dir(&beside).expect("a folder");
    let small = Small::over(&beside, "1g");
    let stillpoint = elsewhere.other_host("beside/state");
    let (scratch, journal) = (stillpoint.state().join("scratch"), stillpoint.state().join("journal"));
    let disks = ["slow", "full", "sparse"].map(|name| {
        image(&beside, name, "raw", "32M");
        BareDisk::new(name, &beside.join(name).display().to_string(), "raw")
    });
    fill(&beside, "slow", "raw", 0x11, 0, 12 << 20);
    fill(&beside, "full", "raw", 0x22, 0, 32 << 20);
    let [slow, full, sparse] = disks;
    let bare = Bare::start(Bare::folder(), &[slow.slow(), full, sparse], &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    let graph = || BlockGraph::of(&bare.second_qmp_socket()).expect("it answers");
    let before = graph();
    let nothing_is_left = || {
        assert_eq!(graph(), before);
        for folder in [&scratch, &journal] {
            assert_eq!(std::fs::read_dir(folder).expect("a folder").count(), 0, "{}", folder.display());
        }
        bare.write("sparse", 0x33, 0, 64 << 10);
    };

    println!("-- too little is free to begin");
    small.leave(1 << 20);
    let ended = stillpoint.run(&["snapshot", "vm"]).expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(1, "must stay free");
    nothing_is_left();

    println!("-- it is used up while the copy runs");
    small.leave(10 << 20);
    let reserve_bytes = small.facts().f_blocks * small.facts().f_frsize / 20;
    let run = stillpoint.start(&["snapshot", "vm"]).expect("it starts");
    let mut run = stopped_in_the_copy(run, &scratch);
    let mut written = 0;
    while small.free_bytes() >= reserve_bytes {
        bare.write("full", 0x44, written, 256 << 10);
        written += 256 << 10;
    }
    assert!(small.free_bytes() > reserve_bytes / 2 && !run.has_ended(), "nobody has looked yet");
    run.signal(Signal::CONT);
    // Twice as long as between two looks; then the reads that are under way may end.
    std::thread::sleep(Duration::from_millis(500));
    bare.unthrottle();
    let ended = run.wait().expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(1, "must stay free");
    nothing_is_left();

    println!("-- scratch elsewhere is in nobody's way");
    small.leave(1 << 20);
    elsewhere.register("vm", &bare.qmp_socket(), None).expect("registered");
    elsewhere.must(&["snapshot", "vm"]);
    small.grow();
    stillpoint.must(&["snapshot", "vm"]);
    stillpoint.assert_sound(2);
}

/// A run that reads the disks, and is stopped (as SIGSTOP does) so that it stays there.
fn stopped_in_the_copy(mut run: Running, scratch: &Path) -> Running {
    let copying = || {
        // Listening, and both ends of one connection: QEMU itself is not asked, as the cut is under way.
        let sockets = std::fs::read_to_string("/proc/net/unix").expect("the kernel's list");
        let folder = scratch.to_string_lossy().into_owned();
        sockets.lines().filter(|line| line.contains(&folder) && line.ends_with("/nbd")).count() >= 2
    };
    until("the copy", || run.has_ended() || copying());
    run.signal(Signal::STOP);
    assert!(!run.has_ended() && copying(), "the copy was over before it was seen");
    run
}

/// What the guest's overwriter writes to, in place.
const MUCH: &str = "/var/lib/postgresql/much";

/// A guest that never stops writing, and what Stillpoint has of it.
struct Host {
    guest: Guest,
    stillpoint: Stillpoint,
    before: BlockGraph,
    snapshots: usize,
}

impl Host {
    fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test mounts small file systems, which takes root"
        );
        let (guest, stillpoint) = writing_guest();
        guest.exec(&format!("busybox dd if=/dev/urandom of={MUCH} bs=1M count=64 conv=fsync")).success();
        Self { before: guest.block_graph(), guest, stillpoint, snapshots: 0 }
    }

    fn scratch(&self) -> PathBuf {
        self.stillpoint.path("state").join("scratch")
    }

    fn run(&self) -> Ended {
        self.stillpoint.run(&["snapshot", "db1", "--disk", "disk-data"]).expect("it ends")
    }

    /// A few blocks that the next increment has to hold.
    fn change(&self) {
        self.guest
            .exec(&format!("busybox dd if=/dev/urandom of={MUCH} bs=64k count=32 conv=fsync,notrunc"))
            .success();
    }

    /// The run failed as promised: three lines, nothing left in QEMU or on the host, and the guest noticed nothing.
    #[track_caller]
    fn refused(&self, ended: &Ended, word: &str) {
        println!("{}", ended.stderr.trim_end());
        ended.assert_refused(1, word);
        assert_eq!(self.guest.block_graph(), self.before);
        self.nothing_is_left();
        self.writes_were_never_refused();
    }

    /// A run works now, and finds its changes in this way.
    #[track_caller]
    fn works(&mut self, method: &str) {
        let well = self.stillpoint.must(&["snapshot", "db1", "--disk", "disk-data"]);
        assert_eq!(
            (&well["level"], &well["disks"][0]["method"]),
            (&"filesystem".into(), &method.into()),
            "{well}"
        );
        self.kept();
    }

    /// A run worked: it left its bitmap, and nothing else.
    #[track_caller]
    fn kept(&mut self) {
        self.snapshots += 1;
        self.before = self.guest.block_graph();
        self.nothing_is_left();
        self.writes_were_never_refused();
    }

    #[track_caller]
    fn nothing_is_left(&self) {
        let names = |folder: &str| {
            let entries = std::fs::read_dir(self.stillpoint.path("state").join(folder)).expect("a folder");
            entries.map(|entry| entry.expect("an entry").file_name()).collect::<Vec<_>>()
        };
        let (scratch, journal) = (names("scratch"), names("journal"));
        assert!(
            scratch.iter().all(|name| name == "lost+found") && journal.is_empty(),
            "{scratch:?} {journal:?}"
        );
        let vms = names("vms");
        assert_eq!(vms.len(), 2, "the entry and its lock: {vms:?}");
    }

    /// Overwrites in place until it is told enough: each block that a run has to keep goes to scratch first. A write
    /// that fails is noted.
    fn overwrite(&self) {
        self.guest.start(&format!(
            "busybox rm -f /run/enough; until [ -e /run/enough ]; do dd if=/dev/zero of={MUCH} bs=1M count=64 conv=notrunc \
             oflag=direct || busybox touch /run/refused; done"
        ));
    }

    /// Both writers go on, the overwriter was never told of an error, and the kernel saw none.
    #[track_caller]
    fn writes_were_never_refused(&self) {
        println!("writes go on after {:.1?}", self.guest.writes_go_on(LIMIT));
        self.guest
            .exec("busybox touch /run/enough; [ ! -e /run/refused ] && ! busybox dmesg | busybox grep -i 'i/o error'")
            .success();
    }

    /// See [`stopped_in_the_copy`].
    fn in_the_copy(&self) -> Running {
        let run = self.stillpoint.start(&["snapshot", "db1", "--disk", "disk-data"]).expect("it starts");
        stopped_in_the_copy(run, &self.scratch())
    }
}

fn sh(command: &mut Command) {
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn copy(from: &Path, to: &Path) {
    sh(Command::new("cp").arg("-aT").arg(from).arg(to));
}

/// A small file system over a folder, as long as this lives.
struct Small {
    folder: PathBuf,
    /// What was there goes back there.
    below: Option<PathBuf>,
}

impl Small {
    fn over(folder: &Path, size: &str) -> Self {
        let options = format!("size={size},mode=0700");
        sh(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder));
        Self { folder: folder.to_owned(), below: None }
    }

    /// One that holds what the folder holds.
    fn with_content(folder: &Path) -> Self {
        let aside = folder.with_extension("aside");
        copy(folder, &aside);
        let mut small = Self::over(folder, "1g");
        copy(&aside, folder);
        small.below = Some(aside);
        small
    }

    fn remount(&self, option: &str) {
        sh(Command::new("mount").arg("-o").arg(format!("remount,{option}")).arg(&self.folder));
    }

    fn facts(&self) -> rustix::fs::StatVfs {
        rustix::fs::statvfs(&self.folder).expect("it is mounted")
    }

    fn free_bytes(&self) -> u64 {
        self.facts().f_bfree * self.facts().f_frsize
    }

    /// Leaves room for so many bytes.
    fn leave(&self, bytes: u64) {
        let facts = self.facts();
        let used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize;
        self.remount(&format!("size={}", used + bytes));
    }

    /// Leaves room for so many files.
    fn leave_files(&self, files: u64) {
        let facts = self.facts();
        self.remount(&format!("nr_inodes={}", facts.f_files - facts.f_ffree + files));
    }

    fn grow(&self) {
        self.remount("size=1g");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Some(below) = &self.below {
            // What came since goes below, too; if that fails, the test has failed already or will.
            let _copied = Command::new("cp").arg("-aT").arg(&self.folder).arg(below).status();
        }
        // Lazily, so that it goes even if a run that failed the test still holds a file in it.
        let _ended = Command::new("umount").arg("--lazy").arg(&self.folder).status();
        if let Some(below) = &self.below {
            let _removed = std::fs::remove_dir_all(&self.folder);
            let _renamed = std::fs::rename(below, &self.folder);
        }
    }
}

/// Where the machine's own group of processes is told how fast a device may be written. Source: Linux
/// `Documentation/admin-guide/cgroup-v1/blkio-controller.rst`.
const THROTTLE: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";

/// A file system whose device can be slowed down, and that writes at once.
struct Slow {
    folder: PathBuf,
    number: String,
    _image: tempfile::NamedTempFile,
}

impl Slow {
    fn over(folder: &Path) -> Option<Self> {
        std::fs::metadata(THROTTLE).ok()?;
        let image = tempfile::NamedTempFile::new().expect("a file");
        image.as_file().set_len(128 << 20).expect("a size");
        sh(Command::new("mkfs.ext4").arg("-q").arg(image.path()));
        sh(Command::new("mount").args(["-o", "loop,sync"]).arg(image.path()).arg(folder));
        let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(folder).expect("it is there"));
        let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        Some(Self { folder: folder.to_owned(), number, _image: image })
    }

    fn used_bytes(&self) -> u64 {
        let facts = rustix::fs::statvfs(&self.folder).expect("it is mounted");
        (facts.f_blocks - facts.f_bfree) * facts.f_frsize
    }

    fn write_bytes_per_second(&self, bytes: u64) {
        std::fs::write(THROTTLE, format!("{} {bytes}", self.number)).expect("a limit");
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // 0 takes the limit away, or the unmounting would crawl.
        let _set = std::fs::write(THROTTLE, format!("{} 0", self.number));
        let _ended = Command::new("umount").arg("--lazy").arg(&self.folder).status();
    }
}
