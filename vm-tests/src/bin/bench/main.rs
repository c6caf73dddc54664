//! `cargo xtask bench`: what snapshots cost, beside what others cost on the same disk in the same run.
//!
//! For `increment` and `full` the VM is a real QEMU whose virtual CPU stays at reset: no guest runs, so that QEMU's CPU
//! seconds are those of its block layer alone. The disk is written through the guest's device by the monitor's `qemu-io`.
//! `stall` is about a guest at work, `agent` about guest agents on this machine's own kernel.

mod agent;
mod cost;
mod data;
mod full;
mod idle_vm;
mod increment;
mod ours;
mod stall;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["increment"] => increment::run(),
        ["full"] => full::run(),
        ["agent"] => agent::run(agent::MIB),
        ["agent", mib] => match mib.parse() {
            Ok(mib @ 1..=65_536) => agent::run(mib),
            _ => return usage(&words),
        },
        ["stall", ref numbers @ ..] => {
            let numbers: Result<Vec<u32>, _> = numbers.iter().map(|number| number.parse()).collect();
            match numbers.as_deref() {
                Ok([]) => stall::run(stall::SNAPSHOTS, stall::DIRTY_MIB_PER_S),
                Ok([snapshots @ 1..=1000]) => stall::run(*snapshots, stall::DIRTY_MIB_PER_S),
                Ok([snapshots @ 1..=1000, dirty @ 1..=4000]) => stall::run(*snapshots, *dirty),
                _ => return usage(&words),
            }
        }
        [] => increment::run().and_then(|()| full::run()),
        _ => return usage(&words),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe bench failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage(words: &[&str]) -> ExitCode {
    eprintln!(
        "bench [increment | full | stall [SNAPSHOTS [MIB_PER_S]] | agent [MIB]], not {}",
        words.join(" ")
    );
    ExitCode::from(2)
}
