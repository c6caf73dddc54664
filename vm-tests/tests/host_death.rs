//! The host program dies, hangs or is interrupted in the middle of a run: the guest goes on by itself, and the next run
//! finds everything as it should be.

use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm_tests::{Guest, Running, Stillpoint, until, writing_guest};

const LIMIT: Duration = Duration::from_secs(30);
/// Lease of the runs that die, in seconds.
const LEASE_S: &str = "5";
const LEASE: Duration = Duration::from_secs(5);
/// A thaw is late by no more; one second is promised, and an emulated guest's acknowledgements come late.
const THAW_LATE_MAX: Duration = Duration::from_secs(3);
/// Without an acknowledgement for so long, both writers stand.
const STILL: Duration = Duration::from_millis(700);

#[test]
fn a_guest_goes_on_without_its_host_and_the_next_run_cleans_up() {
    let (guest, stillpoint) = writing_guest();
    let untouched = guest.block_graph();

    println!("-- killed in the freeze");
    let run = frozen(&guest, &stillpoint);
    run.signal(Signal::KILL);
    assert_eq!(run.wait().expect("it ends").code(), -1);
    let longest = longest_silence(&guest, LEASE + THAW_LATE_MAX + Duration::from_secs(2));
    println!("the writers stood for {longest:.1?} of a lease of {LEASE:?}");
    assert!(longest <= LEASE + THAW_LATE_MAX, "frozen beyond the lease: {longest:?}");
    guest.writes_go_on(LIMIT);

    println!("-- killed in the copy");
    let run = in_the_copy(&stillpoint);
    run.signal(Signal::KILL);
    assert_eq!(run.wait().expect("it ends").code(), -1);
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    assert!(guest.block_graph().count("-cbw") > 0, "a killed program cleans nothing up");
    assert_eq!(listed(&stillpoint), 0);

    println!("-- interrupted in the freeze");
    let run = frozen(&guest, &stillpoint);
    interrupted(&guest, &stillpoint, run, &untouched);

    println!("-- interrupted in the copy");
    let run = in_the_copy(&stillpoint);
    interrupted(&guest, &stillpoint, run, &untouched);

    println!("-- the next run works");
    let full = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(full["level"], "filesystem", "{full}");
    let kept = guest.block_graph();
    assert_eq!((kept.count("stillpoint-"), kept.count("export"), kept.count("job")), (2, 0, 0), "{kept:#?}");

    println!("-- killed in the copy of an increment, whose bitmap must not be lost");
    guest.exec("busybox dd if=/dev/urandom of=/var/lib/postgresql/much bs=1M count=150 conv=fsync").success();
    let run = in_the_copy(&stillpoint);
    run.signal(Signal::KILL);
    assert_eq!(run.wait().expect("it ends").code(), -1);
    guest.writes_go_on(LIMIT);
    let increment = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(increment["parent"], full["snapshot"]);
    for disk in increment["disks"].as_array().expect("a list") {
        assert_eq!(disk["method"], "bitmap", "{disk}");
    }
    let read = increment["disks"][1]["read_bytes"].as_u64().expect("a number");
    assert!(read >= 150 << 20, "what was written before the killed run is in: {read}");
    stillpoint.assert_sound(2);
    let scratch = std::fs::read_dir(stillpoint.path("state").join("scratch")).expect("a folder").count();
    assert_eq!((scratch, journal(&stillpoint).exists()), (0, false), "nothing is left on the host");
}

/// Ctrl-C: everything is cleaned up before the program ends.
fn interrupted(guest: &Guest, stillpoint: &Stillpoint, run: Running, untouched: &vm_tests::BlockGraph) {
    let asked = Instant::now();
    run.signal(Signal::CONT);
    run.signal(Signal::INT);
    let ended = run.wait().expect("it ends");
    println!("ended after {:.1?}:\n{}", asked.elapsed(), ended.stderr.trim_end());
    ended.assert_refused(130, "interrupted");
    assert_eq!(&guest.block_graph(), untouched);
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    assert!(!journal(stillpoint).exists());
    assert_eq!(listed(stillpoint), 0);
}

/// A run that was stopped (as SIGSTOP does) after it asked for the freeze: the guest is frozen, and nobody thaws it.
fn frozen(guest: &Guest, stillpoint: &Stillpoint) -> Running {
    for attempt in 0..20 {
        let earlier = server(stillpoint);
        let mut run = stillpoint.start(&["snapshot", "db1", "--lease", LEASE_S]).expect("it starts");
        // The server is the last part of the preparations; the freeze is asked for a moment later.
        until("the preparations", || {
            run.has_ended() || (server(stillpoint).is_some() && server(stillpoint) != earlier)
        });
        std::thread::sleep(Duration::from_millis(10 + 15 * attempt));
        run.signal(Signal::STOP);
        let stopped = Instant::now();
        while stopped.elapsed() < Duration::from_secs(3) {
            if silence(guest) >= STILL && guest.block_graph().count("state \"running\"") == 1 {
                println!("frozen, at attempt {}", attempt + 1);
                return run;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // Too early, or too late: it was not frozen then.
        run.signal(Signal::KILL);
        run.wait().expect("it ends");
        guest.writes_go_on(LIMIT);
    }
    panic!("the guest was never frozen");
}

/// A run that reads the disks. Seen by its connections to QEMU's NBD server, not by asking QEMU: the cut is under way
/// meanwhile, and QEMU 7.2 once died while a second monitor asked for its nodes again and again in it.
fn in_the_copy(stillpoint: &Stillpoint) -> Running {
    let earlier = server(stillpoint);
    let mut run = stillpoint.start(&["snapshot", "db1", "--lease", LEASE_S]).expect("it starts");
    let copying = || {
        let sockets = std::fs::read_to_string("/proc/net/unix").expect("the kernel's list");
        // Listening it has flags 00010000, accepted connections have none: both bear the server's path.
        let ours =
            |path: &PathBuf| sockets.lines().filter(|line| line.ends_with(&*path.to_string_lossy())).count();
        server(stillpoint).filter(|path| Some(path) != earlier.as_ref()).is_some_and(|path| ours(&path) == 3)
    };
    until("the copy", || run.has_ended() || copying());
    assert!(!run.has_ended() && copying(), "the copy was over before it was seen");
    run
}

fn listed(stillpoint: &Stillpoint) -> usize {
    stillpoint.must(&["snapshots"])["snapshots"].as_array().expect("a list").len()
}

fn journal(stillpoint: &Stillpoint) -> PathBuf {
    stillpoint.path("state").join("journal").join("db1.json")
}

/// The socket of QEMU's NBD server, if the run whose journal is there made one.
fn server(stillpoint: &Stillpoint) -> Option<PathBuf> {
    let text = std::fs::read(journal(stillpoint)).ok()?;
    let note: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let socket = Path::new(note["plan"]["socket"].as_str()?).to_owned();
    socket.exists().then_some(socket)
}

/// How long the more recent of the two writers has been silent.
fn silence(guest: &Guest) -> Duration {
    let acks = guest.acks().so_far();
    acks.iter().rev().find(|ack| matches!(ack.kind, 'w' | 'x')).map_or(Duration::ZERO, |ack| ack.at.elapsed())
}

/// The longest time that either writer stood, from a moment ago until the guest has gone on for a while.
fn longest_silence(guest: &Guest, watch: Duration) -> Duration {
    let moment = Duration::from_secs(10);
    let since = Instant::now().checked_sub(moment).expect("the machine is up longer");
    std::thread::sleep(watch);
    guest.longest_silence(since)
}
