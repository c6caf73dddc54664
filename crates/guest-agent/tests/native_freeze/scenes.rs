//! The scenes. The list of their names is what is promised.

use super::client::{Agent, Inside, codes, filesystem, kill, until};
use super::private_root::Build;
use guest_agent::freeze::kernel;
use serde_json::json;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// One test: what it mounts, and what happens.
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) build: fn(&mut Build),
    pub(crate) play: fn(&Inside),
}

macro_rules! scenes {
    ($($(#[$doc:meta])* $name:ident: $build:expr, $play:expr;)+) => {
        pub(crate) const SCENES: &[Scene] = &[$(Scene { name: stringify!($name), build: $build, play: $play }),+];
    };
}
pub(crate) use scenes;

/// Those of all files.
pub(crate) fn all() -> impl Iterator<Item = &'static Scene> {
    SCENES.iter().chain(super::contract::SCENES).chain(super::hooks::SCENES).chain(super::defects::SCENES)
}

pub(crate) fn find(name: &str) -> &'static Scene {
    all().find(|scene| scene.name == name).unwrap_or_else(|| panic!("no scene {name}"))
}

/// Those that only `make test-long` runs: none.
pub(crate) const LONG: &[&str] = &[];

pub(crate) fn ext4(build: &mut Build) {
    build.filesystem("ext4", "/data");
}

pub(crate) fn two(build: &mut Build) {
    build.filesystem("ext4", "/a");
    build.filesystem("ext4", "/b");
}

/// Most that agent and guard hold while frozen, in any build: the delivered one takes a fifth.
const RUN_KIB_MAX: u64 = 20 << 10;

scenes! {
    freezes_and_thaws_ext4_xfs_and_btrfs_with_subvolumes: |build| {
        build.filesystem("ext4", "/e");
        build.filesystem("xfs", "/x");
        let device = build.filesystem("btrfs", "/b");
        build.run("btrfs", &["subvolume", "create", "/b/sub"]);
        build.mount_again(&device, "btrfs", "/s", "subvol=sub");
    }, |inside| {
        let agent = inside.agent();
        let answer = agent.freeze("r1", 30_000);
        assert_eq!(answer["frozen"], 3, "one for each superblock: {answer}");
        inside.expect_blocked(&["/e", "/x", "/b", "/s"]);
        assert_eq!(agent.state(), "frozen");
        let report = agent.thaw("r1");
        inside.expect_writable(&["/e", "/x", "/b", "/s"]);
        for mountpoint in ["/e", "/x", "/b"] {
            assert_eq!(filesystem(&report, mountpoint)["state"], "held", "{report}");
        }
        assert_eq!(report["thawed_by"], "host");
        assert_eq!(report["filesystems"].as_array().unwrap().len(), 3);
        assert_eq!(agent.state(), "thawed");
        assert_eq!(agent.thaw("r1"), report, "thawing again answers the same report");
        assert!(agent.refused("stillpoint-thaw", json!({"id": "r2"})).contains("no run"));
    };

    a_loop_file_system_freezes_before_its_carrier_whatever_the_mount_table_says: |build| {
        let outer = build.filesystem("ext4", "/first");
        let inner = build.device("/first/disk.img", "ext4", 32);
        build.mount(&inner, "ext4", "/inner");
        // Mounted again and let go of: now the carrier comes after what it carries, and freezing in reverse order of
        // the table waits for ever.
        build.mount_again(&outer, "ext4", "/carrier", "");
        build.detach("/first");
    }, |inside| {
        let order: Vec<_> = inside.mounts().into_iter().map(|mount| mount.mountpoint).collect();
        let place = |name: &str| order.iter().position(|one| one.to_str() == Some(name)).unwrap();
        assert!(place("/inner") < place("/carrier"), "the table is not in the order that this is about");
        std::fs::write("/inner/file", vec![1u8; 1 << 20]).unwrap();
        the_wrong_order_waits_for_ever();
        let agent = inside.agent();
        for round in 0..3 {
            let id = format!("r{round}");
            assert_eq!(agent.freeze(&id, 20_000)["frozen"], 2);
            inside.expect_blocked(&["/inner", "/carrier"]);
            let report = agent.thaw(&id);
            assert_eq!(filesystem(&report, "/inner")["state"], "held");
            assert_eq!(filesystem(&report, "/carrier")["state"], "held");
            inside.expect_writable(&["/inner", "/carrier"]);
        }
    };

    bind_mounts_count_once_and_a_covered_mount_point_is_reached_elsewhere: |build| {
        build.filesystem("ext4", "/a");
        build.filesystem("ext4", "/x");
        build.folder("/deeper/bound");
        build.bind("/a", "/deeper/bound");
        build.folder("/x/folder");
        build.bind("/x/folder", "/a");
    }, |inside| {
        let agent = inside.agent();
        assert_eq!(agent.freeze("r", 20_000)["frozen"], 2);
        inside.expect_blocked(&["/a", "/x", "/deeper/bound"]);
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/deeper/bound")["state"], "held");
        assert_eq!(filesystem(&report, "/x")["state"], "held");
        inside.expect_writable(&["/a", "/x", "/deeper/bound"]);
    };

    a_mount_that_cannot_be_opened_is_named_and_the_rest_freezes: |build| {
        build.filesystem("ext4", "/data");
        build.filesystem("ext4", "/hidden");
        drop(std::os::unix::net::UnixListener::bind(build.outside("/hidden/socket")).unwrap());
        std::fs::write(build.outside("/socket"), b"").unwrap();
        build.bind("/hidden/socket", "/socket");
        build.detach("/hidden");
        build.filesystem("ext4", "/covered");
        build.bind("/tmp", "/covered");
    }, |inside| {
        let agent = inside.agent();
        assert_eq!(agent.freeze("r", 20_000)["frozen"], 1);
        inside.expect_blocked(&["/data"]);
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/socket")["state"], "unreachable", "{report}");
        assert_eq!(filesystem(&report, "/covered")["state"], "unreachable", "{report}");
        assert!(filesystem(&report, "/covered")["detail"].as_str().unwrap().contains("on top"));
        assert_eq!(filesystem(&report, "/data")["state"], "held");
    };

    a_file_system_frozen_by_someone_else_is_left_alone: two, |inside| {
        let theirs = File::open("/a").unwrap();
        kernel::freeze(theirs.as_fd()).unwrap();
        let agent = inside.agent();
        assert_eq!(agent.freeze("r", 20_000)["frozen"], 1);
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/a")["state"], "held_by_other");
        assert_eq!(filesystem(&report, "/b")["state"], "held");
        inside.expect_writable(&["/b"]);
        assert!(inside.blocks("/a"), "their freeze is not ours to thaw");
        kernel::thaw(theirs.as_fd()).unwrap();
        inside.expect_writable(&["/a"]);
    };

    a_thaw_by_a_third_party_is_seen: two, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 20_000);
        kernel::thaw(File::open("/a").unwrap().as_fd()).unwrap();
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/a")["state"], "early_thaw");
        assert_eq!(filesystem(&report, "/b")["state"], "held");
        assert!(codes(&report["reasons"]).contains(&"early_thaw"));
    };

    thaws_when_the_lease_ends_without_the_host: two, |inside| {
        let agent = inside.agent();
        let begun = Instant::now();
        assert_eq!(agent.freeze("r", 1_500)["lease_ms"], 1_500);
        inside.expect_blocked(&["/a"]);
        inside.until_writable("/a", Duration::from_secs(10));
        let frozen = begun.elapsed();
        assert!(frozen < Duration::from_millis(1_500 + 1_000) + Duration::from_millis(500), "{frozen:?}");
        until("the run is over", Duration::from_secs(5), || agent.state() == "thawed");
        let report = agent.thaw("r");
        assert_eq!(report["thawed_by"], "lease_ended");
        assert!(codes(&report["reasons"]).contains(&"lease_ended"));
        let frozen_ms = report["frozen_ms"].as_u64().unwrap();
        assert!((1_450..2_500).contains(&frozen_ms), "{frozen_ms}");
        assert!(agent.refused("stillpoint-renew", json!({"id": "r", "lease_ms": 1000})).contains("no run"));
    };

    a_renewed_lease_lasts_longer_and_counts_from_the_renewal: ext4, |inside| {
        let agent = inside.agent();
        let begun = Instant::now();
        agent.freeze("r", 2_000);
        std::thread::sleep(Duration::from_millis(1_000));
        assert_eq!(agent.ask("stillpoint-renew", json!({"id": "r", "lease_ms": 3_000}))["lease_ms"], 3_000);
        let left = agent.ask("stillpoint-status", json!({}))["lease_left_ms"].as_u64().unwrap();
        assert!((2_000..=3_000).contains(&left), "{left}");
        assert!(agent.refused("stillpoint-renew", json!({"id": "other", "lease_ms": 3_000})).contains("other"));
        inside.until_writable("/data", Duration::from_secs(10));
        let frozen = begun.elapsed();
        assert!(frozen >= Duration::from_millis(3_900) && frozen < Duration::from_millis(5_500), "{frozen:?}");
    };

    thaws_when_the_agent_is_killed: two, |inside| {
        let mut agent = inside.agent();
        agent.freeze("r", 60_000);
        inside.expect_blocked(&["/a", "/b"]);
        agent.signal(libc::SIGKILL);
        inside.until_writable("/a", Duration::from_secs(1));
        inside.until_writable("/b", Duration::from_secs(1));
        agent.ended(Duration::from_secs(5));
        until("the guard is gone", Duration::from_secs(5), || inside.guard().is_none());
        let again = inside.agent();
        until("the record is taken up", Duration::from_secs(5), || again.state() == "thawed");
        let last = again.ask("stillpoint-status", json!({}))["last"].clone();
        assert_eq!((last["id"].as_str(), last["thawed_by"].as_str()), (Some("r"), Some("agent_gone")));
        assert!(codes(&last["reasons"]).contains(&"agent_restarted"));
        assert_eq!(again.freeze("next", 10_000)["frozen"], 2);
        again.thaw("next");
    };

    thaws_at_once_when_the_guard_is_killed: two, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 60_000);
        inside.expect_blocked(&["/a"]);
        kill(inside.guard().unwrap(), libc::SIGKILL);
        inside.until_writable("/a", Duration::from_secs(1));
        inside.until_writable("/b", Duration::from_secs(1));
        let report = agent.thaw("r");
        assert!(codes(&report["reasons"]).contains(&"guard_died"), "{report}");
        assert_eq!(report["thawed_by"], "failed_freeze");
        assert_eq!(agent.freeze("next", 10_000)["frozen"], 2);
        agent.thaw("next");
    };

    a_restarted_agent_thaws_when_agent_and_guard_were_killed: two, |inside| {
        let mut agent = inside.agent();
        agent.freeze("r", 60_000);
        let guard = inside.guard().unwrap();
        // Stopped first, so that neither can act on the other's death.
        kill(guard, libc::SIGSTOP);
        agent.signal(libc::SIGKILL);
        kill(guard, libc::SIGKILL);
        agent.ended(Duration::from_secs(5));
        assert!(inside.blocks("/a"), "nobody is left to thaw");
        let begun = Instant::now();
        let again = inside.agent();
        inside.until_writable("/a", Duration::from_secs(2));
        inside.until_writable("/b", Duration::from_secs(2));
        eprintln!("thawed {:?} after the restart", begun.elapsed());
        until("the record is undone", Duration::from_secs(5), || again.state() == "thawed");
        let last = again.ask("stillpoint-status", json!({}))["last"].clone();
        assert_eq!(last["thawed_by"], "agent_gone");
        assert!(codes(&last["reasons"]).contains(&"agent_restarted"));
        assert_eq!(filesystem(&last, "/a")["state"], "held");
        assert!(!std::path::Path::new("/run/qga.state.isfrozen").exists());
        assert!(!std::path::Path::new("/run/freeze-undo").exists());
    };

    a_hanging_agent_does_not_outlast_the_lease: two, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 2_000);
        agent.signal(libc::SIGSTOP);
        let waited = inside.until_writable("/a", Duration::from_secs(4));
        inside.until_writable("/b", Duration::from_secs(1));
        assert!(waited < Duration::from_secs(3), "{waited:?}");
        agent.signal(libc::SIGCONT);
        until("the run is over", Duration::from_secs(5), || agent.state() == "thawed");
        assert_eq!(agent.thaw("r")["thawed_by"], "lease_ended");
    };

    an_agent_that_hangs_beyond_its_lease_is_ended_by_its_guard: two, |inside| {
        let mut agent = inside.agent();
        agent.freeze("r", 1_500);
        agent.signal(libc::SIGSTOP);
        inside.until_writable("/a", Duration::from_secs(4));
        // Nobody lets it go on: as long as it lives, its workers hold what they quiesced.
        agent.ended(Duration::from_secs(12));
        until("the guard is gone", Duration::from_secs(5), || inside.guard().is_none());
        let again = inside.agent();
        until("the record is taken up", Duration::from_secs(5), || again.state() == "thawed");
        let last = again.ask("stillpoint-status", json!({}))["last"].clone();
        assert_eq!((last["id"].as_str(), last["thawed_by"].as_str()), (Some("r"), Some("lease_ended")), "{last}");
        assert_eq!(again.freeze("next", 10_000)["frozen"], 2);
        again.thaw("next");
    };

    a_hanging_guard_does_not_outlast_the_lease: two, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 2_000);
        let guard = inside.guard().unwrap();
        kill(guard, libc::SIGSTOP);
        let waited = inside.until_writable("/a", Duration::from_secs(4));
        inside.until_writable("/b", Duration::from_secs(1));
        assert!(waited < Duration::from_secs(3), "{waited:?}");
        until("the run is over", Duration::from_secs(8), || agent.state() == "thawed");
        assert_eq!(agent.thaw("r")["thawed_by"], "lease_ended");
        assert!(inside.guard().is_none(), "the guard that hung was ended");
    };

    the_guard_survives_signals_to_the_agents_process_group: ext4, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 60_000);
        let guard = inside.guard().unwrap();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            kill(guard, signal);
        }
        // SAFETY: plain system calls.
        let (session, own) = unsafe { (libc::getsid(guard), libc::getsid(agent.pid())) };
        assert_eq!(session, guard, "a session of its own");
        assert_ne!(session, own);
        assert!(inside.blocks("/data"));
        let open = std::fs::read_dir(format!("/proc/{guard}/fd")).unwrap().count();
        assert!(open <= 3 + 4, "socket, ledger, timer, one folder and nothing else: {open}");
        let status = std::fs::read_to_string(format!("/proc/{guard}/status")).unwrap();
        let locked = status.lines().find(|line| line.starts_with("VmLck")).unwrap().to_owned();
        assert!(!locked.contains(" 0 kB"), "{locked}");
        let resident = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        eprintln!("the guard: {locked}; {resident}");
        assert_eq!(filesystem(&agent.thaw("r"), "/data")["state"], "held");
    };

    /// `cargo xtask bench agent` shows what this prints of the agent as it is delivered.
    an_agent_and_its_guard_take_little_memory_while_frozen: ext4, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 60_000);
        let [own, guards] = [agent.pid(), inside.guard().unwrap()].map(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        });
        assert_eq!(filesystem(&agent.thaw("r"), "/data")["state"], "held");
        eprintln!("resident while frozen: the agent {own} KiB, its guard {guards} KiB");
        assert!(own + guards < RUN_KIB_MAX, "{own} and {guards} KiB");
    };

    /// FIFREEZE flushes onto a device so slow that it outlasts the lease.
    a_freeze_in_the_kernel_that_outlasts_the_lease_holds_up_no_other: |build| {
        build.filesystem("ext4", "/fast");
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 2_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        inside.keep_dirty("/slow/file", 4);
        std::thread::sleep(Duration::from_millis(300));
        let agent = inside.agent();
        let mut host = agent.connect();
        host.send("stillpoint-freeze", json!({"id": "r", "lease_ms": 1_400, "want": "filesystem", "prepare_ms_max": 6_000}));
        until("freezing", Duration::from_secs(20), || agent.state() == "freezing" && inside.blocks("/fast"));
        let waited = inside.until_writable("/fast", Duration::from_secs(2));
        eprintln!("the fast one was thawed {waited:?} later, state {}", agent.state());
        assert_ne!(agent.state(), "thawed", "the slow one is in the kernel still");
        let answer = host.receive();
        assert!(answer["error"]["desc"].as_str().unwrap_or_default().contains("lease"), "{answer}");
        inside.until_writable("/slow", Duration::from_secs(20));
        let report = agent.thaw("r");
        eprintln!("{report}");
        assert_eq!(report["thawed_by"], "lease_ended");
        let (fast, slow) = (&filesystem(&report, "/fast")["frozen_ms"], &filesystem(&report, "/slow")["frozen_ms"]);
        assert!(fast.as_u64().unwrap() < 2_400, "lease and a second: {fast}");
        assert!(slow.as_u64().unwrap() > fast.as_u64().unwrap() + 300, "{slow} {fast}");
    };

    a_thaw_while_freezing_aborts_the_freeze: |build| {
        build.filesystem("ext4", "/fast");
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 4_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        inside.keep_dirty("/slow/file", 5);
        std::thread::sleep(Duration::from_millis(300));
        let agent = inside.agent();
        let mut host = agent.connect();
        host.send("stillpoint-freeze", json!({"id": "r", "lease_ms": 60_000, "want": "filesystem", "prepare_ms_max": 6_000}));
        until("freezing", Duration::from_secs(20), || agent.state() == "freezing" && inside.blocks("/fast"));
        let mut other = agent.connect();
        other.send("stillpoint-thaw", json!({"id": "r"}));
        inside.until_writable("/fast", Duration::from_secs(1));
        assert!(host.receive()["error"]["desc"].as_str().unwrap().contains("thaw"));
        let report = other.receive()["return"].clone();
        assert!(codes(&report["reasons"]).contains(&"aborted"), "{report}");
        assert_eq!(agent.state(), "thawed");
        inside.until_writable("/slow", Duration::from_secs(20));
    };

    a_killed_agent_is_outlived_by_its_freeze_in_the_kernel_and_the_guard_thaws_it: |build| {
        build.filesystem("ext4", "/fast");
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 4_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        inside.keep_dirty("/slow/file", 5);
        std::thread::sleep(Duration::from_millis(300));
        let agent = inside.agent();
        let mut host = agent.connect();
        host.send("stillpoint-freeze", json!({"id": "r", "lease_ms": 60_000, "want": "filesystem", "prepare_ms_max": 6_000}));
        until("freezing", Duration::from_secs(20), || agent.state() == "freezing" && inside.blocks("/fast"));
        agent.signal(libc::SIGKILL);
        // The socket to the guard closes when the last thread has left the kernel; then it is at once.
        inside.until_writable("/slow", Duration::from_secs(20));
        inside.until_writable("/fast", Duration::from_secs(1));
    };

    a_freeze_that_would_stall_longer_than_allowed_is_refused_before_it_starts: |build| {
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 4_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        inside.keep_dirty("/slow/file", 5);
        std::thread::sleep(Duration::from_millis(300));
        let agent = inside.agent();
        let arguments = json!({"id": "r", "lease_ms": 60_000, "want": "filesystem", "prepare_ms_max": 1, "budget_ms": 300});
        let refusal = agent.refused("stillpoint-freeze", arguments);
        assert!(refusal.contains("by the last flush"), "{refusal}");
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/slow")["state"], "not_frozen");
        assert_eq!(report["frozen_ms"], 0);
        let check = agent.ask("stillpoint-check", json!({}));
        assert!(check["predicted_freeze_ms"].as_u64().unwrap() > 300, "{check}");
    };

    a_plain_freeze_that_takes_longer_than_a_shortened_compat_lease_fails: |build| {
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 4_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        inside.keep_dirty("/slow/file", 5);
        std::thread::sleep(Duration::from_millis(300));
        let agent = inside.agent_with_compat_lease(300);
        // Before it begins, which depends on what the last flush had to write, or while it goes on: then by the budget or by the
        // lease, which are over together.
        let codes = ["freeze_would_stall: ", "freeze_over_budget: ", "lease_ended: "];
        let refusal = agent.refused("guest-fsfreeze-freeze", json!({}));
        assert!(codes.iter().any(|code| refusal.starts_with(code)), "{refusal}");
        inside.expect_writable(&["/slow"]);
    };

    an_unfreezable_file_system_is_proven_unwritten_or_named: |build| {
        let device = build.filesystem("squashfs", "/sq");
        std::os::unix::fs::symlink(&device, build.outside("/run/device")).unwrap();
        build.filesystem("ext4", "/data");
    }, |inside| {
        let agent = inside.agent();
        assert_eq!(agent.freeze("r", 20_000)["frozen"], 1);
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/sq")["state"], "unwritten", "{report}");
        assert_eq!(filesystem(&report, "/sq")["read_only"], true);
        agent.freeze("s", 20_000);
        // Behind its back: the device itself is written to between the freeze and the thaw.
        let mut device = File::options().write(true).open("/run/device").unwrap();
        std::io::Seek::seek(&mut device, std::io::SeekFrom::End(-512)).unwrap();
        std::io::Write::write_all(&mut device, &[0; 512]).unwrap();
        device.sync_all().unwrap();
        let report = agent.thaw("s");
        assert_eq!(filesystem(&report, "/sq")["state"], "unsupported", "{report}");
        let check = agent.ask("stillpoint-check", json!({}));
        assert_eq!(filesystem(&check, "/sq")["state"], "unsupported");
        assert_eq!(filesystem(&check, "/data")["state"], "freezable");
    };

    a_state_folder_that_would_freeze_is_refused: |build| {
        build.filesystem("ext4", "/run");
    }, |inside| {
        let agent = inside.agent();
        let refusal = agent.refused("stillpoint-freeze", json!({"id": "r", "lease_ms": 5_000, "want": "filesystem"}));
        assert!(refusal.contains("tmpfs"), "{refusal}");
        inside.expect_writable(&["/run"]);
    };

    /// As in a container: what is written there is written to the frozen file system below.
    a_state_folder_over_a_file_system_that_would_freeze_is_refused: |build| {
        build.filesystem("ext4", "/data");
        let folders = ["lower", "upper", "work"].map(|name| {
            build.folder(&format!("/data/{name}"));
            format!("{name}dir={}", build.outside("/data").join(name).display())
        });
        build.mount_again("overlay", "overlay", "/run", &folders.join(","));
    }, |inside| {
        let agent = inside.agent();
        let refusal = agent.refused("guest-fsfreeze-freeze", json!({}));
        assert!(refusal.contains("tmpfs"), "{refusal}");
        inside.expect_writable(&["/data", "/run"]);
    };

    /// Left out of the freeze itself, but a store into it would wait for the file system that its file lies on.
    a_state_folder_whose_carrier_would_freeze_is_refused: |build| {
        build.filesystem("ext4", "/data");
        let device = build.device("/data/state.img", "ext4", 16);
        build.mount(&device, "ext4", "/run");
    }, |inside| {
        std::fs::write("/tmp/key-file", "[stillpoint]\nfreeze-exclude=/run\n").unwrap();
        let agent = inside.agent_with(&["-c", "/tmp/key-file"]);
        let refusal = agent.refused("guest-fsfreeze-freeze", json!({}));
        assert!(refusal.contains("tmpfs"), "{refusal}");
        inside.expect_writable(&["/data", "/run"]);
    };

    a_rehearsal_gives_way_to_a_run: |build| {
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 2_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        std::fs::write("/slow/file", vec![7u8; 16 << 20]).unwrap();
        let agent = inside.agent();
        let (mut one, mut other) = (agent.connect(), agent.connect());
        one.send("stillpoint-check", json!({}));
        until("the rehearsal flushes", Duration::from_secs(5), || {
            std::fs::read_to_string("/proc/meminfo").unwrap().lines().any(|line| {
                line.starts_with("Writeback:") && !line.contains(" 0 kB")
            })
        });
        other.send("stillpoint-check", json!({}));
        assert!(other.receive().to_string().contains("busy: "), "one at a time");
        other.send("guest-fsfreeze-freeze", json!({}));
        let called_off = one.receive_within(Duration::from_secs(20)).to_string();
        assert!(called_off.contains("aborted: "), "{called_off}");
        assert_eq!(other.receive_within(Duration::from_secs(40))["return"], 1);
        assert!(agent.refused("stillpoint-check", json!({})).contains("disabled"), "none while frozen");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
    };

    a_mount_in_another_namespace_freezes_too: |build| {
        build.filesystem("ext4", "/data");
        build.filesystem("ext4", "/only-there");
    }, |inside| {
        let other = inside.in_other_namespace(|| {
            rustix::mount::mount_change("/", rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC)
                .unwrap();
        });
        rustix::mount::unmount("/only-there", rustix::mount::UnmountFlags::DETACH).unwrap();
        assert!(inside.mounts().iter().all(|mount| mount.mountpoint.to_str() != Some("/only-there")));
        let there = format!("/proc/{other}/root/only-there");
        let agent = inside.agent();
        assert_eq!(agent.freeze("r", 20_000)["frozen"], 2);
        inside.expect_blocked(&["/data", &there]);
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/only-there")["state"], "held");
        inside.expect_writable(&["/data", &there]);
        kill(other, libc::SIGKILL);
    };

    an_agent_whose_own_root_is_frozen_goes_on_answering: |build| {
        build.filesystem("ext4", "/root");
        build.filesystem("ext4", "/root/data");
        build.system("/root");
    }, |inside| {
        let agent = inside.agent_in("/root");
        let answer = agent.freeze("r", 3_000);
        assert_eq!(answer["frozen"], 2, "{answer}");
        inside.expect_blocked(&["/root", "/root/data"]);
        for _ in 0..20 {
            assert_eq!(agent.state(), "frozen");
        }
        let report = agent.thaw("r");
        let (root, data) = (filesystem(&report, "/"), filesystem(&report, "/data"));
        assert_eq!((&root["state"], &data["state"]), (&json!("held"), &json!("held")), "{report}");
        let order: Vec<_> = report["filesystems"].as_array().unwrap().iter().map(|one| &one["mountpoint"]).collect();
        assert_eq!(order, [&json!("/data"), &json!("/")], "the root file system last");
        assert_eq!(agent.freeze("s", 1_000)["frozen"], 2);
        agent.signal(libc::SIGKILL);
        inside.until_writable("/root", Duration::from_secs(1));
        inside.until_writable("/root/data", Duration::from_secs(1));
    };

    while_frozen_nothing_is_opened_forked_or_executed: |build| {
        two(build);
        build.program("/usr/bin/strace");
    }, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 30_000);
        nothing_is_opened_forked_or_executed(inside, &agent);
    };

    unknown_writers_are_listed: two, |inside| {
        let _open = File::create("/a/open").unwrap();
        let agent = inside.agent();
        agent.freeze("r", 20_000);
        let report = agent.thaw("r");
        let writers = report["unknown_writers"].as_array().unwrap();
        assert_eq!(writers.len(), 1, "{report}");
        assert_eq!((&writers[0]["pid"], &writers[0]["mountpoints"]), (&json!(1), &json!(["/a"])));
    };

    plain_freeze_and_thaw_count_as_qemu_ga_does: |build| {
        let device = build.filesystem("ext4", "/a");
        build.mount_again(&device, "ext4", "/second", "");
        build.filesystem("ext4", "/b");
    }, |inside| {
        let agent = inside.agent();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "frozen");
        assert!(std::path::Path::new("/run/qga.state.isfrozen").exists());
        inside.expect_blocked(&["/a", "/second", "/b"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
        assert!(!std::path::Path::new("/run/qga.state.isfrozen").exists());
        let frozen = |list: &[&str]| {
            let count = agent.ask("guest-fsfreeze-freeze-list", json!({"mountpoints": list})).as_i64().unwrap();
            assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), count);
            count
        };
        assert_eq!(frozen(&["/second"]), 1, "any mount point of a file system stands for it");
        assert_eq!(frozen(&["/b", "/a", "/b"]), 2);
        assert_eq!(frozen(&["/b/"]), 0);
        assert_eq!(frozen(&["/nope"]), 0);
        assert_eq!(frozen(&[]), 0);
    };

    a_mark_left_by_a_stock_agent_waits_for_the_hosts_thaw: two, |inside| {
        kernel::freeze(File::open("/a").unwrap().as_fd()).unwrap();
        std::fs::write("/run/qga.state.isfrozen", b"").unwrap();
        let agent = inside.agent();
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "frozen");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
        inside.expect_writable(&["/a"]);
    };

    what_a_stock_agent_left_frozen_is_thawed_when_the_compat_lease_ends: two, |inside| {
        kernel::freeze(File::open("/a").unwrap().as_fd()).unwrap();
        std::fs::write("/run/qga.state.isfrozen", b"").unwrap();
        let agent = inside.agent_with_compat_lease(2_000);
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "frozen");
        inside.until_writable("/a", Duration::from_secs(4));
        until("it is told", Duration::from_secs(5), || agent.state() == "thawed");
        assert!(!std::path::Path::new("/run/qga.state.isfrozen").exists());
        let refused = agent.refused("guest-fsfreeze-thaw", json!({}));
        assert!(refused.contains("lease_ended: the guest was frozen no longer: another agent"), "{refused}");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0, "told once");
        let log = std::fs::read_to_string("/run/agent.log").unwrap();
        assert!(log.contains("the lease of 2000 ms ended: what another agent left frozen is thawed"), "{log}");
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2, "it serves as any other");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
    };

    a_stock_agents_mark_from_before_the_boot_refuses_nothing: two, |inside| {
        let mark = File::create("/b/qga.state.isfrozen").unwrap();
        let up = Duration::from_nanos(kernel::boottime_ns());
        mark.set_modified(std::time::SystemTime::now() - up - Duration::from_secs(3600)).unwrap();
        let agent = inside.agent_with_state_in("/b");
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
        assert!(!std::path::Path::new("/b/qga.state.isfrozen").exists());
        let log = std::fs::read_to_string("/run/agent.log").unwrap();
        assert!(log.contains("removed a mark of a frozen guest that is older than this boot"), "{log}");
        assert!(agent.ask("guest-get-host-name", json!({})).is_object(), "what is refused while frozen");
    };

    the_lease_of_what_a_stock_agent_left_frozen_does_not_begin_anew_with_the_agent: two, |inside| {
        kernel::freeze(File::open("/a").unwrap().as_fd()).unwrap();
        let mark = File::create("/run/qga.state.isfrozen").unwrap();
        mark.set_modified(std::time::SystemTime::now() - Duration::from_secs(60)).unwrap();
        let agent = inside.agent_with_compat_lease(60_000);
        inside.until_writable("/a", Duration::from_secs(5));
        until("it is told", Duration::from_secs(5), || agent.state() == "thawed");
    };

    the_first_plain_thaw_after_the_compat_lease_says_that_it_ended: ext4, |inside| {
        let agent = inside.agent_with_compat_lease(1_000);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 1);
        inside.until_writable("/data", Duration::from_secs(3));
        until("the run is over", Duration::from_secs(5), || agent.state() == "thawed");
        assert!(agent.refused("guest-fsfreeze-thaw", json!({})).contains("thawed by itself"));
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
    };

    one_run_at_a_time_holds_the_guest: two, |inside| {
        let agent = inside.agent();
        agent.freeze("r", 20_000);
        assert!(agent.refused("stillpoint-freeze", json!({"id": "s", "lease_ms": 1000})).contains("disabled"));
        assert_eq!(filesystem(&agent.thaw("r"), "/a")["state"], "held");
    };
}

/// Watches a frozen agent and its guard at work, and thaws the run `r`.
pub(crate) fn nothing_is_opened_forked_or_executed(inside: &Inside, agent: &Agent) {
    let pids = [agent.pid(), inside.guard().unwrap()].map(|pid| pid.to_string());
    let Ok(mut tracer) = std::process::Command::new("/bin/strace")
        .args(["-f", "-q", "-o", "/run/trace", "-p", &pids[0], "-p", &pids[1]])
        .spawn()
    else {
        eprintln!("SKIPPED needs /usr/bin/strace");
        return;
    };
    until("both are traced", Duration::from_secs(10), || pids.iter().all(|pid| inside.is_traced(pid)));
    for _ in 0..5 {
        agent.ask("guest-ping", json!({}));
        agent.ask("stillpoint-status", json!({}));
        agent.ask("guest-fsfreeze-status", json!({}));
        agent.ask("stillpoint-renew", json!({"id": "r", "lease_ms": 30_000}));
    }
    inside.expect_blocked(&["/a", "/b"]);
    kill(i32::try_from(tracer.id()).unwrap(), libc::SIGINT);
    tracer.wait().unwrap();
    agent.thaw("r");
    let trace = std::fs::read_to_string("/run/trace").unwrap();
    assert!(trace.contains("accept4("), "the trace shows the requests: {trace}");
    for call in [
        "open(",
        "openat(",
        "openat2(",
        "creat(",
        "execve(",
        "execveat(",
        "fork(",
        "clone(",
        "clone3(",
        "unlink",
        "rename",
    ] {
        let lines: Vec<&str> = trace
            .lines()
            .filter(|line| line.split_whitespace().nth(1).is_some_and(|word| word.starts_with(call)))
            .collect();
        assert!(lines.is_empty(), "{lines:?}");
    }
}

/// What the scene above is about, shown without the agent: the carrier first, and the inner freeze never returns.
fn the_wrong_order_waits_for_ever() {
    let carrier = File::open("/carrier").unwrap();
    kernel::freeze(carrier.as_fd()).unwrap();
    let inner = std::thread::spawn(|| {
        let inner = File::open("/inner").unwrap();
        kernel::freeze(inner.as_fd()).unwrap();
        kernel::thaw(inner.as_fd()).unwrap();
    });
    std::thread::sleep(Duration::from_millis(800));
    assert!(
        !inner.is_finished(),
        "the inner file system froze: then the order does not matter and this shows nothing"
    );
    kernel::thaw(carrier.as_fd()).unwrap();
    inner.join().unwrap();
}

/// Says why a scene cannot be played here.
pub(crate) fn cannot_throttle() -> bool {
    match std::fs::read_to_string("/run/no-throttle") {
        Ok(path) => {
            eprintln!("SKIPPED needs {path} to slow a device down");
            true
        }
        Err(_) => false,
    }
}
