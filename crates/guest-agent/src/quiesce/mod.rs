//! Quiescing applications: every one is found, flushed before the freeze, held over it and checked after the thaw.
//!
//! The agent never speaks to an application itself. Each instance is served by a worker process: this program again,
//! with the rights of the application's own user and nothing open but a pipe to the agent. Between freeze and thaw
//! nothing is sent to anybody.

mod applications;
mod channel;
mod discovery;
mod instance;
mod kinds;
mod postgresql;
mod process;
mod root;
pub mod worker;

pub use applications::Applications;
pub(crate) use process::{group_has_others, members_of_session};
