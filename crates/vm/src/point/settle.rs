//! Waits until QEMU's own writes to scratch are done, before anything that would make the guest wait for them.
//!
//! A copy that takes too long breaks the snapshot and lets the guest's write go on, but the write to scratch stays under
//! way in QEMU, which cannot take it back. Whatever takes the filter out waits for such writes with the guest's devices
//! stopped: over a scratch of 4 KiB/s a guest stood still for 215 s. A filter that stays in place stops nobody.
//!
//! QEMU does not tell of these writes, but the kernel does: each is a thread that waits in a call on the scratch file.
//! Where we may not look (not root, another process namespace), nothing is waited for.

use crate::point::plan::Plan;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A guest that waits for so many calls of this length one after the other, as QEMU makes them for one large write, waits
/// no longer than was agreed for a single copy.
const BRISK: Duration = Duration::from_millis(250);
/// For so long no call may last longer.
const CALM: Duration = Duration::from_millis(500);
/// One write may have ended and the next not begun: so many looks in a row must find none.
const LOOKS_EMPTY: u32 = 3;
/// Longest wait; then the filter stays for the next run.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Whether the process's writes to the plan's scratch files are done, or come and go fast.
pub(super) fn settled(plan: &Plan, process: u32) -> bool {
    let process = PathBuf::from(format!("/proc/{process}"));
    // As the kernel names open files; if the folder is gone, nothing can be said of it.
    let scratch = plan.folder.canonicalize().unwrap_or_else(|_| plan.folder.clone());
    let began = Instant::now();
    let mut since: BTreeMap<Call, Instant> = BTreeMap::new();
    let (mut slow, mut empty) = (began, 0);
    while began.elapsed() < PATIENCE {
        let calls = calls(&scratch, &process);
        let now = Instant::now();
        empty = if calls.is_empty() { empty + 1 } else { 0 };
        since.retain(|call, _| calls.contains(call));
        for call in calls {
            since.entry(call).or_insert(now);
        }
        if since.values().any(|begun| now - *begun > BRISK) {
            slow = now;
        }
        if empty == LOOKS_EMPTY || now - slow > CALM {
            return true;
        }
        std::thread::sleep(LOOK);
    }
    false
}

/// A thread's name, and the call that it waits in, with its arguments: the next write of the same thread is another.
type Call = (String, String);

/// The calls on files of a folder in which threads of a process wait.
fn calls(scratch: &Path, process: &Path) -> BTreeSet<Call> {
    let Ok(threads) = fs::read_dir(process.join("task")) else { return BTreeSet::new() };
    let waiting = threads.flatten().filter_map(|thread| {
        let call = fs::read_to_string(thread.path().join("syscall")).ok()?;
        // By its name only: a look at the file itself could wait for the same disk.
        let file = fs::read_link(process.join("fd").join(descriptor(&call)?.to_string())).ok()?;
        file.starts_with(scratch).then(|| (thread.file_name().to_string_lossy().into_owned(), call))
    });
    waiting.collect()
}

/// The first argument. Source: `proc_pid_syscall(5)`: the number, six arguments, stack and instruction pointer; or a word.
fn descriptor(call: &str) -> Option<u32> {
    let mut words = call.split_whitespace();
    // -1: it waits, but in no call.
    words.next()?.parse::<u32>().ok()?;
    u32::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_of_a_call_is_its_first_argument() {
        let call = "18 0x1f 0x7f3c 0x10000 0x340000 0x0 0x0 0x7f3c9affe5f8 0x7f3c9d3a1a1f\n";
        assert_eq!(descriptor(call), Some(31));
        assert_eq!(
            descriptor("202 0x7f3c9d3a1a1f 0x80 0x0 0x0 0x0 0x0 0x7f 0x7f\n"),
            None,
            "an address is none"
        );
        for word in ["running\n", "-1 0x7ffd 0x7f\n", "", "0"] {
            assert_eq!(descriptor(word), None, "{word:?}");
        }
    }
}
