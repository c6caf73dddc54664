//! `cargo xtask bench`: what snapshots cost, beside what others cost on the same disk in the same run.
//!
//! The VM is a real QEMU whose virtual CPU stays at reset: no guest runs, so that QEMU's CPU seconds are those of its
//! block layer alone. The disk is written through the guest's device by the monitor's `qemu-io`.

mod cost;
mod data;
mod full;
mod idle_vm;
mod increment;
mod ours;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["increment"] => increment::run(),
        ["full"] => full::run(),
        [] => increment::run().and_then(|()| full::run()),
        _ => {
            eprintln!("bench [increment|full], not {}", words.join(" "));
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe bench failed: {error}");
            ExitCode::FAILURE
        }
    }
}
