//! How long a working guest's applications stall at a snapshot: ours beside a stock agent with QEMU's own backup.
//!
//! One guest, one boot, a heavy load that never ends; ours, stock and quiet times take turns. Everything is measured in the
//! guest, by those who wait: a host's own times begin too early and end too late.

mod figures;
mod idle;
mod kernel;
mod taken;

use crate::cost::Cost;
use figures::{Judged, Longest, Noted, Span, Wait, missed, quantile};
use std::time::{Duration, Instant};
use taken::{Clock, Stock, Taken, now_ns};
use vm_tests::{Guest, Stillpoint};

/// So many of each kind unless said otherwise.
pub(crate) const SNAPSHOTS: u32 = 10;
/// A small database server. What the kernel leaves unwritten grows with its memory, and so does the stall of an unprepared freeze.
const MEMORY_MIB: u32 = 4096;
const VCPUS: u32 = 2;
/// What the writer without fsync is asked for; the report says what it came to.
pub(crate) const DIRTY_MIB_PER_S: u32 = 20;
const PGBENCH_CLIENTS: u32 = 4;
/// The load runs for so long before the first, and again between two, so that each finds the same amount unwritten. In
/// production it would be half a minute, the age at which Linux writes out what is dirty (`dirty_expire_centisecs`).
const REST: Duration = Duration::from_secs(15);
/// How long a wait may last until it is noted.
const NOTED_MAX: Duration = Duration::from_secs(5);
/// A quiet time before the first snapshot of ours said how long one is.
const QUIET: Duration = Duration::from_secs(4);
/// When no further round is begun, in all; what was taken until then is shown.
const ROUNDS_MAX: Duration = Duration::from_secs(20 * 60);
/// The guest's clock must not run away from the host's by more between the beginning and the end of one turn. The edges of a
/// window are placed by it, no wait is measured by it.
const DRIFT_MS_MAX: f64 = 250.0;
/// How long the load may take to be ready: its files are filled first.
const READY_MAX: Duration = Duration::from_secs(300);

/// Names another build of our agent, which then takes turns as well: what a change gained, on one guest in one run.
const OLDER_AGENT: &str = "STILLPOINT_OLDER_AGENT";

/// Takes turns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Ours,
    Stock,
    Quiet,
    /// Ours, as it was before a change.
    Older,
}

pub(crate) fn run(snapshots: u32, dirty_mib_per_s: u32) -> Result<(), String> {
    println!("== stall: the longest wait in the guest, {snapshots} snapshots of each kind, in turn");
    println!("images, scratch and repository: {}", std::env::temp_dir().display());
    // Beside the rounds: boot, filling the load's files, a round that was begun in time.
    let lifetime = ROUNDS_MAX + READY_MAX * 4;
    let older_agent = std::env::var_os(OLDER_AGENT).map(std::path::PathBuf::from);
    let mut turns = vec![Turn::Ours, Turn::Stock, Turn::Quiet];
    turns.extend(older_agent.is_some().then_some(Turn::Older));
    let builder = Guest::builder().memory_mib(MEMORY_MIB).vcpus(VCPUS).lifetime(lifetime);
    let builder = builder.older_agent(older_agent);
    let guest = builder.start().map_err(|error| error.to_string())?;
    let limit = Duration::from_secs(60);
    guest.booted(limit);
    guest.agent_ready(limit);
    guest.postgresql_ready(limit);
    idle::run(&guest, turns.contains(&Turn::Older))?;
    let stillpoint = Stillpoint::new()?;
    let disks = taken::first(&guest, &stillpoint)?;
    let mut stock = Stock::new(&guest, disks)?;
    // Before the load: the kernel stops all processors to turn it on, which beside the load once took over a minute.
    let traced = kernel::begin(&guest);
    if !traced {
        println!("the guest's kernel has no function tracer: where FIFREEZE spends its time is not shown");
    }
    guest.start_pgbench(PGBENCH_CLIENTS, u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX));
    guest.start_measured_load(dirty_mib_per_s);
    println!(
        "guest: {VCPUS} CPUs, {MEMORY_MIB} MiB; load: write and fsync of 4 KiB on xfs and on ext4, commits of single rows, \
         pgbench with {PGBENCH_CLIENTS} clients, {dirty_mib_per_s} MiB/s of random 16 KiB writes to xfs"
    );
    let ready = Instant::now() + READY_MAX;
    while !Noted::parse(&guest.stalls())?.is_under_way() {
        if Instant::now() > ready {
            return Err(format!("the load is not ready after {READY_MAX:?}"));
        }
        std::thread::sleep(NOTED_MAX);
    }
    std::thread::sleep(REST);
    let dirty = guest.exec("busybox grep -E '^(Dirty|Writeback):' /proc/meminfo").success();
    let dirty: Vec<&str> = dirty.split_whitespace().collect();
    println!("before the first: {}; {}", dirty.join(" "), Noted::parse(&guest.stalls())?.pace());

    println!("\nsteps, in ms");
    let (mut ours, mut older, mut stocks, mut quiets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut quiet_costs, began) = (Vec::new(), Instant::now());
    let (mut error_ms_max, mut drift_ms_max) = (0.0_f64, 0.0_f64);
    // When the processors were stopped, and for how long by what the guest's clock lost.
    let mut stops = Vec::new();
    for round in 0..snapshots {
        // Each kind follows each other one in its turn.
        if round > 0 {
            turns.rotate_left(1);
        }
        if began.elapsed() > ROUNDS_MAX {
            break;
        }
        for turn in &turns {
            if turns.len() > 3 && *turn != Turn::Quiet && *turn != Turn::Stock {
                guest.run_agent(*turn == Turn::Older);
            }
            std::thread::sleep(REST);
            let clock = Clock::of(&guest)?;
            let taken = |name: &str, all: &mut Vec<Taken>, taken: Taken| {
                all.push(taken);
                println!("{name:5} {:2}: {}", all.len(), all[all.len() - 1].steps);
            };
            match turn {
                Turn::Ours => taken("ours", &mut ours, taken::ours(&guest, &stillpoint)?),
                Turn::Older => taken("older", &mut older, taken::ours(&guest, &stillpoint)?),
                Turn::Stock => taken("stock", &mut stocks, stock.snapshot(&guest)?),
                Turn::Quiet => {
                    let length = ours.last().map_or(QUIET, |taken: &Taken| {
                        Duration::from_nanos(taken.window.to_ns - taken.window.from_ns)
                    });
                    let from_ns = clock.guest_ns(now_ns());
                    let ((), cost) = Cost::of(guest.pid(), || {
                        std::thread::sleep(length);
                        Ok(())
                    })?;
                    quiets.push(Span { from_ns, to_ns: clock.guest_ns(now_ns()) });
                    quiet_costs.push(cost);
                }
            }
            if traced {
                kernel::take(&guest).iter().for_each(|line| println!("          {line}"));
            }
            let after = Clock::of(&guest)?;
            let drift_ms = clock.drift_ms(after);
            let unsure_ms = clock.error_ms() + after.error_ms();
            error_ms_max = error_ms_max.max(unsure_ms);
            let stopped = match turn {
                Turn::Ours => ours.last(),
                Turn::Older => older.last(),
                Turn::Stock | Turn::Quiet => None,
            };
            if let Some(taken) = stopped {
                stops.push((taken.held, clock.stood_ns(after)));
                println!("          the guest's clock lost {:.1} ms, to {unsure_ms:.1}", -drift_ms);
            } else {
                drift_ms_max = drift_ms_max.max(drift_ms.abs());
            }
            if drift_ms.abs() > DRIFT_MS_MAX + unsure_ms {
                return Err(format!(
                    "the guest's clock ran {drift_ms:.1} ms away from the host's in one turn"
                ));
            }
        }
    }
    // What is under way has to end before it is noted.
    std::thread::sleep(NOTED_MAX);
    let mut noted = Noted::parse(&guest.stalls())?;
    guest.stop_load();
    for (held, stood_ns) in stops {
        noted.lengthen(held, stood_ns);
    }
    println!("load: {}", noted.pace());
    println!(
        "guest's clock: placed to {error_ms_max:.1} ms, drift in a turn in which nobody stops it {drift_ms_max:.1} ms at most"
    );
    println!("\nlongest wait of each snapshot, in ms");
    for (name, all) in [("ours", &ours), ("older", &older), ("stock", &stocks)] {
        for (number, taken) in all.iter().enumerate() {
            let mut waits = Vec::new();
            for wait in Wait::ALL {
                waits.push(placed(&noted, wait, taken)?);
            }
            println!("{name:5} {:2}: {}", number + 1, waits.join("; "));
        }
    }
    report(&noted, &ours, &older, &stocks, &quiets, &quiet_costs)?;
    match ours.len() {
        number if number < snapshots as usize => {
            Err(format!("only {number} of {snapshots} snapshots in {ROUNDS_MAX:?}: too slow a machine"))
        }
        _ => Ok(()),
    }
}

/// The longest wait of a snapshot, and how much of it lay before the freeze, in it, and after it.
fn placed(noted: &Noted, wait: Wait, taken: &Taken) -> Result<String, String> {
    let longest = noted.longest(wait, taken.window)?;
    let before = Span { from_ns: 0, to_ns: taken.frozen.from_ns };
    let after = Span { from_ns: taken.frozen.to_ns, to_ns: u64::MAX };
    let [before, frozen, after] = [before, taken.frozen, after].map(|span| longest.within(span).ms());
    Ok(format!("{wait} {:.0} = {before:.0} before + {frozen:.0} frozen + {after:.0} after", longest.ms()))
}

fn report(
    noted: &Noted,
    ours: &[Taken],
    older: &[Taken],
    stocks: &[Taken],
    quiets: &[Span],
    quiet_costs: &[Cost],
) -> Result<(), String> {
    let windows = |all: &[Taken]| all.iter().map(|taken| taken.window).collect::<Vec<_>>();
    let whole: Vec<Span> = ours.iter().map(|taken| taken.whole).collect();
    let (our_windows, stock_windows) = (windows(ours), windows(stocks));
    println!("\nlongest wait in the guest, ms: median / maximum of {} times", ours.len());
    println!("{:38} {:>16} {:>16} {:>16}", "", Wait::ALL[0], Wait::ALL[1], Wait::ALL[2]);
    let row = |name: &str, windows: &[Span]| -> Result<[Longest; 3], String> {
        let mut lengths: Vec<f64> = windows.iter().map(|window| window.ms()).collect();
        lengths.sort_by(f64::total_cmp);
        let mut cells = Vec::new();
        for wait in Wait::ALL {
            cells.push(Longest::of(noted, wait, windows)?);
        }
        let name = format!("{name} ({:.1} s)", quantile(&lengths, 0.5) / 1000.0);
        println!(
            "{name:38} {:>16} {:>16} {:>16}",
            cells[0].to_string(),
            cells[1].to_string(),
            cells[2].to_string()
        );
        Ok([cells[0], cells[1], cells[2]])
    };
    let our_row = row("ours, from the first flush round", &our_windows)?;
    row("ours, from the freeze command", &whole)?;
    if !older.is_empty() {
        row("older, from the first flush round", &windows(older))?;
    }
    let stock_row = row("stock, from the freeze command", &stock_windows)?;
    row("quiet", quiets)?;
    println!("only what was under way while the guest was frozen:");
    for (name, all) in [("ours", ours), ("older", older), ("stock", stocks)] {
        let frozen: Vec<Span> = all.iter().map(|taken| taken.frozen).collect();
        let [a, b, c] = Wait::ALL.map(|wait| Longest::met(noted, wait, &frozen).to_string());
        if !frozen.is_empty() {
            println!("{name:38} {a:>16} {b:>16} {c:>16}");
        }
    }
    let mut judged = Vec::new();
    println!("\nsingle waits in quiet times, ms: p50 / p99 / maximum");
    for (at, wait) in Wait::ALL.into_iter().enumerate() {
        let all = noted.all(wait, quiets);
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|at| quantile(&all, at));
        let (ours, stock) = (our_row[at], stock_row[at]);
        println!(
            "{wait:12} {p50:.0} / {p99:.0} / {max:.0} of {}; ours is {:.2} of stock's median, {:.2} of its maximum, {:.1} \
             times this p99",
            all.len(),
            ours.median / stock.median,
            ours.max / stock.max,
            ours.median / p99
        );
        judged.push(Judged { wait, ours, stock, quiet_p99: p99 });
    }
    println!("\nmedian cost (QEMU's CPU is mostly the guest's own work)");
    let cost = |all: &[Taken]| Cost::median(&all.iter().map(|taken| taken.cost).collect::<Vec<_>>());
    println!("ours  {}\nstock {}\nquiet {}", cost(ours), cost(stocks), Cost::median(quiet_costs));
    let missed = missed(&judged);
    if missed.is_empty() { Ok(()) } else { Err(missed.join("; ")) }
}
