//! Carries runs out: snapshot, restore, boot.
//!
//! Synchronous: a run is one thread that talks to one VM, and its stack trace tells the whole story.

pub mod blocks;
pub mod boot;
pub mod check;
mod claim;
mod copy;
mod definition;
pub mod guest;
pub mod journal;
mod parent;
pub mod pieces;
pub mod register;
pub mod restore;
mod seen;
pub mod serve;
pub mod snapshot;
pub mod survey;
pub mod watch;

pub use copy::CopyError;

use std::time::{SystemTime, UNIX_EPOCH};

/// The host's wall clock, milliseconds since 1970. For people; no decision rests on it.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A fresh name for a run: 26 lower-case letters and digits.
///
/// # Panics
/// If the system has no randomness: nothing can be encrypted then either.
pub(crate) fn fresh_id() -> String {
    let mut bytes = [0; 26];
    getrandom::fill(&mut bytes).expect("the system has random numbers");
    bytes.map(|byte| char::from(b"abcdefghijklmnopqrstuvwxyz234567"[usize::from(byte % 32)])).iter().collect()
}
