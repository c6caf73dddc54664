//! Whoever dies or falls silent, at whatever step of a run: the guest goes on, nothing stays frozen or locked, no
//! snapshot claims more than it has evidence for, and the next run is whole.
//!
//! Each death is died once where a change waits for it, three times in the long run.

use rustix::process::Signal;
use std::time::{Duration, Instant};
use vm_tests::{At, Extent, Guest, Ordeal, Stillpoint, Victim, signal};

/// Whoever thaws after a death does so at once; an emulated guest on a busy machine takes its time for anything.
const AT_ONCE: Duration = Duration::from_secs(10);
/// Of the runs whose guest is thawed by a death in it, in seconds: long, so that it is not the lease that thaws.
const LONG_LEASE_S: u32 = 60;
/// Of the runs that nobody thaws.
const LEASE_S: u32 = 3;
/// Invariant 1.
const LEASE_AND_A_SECOND: Duration = Duration::from_secs(LEASE_S as u64 + 1);

const FROZEN: At = At::Answered("stillpoint-freeze");
const AFTER_THE_POINT: At = At::Asked("stillpoint-thaw");
/// The session that a worker holds.
const SESSION: &str = "^postgres: .*postgres postgres .local.";

fn begin(extent: Extent) -> Ordeal {
    Ordeal::begin(Guest::builder(), Stillpoint::new().expect("a repository"), extent)
}

#[test]
fn whoever_dies_in_the_guest_it_thaws_and_lets_go_and_the_next_run_is_whole() {
    deaths_in_the_guest(Extent::Once);
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
            println!("-- {round}: {victim:?} killed in the quiesce, before anything is frozen");
            let most = if victim == Victim::Worker { "filesystem" } else { "crash" };
            ordeal.hold_quiesce();
            let run = ordeal.run(LONG_LEASE_S);
            ordeal.come_to_quiesce();
            ordeal.thaws_within(AT_ONCE, &victim.killed());
            ordeal.release_quiesce();
            ordeal.is_worth_at_most(run, most);
            ordeal.is_untouched();
            ordeal.is_over();

            for (step, name) in
                [(FROZEN, "frozen, before the point"), (AFTER_THE_POINT, "frozen, after the point")]
            {
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
        println!("-- {round}: an agent that hangs in the quiesce is ended by its guard");
        ordeal.hold_quiesce();
        let run = ordeal.run(LONG_LEASE_S);
        ordeal.come_to_quiesce();
        let hung = Instant::now();
        ordeal.guest.exec(&Victim::Agent.hung()).success();
        ordeal.is_worth_at_most(run, "crash");
        println!("   over after {:.1?}", hung.elapsed());
        ordeal.release_quiesce();
        ordeal.is_untouched();
        ordeal.is_over();
        ordeal.has_passed();
    }
}

#[test]
fn whenever_the_host_program_dies_the_guest_thaws_by_itself_and_the_next_run_cleans_up() {
    deaths_of_the_host_program(Extent::Once);
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
            At::Asked("stop"),
            At::Answered("stop"),
            At::Asked("transaction"),
            At::Asked("qom-set"),
            At::Asked("cont"),
            At::Asked("block-export-add"),
            At::Asked("block-export-del"),
            At::Answered("blockdev-del"),
        ] {
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
            println!("-- {round}: killed at {at:?}");
            ordeal.agent.hold(at);
            let mut run = ordeal.run(LEASE_S);
            ordeal.come_to(&ordeal.agent, &mut run);
            run.signal(Signal::KILL);
            assert_eq!(run.wait().expect("it ends").code(), -1);
            ordeal.agent.pass();
            died(&mut ordeal);
        }
        println!("-- {round}: killed while the manifest is written");
        let manifests = ordeal.stillpoint.repository().join("manifests");
        let count = || std::fs::read_dir(&manifests).map_or(0, Iterator::count);
        let before = count();
        let mut run = ordeal.run(LEASE_S);
        while count() == before && !run.has_ended() {}
        run.signal(Signal::KILL);
        // It may have come to its end this instant.
        println!("   {:?}", run.wait().expect("it ends").code());
        died(&mut ordeal);
        ordeal.has_passed();
    }
}

/// The program is dead.
fn died(ordeal: &mut Ordeal) {
    ordeal.thaws_within(LEASE_AND_A_SECOND, "true");
    ordeal.count_again();
    ordeal.is_over();
}
