//! The kinds of applications that have a module: one entry here, one folder beside it.

use super::channel::Note;
use super::postgresql;
use super::process::Process;
use super::worker::{Errand, Session};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// What the agent needs to know of a kind.
pub(super) struct Kind {
    /// As reported.
    pub(super) name: &'static str,
    /// The longest freeze that its instances bear.
    pub(super) freeze_budget: Duration,
    /// What it holds from the quiesce to the thaw stalls its clients.
    pub(super) stalls_writers: bool,
    /// In the agent: whether the process with this id runs its program. Must not wait for anything.
    pub(super) is_it: fn(u32) -> bool,
    /// In the agent, in a thread of its own: the instance whose main process this is, if it is one. Connects to nothing, but
    /// opens what the process names, which may lie on a dead server. An error means that it could not be looked at.
    pub(super) look: fn(u32) -> io::Result<Option<Found>>,
    /// In a worker: makes a session from an order and the number of the socket; connects in its first phase.
    pub(super) session: fn(serde_json::Value, RawFd) -> io::Result<Box<dyn Session>>,
}

/// All of them.
pub(super) const KINDS: &[Kind] = &[postgresql::KIND];

/// An instance that was found.
#[derive(Debug)]
pub(super) struct Found {
    /// What tells it from its like.
    pub(super) instance: String,
    pub(super) version: Option<String>,
    pub(super) device_numbers: BTreeSet<String>,
    pub(super) facts: BTreeMap<String, String>,
    pub(super) notes: Vec<Note>,
    /// Its main process.
    pub(super) process: Process,
    /// How to reach it, or why it cannot be reached.
    pub(super) errand: Result<Errand, Note>,
}
