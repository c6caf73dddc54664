//! What a freeze changes in a guest's kernel beside file systems, and that it is changed back.

use guest_protocol::stillpoint::{FreezeArguments, ThawArguments};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use vm::agent::Agent;
use vm_tests::Guest;

const SWITCH: &str = "/sys/kernel/rcu_expedited";
const LIMIT: Duration = Duration::from_secs(60);
/// An agent is killed while FIFREEZE runs. On a loaded machine the kill may come too late, and is tried again.
const KILLS_MAX: usize = 10;

fn agent(guest: &Guest) -> Agent {
    Agent::connect(&guest.agent_socket(), LIMIT).expect("the agent answers")
}

fn switch(guest: &Guest) -> String {
    guest.exec(&format!("cat {SWITCH}")).success().trim().to_owned()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn grace_periods_are_short_while_fifreeze_runs_and_as_before_afterwards_whoever_dies() {
    let guest = Guest::builder().vcpus(2).append("stillpoint.postgresql=off").start().expect("QEMU starts");
    guest.booted(Duration::from_secs(10));
    guest.agent_ready(Duration::from_secs(10));
    assert_eq!(switch(&guest), "0");

    guest.start(&format!("until read v <{SWITCH} && [ $v = 1 ]; do :; done; echo seen >/dev/shm/seen"));
    let never = AtomicBool::new(false);
    let mut ours = agent(&guest);
    ours.stillpoint_freeze(&FreezeArguments::new("r1", 60_000), &never).expect("it freezes");
    assert_eq!(switch(&guest), "0", "FIFREEZE is over");
    ours.stillpoint_thaw(&ThawArguments { id: "r1".to_owned() }, LIMIT).expect("it thaws");
    // The port takes one host at a time.
    drop(ours);
    until("the switch was seen to be on", || guest.exec("test -e /dev/shm/seen").code == 0);

    for attempt in 1..=KILLS_MAX {
        guest.agent_ready(Duration::from_secs(10));
        // The shell's own kill: another program would come too late.
        guest.start(&format!(
            "set -- $(busybox pidof stillpoint-agent); pid=${{1:?}}; echo $pid >/dev/shm/ready; \
             until read v <{SWITCH} && [ $v = 1 ]; do :; done; kill -9 $pid; read v <{SWITCH}; echo $v >/dev/shm/killed"
        ));
        until("the killer waits", || guest.exec("test -s /dev/shm/ready").code == 0);
        let mut ours = agent(&guest);
        let died = ours.stillpoint_freeze(&FreezeArguments::new(format!("k{attempt}"), 60_000), &never);
        until("the agent was killed", || guest.exec("test -s /dev/shm/killed").code == 0);
        let at_the_kill = guest.exec("cat /dev/shm/killed; rm /dev/shm/killed /dev/shm/ready").success();
        until("the switch is as before", || switch(&guest) == "0");
        until("the guest is writable", || {
            guest.exec("timeout 1 sh -c 'echo >/var/tmp/w && sync /var/tmp/w'").code == 0
        });
        println!("attempt {attempt}: the switch was {} at the kill; {died:?}", at_the_kill.trim());
        // Only an agent that is dead cannot have turned it back itself.
        if at_the_kill.trim() == "1" && died.is_err() {
            return;
        }
    }
    panic!("none of {KILLS_MAX} kills came while the switch was on: this shows nothing");
}

const QUEUE: &str = "/sys/block/vdb/queue/nr_requests";

#[test]
fn queues_are_short_while_dirty_pages_are_flushed_and_as_before_afterwards_whoever_dies() {
    let guest = Guest::builder().vcpus(2).append("stillpoint.postgresql=off").start().expect("QEMU starts");
    guest.booted(Duration::from_secs(10));
    guest.agent_ready(Duration::from_secs(10));
    let requests = || guest.exec(&format!("cat {QUEUE}")).success().trim().to_owned();
    let before = requests();
    println!("{before} requests");

    let dirty = "busybox dd if=/dev/zero of=/var/lib/postgresql/dirt bs=1M count=100 2>/dev/null";
    let shorter = format!("until read v <{QUEUE} && [ $v -lt {before} ]; do :; done");
    guest.exec(dirty).success();
    guest.start(&format!("{shorter}; echo $v >/dev/shm/seen"));
    let never = AtomicBool::new(false);
    let mut ours = agent(&guest);
    ours.stillpoint_freeze(&FreezeArguments::new("r1", 60_000), &never).expect("it freezes");
    assert_eq!(requests(), before, "the flush is over");
    ours.stillpoint_thaw(&ThawArguments { id: "r1".to_owned() }, LIMIT).expect("it thaws");
    drop(ours);
    until("the queue was seen to be short", || guest.exec("test -s /dev/shm/seen").code == 0);

    for attempt in 1..=KILLS_MAX {
        guest.agent_ready(Duration::from_secs(10));
        guest.exec(dirty).success();
        guest.start(&format!(
            "set -- $(busybox pidof stillpoint-agent); pid=${{1:?}}; echo $pid >/dev/shm/ready; \
             {shorter}; kill -9 $pid; read v <{QUEUE}; echo $v >/dev/shm/killed"
        ));
        until("the killer waits", || guest.exec("test -s /dev/shm/ready").code == 0);
        let mut ours = agent(&guest);
        let died = ours.stillpoint_freeze(&FreezeArguments::new(format!("k{attempt}"), 60_000), &never);
        until("the agent was killed", || guest.exec("test -s /dev/shm/killed").code == 0);
        let at_the_kill = guest.exec("cat /dev/shm/killed; rm /dev/shm/killed /dev/shm/ready").success();
        until("the queue is as before", || requests() == before);
        until("grace periods are as before", || switch(&guest) == "0");
        println!("attempt {attempt}: {} requests at the kill; {died:?}", at_the_kill.trim());
        // Only an agent that is dead cannot have made it longer itself.
        if at_the_kill.trim() != before && died.is_err() {
            return;
        }
    }
    panic!("none of {KILLS_MAX} kills came while the queue was short: this shows nothing");
}
