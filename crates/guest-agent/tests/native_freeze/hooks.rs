//! Scenes with hooks: they are called before the freeze and after the thaw, whatever happens in between.

use super::client::{Agent, codes, filesystem, kill, until};
use super::private_root::Build;
use super::scenes::{Scene, nothing_is_opened_forked_or_executed, scenes, two};
use guest_agent::freeze::kernel;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Says that it was called, in the log and on the file system that is to be frozen: where that is frozen, it hangs.
const NOTES: &str = "log ${0##*/} $1\necho $1 >>/a/${0##*/}";

fn hooked(build: &mut Build, hooks: &[(&str, &str)]) {
    two(build);
    for (name, text) in hooks {
        build.hook(name, text);
    }
}

/// What the hooks have logged, on one line.
fn log() -> String {
    let text = std::fs::read_to_string("/run/hooks.log").unwrap_or_default();
    text.lines().collect::<Vec<_>>().join(" ")
}

fn last(agent: &Agent) -> Value {
    agent.ask("stillpoint-status", json!({}))["last"].clone()
}

fn want_application(id: &str) -> Value {
    json!({"id": id, "lease_ms": 30_000, "want": "application"})
}

fn lives(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

scenes! {
    d17_hooks_are_called_before_the_freeze_and_in_reverse_order_after_the_thaw: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", NOTES), ("30-c.sample", NOTES)]);
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        assert_eq!(log(), "10-a freeze 20-b freeze");
        inside.expect_blocked(&["/a", "/b"]);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        assert_eq!(log(), "10-a freeze 20-b freeze 20-b thaw 10-a thaw");
        let hooks = last(&agent)["hooks"].clone();
        assert_eq!(hooks.as_array().unwrap().len(), 2, "{hooks}");
        for hook in hooks.as_array().unwrap() {
            assert_eq!((&hook["freeze"]["outcome"], &hook["thaw"]["outcome"]), (&json!("succeeded"), &json!("succeeded")));
        }
        // Called by our own command as well, unless applications are to be left alone.
        agent.freeze("left-alone", 20_000);
        agent.thaw("left-alone");
        assert!(log().ends_with("20-b thaw 10-a thaw") && log().split(' ').count() == 8, "{}", log());
        let flushed = |report: &Value| report["flush_rounds_ms"].as_array().map_or(0, Vec::len);
        let left_alone = agent.ask("stillpoint-status", json!({}))["last"].clone();
        agent.ask("stillpoint-freeze", want_application("r"));
        let report = agent.thaw("r");
        assert_eq!(filesystem(&report, "/a")["state"], "held");
        assert_eq!(log().split(' ').count(), 16, "{}", log());
        // What a hook holds may stall writers: the bulk is written out before it is called. Otherwise nothing is written out twice.
        // Either way the remainder follows, right before FIFREEZE.
        assert!(flushed(&left_alone) == 2 && flushed(&report) == 3, "{left_alone} {report}");
    };

    d12_a_failing_hook_fails_the_freeze: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", "log b $1; echo secret; [ $1 = thaw ] || exit 5"), ("30-c", NOTES)]);
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        let refusal = agent.refused("guest-fsfreeze-freeze", json!({}));
        assert!(refusal.contains("child process has failed to execute fsfreeze hook: exit status 5"), "{refusal}");
        assert!(refusal.contains("20-b") && !refusal.contains("secret"), "{refusal}");
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
        inside.expect_writable(&["/a", "/b"]);
        assert_eq!(log(), "10-a freeze b freeze b thaw 10-a thaw");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
        let refusal = agent.refused("stillpoint-freeze", want_application("r"));
        assert!(refusal.starts_with("hook_failed: "), "{refusal}");
        let report = agent.thaw("r");
        assert_eq!(report["thawed_by"], "nothing_frozen");
        assert_eq!(report["hooks"][1]["freeze"]["exit_code"], 5, "{report}");
        assert!(!report.to_string().contains("secret"), "{report}");
        assert!(std::fs::read_to_string("/run/agent.log").unwrap().contains("20-b freeze: secret"), "it is in the guest's log");
    };

    d13_the_packaged_script_is_not_called_itself_whatever_is_wrong_with_it: |build| {
        hooked(build, &[("10-a", NOTES)]);
        // As the script of QEMU 10.2 under a shell that it was not written for.
        let broken = "#!/bin/sh\n# stillpoint-agent calls fsfreeze-hook.d by itself\nSTATUS=${PIPESTATUS[0]}\nexit 0\n";
        let path = build.outside("/etc/qemu/fsfreeze-hook");
        std::fs::write(&path, broken).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }, |inside| {
        let ran = std::process::Command::new("/etc/qemu/fsfreeze-hook").arg("freeze").output().unwrap();
        assert!(!ran.status.success(), "it really is broken");
        let agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        assert_eq!(log(), "10-a freeze 10-a thaw");
    };

    d10_a_hook_that_hangs_ends_at_its_limit_and_the_agent_answers_meanwhile: |build| {
        hooked(build, &[("10-hangs", "log a $1; [ $1 = thaw ] || exec sleep 600")]);
    }, |inside| {
        let agent = inside.agent_with(&["-F", "--hook-limit-ms=4000"]);
        let mut host = agent.connect();
        host.send("guest-fsfreeze-freeze", json!({}));
        until("the hook is called", Duration::from_secs(20), || log() == "a freeze");
        for _ in 0..5 {
            let begun = Instant::now();
            agent.ask("guest-ping", json!({}));
            assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
            assert!(agent.ask("guest-info", json!({}))["supported_commands"].is_array());
            assert_eq!(agent.state(), "quiescing");
            assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
            inside.expect_writable(&["/a", "/b"]);
        }
        let answer = host.receive();
        let words = answer["error"]["desc"].as_str().unwrap();
        assert!(words.starts_with("hook_timeout: ") && words.contains("no end within"), "{words}");
        assert_eq!(log(), "a freeze a thaw");
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "thawed");
    };

    d33_a_probe_is_answered_while_a_hook_runs_on_the_very_same_connection: |build| {
        hooked(build, &[("10-slow", "log a $1; [ $1 = thaw ] || exec sleep 600")]);
    }, |inside| {
        let agent = inside.agent_with(&["-F", "--hook-limit-ms=60000"]);
        let mut host = agent.connect();
        host.send("guest-fsfreeze-freeze", json!({}));
        until("the hook is called", Duration::from_secs(20), || log() == "a freeze");
        let begun = Instant::now();
        // As hosts do that send no ids: a sync says that nobody waits for the freeze's answer any more.
        assert_eq!(host.ask("guest-sync", json!({"id": 7}))["return"], 7);
        assert_eq!(host.ask("guest-ping", json!({}))["return"], json!({}));
        assert_eq!(host.ask("guest-fsfreeze-thaw", json!({}))["return"], 0);
        assert!(begun.elapsed() < Duration::from_secs(20), "a thaw waits for no hook's limit: {:?}", begun.elapsed());
        assert_eq!(log(), "a freeze a thaw");
    };

    d11_a_hook_that_leaves_a_lock_holder_behind_delays_nothing: |build| {
        hooked(build, &[(
            "10-lock",
            "case $1 in
             freeze) (echo $$ >/dev/null; sleep 600 & echo $! >/run/holder; while :; do echo holding; sleep 0.05; done) & echo $! >/run/writer;;
             thaw) kill $(cat /run/holder /run/writer);;
             esac",
        )]);
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        let begun = Instant::now();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let pids: Vec<String> = ["/run/holder", "/run/writer"].iter().map(|file| std::fs::read_to_string(file).unwrap().trim().to_owned()).collect();
        std::thread::sleep(Duration::from_millis(300));
        assert!(pids.iter().all(|pid| lives(pid)), "what holds a lock lives until the thaw, and so does what writes");
        inside.expect_blocked(&["/a"]);
        agent.ask("guest-ping", json!({}));
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        until("they are gone", Duration::from_secs(10), || !pids.iter().any(|pid| lives(pid)));
    };

    d14_hooks_are_called_after_a_freeze_of_nothing_and_after_one_that_failed: |build| {
        hooked(build, &[("10-a", NOTES)]);
        build.hook("20-b", "log b $1; [ ! -e /run/fail ] || [ $1 = thaw ]");
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze-list", json!({"mountpoints": []})), 0);
        assert_eq!(log(), "10-a freeze b freeze b thaw 10-a thaw");
        std::fs::write("/run/fail", b"").unwrap();
        agent.refused("guest-fsfreeze-freeze", json!({}));
        assert_eq!(log(), "10-a freeze b freeze b thaw 10-a thaw ".repeat(2).trim_end());
        std::fs::remove_file("/run/fail").unwrap();
        // Refused after the hooks: a freeze that would take longer than allowed.
        let arguments = json!({"id": "r", "lease_ms": 30_000, "want": "application", "budget_ms": 0});
        let refusal = agent.refused("stillpoint-freeze", arguments);
        assert!(refusal.starts_with("freeze_"), "{refusal}");
        assert_eq!(log(), "10-a freeze b freeze b thaw 10-a thaw ".repeat(3).trim_end());
    };

    d15_a_hook_that_fails_after_the_thaw_leaves_the_thaw_a_success: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", "log b $1; [ $1 = freeze ]")]);
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        assert_eq!(log(), "10-a freeze b freeze b thaw 10-a thaw");
        let report = last(&agent);
        assert_eq!(report["hooks"][1]["thaw"]["exit_code"], 1);
        assert!(codes(&report["reasons"]).contains(&"hook_thaw_failed"), "{report}");
        assert!(std::fs::read_to_string("/run/agent.log").unwrap().contains("20-b thaw: exit status 1"));
    };

    d16_a_hook_that_writes_without_end_costs_no_memory: |build| {
        hooked(build, &[("10-floods", "dd if=/dev/zero bs=65536 count=4800 2>/dev/null")]);
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        let peak_kib = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        // A run without its hook has costs of its own: the guard's copy of the program, among others.
        agent.freeze("before", 20_000);
        agent.thaw("before");
        let before = peak_kib();
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 2);
        assert_eq!(last(&agent)["hooks"][0]["freeze"]["output_bytes"], 4800 * 65536);
        let more = peak_kib() - before;
        eprintln!("300 MiB of output twice: {more} KiB more at the peak, of {before}");
        assert!(more < 8 << 10, "{more} KiB");
    };

    while_frozen_nothing_is_opened_forked_or_executed_though_hooks_left_children: |build| {
        let writes = "[ $1 = thaw ] && exec kill $(cat /run/writer)\n(while :; do echo more; sleep 0.01; done) & echo $! >/run/writer";
        hooked(build, &[("10-a", NOTES), ("20-b", writes)]);
        build.program("/usr/bin/strace");
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        agent.ask("stillpoint-freeze", want_application("r"));
        nothing_is_opened_forked_or_executed(inside, &agent);
        assert_eq!(log(), "10-a freeze 10-a thaw");
    };

    hooks_are_called_when_the_lease_ends_without_the_host: |build| {
        hooked(build, &[("10-a", NOTES)]);
    }, |inside| {
        let agent = inside.agent_with(&["-F", "--compat-lease-ms=1000"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        until("the hook is called", Duration::from_secs(20), || log() == "10-a freeze 10-a thaw");
        until("the run is over", Duration::from_secs(10), || agent.state() == "thawed");
        assert!(agent.refused("guest-fsfreeze-thaw", json!({})).contains("thawed by itself"));
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 0);
        assert_eq!(log(), "10-a freeze 10-a thaw", "once");
    };

    hooks_are_called_before_a_stopping_agent_ends: |build| {
        hooked(build, &[("10-a", "[ $1 = freeze ] || sleep 1; log a $1")]);
    }, |inside| {
        let mut agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        agent.signal(libc::SIGTERM);
        agent.ended(Duration::from_secs(30));
        assert_eq!(log(), "a freeze a thaw");
        assert!(!std::path::Path::new("/run/freeze-undo").exists());
    };

    the_next_agent_calls_the_hooks_of_one_that_was_killed_while_frozen: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", NOTES)]);
    }, |inside| {
        let mut agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        agent.signal(libc::SIGKILL);
        agent.ended(Duration::from_secs(10));
        inside.until_writable("/a", Duration::from_secs(5));
        until("the guard is gone", Duration::from_secs(5), || inside.guard().is_none());
        assert_eq!(log(), "10-a freeze 20-b freeze");
        // Even one that was not told of any hooks.
        let again = inside.agent();
        until("the record is undone", Duration::from_secs(20), || again.state() == "thawed");
        assert_eq!(log(), "10-a freeze 20-b freeze 20-b thaw 10-a thaw");
        let report = last(&again);
        assert!(codes(&report["reasons"]).contains(&"agent_restarted"));
        assert_eq!(report["hooks"][0]["thaw"]["outcome"], "succeeded", "{report}");
        assert!(again.refused("guest-fsfreeze-thaw", json!({})).contains("agent died during the freeze"));
        assert_eq!(again.ask("guest-fsfreeze-thaw", json!({})), 0);
    };

    the_next_agent_ends_a_hook_that_was_being_called_and_calls_it_after: |build| {
        hooked(build, &[("10-a", NOTES), (
            "20-b",
            "log b $1\n[ $1 = thaw ] && exit\nsleep 600 & echo $! >/run/child\necho $$ >/run/hook\nwait\nlog went on",
        )]);
    }, |inside| {
        let mut agent = inside.agent_with(&["-F"]);
        agent.connect().send("guest-fsfreeze-freeze", json!({}));
        until("the second hook is called", Duration::from_secs(20), || std::path::Path::new("/run/hook").exists());
        let [hook, child] = ["/run/hook", "/run/child"].map(|file| std::fs::read_to_string(file).unwrap().trim().to_owned());
        agent.signal(libc::SIGKILL);
        agent.ended(Duration::from_secs(10));
        until("the hook dies with its agent", Duration::from_secs(10), || !lives(&hook));
        assert!(lives(&child), "what it started does not; the next agent ends it");
        let again = inside.agent_with(&["-F"]);
        until("the record is undone", Duration::from_secs(20), || again.state() == "thawed");
        // A signal takes a moment on a busy machine.
        until("what it started is ended", Duration::from_secs(10), || !lives(&child));
        assert_eq!(log(), "10-a freeze b freeze b thaw 10-a thaw");
        inside.expect_writable(&["/a", "/b"]);
    };

    hooks_owed_outlive_one_death_after_another: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", "log b $1; [ $1 = freeze ] || [ ! -e /run/hang ] || exec sleep 600")]);
    }, |inside| {
        let mut agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-freeze", json!({})), 2);
        std::fs::write("/run/hang", b"").unwrap();
        agent.signal(libc::SIGKILL);
        agent.ended(Duration::from_secs(10));
        let mut second = inside.agent_with(&["-F"]);
        until("it calls what is owed", Duration::from_secs(20), || log().ends_with("b thaw"));
        second.signal(libc::SIGKILL);
        second.ended(Duration::from_secs(10));
        std::fs::remove_file("/run/hang").unwrap();
        let third = inside.agent_with(&["-F"]);
        until("the record is undone", Duration::from_secs(20), || third.state() == "thawed");
        assert_eq!(log(), "10-a freeze b freeze b thaw b thaw 10-a thaw", "that it may be called twice is said");
        assert!(!std::path::Path::new("/run/freeze-undo").exists());
    };

    a_hook_that_others_may_change_is_refused_loudly: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", NOTES)]);
        let path = build.outside("/etc/qemu/fsfreeze-hook.d/20-b");
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o775)).unwrap();
    }, |inside| {
        let agent = inside.agent_with(&["-F"]);
        let refusal = agent.refused("guest-fsfreeze-freeze", json!({}));
        assert!(refusal.starts_with("hook_refused: ") && refusal.contains("20-b"), "{refusal}");
        assert_eq!(log(), "", "none is called");
        inside.expect_writable(&["/a", "/b"]);
        let check = agent.ask("stillpoint-check", json!({}));
        assert!(codes(&check["reasons"]).contains(&"hook_refused"), "{check}");
        assert!(std::fs::read_to_string("/run/agent.log").unwrap().contains("error: hook /etc/qemu/fsfreeze-hook.d/20-b is not called"));
    };

    a_hook_that_is_not_there_fails_the_freeze_in_qemu_gas_words: two, |inside| {
        let agent = inside.agent_with(&["-F/etc/nowhere"]);
        let refusal = agent.refused("guest-fsfreeze-freeze", json!({}));
        assert!(refusal.contains("failed to exec '/etc/nowhere': No such file or directory"), "{refusal}");
        inside.expect_writable(&["/a", "/b"]);
    };

    an_application_that_a_hook_names_is_attested_by_it: |build| {
        hooked(build, &[("10-db", "[ $1 = thaw ] && exit $(cat /run/code)\necho stillpoint: quiesced somedb /a/db; echo stillpoint: files /b; echo stillpoint: position 42")]);
        build.folder("/a/db");
    }, |inside| {
        std::fs::write("/run/code", b"0").unwrap();
        let agent = inside.agent_with(&["-F"]);
        agent.ask("stillpoint-freeze", want_application("r"));
        let report = agent.thaw("r");
        let application = report["applications"][0].clone();
        let expected = [("kind", json!("somedb")), ("instance", json!("/a/db")), ("quiesced", json!(true)), ("held", json!(true)),
            ("attested_by", json!("/etc/qemu/fsfreeze-hook.d/10-db")), ("position", json!("42")), ("crash_safe", json!(false))];
        for (member, value) in expected {
            assert_eq!(application[member], value, "{application}");
        }
        let numbers: Vec<_> = ["/a", "/b"].iter().map(|mount| filesystem(&report, mount)["device_number"].clone()).collect();
        let told = application["device_numbers"].as_array().unwrap();
        assert!(told.len() == 2 && numbers.iter().all(|number| told.contains(number)), "{application}");
        // A policy that asks for it is met; without the hook's word it is not.
        let required = |id: &str, kind: &str| json!({"id": id, "lease_ms": 20_000, "applications": [{"kind": kind, "policy": "required"}]});
        agent.ask("stillpoint-freeze", required("s", "somedb"));
        assert_eq!(agent.thaw("s")["applications"][0]["policy"], "required");
        assert!(agent.refused("stillpoint-freeze", required("t", "otherdb")).starts_with("required_application: "));
        std::fs::write("/run/code", b"3").unwrap();
        agent.ask("stillpoint-freeze", want_application("u"));
        let report = agent.thaw("u");
        assert_eq!(report["applications"][0]["held"], false, "it was not held, the hook says: {report}");
    };

    the_hooks_of_a_stock_agent_that_died_frozen_are_called_after_the_hosts_thaw: |build| {
        hooked(build, &[("10-a", NOTES), ("20-b", NOTES)]);
    }, |inside| {
        kernel::freeze(File::open("/a").unwrap().as_fd()).unwrap();
        std::fs::write("/run/qga.state.isfrozen", b"").unwrap();
        let agent = inside.agent_with(&["-F"]);
        assert_eq!(agent.ask("guest-fsfreeze-status", json!({})), "frozen");
        assert_eq!(log(), "");
        assert_eq!(agent.ask("guest-fsfreeze-thaw", json!({})), 1);
        assert_eq!(log(), "20-b thaw 10-a thaw");
    };

    an_agent_that_hangs_in_a_hooks_call_is_ended_by_its_guard: |build| {
        hooked(build, &[("10-a", "log a $1; [ $1 = thaw ] || exec sleep 600")]);
    }, |inside| {
        let mut agent = inside.agent_with(&["-F", "--hook-limit-ms=1000"]);
        agent.connect().send("guest-fsfreeze-freeze", json!({}));
        until("the hook is called", Duration::from_secs(20), || log() == "a freeze");
        agent.signal(libc::SIGSTOP);
        // Its limits, the longest flush, and what an agent may be late.
        agent.ended(Duration::from_secs(60));
        let again = inside.agent_with(&["-F"]);
        until("the record is undone", Duration::from_secs(20), || again.state() == "thawed");
        assert_eq!(log(), "a freeze a thaw");
        kill(again.pid(), libc::SIGTERM);
    };
}
