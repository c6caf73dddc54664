//! Finds the instances of a kind among the processes, and tells what could not be looked at.

use super::kinds::{Found, Kind};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Longest look at one process: what it has open may lie on a server that does not answer.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// Most looks that may hang, of all discoveries together; nothing can end a thread that waits in the kernel.
const HANGING_MAX: usize = 16;
const STACK_BYTES: usize = 256 << 10;

/// Looks that have not come back.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// What was found of one kind.
#[derive(Debug, Default)]
pub(super) struct Discovery {
    pub(super) found: Vec<Found>,
    /// Why one could not be looked at, of each process that may be another instance.
    pub(super) unseen: Vec<String>,
}

/// Looks at every process that may be one.
pub(super) fn discover(kind: &'static Kind, pids: &[u32], deadline: Instant) -> Discovery {
    let mut discovery = Discovery::default();
    for pid in pids.iter().copied().filter(|pid| (kind.is_it)(*pid)) {
        match look(kind, pid, deadline) {
            Ok(found) => discovery.found.extend(found),
            Err(why) => discovery.unseen.push(format!("process {pid}: {why}")),
        }
    }
    // Two containers may well use the same path; then only the pid tells them apart.
    let names: Vec<String> = discovery.found.iter().map(|one| one.instance.clone()).collect();
    for one in &mut discovery.found {
        if names.iter().filter(|name| **name == one.instance).count() > 1 {
            one.instance = format!("{} pid {}", one.instance, one.process.pid);
        }
    }
    discovery
}

fn look(kind: &'static Kind, pid: u32, deadline: Instant) -> Result<Option<Found>, String> {
    let left = deadline.saturating_duration_since(Instant::now()).min(LOOK_MAX);
    if left.is_zero() {
        return Err("there was no time left to look at it".to_owned());
    }
    if UNDER_WAY.load(SeqCst) >= HANGING_MAX {
        return Err("too many earlier looks at such processes hang".to_owned());
    }
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        let looked = (kind.look)(pid);
        UNDER_WAY.fetch_sub(1, SeqCst);
        sender.send(looked).is_ok()
    };
    UNDER_WAY.fetch_add(1, SeqCst);
    if let Err(error) = thread::Builder::new().stack_size(STACK_BYTES).spawn(work) {
        UNDER_WAY.fetch_sub(1, SeqCst);
        return Err(format!("no thread: {error}"));
    }
    let looked: io::Result<Option<Found>> =
        receiver.recv_timeout(left).map_err(|_| "looking at it takes too long".to_owned())?;
    looked.map_err(|error| error.to_string())
}
