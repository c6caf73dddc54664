//! The worker process that serves one application: how the agent starts, asks and ends it, and what it is inside.

mod inside;
mod spawn;

pub(super) use inside::Session;
pub use inside::main_if_worker;
pub(super) use spawn::{Errand, Lost, Worker};

/// The argument that makes this program a worker; the kind of application and the number of its socket follow.
const WORKER_ARGUMENT: &str = "quiesce-worker";
