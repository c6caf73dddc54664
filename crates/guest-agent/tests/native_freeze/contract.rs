//! More scenes: what qemu-ga's users rely on around a freeze, and what they suffered from.

use super::client::{codes, filesystem, until};
use super::scenes::{Scene, cannot_throttle, scenes, two};
use guest_agent::freeze::kernel;
use serde_json::json;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

scenes! {
    d1_every_signal_that_ends_the_agent_thaws_first: two, |inside| {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            let mut agent = inside.agent();
            assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
            inside.expect_blocked(&["/a"]);
            agent.signal(signal);
            inside.until_writable("/a", Duration::from_secs(2));
            assert_eq!(agent.ended(Duration::from_secs(5)), Some(0), "signal {signal}");
            inside.expect_writable(&["/b"]);
            until("the guard is gone", Duration::from_secs(5), || inside.guard().is_none());
            assert!(!Path::new("/run/freeze-undo").exists());
            assert!(!Path::new("/run/qga.state.isfrozen").exists());
        }
    };

    d18_a_client_that_leaves_its_answers_unread_ends_no_freeze: two, |inside| {
        let agent = inside.agent();
        let mut host = agent.connect();
        assert_eq!(host.ask("guest-fsfreeze-freeze", json!({}))["return"], 2);
        for _ in 0..3 {
            let mut rude = agent.connect();
            // One: were there more, the agent would find out by writing.
            rude.send("guest-info", json!({}));
            rude.wait_for_something();
            // Closed with answers in its buffer: the agent's socket sees a reset.
        }
        assert_eq!(host.ask("guest-fsfreeze-status", json!({}))["return"], "frozen");
        inside.expect_blocked(&["/a", "/b"]);
        drop(host);
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "frozen", "its host may come back");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
    };

    d19_a_client_that_does_not_read_keeps_nobody_from_thawing: two, |inside| {
        let agent = inside.agent();
        let mut deaf = agent.connect();
        assert_eq!(deaf.ask("guest-fsfreeze-freeze", json!({}))["return"], 2);
        deaf.stuff("guest-info");
        inside.expect_blocked(&["/a", "/b"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        inside.expect_writable(&["/a", "/b"]);
    };

    d33_ping_status_and_info_are_answered_while_a_freeze_takes_its_time: |build| {
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
        host.send("guest-fsfreeze-freeze", json!({}));
        until("the freeze has begun", Duration::from_secs(20), || agent.state() != "thawed");
        // On the same channel, as libvirt's next job would: an id, or a sync, which gives the freeze's answer up.
        for command in ["guest-ping", "guest-fsfreeze-status", "guest-info"] {
            host.send_with_id(command, 1);
            let answer = host.receive();
            assert_eq!(answer["id"], 1, "the freeze was over too early: {answer}");
            agent.ask(command, json!({}));
        }
        assert_ne!(agent.state(), "thawed");
        assert_eq!(host.ask("guest-sync", json!({"id": 5}))["return"], 5);
        assert_eq!(host.ask("guest-ping", json!({}))["return"], json!({}));
        host.ask("guest-fsfreeze-thaw", json!({}));
        inside.until_writable("/slow", Duration::from_secs(20));
    };

    /// More is dirty than any time for flushing allows: a stock agent freezes all the same, and hosts rely on that.
    a_plain_freeze_takes_the_time_that_it_needs: |build| {
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 2_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        std::fs::write("/slow/file", vec![7u8; 16 << 20]).unwrap();
        let agent = inside.agent();
        let mut host = agent.connect();
        let begun = Instant::now();
        host.send("guest-fsfreeze-freeze", json!({}));
        assert_eq!(host.receive_within(Duration::from_secs(40))["return"], 1);
        assert!(begun.elapsed() > Duration::from_secs(6), "flushed in time: {:?}", begun.elapsed());
        inside.expect_blocked(&["/slow"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        inside.expect_writable(&["/slow"]);
    };

    what_the_administrator_leaves_out_is_not_frozen_and_says_so: |build| {
        build.filesystem("ext4", "/a");
        let device = build.filesystem("ext4", "/b");
        build.mount_again(&device, "ext4", "/pods/one", "");
        build.filesystem("xfs", "/x");
    }, |inside| {
        std::fs::write("/run/key-file", "[stillpoint]\nfreeze-exclude=/pods/*,xfs\n").unwrap();
        let mut agent = inside.agent_with(&["-c", "/run/key-file"]);
        assert_eq!(agent.freeze("r", 20_000)["frozen"], 1);
        inside.expect_blocked(&["/a"]);
        inside.expect_writable(&["/b", "/pods/one", "/x"]);
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/a")["state"], "held");
        for left_out in ["/b", "/x"] {
            assert_eq!(filesystem(&report, left_out)["state"], "not_frozen", "{report}");
        }
        assert_eq!(codes(&report["reasons"]).iter().filter(|code| **code == "filesystem_excluded").count(), 2);
        let check = agent.ask("stillpoint-check", json!({}));
        assert_eq!(filesystem(&check, "/a")["state"], "freezable");
        assert_eq!(filesystem(&check, "/x")["state"], "not_frozen");
        // A host that names it gets it no more than one that does not.
        assert_eq!(agent.ask("guest-fsfreeze-freeze-list", json!({"mountpoints": ["/b", "/x"]})), 0);
        agent.signal(libc::SIGTERM);
        agent.ended(Duration::from_secs(5));
        let agent = inside.agent_with(&["--freeze-include=/x"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 1);
        inside.expect_blocked(&["/x"]);
        inside.expect_writable(&["/a", "/b"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
    };

    a_state_folder_on_a_file_system_that_is_left_out_will_do: |build| {
        build.filesystem("ext4", "/run");
        build.filesystem("ext4", "/data");
    }, |inside| {
        let agent = inside.agent_with(&["--freeze-exclude=/run"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 1);
        inside.expect_blocked(&["/data"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
    };

    the_lease_of_plain_freezes_can_stand_in_the_key_file: two, |inside| {
        std::fs::write("/run/key-file", "[stillpoint]\ncompat-lease-ms=1000\n").unwrap();
        let agent = inside.agent_with(&["-c", "/run/key-file"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        inside.until_writable("/a", Duration::from_secs(4));
    };

    commands_of_note_are_told_to_syslog_but_not_while_frozen: two, |inside| {
        let syslog = UnixDatagram::bind("/dev/log").unwrap();
        syslog.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let next = || {
            let mut bytes = [0; 4096];
            let length = syslog.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        };
        let agent = inside.agent_with(&["-l", "/run/own.log"]);
        agent.ask("guest-ping", json!({}));
        assert_eq!(next(), "<14>stillpoint-agent: info: guest-ping called");
        agent.refused("guest-exec", json!({"path": "/nope\nforged", "arg": ["a b"]}));
        assert_eq!(next(), "<14>stillpoint-agent: info: guest-exec called: \"/nope forged a b\"");
        agent.ask("guest-fsfreeze-freeze", json!({}));
        assert_eq!(next(), "<14>stillpoint-agent: info: guest-fsfreeze called");
        agent.ask("guest-ping", json!({}));
        syslog.set_nonblocking(true).unwrap();
        assert!(syslog.recv(&mut [0; 64]).is_err(), "nothing is told while frozen");
        // Nobody reads any more: what would be told is not waited for.
        for _ in 0..200 {
            agent.ask("guest-ping", json!({}));
        }
        agent.ask("guest-fsfreeze-thaw", json!({}));
        for _ in 0..200 {
            agent.ask("guest-ping", json!({}));
        }
        assert!(syslog.recv(&mut [0; 64]).is_ok(), "and after the thaw it is told");
        let log = std::fs::read_to_string("/run/own.log").unwrap();
        assert!(log.contains(": warning: disabling logging due to filesystem freeze\n"), "{log}");
        assert!(log.contains(": warning: logging re-enabled due to filesystem unfreeze\n"), "{log}");
    };

    a_daemon_that_starts_frozen_writes_its_pid_file_after_the_thaw: two, |inside| {
        // As a stock agent that was killed leaves it.
        kernel::freeze(File::open("/a").unwrap().as_fd()).unwrap();
        std::fs::write("/run/qga.state.isfrozen", b"").unwrap();
        let mut starter = inside.agent_with(&["-d", "-f", "/a/pid", "-l", "/a/log"]);
        assert_eq!(starter.ended(Duration::from_secs(10)), Some(0), "it is not kept waiting");
        assert_eq!(starter.ask("guest-fsfreeze-status", json!({})), "frozen");
        assert_eq!(starter.ask("guest-fsfreeze-thaw", json!({})), 1);
        until("the pid file is there", Duration::from_secs(10), || {
            std::fs::read_to_string("/a/pid").is_ok_and(|text| text.ends_with('\n'))
        });
        until("and so is the log", Duration::from_secs(10), || Path::new("/a/log").exists());
    };
}
