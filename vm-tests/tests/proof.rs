//! The promise itself: what was acknowledged before the freeze is in the twin; and the control that shows what a freeze is for.

use std::time::Duration;
use vm_tests::{Guest, Promised, Stillpoint, prove, snapshot_id};

const LIMIT: Duration = Duration::from_secs(30);
const LOAD_LIMIT: Duration = Duration::from_secs(240);

#[test]
fn nothing_acknowledged_before_the_freeze_is_missing_in_a_twin_and_a_cut_without_one_loses_writes() {
    let guest = Guest::builder().start().expect("QEMU starts");
    guest.agent_ready(LIMIT);
    guest.postgresql_ready(LIMIT);
    let stillpoint = Stillpoint::new().expect("a repository");
    let (qmp, agent) = (guest.qmp_socket(), guest.agent_socket());
    let add = ["vm", "add", "db1", "--qmp", &qmp.to_string_lossy(), "--agent", &agent.to_string_lossy()];
    stillpoint.run(&add).and_then(|ended| ended.success()).expect("it is registered");
    guest.start_heavy_load();
    for kind in ['c', 'w', 'x'] {
        assert!(guest.acks().wait_for(kind, 100, LOAD_LIMIT), "{}", guest.exec("cat /run/load.log").out);
    }
    let mut taken = Vec::new();
    for words in
        [&["snapshot", "db1", "--require", "application"][..], &["snapshot", "db1", "--want", "crash"]]
    {
        // Some of what the second is asked for was never written back.
        let more = guest.acks().highest('w') + 100;
        assert!(guest.acks().wait_for('w', more, LOAD_LIMIT), "the guest stands still");
        let object = stillpoint.run(words).and_then(|ended| ended.success()).expect("a snapshot");
        let id = snapshot_id(&object).expect("it has an id").to_owned();
        let promised = Promised::of(&stillpoint, guest.acks(), &id).expect("its receipt");
        println!("{id} ({}): {promised}", object["level"]);
        taken.push((id, promised));
    }
    drop(guest);

    let (ours, promised) = &taken[0];
    let found = prove(&stillpoint, ours, promised).expect("a twin");
    assert_eq!(found.missing(promised), Promised::default());
    assert_eq!(found.complaints, Vec::<String>::new());

    let (control, promised) = &taken[1];
    let found = prove(&stillpoint, control, promised).expect("a twin");
    let missing = found.missing(promised);
    println!("missing in the control: {missing}");
    assert_eq!(missing.commits, 0, "PostgreSQL syncs what it acknowledges");
    assert!(missing.ext4 + missing.xfs > 0, "the control shows nothing: it lost no write");
}
