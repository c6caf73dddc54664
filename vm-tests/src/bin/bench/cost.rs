//! Time and CPU of a piece of work: the programs it ran, and QEMU's share.

use std::fmt;
use std::time::{Duration, Instant};

/// What a piece of work took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) wall: Duration,
    /// User and system time of the programs that were run and have ended, and of their children.
    pub(crate) client: Duration,
    /// The same of QEMU, which serves the disk.
    pub(crate) qemu: Duration,
    /// What a hypervisor took from all of this machine's processors meanwhile: where there is much of it, the rest proves little.
    pub(crate) stolen: Duration,
}

impl Cost {
    pub(crate) fn cpu(self) -> Duration {
        self.client + self.qemu
    }

    /// Runs `work`. Its children must have been waited for at its end.
    ///
    /// The kernel counts here in steps of 10 ms.
    pub(crate) fn of<T>(qemu: u32, work: impl FnOnce() -> Result<T, String>) -> Result<(T, Self), String> {
        let (children, server, steal, began) = (ended_children()?, process(qemu)?, stolen()?, Instant::now());
        let done = work()?;
        let cost = Self {
            wall: began.elapsed(),
            client: ended_children()? - children,
            qemu: process(qemu)? - server,
            stolen: stolen()? - steal,
        };
        Ok((done, cost))
    }

    /// Each figure's median by itself.
    pub(crate) fn median(costs: &[Self]) -> Self {
        let middle = |figure: fn(&Self) -> Duration| {
            let mut figures: Vec<Duration> = costs.iter().map(figure).collect();
            figures.sort();
            figures[figures.len() / 2]
        };
        Self {
            wall: middle(|c| c.wall),
            client: middle(|c| c.client),
            qemu: middle(|c| c.qemu),
            stolen: middle(|c| c.stolen),
        }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [wall, client, qemu, stolen] =
            [self.wall, self.client, self.qemu, self.stolen].map(|time| time.as_secs_f64());
        write!(
            to,
            "{wall:6.2} s wall, CPU {:6.2} s = {client:6.2} program + {qemu:6.2} QEMU; {stolen:.2} s stolen",
            client + qemu
        )
    }
}

/// Fields 16 and 17 of our own `stat`: children that were waited for. Source: proc(5).
fn ended_children() -> Result<Duration, String> {
    fields("/proc/self/stat", 16)
}

/// Fields 14 and 15: the process itself.
pub(crate) fn process(pid: u32) -> Result<Duration, String> {
    fields(&format!("/proc/{pid}/stat"), 14)
}

/// Field 8 of the first line: time that a hypervisor gave to others, of all processors. Source: proc(5).
fn stolen() -> Result<Duration, String> {
    let path = "/proc/stat";
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let ticks = text.split_whitespace().nth(8).ok_or_else(|| format!("no stolen time in {path}"))?;
    Ok(duration(ticks.parse().map_err(|error| format!("{path}: {ticks}: {error}"))?))
}

/// The sum of two neighbouring fields, user and system time, counted from 1 as proc(5) does.
fn fields(path: &str, first: usize) -> Result<Duration, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    // The second field is a name in brackets, in which anything may stand.
    let after_name = text.rsplit_once(')').ok_or("no name in stat")?.1;
    let ticks = after_name.split_whitespace().skip(first - 3).take(2);
    let ticks: u64 = ticks.map(|tick| tick.parse::<u64>().unwrap_or(0)).sum();
    Ok(duration(ticks))
}

fn duration(ticks: u64) -> Duration {
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}
