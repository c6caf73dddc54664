//! Runs that meet each other, and VMs that do not hold still: one run at a time works on a VM, whoever started it, and
//! what becomes of the VM meanwhile leaves a sound snapshot or none.

use rustix::process::Signal;
use serde_json::{Value, json};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_tests::bare::{fill, image, same};
use vm_tests::{At, Bare, BareDisk, BlockGraph, Ended, Gate, Running, Stillpoint};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// Two disks with data, the first of which is read slowly: a run is in its copy for as long as the test wants.
fn disks() -> Vec<BareDisk> {
    vec![BareDisk::new("slow", "slow.raw", "raw").slow(), BareDisk::new("fast", "fast.qcow2", "qcow2")]
}

fn images() -> tempfile::TempDir {
    let folder = Bare::folder();
    image(folder.path(), "slow.raw", "raw", "16M");
    image(folder.path(), "fast.qcow2", "qcow2", "16M");
    fill(folder.path(), "slow.raw", "raw", 0x11, 0, 12 * MIB);
    fill(folder.path(), "fast.qcow2", "qcow2", 0x22, 0, 12 * MIB);
    folder
}

/// Starts a run and waits until it reads the disks: until something is connected to the NBD server that it made.
fn in_the_copy(stillpoint: &Stillpoint, vm: &str) -> Running {
    let earlier = server(stillpoint, vm);
    let mut run = stillpoint.start(&["snapshot", vm]).expect("it starts");
    let copying = || {
        let sockets = std::fs::read_to_string("/proc/net/unix").expect("the kernel's list");
        let connected = |path: PathBuf| {
            sockets.lines().filter(|line| line.ends_with(&*path.to_string_lossy())).count() > 1
        };
        server(stillpoint, vm).filter(|path| Some(path) != earlier.as_ref()).is_some_and(connected)
    };
    let end = Instant::now() + LIMIT;
    while !run.has_ended() && !copying() {
        assert!(Instant::now() < end, "no copy within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(!run.has_ended(), "the run was over before it was seen to copy: {:?}", run.wait());
    run
}

fn journal(stillpoint: &Stillpoint, vm: &str) -> PathBuf {
    stillpoint.state().join("journal").join(format!("{vm}.json"))
}

fn server(stillpoint: &Stillpoint, vm: &str) -> Option<PathBuf> {
    let note: Value = serde_json::from_slice(&std::fs::read(journal(stillpoint, vm)).ok()?).ok()?;
    let socket = Path::new(note["plan"]["socket"].as_str()?).to_owned();
    socket.exists().then_some(socket)
}

fn listed(stillpoint: &Stillpoint, vm: &str) -> usize {
    stillpoint.must(&["snapshots", vm])["snapshots"].as_array().expect("a list").len()
}

fn files_in(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

/// The snapshot's disks hold what two images hold.
#[track_caller]
fn assert_holds(stillpoint: &Stillpoint, snapshot: &Value, slow: &Path, fast: &Path) {
    let id = snapshot["snapshot"].as_str().expect("an id");
    let targets = ["slow", "fast"].map(|disk| stillpoint.path(&format!("restored-{disk}")));
    let wishes = [format!("slow={}", targets[0].display()), format!("fast={}", targets[1].display())];
    stillpoint.must(&["restore", id, "--overwrite", "--disk", &wishes[0], "--disk", &wishes[1]]);
    assert!(same(&targets[0], "raw", slow, "raw"), "slow differs: {snapshot}");
    assert!(same(&targets[1], "raw", fast, "qcow2"), "fast differs: {snapshot}");
}

fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).expect("room for a copy");
}

#[test]
fn one_run_at_a_time_works_on_a_vm_by_whatever_name_monitor_or_host() {
    let folder = images();
    copy(&folder.path().join("slow.raw"), &folder.path().join("slow.before"));
    copy(&folder.path().join("fast.qcow2"), &folder.path().join("fast.before"));
    let bare = Bare::start(folder, &disks(), &[]);
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let elsewhere = stillpoint.other_host("elsewhere");
    stillpoint.register("one", &bare.qmp_socket(), None).expect("registered");
    stillpoint.register("same", &bare.qmp_socket(), None).expect("registered");
    stillpoint.register("two", &bare.second_qmp_socket(), None).expect("registered");
    elsewhere.register("three", &bare.second_qmp_socket(), None).expect("registered");
    let refused = |host: &Stillpoint, vm: &str, word: &str| {
        let asked = Instant::now();
        let ended = host.run(&["snapshot", vm]).expect("it ends");
        println!("{vm}, after {:.1?}: {}", asked.elapsed(), ended.stderr.trim_end());
        ended.assert_refused(8, word);
    };

    println!("-- while a run copies");
    let run = in_the_copy(&stillpoint, "one");
    bare.write("fast", 0xee, 0, 4 * MIB);
    let resize = bare.try_command("block_resize", &json!({ "node-name": "n1", "size": 32 * MIB }));
    println!("resized meanwhile: {resize:?}");
    assert!(resize.is_err(), "the run does not expect a disk of another size");
    refused(&stillpoint, "same", "'one'");
    refused(&stillpoint, "two", "'one'");
    refused(&elsewhere, "three", "not started from this state folder");
    bare.unthrottle();
    let first = run.wait().and_then(Ended::success).expect("it is not disturbed");
    assert_holds(&stillpoint, &first, &bare.path("slow.before"), &bare.path("fast.before"));

    println!("-- afterwards all of them work");
    for (host, vm) in [(&stillpoint, "same"), (&stillpoint, "two"), (&elsewhere, "three")] {
        host.must(&["snapshot", vm]);
    }

    println!("-- a run is killed");
    bare.throttle();
    let run = in_the_copy(&stillpoint, "one");
    run.signal(Signal::KILL);
    assert_eq!(run.wait().expect("it ends").code(), -1);
    refused(&elsewhere, "three", "or died at it");
    bare.unthrottle();
    let undone = stillpoint.must(&["snapshot", "two"]);
    assert_holds(&stillpoint, &undone, &bare.path("slow.raw"), &bare.path("fast.qcow2"));
    assert!(!journal(&stillpoint, "one").exists(), "its note was dealt with");
    elsewhere.must(&["snapshot", "three"]);

    println!("-- two begin at once");
    for _ in 0..4 {
        let runs = [("one", &stillpoint), ("three", &elsewhere)]
            .map(|(vm, host)| host.start(&["snapshot", vm]).expect("it starts"));
        let ended = runs.map(|run| run.wait().expect("it ends"));
        assert!(ended.iter().any(|ended| ended.status.success()), "{ended:?}");
        for ended in ended {
            println!("{}", ended.code());
            if ended.status.success() {
                assert_holds(&stillpoint, &ended.object, &bare.path("slow.raw"), &bare.path("fast.qcow2"));
            } else {
                ended.assert_refused(8, "works on this VM");
            }
        }
    }
    let graph = BlockGraph::of(&bare.second_qmp_socket()).expect("it answers");
    assert_eq!(
        (graph.count("-cbw"), graph.count("stillpoint-run"), graph.count("export")),
        (0, 0, 0),
        "{graph:#?}"
    );
    assert_eq!(files_in(&stillpoint.state().join("scratch")), 0);
    let verified = stillpoint.must(&["verify"]);
    assert_eq!(verified["damage_total"], 0, "{verified}");
}

#[test]
fn a_vm_that_is_reset_or_ends_during_the_copy_leaves_a_sound_snapshot_or_none() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let register = |bare: &Bare| {
        stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    };
    let mut bare = Bare::start(images(), &disks(), &[]);
    register(&bare);

    println!("-- reset");
    let run = in_the_copy(&stillpoint, "vm");
    bare.command("system_reset", &json!({}));
    bare.unthrottle();
    let first = run.wait().and_then(Ended::success).expect("a reset is the guest's own affair");
    assert_holds(&stillpoint, &first, &bare.path("slow.raw"), &bare.path("fast.qcow2"));

    for (kept, kill) in [(1, false), (2, true)] {
        println!("-- {}", if kill { "QEMU is killed" } else { "shut off" });
        bare.write("slow", 0xa1, MIB, 8 * MIB);
        bare.write("fast", 0xa2, MIB, 8 * MIB);
        bare.throttle();
        let run = in_the_copy(&stillpoint, "vm");
        if kill {
            bare.kill();
        }
        let folder = bare.quit();
        let ended = run.wait().expect("it ends");
        println!("{}", ended.stderr.trim_end());
        ended.assert_refused(7, "the VM ended during the run");
        assert_eq!(listed(&stillpoint, "vm"), kept);
        assert_eq!(
            files_in(&stillpoint.state().join("scratch")),
            0,
            "scratch is not kept for a VM that is gone"
        );

        println!("-- without a VM: behind a throttle its images are not to be had without QEMU");
        let ended = stillpoint.run(&["snapshot", "vm"]).expect("it ends");
        println!("{}", ended.stderr.trim_end());
        ended.assert_refused(7, "cannot be read while the VM is shut off");

        println!("-- started again");
        bare = Bare::start(folder, &disks(), &[]);
        bare.unthrottle();
        stillpoint.must(&["vm", "remove", "vm"]);
        register(&bare);
        bare.write("fast", 0xa3, 0, 4096);
        let next = stillpoint.must(&["snapshot", "vm"]);
        assert_holds(&stillpoint, &next, &bare.path("slow.raw"), &bare.path("fast.qcow2"));
        stillpoint.assert_sound(kept + 1);
    }
}

#[test]
fn a_vm_that_is_to_migrate_during_the_copy_stays_and_the_run_goes_on() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let bare = Bare::start(images(), &disks(), &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    bare.unthrottle();
    stillpoint.must(&["snapshot", "vm"]);
    bare.write("slow", 0xa1, MIB, 8 * MIB);
    bare.write("fast", 0xa2, MIB, 8 * MIB);
    bare.throttle();
    copy(&bare.path("fast.qcow2"), &bare.path("before"));
    let run = in_the_copy(&stillpoint, "vm");
    let other = target_of(&bare);
    migrate(&bare, &other);
    let migration = end_of_migration(&bare);
    println!("the migration: {migration}");
    // QEMU 7.2 cannot hand over disks behind a filter. It must go on then as if nothing had happened, and so must we.
    assert_eq!(migration, "failed", "another QEMU than those that were tried: say what becomes of the run");
    assert_eq!(bare.command("query-status", &json!({}))["running"], true);
    bare.write("fast", 0xa4, 0, 4096);
    bare.unthrottle();
    let taken = run.wait().and_then(Ended::success).expect("the run goes on");
    assert_holds(&stillpoint, &taken, &bare.path("slow.raw"), &bare.path("before"));
    let graph = BlockGraph::of(&bare.second_qmp_socket()).expect("it answers");
    assert_eq!(
        (graph.count("-cbw"), graph.count("export"), graph.count("\"running\"")),
        (0, 0, 1),
        "{graph:#?}"
    );

    println!("-- without a run it migrates, and the next run is complete");
    drop(other);
    bare.write("slow", 0xa5, 2 * MIB, MIB);
    bare.write("fast", 0xa6, 2 * MIB, MIB);
    let other = target_of(&bare);
    migrate(&bare, &other);
    assert_eq!(end_of_migration(&bare), "completed");
    println!("-- the source still answers, but the disks are not its own any more");
    let ended = stillpoint.run(&["snapshot", "vm"]).expect("it ends");
    println!("{}", ended.stderr.trim_end());
    ended.assert_refused(7, "does not run in this QEMU");
    println!("-- the target");
    other.unthrottle();
    stillpoint.must(&["vm", "remove", "vm"]);
    stillpoint.register("vm", &other.qmp_socket(), None).expect("registered");
    other.write("fast", 0xa7, 3 * MIB, 4096);
    let next = stillpoint.must(&["snapshot", "vm"]);
    assert_holds(&stillpoint, &next, &other.path("slow.raw"), &other.path("fast.qcow2"));
    stillpoint.assert_sound(3);
}

/// A migration that is under way, or over, when the run comes to stop the VM: a VM that left is never started here again, and one
/// that is leaving is not stopped.
#[test]
fn a_vm_that_migrates_before_the_cut_runs_in_one_place_only() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let bare = Bare::start(images(), &disks(), &[]);
    bare.unthrottle();
    let gate = Gate::before(&bare.qmp_socket(), &bare.path("")).expect("a gate");
    stillpoint.register("vm", gate.socket(), None).expect("registered");
    stillpoint.must(&["snapshot", "vm"]);
    let come_to = |messages: &[At]| {
        gate.hold(messages[0]);
        let run = stillpoint.start(&["snapshot", "vm"]).expect("it starts");
        assert!(gate.wait(LIMIT), "the run does not come to {messages:?}");
        for next in &messages[1..] {
            gate.pass_to(*next);
            assert!(gate.wait(LIMIT), "the run does not come to {next:?}");
        }
        run
    };
    // The first question is that of the preparation.
    let before_the_stop = [At::Asked("query-migrate"), At::Asked("query-migrate")];

    println!("-- on its way");
    let run = come_to(&before_the_stop);
    // Nobody reads there: it is under way for as long as the test wants.
    let nowhere = bare.path("nowhere");
    let _listener = UnixListener::bind(&nowhere).expect("a socket");
    bare.command("migrate", &json!({ "uri": format!("unix:{}", nowhere.display()) }));
    gate.pass();
    run.wait().expect("it ends").assert_refused(8, "migrates");
    assert_eq!(bare.command("query-status", &json!({}))["running"], true, "it was not stopped");
    println!("-- and nothing is begun meanwhile");
    stillpoint.run(&["snapshot", "vm"]).expect("it ends").assert_refused(8, "migrates");
    bare.command("migrate_cancel", &json!({}));
    assert_eq!(end_of_migration(&bare), "cancelled");
    stillpoint.must(&["snapshot", "vm"]);

    println!("-- it comes back, and the program is killed before it stopped anything");
    let run = come_to(&before_the_stop);
    let other = target_of(&bare);
    migrate(&bare, &other);
    // The filters are open by now, although in nobody's way yet.
    assert_eq!(
        end_of_migration(&bare),
        "failed",
        "another QEMU than those that were tried: say what becomes of the run"
    );
    run.signal(Signal::KILL);
    assert_eq!(run.wait().expect("it ends").code(), -1);
    gate.pass();
    drop(other);
    assert_eq!(bare.command("query-status", &json!({}))["running"], true);
    stillpoint.must(&["snapshot", "vm"]);

    println!("-- gone, when the run has asked whether it is here");
    let run = come_to(&before_the_stop[..1]);
    let other = target_of(&bare);
    migrate(&bare, &other);
    assert_eq!(end_of_migration(&bare), "completed");
    gate.pass();
    let ended = run.wait().expect("it ends");
    println!("{}", ended.stderr.trim_end());
    assert!(ended.code() > 0, "there is no VM here to take a snapshot of");
    // A shell that the program left behind would speak at once.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(bare.command("query-status", &json!({}))["status"], "postmigrate");
    assert_eq!(other.command("query-status", &json!({}))["running"], true);
    drop(bare);
}

#[test]
fn a_vm_that_someone_else_lets_go_on_during_the_cut_leaves_no_snapshot() {
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let bare = Bare::start(images(), &disks(), &[]);
    bare.unthrottle();
    let gate = Gate::before(&bare.qmp_socket(), &bare.path("")).expect("a gate");
    stillpoint.register("vm", gate.socket(), None).expect("registered");
    gate.hold(At::Answered("stop"));
    let run = stillpoint.start(&["snapshot", "vm"]).expect("it starts");
    assert!(gate.wait(LIMIT), "the run does not stop the VM");
    bare.command("cont", &json!({}));
    gate.pass();
    run.wait().expect("it ends").assert_refused(4, "one after the other while the guest ran");
    assert_eq!(listed(&stillpoint, "vm"), 0);
    stillpoint.must(&["snapshot", "vm"]);
}

/// A QEMU that waits for the VM of another one, whose disks it shares.
fn target_of(bare: &Bare) -> Bare {
    let folder = Bare::folder();
    for name in ["slow.raw", "fast.qcow2"] {
        std::os::unix::fs::symlink(bare.path(name), folder.path().join(name)).expect("a link");
    }
    Bare::start(folder, &disks(), &["-incoming", "unix:incoming"])
}

fn migrate(bare: &Bare, target: &Bare) {
    let uri = format!("unix:{}", target.path("incoming").display());
    bare.command("migrate", &json!({ "uri": uri }));
}

/// How a migration ended.
fn end_of_migration(bare: &Bare) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        let found = bare.command("query-migrate", &json!({}));
        let word = found["status"].as_str().unwrap_or_default().to_owned();
        if ["completed", "failed", "cancelled"].contains(&&*word) {
            return word;
        }
        assert!(Instant::now() < end, "the migration does not end: {found}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A monitor's socket of the test's own before QEMU's, which can be cut off: it forwards one client after the other.
struct Proxy {
    path: PathBuf,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Proxy {
    fn before(qmp: &Path, path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let streams: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
        let (kept, qmp) = (Arc::clone(&streams), qmp.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(&qmp) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let [mut from, mut to] =
                        [from, to].map(|stream| stream.try_clone().expect("a descriptor"));
                    std::thread::spawn(move || {
                        // Ends when either side does; the other is told.
                        let _ended =
                            std::io::copy(&mut from, &mut to).and_then(|_| to.shutdown(Shutdown::Both));
                    });
                }
                kept.lock().expect("nobody panics with it").extend([client, server]);
            }
        });
        Self { path: path.to_owned(), streams }
    }

    fn cut(&self) {
        std::fs::remove_file(&self.path).expect("it is there");
        for stream in self.streams.lock().expect("nobody panics with it").drain(..) {
            // Fails only for one that has ended.
            let _ended = stream.shutdown(Shutdown::Both);
        }
    }
}

#[test]
fn a_monitor_that_vanishes_during_the_copy_costs_the_cleaning_up_which_the_next_run_does() {
    let bare = Bare::start(images(), &disks(), &[]);
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let proxy = Proxy::before(&bare.qmp_socket(), &bare.path("proxy"));
    stillpoint.register("vm", &bare.path("proxy"), None).expect("registered");
    let run = in_the_copy(&stillpoint, "vm");
    copy(&bare.path("fast.qcow2"), &bare.path("before"));
    bare.write("fast", 0xee, 0, 4 * MIB);
    proxy.cut();
    bare.unthrottle();
    let ended = run.wait().expect("it ends");
    println!("{}", ended.stderr.trim_end());
    let graph = || BlockGraph::of(&bare.second_qmp_socket()).expect("it answers");
    if ended.status.success() {
        assert!(ended.stderr.starts_with("warning: the snapshot is complete"), "{}", ended.stderr);
        assert_holds(&stillpoint, &ended.object, &bare.path("slow.raw"), &bare.path("before"));
    } else {
        ended.assert_refused(7, "vm");
    }
    assert!(graph().count("-cbw") > 0, "what nobody could take out is still there");
    bare.write("fast", 0xef, 0, 4 * MIB);

    let gone = stillpoint.run(&["snapshot", "vm"]).expect("it ends");
    gone.assert_refused(7, "cannot be read while the VM is shut off");
    stillpoint.must(&["vm", "remove", "vm"]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    bare.write("slow", 0xf0, MIB, MIB);
    let next = stillpoint.must(&["snapshot", "vm"]);
    assert_holds(&stillpoint, &next, &bare.path("slow.raw"), &bare.path("fast.qcow2"));
    let graph = graph();
    assert_eq!(
        (graph.count("-cbw"), graph.count("stillpoint-run"), graph.count("export")),
        (0, 0, 0),
        "{graph:#?}"
    );
    assert_eq!(files_in(&stillpoint.state().join("scratch")), 0);
}
