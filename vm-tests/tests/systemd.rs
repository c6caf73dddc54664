//! Our agent as a unit of systemd, on a guest whose root is frozen while it dies: systemd starts it again at once, though
//! its own journal waits for the root.

use std::time::{Duration, Instant};
use vm_tests::{At, Extent, Guest, Init, Ordeal, Stillpoint, Victim};

/// Whoever thaws after a death does so at once; an emulated guest on a busy machine takes its time for anything.
const AT_ONCE: Duration = Duration::from_secs(10);
/// Long, so that it is not the lease that thaws.
const LEASE_S: u32 = 60;

#[test]
fn whoever_dies_on_a_frozen_root_systemd_starts_the_agent_again_at_once() {
    deaths_under_systemd(Extent::Quarter);
}

#[test]
#[ignore = "long: each death three times"]
fn deaths_under_systemd_three_times() {
    deaths_under_systemd(Extent::ThreeTimes);
}

fn deaths_under_systemd(extent: Extent) {
    let builder = Guest::builder().init(Init::Systemd).vcpus(2).memory_mib(1024);
    let mut ordeal = Ordeal::begin(builder, Stillpoint::with_key_file().expect("a repository"), extent);
    println!(
        "{}",
        ordeal
            .guest
            .exec("systemctl --version | head -n 1; systemctl --failed --no-legend; cat /proc/1/comm")
            .success()
    );
    let property = |ordeal: &Ordeal, name: &str| {
        ordeal
            .guest
            .exec(&format!("systemctl show --value --property={name} stillpoint-agent.service"))
            .success()
            .trim()
            .to_owned()
    };
    assert_eq!(property(&ordeal, "ActiveState"), "active");
    let pid = property(&ordeal, "MainPID");
    assert_eq!(ordeal.guest.exec(&format!("cat /proc/{pid}/oom_score_adj")).success().trim(), "-1000");
    // More often than systemd's own limit of starts, unless the unit lifts it.
    for round in extent.rounds() {
        let mut deaths: u32 = property(&ordeal, "NRestarts").parse().expect("a number");
        for victim in [Victim::Agent, Victim::Guard, Victim::Worker, Victim::All] {
            for (step, name) in
                [(At::Answered("stillpoint-freeze"), "before"), (At::Asked("stillpoint-thaw"), "after")]
            {
                if !ordeal.takes() {
                    continue;
                }
                println!("-- {round}: {victim:?} killed while the root is frozen, {name} the point");
                ordeal.agent.hold(step);
                let mut run = ordeal.run(LEASE_S);
                ordeal.come_to(&ordeal.agent, &mut run);
                // The journal is on the root: whoever writes there now waits, systemd's journal first.
                ordeal.guest.exec("logger --id=1 frozen || :").success();
                if victim == Victim::Worker {
                    ordeal.guest.exec(&victim.killed()).success();
                } else {
                    ordeal.thaws_within(AT_ONCE, &victim.killed());
                }
                ordeal.agent.pass();
                let most = if victim == Victim::Worker { "filesystem" } else { "crash" };
                ordeal.is_worth_at_most(run, most);
                ordeal.is_untouched();
                ordeal.is_over();
                if matches!(victim, Victim::Agent | Victim::All) {
                    deaths += 1;
                    let restarts: u32 = property(&ordeal, "NRestarts").parse().expect("a number");
                    assert_eq!(restarts, deaths, "started again each time");
                }
            }
        }
        println!("-- {round}: killed eight times in a row, without a run");
        for _ in 0..8 {
            let before = property(&ordeal, "MainPID");
            ordeal.guest.exec(&Victim::Agent.killed()).success();
            let killed = Instant::now();
            while ["0", before.as_str()].contains(&property(&ordeal, "MainPID").as_str()) {
                assert!(killed.elapsed() < Duration::from_secs(60), "it is not started again");
            }
        }
        assert_eq!(property(&ordeal, "NRestarts"), (deaths + 8).to_string(), "started again each time");

        println!("-- {round}: stopped by systemd while the root is frozen");
        ordeal.agent.hold(At::Asked("stillpoint-thaw"));
        let mut run = ordeal.run(LEASE_S);
        ordeal.come_to(&ordeal.agent, &mut run);
        ordeal.thaws_within(AT_ONCE, "systemctl --no-block restart stillpoint-agent.service");
        ordeal.agent.pass();
        ordeal.is_worth_at_most(run, "crash");
        ordeal.is_over();
        ordeal.has_passed();
    }
}
