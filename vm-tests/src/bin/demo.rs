//! `make demo`: from a working guest to a proven snapshot, and beside it what a snapshot without a freeze loses.
//!
//! `--sabotage no-freeze` takes our snapshots without freezing, `--sabotage drop-frame` damages the repository: both must
//! make the proof fail, or it proves nothing.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vm_tests::{Agent, Found, Guest, Promised, Stillpoint, prove, snapshot_id};

/// Acknowledgements of each kind that must have come before the first snapshot.
const ACKNOWLEDGED_MIN: u64 = 200;
const BOOT_LIMIT: Duration = Duration::from_secs(30);
const LOAD_LIMIT: Duration = Duration::from_secs(240);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    NoFreeze,
    DropFrame,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let sabotage = match words[..] {
        [] => None,
        ["--sabotage", "no-freeze"] => Some(Sabotage::NoFreeze),
        ["--sabotage", "drop-frame"] => Some(Sabotage::DropFrame),
        _ => {
            eprintln!("demo [--sabotage no-freeze|drop-frame], not {}", words.join(" "));
            return ExitCode::from(2);
        }
    };
    match demo(sabotage) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo(sabotage: Option<Sabotage>) -> Result<(), String> {
    let clock = Instant::now();
    let say = |text: &dyn Display| println!("\n[{:4.0} s] {text}", clock.elapsed().as_secs_f64());

    say(&"a guest boots: Debian 12, PostgreSQL on xfs, ext4 root, stillpoint-agent");
    let guest = Guest::builder().agent(Agent::Ours).start().map_err(|error| error.to_string())?;
    let agent_after = guest.agent_ready(BOOT_LIMIT);
    let postgresql_after = guest.postgresql_ready(BOOT_LIMIT);
    println!("agent after {agent_after:.1?}, PostgreSQL after {postgresql_after:.1?}");

    let stillpoint = Stillpoint::new()?;
    let (qmp, agent) = (guest.qmp_socket(), guest.agent_socket());
    let (qmp, agent) = (qmp.to_string_lossy(), agent.to_string_lossy());
    stillpoint.run(&["vm", "add", "db1", "--qmp", &qmp, "--agent", &agent])?.success()?;

    say(&"load: pgbench, a client that records its commits, and writers that never sync");
    guest.start_pgbench(2, 3600);
    guest.start_heavy_load();
    for kind in ['c', 'w', 'x'] {
        if !guest.acks().wait_for(kind, ACKNOWLEDGED_MIN, LOAD_LIMIT) {
            return Err(format!("too few acknowledgements: {}", guest.exec("cat /run/load.log").out));
        }
    }

    let ours: &[&str] = match sabotage {
        Some(Sabotage::NoFreeze) => &["snapshot", "db1", "--want", "crash"],
        _ => &["snapshot", "db1", "--require", "application"],
    };
    say(&format!("full snapshot: stillpoint {}", ours.join(" ")));
    let full = stillpoint.run(ours)?.success()?;
    let full = snapshot_id(&full)?.to_owned();
    println!("{}", stillpoint.text(&["show", &full])?);
    let before = guest.acks().highest('c');
    if !guest.acks().wait_for('c', before + 50, LOAD_LIMIT) {
        return Err("the guest does not go on after the snapshot".to_owned());
    }

    say(&"incremental snapshot, the same way");
    let increment = stillpoint.run(ours)?.success()?;
    let increment = snapshot_id(&increment)?.to_owned();
    println!("{}", stillpoint.text(&["show", &increment])?);

    say(&"control: a snapshot without a freeze, as a hypervisor takes it by itself");
    let control = stillpoint.run(&["snapshot", "db1", "--want", "crash"])?.success()?;
    let control = snapshot_id(&control)?.to_owned();
    println!("{}", stillpoint.text(&["show", &control])?);

    let mut promises = Vec::new();
    for snapshot in [&full, &increment, &control] {
        promises.push(Promised::of(&stillpoint, guest.acks(), snapshot)?);
    }
    drop(guest);
    println!("the original is gone: its QEMU was killed");

    if sabotage == Some(Sabotage::DropFrame) {
        damage(&stillpoint)?;
    }
    let verified = stillpoint.run(&["verify"])?;
    if !verified.status.success() {
        return Err(format!("verify: {}", verified.stderr));
    }
    println!("stillpoint verify: {} snapshots are sound", verified.object["snapshots"]);

    for (name, snapshot, promised) in
        [("full", &full, &promises[0]), ("incremental", &increment, &promises[1])]
    {
        say(&format!("a twin of the {name} snapshot"));
        println!("acknowledged before its freeze was sent: {promised}");
        let found = prove(&stillpoint, snapshot, promised)?;
        report(&found);
        judge(promised, &found)?;
        println!("all of them are there");
    }

    say(&"a twin of the control");
    println!("acknowledged before its cut: {}", promises[2]);
    let found = prove(&stillpoint, &control, &promises[2])?;
    report(&found);
    let missing = found.missing(&promises[2]);
    println!("missing: {missing}");
    if missing.ext4 + missing.xfs == 0 {
        return Err(
            "the control lost none of the never-synced writes, so the comparison shows nothing".to_owned()
        );
    }
    say(&"proven: nothing acknowledged was lost by ours, and the control shows what a freeze is for");
    Ok(())
}

fn report(found: &Found) {
    println!(
        "agent after {:.1?}, PostgreSQL recovered and open after {:.1?}",
        found.agent_after, found.postgresql_after
    );
    print!("{}", found.recovery);
    println!("present: {}", found.kept);
    if found.complaints.is_empty() {
        println!("pg_amcheck and the file-system checks find nothing");
    }
}

fn judge(promised: &Promised, found: &Found) -> Result<(), String> {
    if [promised.commits, promised.ext4, promised.xfs].iter().any(|&count| count < ACKNOWLEDGED_MIN) {
        return Err(format!("fewer than {ACKNOWLEDGED_MIN} of a kind were acknowledged: {promised}"));
    }
    let missing = found.missing(promised);
    if missing != Promised::default() {
        return Err(format!("acknowledged before the point and missing in the twin: {missing}"));
    }
    if found.complaints.is_empty() { Ok(()) } else { Err(found.complaints.join("\n")) }
}

/// Loses the middle of the largest pack, as a failing disk might.
fn damage(stillpoint: &Stillpoint) -> Result<(), String> {
    use std::os::unix::fs::FileExt;
    let words = |error: std::io::Error| error.to_string();
    let mut packs = Vec::new();
    let mut folders = vec![stillpoint.repository().join("packs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(words)? {
            let path = entry.map_err(words)?.path();
            if path.is_dir() { folders.push(path) } else { packs.push(path) }
        }
    }
    let size = |path: &std::path::PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let pack = packs.into_iter().max_by_key(size).ok_or("the repository holds no pack")?;
    println!("sabotage: 4096 bytes of a pack are lost");
    let file = std::fs::OpenOptions::new().write(true).open(&pack).map_err(words)?;
    file.write_all_at(&[0; 4096], size(&pack) / 2).map_err(words)
}
