//! How a long operation tells how far it is, and hears that it should end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A long operation tells this what it does. Called from the thread that runs it, often; must be quick.
pub trait Watch: Sync {
    /// A new step has begun, e.g. `copying disk data`.
    fn step(&self, name: &str);
    /// Of this step's `total_bytes`, so many are done.
    fn progress(&self, done_bytes: u64, total_bytes: u64);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn step(&self, _name: &str) {}
    fn progress(&self, _done_bytes: u64, _total_bytes: u64) {}
}

/// Someone's wish that an operation ends. Clones share it; it is never taken back.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// The shared flag, for a signal handler.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }

    /// Whether someone asked.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
