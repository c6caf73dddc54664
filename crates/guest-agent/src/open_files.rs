//! How many files this process may have open: a folder on each superblock, three pipes for each program, handles of hosts.
//!
//! Under systemd the limit is 1,024, low for the sake of programs that use `select`; whoever does not may raise it.
//! Source: `RLIMIT_NOFILE` in `systemd.exec(5)`.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Enough for 1,024 superblocks and 256 each of programs and handles, several times over.
const FILES_MAX: u64 = 16 << 10;
/// None was raised.
const UNTOUCHED: u64 = u64::MAX;

/// What the limit was.
static BEFORE: AtomicU64 = AtomicU64::new(UNTOUCHED);

/// Raises the limit as far as that needs no right, and no further than is needed.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(FILES_MAX).min(FILES_MAX);
    if let Some(before) = limit.current.filter(|before| *before < wanted) {
        let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            BEFORE.store(before, SeqCst);
        }
    }
}

/// Sets the limit as it was, in a forked child before it becomes a program that is none of ours. Async-signal-safe.
pub fn restore_limit() {
    let before = BEFORE.load(SeqCst);
    if before != UNTOUCHED {
        let limit = Rlimit { current: Some(before), maximum: getrlimit(Resource::Nofile).maximum };
        // Lowering is always allowed.
        let _lowered = setrlimit(Resource::Nofile, limit).is_ok();
    }
}
