//! The guest itself: boots, works, acknowledges, survives a pulled plug.

use std::time::Duration;
use vm_tests::{
    Agent, CHECK_FILE_SYSTEMS, DATA_RECORDS, DiskFormat, Guest, Machine, RECOVERY_LOG, ROOT_RECORDS, amcheck,
    count_records,
};

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_guest_with_the_stock_agent_takes_commits_and_comes_back_after_a_pulled_plug() {
    let guest = Guest::builder().agent(Agent::Stock).start().expect("QEMU starts");
    let harness = guest.booted(LIMIT);
    let agent = guest.agent_ready(LIMIT);
    let postgresql = guest.postgresql_ready(LIMIT);
    println!("harness after {harness:.1?}, agent after {agent:.1?}, PostgreSQL after {postgresql:.1?}");
    let mut agent =
        vm::agent::Agent::connect(&guest.agent_socket(), LIMIT).expect("it answers beside the harness");
    assert_eq!((agent.kind(), agent.ping().is_ok()), (vm::agent::Kind::Stock, true));
    let mounts = guest.exec("cat /proc/mounts").success();
    assert!(mounts.contains(" / ext4 ") && mounts.contains(" /var/lib/postgresql xfs "), "{mounts}");

    guest.start_load();
    for (kind, number) in [('c', 100), ('w', 100), ('x', 100)] {
        assert!(
            guest.acks().wait_for(kind, number, 6 * LIMIT),
            "{kind}: {}",
            guest.exec("cat /run/load.log").out
        );
    }
    let committed = guest.acks().highest('c');
    let (_folder, disks) = guest.kill();
    println!("{committed} commits were acknowledged; the plug is pulled");

    let guest = Guest::builder().agent(Agent::None).disks(disks).start().expect("QEMU starts");
    guest.booted(LIMIT);
    let recovered = guest.postgresql_ready(LIMIT);
    let found: u64 = guest.sql("select count(*) from commits").parse().expect("a number");
    println!("{found} commits after {recovered:.1?}");
    assert!(found >= committed, "{found} of {committed} commits");
    let kept = |file| guest.exec(&count_records(file)).success().trim().parse::<u64>().expect("a number");
    println!("never synced and still there: {} on ext4, {} on xfs", kept(ROOT_RECORDS), kept(DATA_RECORDS));
    print!("{}", guest.exec(RECOVERY_LOG).success());
    guest.exec(&amcheck("bench")).success();
    let checked = guest.exec(CHECK_FILE_SYSTEMS);
    println!("{}", checked.out);
    checked.success();
    println!("powered off in {:.1?}", guest.power_off(LIMIT));
}

#[test]
fn a_guest_on_raw_disks_of_the_old_machine_powers_off_when_its_agent_is_asked() {
    let guest = Guest::builder()
        .agent(Agent::Stock)
        .disk_format(DiskFormat::Raw)
        .machine(Machine::Pc)
        .append("stillpoint.postgresql=off")
        .start()
        .expect("QEMU starts");
    println!("agent after {:.1?}", guest.agent_ready(LIMIT));
    println!("powered off in {:.1?}", guest.power_off(LIMIT));
}

#[test]
fn our_agent_answers_in_the_guest_and_is_started_again_when_it_is_killed() {
    let guest = Guest::builder().append("stillpoint.postgresql=off").start().expect("QEMU starts");
    println!("our agent after {:.1?}", guest.agent_ready(LIMIT));
    let mut agent = vm::agent::Agent::connect(&guest.agent_socket(), LIMIT).expect("it answers");
    agent.ping().expect("it answers");
    let resident = guest.exec("busybox grep VmRSS /proc/$(busybox pidof stillpoint-agent)/status").success();
    println!("version {}, {}", agent.info().version, resident.trim());
    drop(agent);
    let pid = "busybox pidof stillpoint-agent";
    let first = guest.exec(pid).success();
    guest.exec("busybox killall -KILL stillpoint-agent").success();
    println!("again after {:.1?}", guest.agent_ready(LIMIT));
    assert_ne!(guest.exec(pid).success(), first);
    println!("powered off in {:.1?}", guest.power_off(LIMIT));
}

#[test]
fn a_guest_ends_with_its_lifetime_and_with_its_value() {
    let alive = |pid: u32| std::path::Path::new(&format!("/proc/{pid}")).exists();
    let guest =
        Guest::builder().agent(Agent::None).lifetime(Duration::from_secs(1)).start().expect("QEMU starts");
    let (pid, end) = (guest.pid(), std::time::Instant::now() + LIMIT);
    while alive(pid) && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!alive(pid), "it outlived its lifetime");

    let guest = Guest::builder().agent(Agent::None).start().expect("QEMU starts");
    let (pid, folder) = (guest.pid(), guest.folder().to_owned());
    assert!(alive(pid) && folder.exists());
    drop(guest);
    assert!(!alive(pid) && !folder.exists(), "QEMU or its files outlived their value");
}
