//! Runs programs side by side, as many at a time as there are processors.
//!
//! What each prints is kept until it ends and then shown in one piece: a log that two wrote at once tells nothing.

use crate::stage::Program;
use std::io::{self, Write};
use std::sync::Mutex;
use std::thread::{available_parallelism, scope};

/// More would mean as many guests, each with its memory.
const LANES_MAX: usize = 4;

/// Runs all of them, also after one has failed; an error names those that did.
pub(crate) fn run(programs: Vec<Program>) -> Result<(), String> {
    let lanes = available_parallelism().map_or(1, usize::from).min(LANES_MAX);
    let waiting = Mutex::new(programs.into_iter());
    let failed = Mutex::new(Vec::new());
    let lane = || {
        // A poisoned lock means that another lane panicked, which ends everything anyway.
        while let Some(program) = { waiting.lock().expect("no lane panics").next() } {
            let (shown, ended) = program.together();
            // A terminal that is gone is no reason to stop testing.
            let _shown = io::stderr().lock().write_all(&shown);
            failed.lock().expect("no lane panics").extend(ended.err());
        }
    };
    scope(|lanes_of| {
        for _ in 0..lanes {
            lanes_of.spawn(lane);
        }
    });
    let failed = failed.into_inner().expect("no lane panics");
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}
