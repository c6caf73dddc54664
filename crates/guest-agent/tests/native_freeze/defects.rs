//! Defects of qemu-ga that are mended here: a scene for each that concerns freezing and that no other scene is about. Hosts see
//! what they saw before: these use its own commands. `docs/compatibility.md` has the table.

use super::client::{filesystem, until};
use super::scenes::{Scene, cannot_throttle, scenes, two};
use guest_agent::freeze::kernel;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

fn last(agent: &super::client::Agent) -> Value {
    agent.ask("stillpoint-status", json!({}))["last"].clone()
}

scenes! {
    d1_a_plain_freeze_lasts_for_ever_neither_by_itself_nor_by_a_death: two, |inside| {
        let mut agent = inside.agent_with(&["--compat-lease-ms=1500"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        inside.expect_blocked(&["/a"]);
        // The host is gone.
        inside.until_writable("/a", Duration::from_secs(10));
        until("the run is over", Duration::from_secs(10), || agent.state() == "thawed");
        let words = agent.refused("guest-fsfreeze-thaw", json!({}));
        assert!(words.starts_with("lease_ended: ") && words.contains("s since 1970"), "it says so and when: {words}");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        agent.signal(libc::SIGTERM);
        agent.ended(Duration::from_secs(10));
        inside.expect_writable(&["/a", "/b"]);
        assert!(!std::path::Path::new("/run/qga.state.isfrozen").exists());
        let mut agent = inside.agent();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        agent.signal(libc::SIGKILL);
        inside.until_writable("/a", Duration::from_secs(5));
        inside.until_writable("/b", Duration::from_secs(5));
        agent.ended(Duration::from_secs(10));
        let agent = inside.agent();
        until("the record is undone", Duration::from_secs(10), || agent.state() == "thawed");
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
        let words = agent.refused("guest-fsfreeze-thaw", json!({}));
        assert!(words.contains("agent died") && words.contains("s since 1970"), "{words}");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
    };

    d1_what_a_host_must_be_told_outlives_the_agent: two, |inside| {
        let mut agent = inside.agent_with(&["--compat-lease-ms=500"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        until("the run is over", Duration::from_secs(10), || agent.state() == "thawed");
        agent.signal(libc::SIGKILL);
        agent.ended(Duration::from_secs(10));
        let mut agent = inside.agent();
        assert!(agent.refused("guest-fsfreeze-thaw", json!({})).contains("lease of 500 ms ended"));
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0, "told once");
        agent.signal(libc::SIGTERM);
        agent.ended(Duration::from_secs(10));
        assert_eq!(inside.agent().ask("guest-fsfreeze-thaw", json!({})), 0);
        // A host that begins anew does not want to hear of the freeze before.
        let agent = inside.agent_with(&["--compat-lease-ms=500"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        until("the run is over", Duration::from_secs(10), || agent.state() == "thawed");
        assert_eq!(agent.ask("guest-fsfreeze-freeze-list", json!({"mountpoints": []})), 0);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
        assert!(!std::path::Path::new("/run/freeze-ended").exists());
    };

    d2_a_plain_freeze_of_stacked_file_systems_needs_no_order_of_the_mount_table: |build| {
        let outer = build.filesystem("ext4", "/first");
        let inner = build.device("/first/disk.img", "ext4", 32);
        build.mount(&inner, "ext4", "/inner");
        build.mount_again(&outer, "ext4", "/carrier", "");
        build.detach("/first");
    }, |inside| {
        std::fs::write("/inner/file", vec![1u8; 1 << 20]).unwrap();
        let agent = inside.agent();
        for list in [json!({}), json!({"mountpoints": ["/carrier", "/inner"]})] {
            assert_eq!(agent.ask("guest-fsfreeze-freeze-list", list), 2);
            inside.expect_blocked(&["/inner", "/carrier"]);
            assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        }
    };

    d3_one_mount_that_cannot_be_opened_fails_no_freeze: |build| {
        build.filesystem("ext4", "/data");
        build.filesystem("ext4", "/hidden");
        drop(std::os::unix::net::UnixListener::bind(build.outside("/hidden/socket")).unwrap());
        std::fs::write(build.outside("/socket"), b"").unwrap();
        build.bind("/hidden/socket", "/socket");
        build.detach("/hidden");
    }, |inside| {
        let agent = inside.agent();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 1);
        inside.expect_blocked(&["/data"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        assert_eq!(filesystem(&last(&agent), "/socket")["state"], "unreachable", "it is named");
    };

    d4_a_mount_point_whose_opening_would_wait_for_ever_holds_up_nothing: |build| {
        build.filesystem("ext4", "/data");
        build.filesystem("ext4", "/hidden");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fifo = build.outside("/hidden/fifo");
        rustix::fs::mknodat(rustix::fs::CWD, fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        std::fs::write(build.outside("/fifo"), b"").unwrap();
        build.bind("/hidden/fifo", "/fifo");
        build.detach("/hidden");
    }, |inside| {
        let agent = inside.agent();
        let mut host = agent.connect();
        host.send("guest-fsfreeze-freeze", json!({}));
        agent.ask("guest-ping", json!({}));
        assert_eq!(host.receive()["return"], 1);
        inside.expect_blocked(&["/data"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        assert_eq!(filesystem(&last(&agent), "/fifo")["state"], "unreachable", "it is named");
    };

    d5_what_lies_under_another_mount_is_frozen_or_named_and_never_taken_for_the_other: |build| {
        build.filesystem("ext4", "/a");
        build.filesystem("ext4", "/x");
        build.filesystem("ext4", "/deep");
        build.folder("/elsewhere");
        build.bind("/deep", "/elsewhere");
        for place in ["/a", "/deep"] {
            build.folder("/x/folder");
            build.bind("/x/folder", place);
        }
    }, |inside| {
        let agent = inside.agent();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2, "/x, and /deep by its other place");
        inside.expect_blocked(&["/x", "/elsewhere"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        let report = last(&agent);
        assert_eq!(filesystem(&report, "/elsewhere")["state"], "held");
        let hidden = filesystem(&report, "/a");
        assert_eq!(hidden["state"], "unreachable", "{report}");
        assert!(hidden["detail"].as_str().unwrap().contains("on top"), "{hidden}");
        assert_eq!(agent.ask("guest-fsfreeze-freeze-list", json!({"mountpoints": ["/a"]})), 1, "what is seen there is /x");
        inside.expect_blocked(&["/x"]);
        inside.expect_writable(&["/elsewhere"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
    };

    d6_a_list_may_name_any_mount_of_a_file_system: |build| {
        let device = build.filesystem("btrfs", "/b");
        build.run("btrfs", &["subvolume", "create", "/b/home"]);
        build.mount_again(&device, "btrfs", "/home", "subvol=home");
        build.filesystem("ext4", "/other");
        build.folder("/bound");
        build.bind("/other", "/bound");
    }, |inside| {
        let agent = inside.agent();
        for (named, blocked, writable) in [("/home", "/b", "/other"), ("/bound", "/other", "/home")] {
            assert_eq!(agent.ask("guest-fsfreeze-freeze-list", json!({"mountpoints": [named]})), 1, "{named}");
            inside.expect_blocked(&[named, blocked]);
            inside.expect_writable(&[writable]);
            assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        }
    };

    d9_what_someone_else_froze_is_neither_counted_nor_thawed: two, |inside| {
        let theirs = File::open("/a").unwrap();
        kernel::freeze(theirs.as_fd()).unwrap();
        let agent = inside.agent();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 1);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        assert!(inside.blocks("/a"), "their freeze is not ours to thaw");
        kernel::thaw(theirs.as_fd()).unwrap();
        inside.expect_writable(&["/a"]);
        // And what someone else thaws is not counted as held.
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        kernel::thaw(theirs.as_fd()).unwrap();
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        assert_eq!(filesystem(&last(&agent), "/a")["state"], "early_thaw");
    };

    /// The agent dies with a freeze that it has read and not answered: whoever asks next hears at once how things stand.
    d30_a_freeze_that_got_lost_with_its_agent_keeps_nobody_waiting: |build| {
        build.filesystem("ext4", "/fast");
        let slow = build.filesystem("ext4", "/slow");
        build.throttle(&slow, 4_000_000);
    }, |inside| {
        if cannot_throttle() {
            return;
        }
        inside.keep_dirty("/slow/file", 5);
        std::thread::sleep(Duration::from_millis(300));
        let mut agent = inside.agent();
        let mut host = agent.connect();
        host.send("guest-fsfreeze-freeze", json!({}));
        until("the freeze has begun", Duration::from_secs(30), || agent.state() == "freezing");
        agent.signal(libc::SIGKILL);
        agent.ended(Duration::from_secs(40));
        let agent = inside.agent();
        let mut host = agent.connect();
        let begun = Instant::now();
        assert_eq!(host.ask("guest-sync", json!({"id": 4711}))["return"], 4711);
        // It may still be undoing what the other began; that is no reason not to answer.
        assert!(host.ask("guest-fsfreeze-status", json!({}))["return"].is_string());
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        until("the record is undone", Duration::from_secs(40), || agent.state() == "thawed");
        let words = agent.refused("guest-fsfreeze-thaw", json!({}));
        assert!(words.contains("the agent died during the freeze"), "{words}");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
        inside.until_writable("/fast", Duration::from_secs(20));
        inside.until_writable("/slow", Duration::from_secs(40));
    };
}
