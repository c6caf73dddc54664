//! How long the file systems of a guest at rest are frozen: what a freeze costs when there is nothing to write out.

use super::figures::quantile;
use guest_protocol::stillpoint::{FreezeArguments, ThawArguments};
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use vm::agent::{Agent, AgentError};
use vm_tests::Guest;

/// Odd, so that the median is one of them.
const FREEZES: usize = 15;
/// So many by one build before the other takes its turn.
const IN_A_ROW: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);

/// Freezes and thaws again and again, by each build of the agent in turn, and prints the medians.
pub(super) fn run(guest: &Guest, has_older: bool) -> Result<(), String> {
    let builds: &[bool] = if has_older { &[false, true] } else { &[false] };
    let mut all = [const { Vec::new() }; 2];
    for turn in 0..FREEZES / IN_A_ROW {
        for older in builds {
            if has_older {
                guest.run_agent(*older);
            }
            for number in 0..IN_A_ROW {
                let frozen = freeze(guest, &format!("idle-{older}-{turn}-{number}"));
                let frozen = frozen.map_err(|error| format!("{error}\n{}", guest.serial_tail()))?;
                all[usize::from(*older)].push(frozen);
            }
        }
    }
    for (name, all) in ["ours", "older"].into_iter().zip(all).take(builds.len()) {
        let median = |figure: fn(&(f64, f64)) -> f64| {
            let mut figures: Vec<f64> = all.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            quantile(&figures, 0.5)
        };
        let (freeze, frozen) = (median(|one| one.0), median(|one| one.1));
        println!("at rest, {FREEZES} times, median in ms: {name:5} FIFREEZE {freeze:.0}, frozen {frozen:.0}");
    }
    Ok(())
}

/// From the first FIFREEZE to the last one's end, and to the last FITHAW's, in milliseconds.
fn freeze(guest: &Guest, id: &str) -> Result<(f64, f64), AgentError> {
    let mut agent = Agent::connect(&guest.agent_socket(), LIMIT)?;
    let never = AtomicBool::new(false);
    let frozen = agent.stillpoint_freeze(&FreezeArguments::new(id, 60_000), &never);
    let report = agent.stillpoint_thaw(&ThawArguments { id: id.to_owned() }, LIMIT)?;
    frozen.map(|_| (report.freeze_ms as f64, report.frozen_ms as f64))
}
