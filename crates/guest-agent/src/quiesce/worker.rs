//! The worker process that serves one application.

/// Becomes a worker, and never returns, if this process was started as one. Call it first in `main`.
pub fn main_if_worker() {}
