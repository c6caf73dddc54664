//! A VM that is shut off is snapshotted from its images: as they lie there, in nobody's way, and never one that runs.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vm_tests::bare::{self, fill, image, same};
use vm_tests::{Bare, BareDisk, Stillpoint, until};

const MIB: u64 = 1 << 20;

/// An image that lies on another, which it names without its format, and a raw one whose content looks like a qcow2 image.
fn images() -> tempfile::TempDir {
    let folder = Bare::folder();
    let at = folder.path();
    image(at, "below.qcow2", "qcow2", "64M");
    fill(at, "below.qcow2", "qcow2", 0x10, 0, 32 * MIB);
    let mut create = Command::new("qemu-img");
    create.current_dir(at).args([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "below.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    bare::run(&mut create);
    fill(at, "top.qcow2", "qcow2", 0x20, 8 * MIB, 24 * MIB);
    image(at, "disk.raw", "raw", "64M");
    fill(at, "disk.raw", "raw", 0x30, 0, 48 * MIB);
    image(at, "hostile.qcow2", "qcow2", "1G");
    let head = std::fs::read(at.join("hostile.qcow2")).expect("an image");
    let mut raw = std::fs::read(at.join("disk.raw")).expect("an image");
    raw[..4096].copy_from_slice(&head[..4096]);
    std::fs::write(at.join("disk.raw"), raw).expect("room");
    folder
}

fn disks() -> Vec<BareDisk> {
    vec![BareDisk::new("chain", "top.qcow2", "qcow2"), BareDisk::new("raw", "disk.raw", "raw")]
}

fn methods(snapshot: &Value) -> Vec<&str> {
    let disks = snapshot["disks"].as_array().expect("a list");
    disks.iter().map(|disk| disk["method"].as_str().expect("a word")).collect()
}

fn codes(snapshot: &Value) -> Vec<&str> {
    let reasons = snapshot["reasons"].as_array().expect("a list");
    reasons.iter().map(|reason| reason["code"].as_str().expect("a word")).collect()
}

/// The snapshot's disks hold what the images in the folder hold.
#[track_caller]
fn assert_holds(stillpoint: &Stillpoint, snapshot: &Value, folder: &Path) {
    let id = snapshot["snapshot"].as_str().expect("an id");
    let targets = ["chain", "raw"].map(|disk| stillpoint.path(&format!("restored-{disk}")));
    let wishes = [format!("chain={}", targets[0].display()), format!("raw={}", targets[1].display())];
    stillpoint.must(&["restore", id, "--overwrite", "--disk", &wishes[0], "--disk", &wishes[1]]);
    assert!(same(&targets[0], "raw", &folder.join("top.qcow2"), "qcow2"), "chain differs: {snapshot}");
    assert!(same(&targets[1], "raw", &folder.join("disk.raw"), "raw"), "raw differs: {snapshot}");
}

/// The storage daemon that serves this VM's images, once it is told to serve them.
fn serving(stillpoint: &Stillpoint) -> Option<(Pid, PathBuf)> {
    let folder = stillpoint.state().join("scratch/at-rest-vm");
    if !folder.join("nbd").exists() {
        return None;
    }
    let monitor = folder.join("qmp").display().to_string();
    let pids = std::fs::read_dir("/proc").expect("it is there").flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_it = |pid: &i32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.starts_with(b"qemu-storage-daemon") && String::from_utf8_lossy(&words).contains(&monitor)
    };
    Some((Pid::from_raw(pids.find(is_it)?)?, folder))
}

#[test]
fn a_vm_that_is_shut_off_is_snapshotted_from_its_images_and_its_increments_go_on() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let bare = Bare::start(images(), &disks(), &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    let full = stillpoint.must(&["snapshot", "vm"]);
    bare.write("chain", 0xa1, 40 * MIB, 64 << 10);
    bare.write("raw", 0xa2, 50 * MIB, 64 << 10);
    let folder = bare.quit();
    let before = ["below.qcow2", "top.qcow2", "disk.raw"]
        .map(|name| std::fs::read(folder.path().join(name)).expect("an image"));

    println!("-- shut off");
    let checked = stillpoint.must(&["check", "vm"]);
    assert_eq!((&checked["level"], codes(&checked)), (&json!("crash"), vec!["vm_shut_off"]));
    let shown = stillpoint.text(&["vm", "show", "vm"]).expect("shown");
    assert!(shown.contains("shut off, last seen") && shown.contains("top.qcow2"), "{shown}");
    let off = stillpoint.must(&["snapshot", "vm"]);
    assert_eq!((&off["level"], &off["parent"]), (&json!("crash"), &full["snapshot"]));
    assert_eq!(methods(&off), ["bitmap", "compared"], "{off}");
    assert_eq!(codes(&off), ["as_last_seen", "vm_shut_off"], "{off}");
    let chain = &off["disks"][0];
    assert_eq!(chain["changed_bytes"], 64 << 10, "only what was written since is new: {chain}");
    assert_holds(&stillpoint, &off, folder.path());
    let page = stillpoint.text(&["show", off["snapshot"].as_str().expect("an id")]).expect("shown");
    assert!(page.contains("2 disks at one instant, while the VM was shut off"), "{page}");
    let refused = stillpoint.run(&["snapshot", "vm", "--require", "filesystem"]).expect("it ends");
    refused.assert_refused(4, "it was shut off");
    for (name, before) in ["below.qcow2", "top.qcow2", "disk.raw"].iter().zip(before) {
        let now = std::fs::read(folder.path().join(name)).expect("an image");
        assert!(now == before, "{name} was not left as it was found");
    }

    println!(
        "-- started again: the bitmap in the image still knows every write since the snapshot that began it"
    );
    let bare = Bare::start(folder, &disks(), &[]);
    bare.write("chain", 0xa3, 44 * MIB, 64 << 10);
    let on = stillpoint.must(&["snapshot", "vm"]);
    assert_eq!((methods(&on)[0], &on["parent"]), ("bitmap", &full["snapshot"]), "{on}");
    assert_holds(&stillpoint, &on, &bare.path(""));
    bare.write("chain", 0xa4, 45 * MIB, 64 << 10);
    let increment = stillpoint.must(&["snapshot", "vm"]);
    assert_eq!(methods(&increment), ["bitmap", "bitmap"], "{increment}");
    assert_holds(&stillpoint, &increment, &bare.path(""));

    println!("-- after a crash of QEMU a bitmap in the image vouches for nothing");
    bare.write("chain", 0xa5, 46 * MIB, 64 << 10);
    let folder = {
        let mut bare = bare;
        bare.kill();
        bare.quit()
    };
    let crashed = stillpoint.must(&["snapshot", "vm"]);
    assert_eq!(methods(&crashed), ["compared", "compared"], "{crashed}");
    assert_holds(&stillpoint, &crashed, folder.path());
    stillpoint.assert_sound(5);
}

#[test]
fn a_vm_is_started_during_the_run_without_delay_and_no_snapshot_is_left() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let bare = Bare::start(images(), &disks(), &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    stillpoint.must(&["vm", "show", "vm"]);
    let mut folder = bare.quit();

    println!(
        "-- the host program is killed during the copy: its daemon ends with it, and the next run clears up"
    );
    let (mut run, daemon, _) = in_the_copy(&stillpoint);
    run.signal(Signal::KILL);
    until("the end of the run", || run.has_ended());
    kill_process(daemon, Signal::CONT).ok(); // it is gone already, which is what is asked next
    let gone = || !Path::new(&format!("/proc/{}", daemon.as_raw_nonzero())).exists();
    until("the end of the daemon", gone);

    for starts in [true, false] {
        println!(
            "-- {}",
            if starts { "the VM is started" } else { "an image is written to by another program" }
        );
        let (run, daemon, at_rest) = in_the_copy(&stillpoint);
        let began = Instant::now();
        let bare = starts.then(|| {
            let bare = Bare::start(std::mem::replace(&mut folder, Bare::folder()), &disks(), &[]);
            println!("started in {:.1?}", began.elapsed());
            bare.write("raw", 0xb1, 0, 4096);
            bare
        });
        if !starts {
            fill(folder.path(), "disk.raw", "raw", 0xb2, 0, 4096);
        }
        kill_process(daemon, Signal::CONT).expect("it is stopped");
        let ended = run.wait().expect("it ends");
        println!("{}", ended.stderr.trim_end());
        ended.assert_refused(7, "while they were read");
        assert!(!at_rest.exists(), "nothing is left of the run");
        folder = bare.map_or(folder, Bare::quit);
    }
    assert_eq!(stillpoint.must(&["snapshots", "vm"])["snapshots"], json!([]));
    stillpoint.must(&["snapshot", "vm"]);
    stillpoint.assert_sound(1);
}

/// Starts a run and stops its storage daemon as soon as that serves the images: the run is in its copy until the daemon is
/// let go on.
fn in_the_copy(stillpoint: &Stillpoint) -> (vm_tests::Running, Pid, PathBuf) {
    let mut run = stillpoint.start(&["snapshot", "vm"]).expect("it starts");
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some((pid, folder)) = serving(stillpoint) {
            kill_process(pid, Signal::STOP).expect("it runs");
            return (run, pid, folder);
        }
        assert!(!run.has_ended() && Instant::now() < end, "the run was over before it was seen to copy");
    }
}

#[test]
fn scratch_of_a_program_that_died_is_not_kept_for_a_vm_that_ended_after_it() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let scratch = stillpoint.state().join("scratch");
    let runs = || std::fs::read_dir(&scratch).into_iter().flatten().flatten().map(|run| run.path());
    for forgotten in [false, true] {
        let bare = Bare::start(images(), &disks(), &[]);
        stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
        let mut run = stillpoint.start(&["snapshot", "vm"]).expect("it starts");
        // The last thing that is made ready.
        until("scratch", || run.has_ended() || runs().any(|run| run.join("nbd").exists()));
        run.signal(Signal::KILL);
        until("the end of the run", || run.has_ended());
        // A shell that it was just about to start holds its lock for a moment longer.
        let mut removed = stillpoint.run(&["vm", "remove", "vm"]).expect("it ends");
        until("the end of its lock", || {
            let busy = removed.code() == 8;
            if busy {
                removed = stillpoint.run(&["vm", "remove", "vm"]).expect("it ends");
            }
            !busy
        });
        println!("{}", removed.stderr.trim_end());
        removed.assert_refused(1, "not taken out yet");
        let folder = bare.quit();
        assert_eq!(runs().count(), 1, "nobody has cleaned up yet");
        if !forgotten {
            let taken = stillpoint.must(&["snapshot", "vm"]);
            assert_holds(&stillpoint, &taken, folder.path());
            assert_eq!(runs().count(), 0);
        }
        stillpoint.must(&["vm", "remove", "vm"]);
        assert_eq!(runs().count(), 0);
    }
    stillpoint.assert_sound(1);
}

#[test]
fn what_may_be_in_use_unseen_or_elsewhere_is_never_taken_for_a_vm_at_rest() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let bare = Bare::start(images(), &disks(), &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    let refused = |code, word: &str| {
        let ended = stillpoint.run(&["snapshot", "vm"]).expect("it ends");
        println!("{}", ended.stderr.trim_end());
        ended.assert_refused(code, word);
    };

    println!("-- never seen running");
    std::fs::rename(bare.qmp_socket(), bare.path("hidden")).expect("renamed");
    refused(7, "cannot be connected to");
    std::fs::rename(bare.path("hidden"), bare.qmp_socket()).expect("renamed");
    stillpoint.must(&["check", "vm"]);

    println!("-- it runs, and only its monitor is out of reach");
    std::fs::rename(bare.qmp_socket(), bare.path("hidden")).expect("renamed");
    refused(8, "open for writing");
    let folder = bare.quit();

    println!("-- an image is not where it was");
    let image = folder.path().join("disk.raw");
    std::fs::rename(&image, folder.path().join("moved")).expect("renamed");
    refused(7, "disk.raw");
    std::fs::rename(folder.path().join("moved"), &image).expect("renamed");

    println!("-- on a block device nobody sees who writes from another host");
    let looped = bare::run(Command::new("losetup").args(["--find", "--show"]).arg(&image));
    let device = LoopDevice(looped.trim().to_owned());
    std::fs::rename(&image, folder.path().join("backing")).expect("renamed");
    std::os::unix::fs::symlink(&device.0, &image).expect("a link");
    refused(4, "block device");
    let taken = stillpoint.must(&["snapshot", "vm", "--require", "none"]);
    assert_eq!(
        (&taken["level"], codes(&taken).contains(&"writers_unseen")),
        (&json!("none"), true),
        "{taken}"
    );
    stillpoint.assert_sound(1);
}

/// A loop device, let go of when dropped.
struct LoopDevice(String);

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Fails only if it is gone already.
        let _detached = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
