//! `cargo xtask bench agent`: what our guest agent costs, beside stock qemu-ga, in the same run on this machine.
//!
//! Both serve a unix socket. No agent can freeze, shut down or change anything here: those commands are blocked.

mod peer;

use peer::{Peer, Program};
use serde_json::json;
use std::time::{Duration, Instant};

/// What is read and written unless told otherwise, in MiB.
pub(crate) const MIB: u64 = 1024;
/// Each round trip is asked for this often, in turns of `TURN`, so that what else the machine does hits all alike.
const ASKED: usize = 10_000;
const TURN: usize = 500;
const PROGRAMS: usize = 200;
/// Each transfer whose CPU is judged is carried out this often, by all agents in turn; the median counts.
const READ: usize = 3;
/// How long an idle agent is watched.
const WATCHED: Duration = Duration::from_secs(10);
/// What one request of a long transfer carries: what scripts do, and what a host does that wants it quick.
const PIECES_MIB: [u64; 2] = [1, 16];
/// The file that is read and written over and over.
const FILE_MIB: u64 = 64;
/// The most that one request may read.
const LARGEST_READ_MIB: u64 = 48;
/// A little less than what a stock agent can take in one message (64 MiB of base64).
const LARGEST_WRITE_MIB: u64 = 47;
/// Memory is judged where a request carries at least so much. Below, most of it is the resident program, not the transfer.
const JUDGED_MIB: u64 = 16;

/// The figures of one agent.
#[derive(Default)]
struct Figures {
    size_kib: u64,
    idle_rss_kib: u64,
    idle_pss_kib: u64,
    /// Wake-ups in `WATCHED`: with a client that is silent, without one, on a port without a host.
    wakeups: [Option<u64>; 3],
    /// For each question: p50 in microseconds, p99, CPU microseconds each.
    asked: Vec<[f64; 3]>,
    exec_us: Option<f64>,
    /// What each of the transfers cost; empty where the agent has no files.
    transfers: Vec<Cost>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// Bytes that are moved through an agent, in requests of one size.
struct Transfer {
    direction: Direction,
    mib: u64,
    request_mib: u64,
}

impl Transfer {
    fn all(mib: u64) -> Vec<Self> {
        use Direction::{Read, Write};
        let long = PIECES_MIB
            .into_iter()
            .flat_map(|request_mib| [Read, Write].map(|direction| Self { direction, mib, request_mib }));
        let one = |direction, mib| Self { direction, mib, request_mib: mib };
        long.chain([one(Read, LARGEST_READ_MIB), one(Write, LARGEST_WRITE_MIB)]).collect()
    }

    fn name(&self) -> String {
        let done = if self.direction == Direction::Read { "read" } else { "written" };
        format!("{} MiB {done}, {} MiB a request", self.mib, self.request_mib)
    }
}

/// What a transfer cost the agent.
#[derive(Clone, Copy)]
struct Cost {
    cpu_s: f64,
    wall_s: f64,
    peak_rss_kib: u64,
}

impl Cost {
    /// Of each figure by itself.
    fn median(costs: &[Self]) -> Option<Self> {
        let of = |figure: fn(&Self) -> f64| {
            let mut figures: Vec<f64> = costs.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            figures.get(figures.len() / 2).copied()
        };
        // The most memory, whenever it was.
        let peak_rss_kib = costs.iter().map(|cost| cost.peak_rss_kib).max()?;
        Some(Self { cpu_s: of(|cost| cost.cpu_s)?, wall_s: of(|cost| cost.wall_s)?, peak_rss_kib })
    }
}

const QUESTIONS: [(&str, &str); 3] = [
    ("ping", r#"{"execute":"guest-ping"}"#),
    ("sync", r#"{"execute":"guest-sync","arguments":{"id":12345678}}"#),
    ("info", r#"{"execute":"guest-info"}"#),
];

/// Measures all agents and prints a table; the first is ours.
pub(crate) fn run(mib: u64) -> Result<(), String> {
    let programs = Program::all()?;
    let moves = Transfer::all(mib);
    let mut all: Vec<Figures> = programs.iter().map(|_| Figures::default()).collect();
    for (program, figures) in programs.iter().zip(&mut all) {
        eprintln!("{}: at rest", program.name);
        at_rest(program, figures)?;
    }
    eprintln!("round trips");
    round_trips(&programs, &mut all)?;
    for (program, figures) in programs.iter().zip(&mut all) {
        eprintln!("{}: programs", program.name);
        figures.exec_us = programs_started(program)?;
    }
    for transfer in &moves {
        eprintln!("{}", transfer.name());
        in_turn(&programs, &mut all, transfer)?;
    }
    print(&programs, &all, &moves);
    let missed = verdicts(&programs, &all, &moves);
    if missed == 0 { Ok(()) } else { Err(format!("{missed} targets were missed")) }
}

fn at_rest(program: &Program, figures: &mut Figures) -> Result<(), String> {
    let mut peer = Peer::start(program)?;
    for (_, question) in QUESTIONS {
        peer.ask(question)?;
    }
    figures.size_kib = peer.mapped_files_kib()?;
    std::thread::sleep(Duration::from_secs(1));
    figures.idle_rss_kib = peer.status_kib("VmRSS")?;
    figures.idle_pss_kib = peer.pss_kib()?;
    figures.wakeups[0] = Some(woken(&peer)?);
    peer.hang_up();
    std::thread::sleep(Duration::from_millis(500));
    figures.wakeups[1] = Some(woken(&peer)?);
    drop(peer);
    // A port without a host reads as an empty file does. Ours does not take a file for a port: `vm-tests/tests/agent_port.rs`
    // looks at a real one.
    if let Ok(peer) = Peer::start_on_file(program) {
        std::thread::sleep(Duration::from_millis(500));
        figures.wakeups[2] = woken(&peer).ok();
    }
    Ok(())
}

fn woken(peer: &Peer) -> Result<u64, String> {
    let before = peer.switches()?;
    std::thread::sleep(WATCHED);
    Ok(peer.switches()? - before)
}

fn round_trips(programs: &[Program], all: &mut [Figures]) -> Result<(), String> {
    let mut peers = programs.iter().map(Peer::start).collect::<Result<Vec<_>, _>>()?;
    for (_, question) in QUESTIONS {
        let mut times: Vec<Vec<f64>> = vec![Vec::new(); peers.len()];
        let before = peers.iter().map(Peer::cpu).collect::<Result<Vec<_>, _>>()?;
        for _ in 0..ASKED / TURN {
            for (peer, times) in peers.iter_mut().zip(&mut times) {
                for _ in 0..TURN {
                    let begun = Instant::now();
                    peer.ask(question)?;
                    times.push(begun.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
        for (index, peer) in peers.iter().enumerate() {
            let cpu = (peer.cpu()? - before[index]).as_secs_f64() * 1e6 / ASKED as f64;
            times[index].sort_by(f64::total_cmp);
            let at = |part: usize| times[index][times[index].len() * part / 100];
            all[index].asked.push([at(50), at(99), cpu]);
        }
    }
    Ok(())
}

/// The median time from asking for a program to knowing that it has ended, asking without pause.
fn programs_started(program: &Program) -> Result<Option<f64>, String> {
    let mut peer = Peer::start(program)?;
    if !peer.knows("guest-exec")? {
        return Ok(None);
    }
    let mut times = Vec::new();
    for _ in 0..PROGRAMS {
        let begun = Instant::now();
        let pid = peer.call("guest-exec", &json!({"path": "/bin/true"}))?["pid"].clone();
        while peer.call("guest-exec-status", &json!({"pid": pid}))?["exited"] != true {}
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(Some(times[times.len() / 2]))
}

/// Has every agent that has files carry out a transfer, one after the other, so that what else the machine does hits all alike.
fn in_turn(programs: &[Program], all: &mut [Figures], transfer: &Transfer) -> Result<(), String> {
    let mut costs: Vec<Vec<Cost>> = vec![Vec::new(); programs.len()];
    for _ in 0..if transfer.direction == Direction::Read { READ } else { 1 } {
        for (program, costs) in programs.iter().zip(&mut costs) {
            if Peer::start(program)?.knows("guest-file-read")? {
                costs.push(moved(program, transfer)?);
            }
        }
    }
    for (figures, costs) in all.iter_mut().zip(&costs) {
        figures.transfers.extend(Cost::median(costs));
    }
    Ok(())
}

/// Carries out a transfer by an agent that was started for it, on an open file.
fn moved(program: &Program, transfer: &Transfer) -> Result<Cost, String> {
    let mut peer = Peer::start(program)?;
    let path = peer.file(FILE_MIB << 20)?;
    let file = peer.call("guest-file-open", &json!({"path": path, "mode": "r+"}))?;
    let bytes = usize::try_from(transfer.request_mib << 20).map_err(|error| error.to_string())?;
    let (command, request) = match transfer.direction {
        Direction::Read => ("guest-file-read", json!({"handle": file, "count": bytes})),
        Direction::Write => ("guest-file-write", json!({"handle": file, "buf-b64": peer::base64_of(bytes)})),
    };
    let (cpu, begun) = (peer.cpu()?, Instant::now());
    for round in 1..=transfer.mib / transfer.request_mib {
        let moved = peer.sized(command, &request)?;
        if moved != bytes {
            return Err(format!("{}: {moved} bytes in one request", transfer.name()));
        }
        if (round * transfer.request_mib).is_multiple_of(FILE_MIB) {
            peer.call("guest-file-seek", &json!({"handle": file, "offset": 0, "whence": 0}))?;
        }
    }
    Ok(Cost {
        cpu_s: (peer.cpu()? - cpu).as_secs_f64(),
        wall_s: begun.elapsed().as_secs_f64(),
        peak_rss_kib: peer.status_kib("VmHWM")?,
    })
}

fn print(programs: &[Program], all: &[Figures], moves: &[Transfer]) {
    let row = |name: &str, figure: &dyn Fn(&Figures) -> String| {
        print!("{name:44}");
        all.iter().for_each(|figures| print!("{:>16}", figure(figures)));
        println!();
    };
    print!("{:44}", "");
    programs.iter().for_each(|program| print!("{:>16}", program.name));
    println!();
    let kib = |kib: u64| format!("{kib} KiB");
    row("program and its libraries", &|one| kib(one.size_kib));
    row("resident, idle", &|one| kib(one.idle_rss_kib));
    row("  its share of shared pages (PSS)", &|one| kib(one.idle_pss_kib));
    let seconds = WATCHED.as_secs();
    for (index, name) in
        ["with a silent client", "without a client", "on a port without a host"].iter().enumerate()
    {
        row(&format!("wake-ups in {seconds} s {name}"), &|one| {
            one.wakeups[index].map_or("-".to_owned(), |count| count.to_string())
        });
    }
    for (index, (name, _)) in QUESTIONS.iter().enumerate() {
        row(&format!("{name}: p50 / p99"), &|one| {
            format!("{:.0} / {:.0} µs", one.asked[index][0], one.asked[index][1])
        });
        row(&format!("{name}: CPU each"), &|one| format!("{:.1} µs", one.asked[index][2]));
    }
    row("exec /bin/true until its end is told, p50", &|one| {
        one.exec_us.map_or("-".to_owned(), |time| format!("{time:.0} µs"))
    });
    for (at, transfer) in moves.iter().enumerate() {
        let name = transfer.name();
        let cell = |one: &Figures, show: &dyn Fn(&Cost) -> String| {
            one.transfers.get(at).map_or("-".to_owned(), show)
        };
        row(&format!("{name}: CPU / wall"), &|one| {
            cell(one, &|cost| format!("{:.2} / {:.2} s", cost.cpu_s, cost.wall_s))
        });
        row(&format!("{name}: peak"), &|one| cell(one, &|cost| kib(cost.peak_rss_kib)));
    }
    println!();
}

/// Says what of the project's aims is met, against each stock agent; answers how many are not.
fn verdicts(programs: &[Program], all: &[Figures], moves: &[Transfer]) -> usize {
    let Some((ours, others)) = all.split_first() else { return 0 };
    let mut missed = 0;
    let mut say = |name: String, met: bool| {
        missed += usize::from(!met);
        println!("{} {name}", if met { "met   " } else { "MISSED" });
    };
    say(format!("idle: at most 3 MiB resident: {} KiB", ours.idle_rss_kib), ours.idle_rss_kib <= 3 << 10);
    let woken: u64 = ours.wakeups.iter().flatten().sum();
    say(format!("idle: no wake-ups: {woken}"), woken == 0);
    for (program, stock) in programs[1..].iter().zip(others) {
        let name = &program.name;
        say(format!("{name}: less resident when idle"), ours.idle_rss_kib < stock.idle_rss_kib);
        let ratio = ours.asked[0][0] / stock.asked[0][0];
        say(format!("{name}: ping p50 at most the same: {ratio:.2} times"), ratio <= 1.0);
        for (transfer, (own, other)) in moves.iter().zip(ours.transfers.iter().zip(&stock.transfers)) {
            if transfer.direction == Direction::Read {
                let (ratio, what) = (own.cpu_s / other.cpu_s, transfer.name());
                say(format!("{name}: {what}: CPU at most a fifth: {ratio:.3}"), ratio <= 0.2);
            }
            if transfer.request_mib >= JUDGED_MIB {
                let ratio = own.peak_rss_kib as f64 / other.peak_rss_kib as f64;
                let what = transfer.name();
                say(format!("{name}: {what}: peak memory at most a quarter: {ratio:.3}"), ratio <= 0.25);
            }
        }
    }
    missed
}
