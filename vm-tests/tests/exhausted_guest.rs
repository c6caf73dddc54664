//! Guests at the end of their means: full file systems, no memory, thousands of mounts.

use guest_protocol::stillpoint::{FreezeArguments, GuestReport, ThawArguments, ThawCause, Want};
use serde_json::Value;
use std::io::{self, Write};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use vm::agent::Agent;
use vm_tests::{Guest, Stillpoint, writing_guest};

const LIMIT: Duration = Duration::from_secs(30);
/// A guest thaws without its host one second after the lease at the latest, by its own clock.
const THAW_LATE_MAX_MS: u64 = 1000;
/// Nobody wants to end these waits.
static GO_ON: AtomicBool = AtomicBool::new(false);

#[test]
fn a_guest_without_space_or_memory_keeps_its_writes_its_database_and_its_thaw() {
    let guest = Guest::builder().start().expect("QEMU starts");
    println!(
        "our agent after {:.1?}, PostgreSQL after {:.1?}",
        guest.agent_ready(LIMIT),
        guest.postgresql_ready(LIMIT)
    );
    guest.start_load();
    guest.writes_go_on(LIMIT);
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    stillpoint.register("db1", &guest.qmp_socket(), Some(&guest.agent_socket())).expect("registered");
    let first = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(first["level"], "application", "{first}");

    println!("-- no memory: the kernel kills for it all the time");
    // What writes and what commits must be there to tell; the database is as dear to its owner.
    guest
        .exec("for p in $(busybox pidof load postgres); do echo -900 >/proc/$p/oom_score_adj; done")
        .success();
    guest.exec("grep -q -e -1000 /proc/$(busybox pidof stillpoint-agent)/oom_score_adj").success();
    guest.start(HOGS);
    let mut kills = killed(&guest);
    kills = more_killed(&guest, kills);
    println!("{kills} killed before");
    let mut agent = Agent::connect(&guest.agent_socket(), 6 * LIMIT).expect("the agent answers");
    let run = |id: &str, lease_ms| FreezeArguments {
        budget_ms: 30_000,
        want: Want::Filesystem,
        ..FreezeArguments::new(id, lease_ms)
    };
    agent.stillpoint_freeze(&run("without-a-host", 8000), &GO_ON).expect("frozen");
    drop(agent);
    let report = ended_by_itself(&guest, "without-a-host");
    assert_eq!(report.thawed_by, ThawCause::LeaseEnded, "{report:?}");
    println!("frozen for {} ms of a lease of 8000", report.frozen_ms);
    assert!(report.frozen_ms <= 8000 + THAW_LATE_MAX_MS, "{report:?}");
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));

    let mut agent = Agent::connect(&guest.agent_socket(), 6 * LIMIT).expect("the agent answers");
    agent.stillpoint_freeze(&run("thawed-by-its-host", 60_000), &GO_ON).expect("frozen");
    // The guest is asked beside the agent, while it is frozen.
    kills = more_killed(&guest, kills);
    let asked = Instant::now();
    let thaw = ThawArguments { id: "thawed-by-its-host".to_owned() };
    let report = agent.stillpoint_thaw(&thaw, 2 * LIMIT).expect("thawed");
    println!("{kills} killed; thawed in {:.1?}, {} ms in the guest", asked.elapsed(), report.thaw_ms);
    assert_eq!(report.thawed_by, ThawCause::Host, "{report:?}");
    assert!(report.thaw_ms <= 2 * THAW_LATE_MAX_MS, "{report:?}");
    drop(agent);
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));

    let pressed = stillpoint.must(&["snapshot", "db1", "--lease", "30"]);
    println!("level under pressure: {}, {}", pressed["level"], pressed["stall"]);
    let why = pressed["reasons"].as_array().expect("a list");
    assert!(pressed["level"] == "application" || !why.is_empty(), "what is worth less says why: {pressed}");
    guest.exec("touch /run/enough").success();
    guest.writes_go_on(LIMIT);
    let commits = guest.acks().highest('c');
    assert!(guest.acks().wait_for('c', commits + 5, 6 * LIMIT), "commits go on");
    guest.stop_load();

    println!("-- the agent's state folder is full");
    guest
        .exec("busybox mount -o remount,size=$(busybox df -k /run | busybox awk 'END { print $3 }')k /run")
        .success();
    let refused = stillpoint.run(&["snapshot", "db1", "--require", "filesystem"]).expect("it ends");
    println!("{}", refused.stderr.trim_end());
    refused.assert_refused(4, "the undo record cannot be written to");
    let less = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(less["level"], "crash", "{less}");
    guest
        .exec("busybox mount -o remount,size=64m /run && ! ls /run/freeze-undo* /run/qga.state.isfrozen")
        .success();

    println!("-- both file systems are full");
    for folder in ["/var/tmp", "/var/lib/postgresql"] {
        // Also what is kept for root, but for a little that is written: to write all of it takes a minute.
        let room = "$(($(busybox stat -f -c %f .) * $(busybox stat -f -c %S .) / 1024 - 4096))";
        guest
            .exec(&format!(
                "cd {folder} && dd if=/dev/zero of=inside bs=64k count=32 conv=fsync && fallocate -l {room}k most; \
                 dd if=/dev/zero of=rest bs=4k; for n in $(busybox seq 200); do echo > few-$n; done; ! echo x > one-more"
            ))
            .success();
    }
    guest.start(
        "until [ -e /run/full-enough ]; do for f in /var/tmp/inside /var/lib/postgresql/inside; do \
         dd if=/dev/urandom of=$f bs=64k count=32 conv=notrunc,fsync || echo $f >> /run/refused; done; done",
    );
    let full = stillpoint.must(&["snapshot", "db1"]);
    println!("level of a full guest: {}, {}", full["level"], full["reasons"]);
    assert_eq!(full["level"], "filesystem", "{full}");
    let reasons = full["reasons"].as_array().expect("a list");
    assert!(reasons.iter().any(|reason| reason["code"] == "no_room"), "{full}");
    guest.exec("touch /run/full-enough; [ ! -e /run/refused ]").success();
    // The database was not made to write what it has no room for, and works on as soon as it has.
    guest.exec("! busybox grep PANIC /var/log/postgresql/*.log").success();
    guest.sql("select count(*) from commits");
    // XFS gives the room of a removed file back in the background.
    guest
        .exec(
            "rm -f /var/tmp/most /var/tmp/rest /var/lib/postgresql/most /var/lib/postgresql/rest; for n in $(busybox seq 200); do \
             [ $(busybox df -k /var/lib/postgresql | busybox awk 'END { print $4 }') -gt 100000 ] && exit 0; busybox sleep 0.1; \
             done; exit 1",
        )
        .success();
    guest.sql("insert into commits (number) values (-1)");
    let well = stillpoint.must(&["snapshot", "db1"]);
    assert_eq!(well["level"], "application", "{well}");
    stillpoint.assert_sound(5);
}

/// Takes all memory again and again; whoever does it is the one that the kernel kills.
const HOGS: &str = "echo 1000 >/proc/self/oom_score_adj; until [ -e /run/enough ]; do \
                    perl -e 'my @all; push @all, \"x\" x (1 << 20) while 1'; done";

fn killed(guest: &Guest) -> u64 {
    let counted = guest.exec("busybox awk '/^oom_kill / { print $2 }' /proc/vmstat").success();
    counted.trim().parse().expect("a number")
}

/// Waits until the kernel has killed at least once more.
fn more_killed(guest: &Guest, before: u64) -> u64 {
    let end = Instant::now() + 4 * LIMIT;
    loop {
        let now = killed(guest);
        if now > before {
            return now;
        }
        assert!(Instant::now() < end, "the guest has memory left");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The report of a run that nobody thawed.
fn ended_by_itself(guest: &Guest, run: &str) -> GuestReport {
    let end = Instant::now() + 4 * LIMIT;
    loop {
        let status =
            Agent::connect(&guest.agent_socket(), LIMIT).and_then(|mut agent| agent.stillpoint_status());
        if let Some(last) = status.ok().and_then(|status| status.last).filter(|last| last.id == run) {
            return last;
        }
        assert!(Instant::now() < end, "the agent does not say how its run ended");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Mounts on which nothing new is stored, and small file systems of their own.
const BINDS: u64 = 5000;
const LOOPS: u64 = 100;
const NAMESPACES: u64 = 20;
/// Bounds, each a few times what was measured on an emulated guest of a loaded machine.
const FREEZE_MS_MAX: u64 = 5_000;
const AGENT_GROWS_KIB_MAX: u64 = 64 << 10;
const GUARD_LOCKED_KIB_MAX: u64 = 64 << 10;

#[test]
fn a_guest_with_thousands_of_mounts_is_frozen_in_bounded_time_and_memory() {
    let (guest, stillpoint) = writing_guest();
    let few = stillpoint.must(&["snapshot", "db1"]);
    let before = memory(&guest, "stillpoint-agent", "VmHWM");

    let begun = Instant::now();
    guest.exec("modprobe loop").success();
    guest.exec(&mounts()).success();
    let lines = guest.exec("cat /proc/self/mountinfo | busybox wc -l").success();
    println!("{} mounts in {:.1?}, {NAMESPACES} namespaces", lines.trim(), begun.elapsed());
    assert!(lines.trim().parse::<u64>().expect("a number") > BINDS + LOOPS);

    let many = stillpoint.must(&["snapshot", "db1", "--require", "filesystem"]);
    for (name, snapshot) in [("few", &few), ("many", &many)] {
        println!("{name}: {} in {}, {}", snapshot["level"], snapshot["phases_ms"], snapshot["stall"]);
    }
    assert_eq!(many["level"], "filesystem", "{many}");
    let held = |snapshot: &Value| {
        let filesystems = snapshot["filesystems"].as_array().expect("a list");
        filesystems.iter().filter(|filesystem| filesystem["state"] == "held").count() as u64
    };
    assert_eq!(held(&many), held(&few) + LOOPS, "each superblock once, however often it is mounted");
    assert!(many["stall"]["frozen_ms"].as_u64().expect("a number") <= FREEZE_MS_MAX, "{}", many["stall"]);

    let mut agent = Agent::connect(&guest.agent_socket(), 6 * LIMIT).expect("the agent answers");
    let run = FreezeArguments { want: Want::Filesystem, ..FreezeArguments::new("measured", 120_000) };
    agent.stillpoint_freeze(&run, &GO_ON).expect("frozen");
    let (after, locked) =
        (memory(&guest, "stillpoint-agent", "VmHWM"), memory(&guest, "stillpoint-guard", "VmLck"));
    agent.stillpoint_thaw(&ThawArguments { id: "measured".to_owned() }, 2 * LIMIT).expect("thawed");
    println!("the agent took {before} KiB, now at most {after}; its guard locks {locked}");
    assert!(after - before <= AGENT_GROWS_KIB_MAX, "{before} -> {after} KiB");
    assert!(locked > 0 && locked <= GUARD_LOCKED_KIB_MAX, "{locked} KiB");
    println!("writes go on after {:.1?}", guest.writes_go_on(LIMIT));
    guest.exec("! busybox dmesg | busybox grep -i 'i/o error'").success();
    stillpoint.assert_sound(2);
    io::stdout().flush().unwrap_or_default();
}

/// A field of `/proc/PID/status` in KiB.
fn memory(guest: &Guest, program: &str, field: &str) -> u64 {
    // One process looks at all of them: hundreds of loop devices have as many threads of the kernel.
    let script = format!(
        r#"for my $process (glob "/proc/[0-9]*") {{
            open my $words, "<", "$process/cmdline" or next;
            my $name = <$words> // "";
            $name =~ s/\0.*//s;
            next unless $name =~ m{{(^|/){program}$}};
            open my $status, "<", "$process/status" or next;
            while (<$status>) {{ print $1 if /^{field}:\s+(\d+)/ }}
        }}"#
    );
    let line = guest.exec(&format!("perl -e '{script}'")).success();
    line.trim().parse().unwrap_or_else(|_| panic!("{field} of {program}: {line:?}"))
}

/// One process makes them all: a process for each mount would take minutes under emulation.
fn mounts() -> String {
    format!(
        r#"set -e
mkdir -p /run/binds /run/loops /var/tmp/images
dd if=/dev/zero of=/var/tmp/images/first bs=1k count=256 2>/dev/null
mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=0 /var/tmp/images/first
perl -e '
# Variables, as perl hands no constant to the kernel.
my ($from, $none, $ext4) = ("/var/tmp", "none", "ext4");
for my $n (1 .. {BINDS}) {{
    my $to = "/run/binds/$n";
    mkdir $to;
    syscall(165, $from, $to, $none, 4096, 0) == 0 or die "bind $n: $!";
}}
open my $control, "<", "/dev/loop-control" or die "loop-control: $!";
for my $n (1 .. {LOOPS}) {{
    my $image = "/var/tmp/images/$n";
    system("cp", "--sparse=always", "/var/tmp/images/first", $image) == 0 or die;
    my $free = int(ioctl($control, 0x4C82, 0));
    open my $loop, "+<", "/dev/loop$free" or die "loop$free: $!";
    open my $file, "+<", $image or die "$image: $!";
    ioctl($loop, 0x4C00, fileno($file)) or die "set $free: $!";
    my ($device, $to) = ("/dev/loop$free", "/run/loops/$n");
    mkdir $to;
    syscall(165, $device, $to, $ext4, 0, 0) == 0 or die "mount $n: $!";
}}'
for n in $(busybox seq {NAMESPACES}); do unshare -m --propagation private busybox sleep 3600 >/dev/null 2>&1 & done
sync"#
    )
}
