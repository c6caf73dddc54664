//! Whoever dies or falls silent, at whatever step of a run: the guest goes on, nothing stays frozen or locked, no
//! snapshot claims more than it has evidence for, and the next run is whole.
//!
//! A quarter of the deaths are died once where a change waits for it, each of them three times in the long run.

use guest_protocol::stillpoint::{GuestReport, ThawCause};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use vm_tests::{At, Extent, Guest, Ordeal, Stillpoint, Victim, signal};

/// Whoever thaws after a death does so at once; an emulated guest on a busy machine takes its time for anything.
const AT_ONCE: Duration = Duration::from_secs(10);
/// Of the runs whose guest is thawed by a death in it, in seconds: long, so that it is not the lease that thaws.
const LONG_LEASE_S: u32 = 60;
/// Of the runs that nobody thaws.
const LEASE_S: u32 = 3;
/// Longest time until its guard ends an agent that hangs in the quiesce: hooks and modules have 10 s each, which is what the
/// engine asks for, and a step may end 5 s late (`run/walk.rs` of the agent).
const HANG_ENDED: Duration = Duration::from_secs(2 * 10 + 5);
/// The same for the flush after the quiesce, which has what is left of the 120 s of a run's preparations.
const FLUSH_HANG_ENDED: Duration = Duration::from_secs(120 + 5);
/// For the rest of a run whose agent is back: it thaws, cuts, and copies an increment. Emulated, on a busy machine.
const REST_OF_RUN: Duration = Duration::from_secs(30);
/// So often a run is killed when its manifest appears, until one was not over by then.
const MANIFEST_KILLS_MAX: u32 = 5;
/// Invariant 1.
const LEASE_AND_A_SECOND: Duration = Duration::from_secs(LEASE_S as u64 + 1);

const FROZEN: At = At::Answered("stillpoint-freeze");
const AFTER_THE_POINT: At = At::Asked("stillpoint-thaw");
/// The session that a worker holds.
const SESSION: &str = "^postgres: .*postgres postgres .local.";

fn begin(extent: Extent) -> Ordeal {
    // By a key file: a passphrase takes a second by design, and hundreds of commands are run.
    Ordeal::begin(Guest::builder(), Stillpoint::with_key_file().expect("a repository"), extent)
}

#[test]
fn whoever_dies_in_the_guest_it_thaws_and_lets_go_and_the_next_run_is_whole() {
    deaths_in_the_guest(Extent::Quarter);
}

#[test]
#[ignore = "long: each death three times"]
fn deaths_in_the_guest_three_times() {
    deaths_in_the_guest(Extent::ThreeTimes);
}

fn deaths_in_the_guest(extent: Extent) {
    let mut ordeal = begin(extent);
    for round in extent.rounds() {
        for victim in [Victim::Agent, Victim::Guard, Victim::Worker, Victim::All] {
            let most = if victim == Victim::Worker { "filesystem" } else { "crash" };
            if ordeal.takes() {
                println!("-- {round}: {victim:?} killed in the quiesce, before anything is frozen");
                ordeal.hold_quiesce();
                let run = ordeal.run(LONG_LEASE_S);
                ordeal.come_to_quiesce();
                ordeal.thaws_within(AT_ONCE, &victim.killed());
                ordeal.release_quiesce();
                ordeal.is_worth_at_most(run, most);
                ordeal.is_untouched();
                ordeal.is_over();
            }

            for (step, name) in
                [(FROZEN, "frozen, before the point"), (AFTER_THE_POINT, "frozen, after the point")]
            {
                if !ordeal.takes() {
                    continue;
                }
                println!("-- {round}: {victim:?} killed {name}");
                ordeal.agent.hold(step);
                let mut run = ordeal.run(LONG_LEASE_S);
                ordeal.come_to(&ordeal.agent, &mut run);
                if victim == Victim::Worker {
                    // Its death thaws nothing, and may not.
                    ordeal.guest.exec(&victim.killed()).success();
                } else {
                    ordeal.thaws_within(AT_ONCE, &victim.killed());
                }
                ordeal.agent.pass();
                ordeal.is_worth_at_most(run, most);
                ordeal.is_untouched();
                ordeal.is_over();
            }

            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: {victim:?} killed in the thaw, before PostgreSQL is resumed");
            ordeal.agent.hold(AFTER_THE_POINT);
            let mut run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to(&ordeal.agent, &mut run);
            ordeal.guest.exec(&signal(SESSION, &["STOP"])).success();
            ordeal.agent.pass();
            // Both can be written to as soon as they are thawed, and the session does not answer yet.
            ordeal.thaws_within(AT_ONCE, "true");
            ordeal.thaws_within(AT_ONCE, &victim.killed());
            ordeal.guest.exec(&signal(SESSION, &["CONT"])).success();
            // A guard's work is done by then.
            let most = if victim == Victim::Guard { "application" } else { "filesystem" };
            ordeal.is_worth_at_most(run, most);
            ordeal.is_untouched();
            ordeal.is_over();
        }
        for (victim, hangs) in
            [(Victim::Agent, false), (Victim::Guard, false), (Victim::Guard, true), (Victim::Agent, true)]
        {
            // Nothing is locked or frozen in that flush, so an agent that hangs in it is let live for two minutes: once is enough.
            if !ordeal.takes() || (round > 1 && hangs && victim == Victim::Agent) {
                continue;
            }
            let (name, deed) = if hangs { ("hangs", victim.hung()) } else { ("is killed", victim.killed()) };
            println!("-- {round}: {victim:?} {name} in the flush after the quiesce");
            let run = ordeal.run_to_flush(LONG_LEASE_S);
            let began = Instant::now();
            ordeal.guest.exec(&deed).success();
            ordeal.release_flush();
            ordeal.thaws_within(AT_ONCE, "true");
            ordeal.is_worth_at_most(run, "crash");
            // A host gives up on an agent that hangs earlier than its guard does.
            let last = ordeal.last_run();
            println!("   over after {:.1?}, {:?}", began.elapsed(), last.thawed_by);
            assert!(began.elapsed() <= FLUSH_HANG_ENDED + REST_OF_RUN, "it takes {:?}", began.elapsed());
            ordeal.is_untouched();
            ordeal.is_over();
        }
        println!("-- {round}: an agent that hangs in the quiesce is ended by its guard");
        ordeal.hold_quiesce();
        let run = ordeal.run(LONG_LEASE_S);
        ordeal.come_to_quiesce();
        let hung = Instant::now();
        ordeal.guest.exec(&Victim::Agent.hung()).success();
        ordeal.is_worth_at_most(run, "crash");
        println!("   over after {:.1?}", hung.elapsed());
        assert!(hung.elapsed() <= HANG_ENDED + REST_OF_RUN, "the guard let it hang for {:?}", hung.elapsed());
        ordeal.release_quiesce();
        ordeal.is_untouched();
        ordeal.is_over();
        ordeal.has_passed();
    }
}

#[test]
fn whenever_the_host_program_dies_the_guest_thaws_by_itself_and_the_next_run_cleans_up() {
    deaths_of_the_host_program(Extent::Quarter);
}

#[test]
#[ignore = "long: each death three times"]
fn deaths_of_the_host_program_three_times() {
    deaths_of_the_host_program(Extent::ThreeTimes);
}

fn deaths_of_the_host_program(extent: Extent) {
    let mut ordeal = begin(extent);
    for round in extent.rounds() {
        for at in [
            At::Asked("blockdev-create"),
            At::Asked("nbd-server-start"),
            At::Answered("stop"),
            At::Asked("stop"),
            At::Asked("transaction"),
            At::Asked("qom-set"),
            At::Asked("cont"),
            At::Asked("block-export-add"),
            At::Asked("block-export-del"),
            At::Answered("blockdev-del"),
        ] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: killed at {at:?}");
            ordeal.monitor.hold(at);
            let mut run = ordeal.run(LEASE_S);
            ordeal.come_to(&ordeal.monitor, &mut run);
            run.signal(Signal::KILL);
            assert_eq!(run.wait().expect("it ends").code(), -1);
            ordeal.monitor.pass();
            died(&mut ordeal);
        }
        for at in [
            At::Asked("stillpoint-freeze"),
            At::Answered("stillpoint-freeze"),
            At::Asked("stillpoint-thaw"),
            At::Answered("stillpoint-thaw"),
        ] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: killed at {at:?}");
            ordeal.agent.hold(at);
            let mut run = ordeal.run(LEASE_S);
            ordeal.come_to(&ordeal.agent, &mut run);
            run.signal(Signal::KILL);
            assert_eq!(run.wait().expect("it ends").code(), -1);
            ordeal.agent.pass();
            let last = died(&mut ordeal);
            if [At::Asked("stillpoint-freeze"), FROZEN].contains(&at) {
                assert_eq!(last.thawed_by, ThawCause::LeaseEnded, "nobody else is there to thaw: {last:?}");
            }
        }
        println!("-- {round}: killed while the manifest is written");
        let manifests = ordeal.stillpoint.repository().join("manifests");
        let count = || std::fs::read_dir(&manifests).map_or(0, Iterator::count);
        // One that comes to its end this instant is no death.
        let killed = (0..MANIFEST_KILLS_MAX).any(|_| {
            let before = count();
            let mut run = ordeal.run(LEASE_S);
            while count() == before && !run.has_ended() {}
            run.signal(Signal::KILL);
            let code = run.wait().expect("it ends").code();
            died(&mut ordeal);
            code == -1
        });
        assert!(killed, "{MANIFEST_KILLS_MAX} runs, and each was over before it was killed");
        ordeal.has_passed();
    }
}

/// The program is dead. Answers what the guest says of its last run: the dead one, if that came to its freeze.
fn died(ordeal: &mut Ordeal) -> GuestReport {
    ordeal.thaws_within(LEASE_AND_A_SECOND, "true");
    // The clock above begins after the death; the guest's own begins with the freeze.
    let last = ended_with_its_lease(ordeal);
    ordeal.count_again();
    ordeal.is_over();
    last
}

/// What the guest says of its last run, which was frozen for no longer than invariant 1 allows.
fn ended_with_its_lease(ordeal: &Ordeal) -> GuestReport {
    let last = ordeal.last_run();
    println!("   its run {} was frozen for {} ms: {:?}", last.id, last.frozen_ms, last.thawed_by);
    assert!(u128::from(last.frozen_ms) <= LEASE_AND_A_SECOND.as_millis(), "{last:?}");
    last
}

#[test]
fn a_cut_channel_a_paused_or_reset_vm_and_an_impatient_host_leave_nothing_frozen_or_locked() {
    silences(Extent::Quarter);
}

#[test]
#[ignore = "long: each death three times"]
fn silences_three_times() {
    silences(Extent::ThreeTimes);
}

fn silences(extent: Extent) {
    let mut ordeal = begin(extent);
    for round in extent.rounds() {
        for (at, most) in [
            (At::Answered("stillpoint-freeze"), "crash"),
            (At::Asked("guest-sync-delimited"), "application"),
            (At::Asked("stillpoint-thaw"), "application"),
            (At::Asked("stillpoint-freeze"), "crash"),
            (At::Answered("stillpoint-thaw"), "application"),
        ] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: the agent's channel is cut at {at:?}");
            ordeal.agent.hold(at);
            let mut run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to(&ordeal.agent, &mut run);
            ordeal.agent.cut();
            ordeal.is_worth_at_most(run, most);
            ordeal.is_untouched();
            ordeal.is_over();
        }
        for (at, most) in [
            (At::Answered("stop"), None),
            (At::Asked("stop"), None),
            (At::Asked("qom-set"), None),
            // All disks are cut by then: the VM is told once more to go on, and so does the run.
            (At::Answered("cont"), Some("application")),
            (At::Asked("block-export-add"), None),
        ] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: the monitor's channel is cut at {at:?}");
            ordeal.monitor.hold(at);
            let mut run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to(&ordeal.monitor, &mut run);
            ordeal.monitor.cut();
            if let Some(most) = most {
                ordeal.is_worth_at_most(run, most);
            } else {
                let ended = run.wait().expect("it ends");
                println!("{}", ended.stderr.trim_end());
                ended.assert_refused(1, "QEMU");
            }
            ordeal.is_untouched();
            ordeal.is_over();
        }

        println!("-- {round}: paused by its owner before the run");
        ordeal.pause();
        let run = ordeal.run(LEASE_S);
        let taken = ordeal.is_worth_at_most(run, "crash");
        assert_eq!(taken["level"], "crash", "{taken}");
        assert_eq!(ordeal.guest.block_graph().count("state \"paused\""), 1, "it stays as its owner left it");
        ordeal.go_on();
        ordeal.is_untouched();
        ordeal.is_over();

        println!("-- {round}: paused by its owner while it is frozen, until after the point");
        ordeal.agent.hold(FROZEN);
        let mut run = ordeal.run(LONG_LEASE_S);
        ordeal.come_to(&ordeal.agent, &mut run);
        // A run that did not know yet would stop the VM itself, and send its thaw while it cuts.
        ordeal.pause_the_run();
        ordeal.agent.pass_to(AFTER_THE_POINT);
        ordeal.come_to(&ordeal.agent, &mut run);
        ordeal.agent.pass();
        ordeal.go_on();
        ordeal.is_worth_at_most(run, "application");
        ordeal.is_untouched();
        ordeal.is_over();

        for at in [FROZEN, AFTER_THE_POINT] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: reset by its owner at {at:?}");
            ordeal.agent.hold(at);
            let mut run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to(&ordeal.agent, &mut run);
            ordeal.guest.reset();
            ordeal.agent.pass();
            ordeal.is_worth_at_most(run, "crash");
            ordeal.works_again();
            ordeal.is_untouched();
            ordeal.is_over();
        }

        if ordeal.takes() {
            println!("-- {round}: paused by its owner in the quiesce, until its host has given up");
            ordeal.hold_quiesce();
            let run = ordeal.run(LEASE_S);
            ordeal.come_to_quiesce();
            ordeal.pause();
            run.signal(Signal::INT);
            let began = Instant::now();
            // A guest that stands hears no thaw, and the host tries for a minute.
            let ended = run.wait().expect("it ends");
            println!("   the run ended {:.1?} later:\n{}", began.elapsed(), ended.stderr.trim_end());
            ended.assert_refused(130, "interrupted");
            assert_eq!(
                ordeal.guest.block_graph().count("state \"paused\""),
                1,
                "it stays as its owner left it"
            );
            ordeal.go_on();
            ordeal.release_quiesce();
            // Nobody has told the guest, so its run goes on, and ends with its lease. Asking for it covers what is not
            // understood: through this test's gate, whoever speaks first after such a pause was not answered in the 5 s that a run
            // waits. Without the gate nobody has to wait: `vm-tests/tests/agent_port.rs`.
            ended_with_its_lease(&ordeal);
            ordeal.is_untouched();
            ordeal.is_over();
            ordeal.next_run_is_whole();
        }

        println!("-- {round}: a host that waits no longer for its freeze, syncs and thaws");
        ordeal.hold_quiesce();
        ordeal.impatient_host();
        ordeal.release_quiesce();
        ordeal.is_untouched();
        ordeal.is_over();
        ordeal.has_passed();
    }
}

#[test]
fn when_qemu_dies_the_run_ends_with_an_error_and_the_guest_boots_from_its_disks() {
    deaths_of_qemu(Extent::Quarter);
}

#[test]
#[ignore = "long: each death three times"]
fn deaths_of_qemu_three_times() {
    deaths_of_qemu(Extent::ThreeTimes);
}

fn deaths_of_qemu(extent: Extent) {
    let mut ordeal = begin(extent);
    for round in extent.rounds() {
        for (at, step) in [
            (FROZEN, "in the freeze"),
            (At::Asked("stillpoint-freeze"), "before the freeze"),
            (AFTER_THE_POINT, "after the point"),
        ] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: QEMU killed {step}");
            ordeal.monitor_without_gate();
            ordeal.agent.hold(at);
            let mut run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to(&ordeal.agent, &mut run);
            let began = Instant::now();
            ordeal.kill_qemu();
            ordeal.agent.pass();
            let ended = run.wait().expect("it ends");
            println!("   the run ended {:.1?} later:\n{}", began.elapsed(), ended.stderr.trim_end());
            ended.assert_refused(7, "the VM ended during the run");
            assert!(began.elapsed() < Duration::from_secs(30), "nobody is left to wait for");
            ordeal.count_again();
            ordeal = ordeal.boot_again();
        }
        // Through the gate, behind which the program cannot see whose end it is: what it is told is all that it knows.
        for (at, is_sealed) in [
            (At::Answered("stop"), false),
            (At::Asked("qom-set"), false),
            (At::Asked("block-export-add"), false),
            (At::Asked("block-export-del"), true),
        ] {
            if !ordeal.takes() {
                continue;
            }
            println!("-- {round}: QEMU killed at {at:?}");
            ordeal.monitor.hold(at);
            let mut run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to(&ordeal.monitor, &mut run);
            ordeal.kill_qemu();
            ordeal.monitor.pass();
            let ended = run.wait().expect("it ends");
            println!("{}", ended.stderr.trim_end());
            if is_sealed {
                assert!(ended.stderr.contains("the snapshot is complete"), "{ended:?}");
                ended.success().expect("a snapshot");
            } else {
                ended.assert_refused(1, "QEMU");
            }
            ordeal.count_again();
            ordeal = ordeal.boot_again();
        }
        ordeal.has_passed();
    }
}
