//! The program in the guest, as a library so that its tests can reach every room.

pub mod activation;
pub mod agent;
pub mod channel;
pub mod children;
pub mod commands;
pub mod daemon;
pub mod errno;
pub mod freeze;
pub mod hooks;
pub mod logging;
pub mod oom;
pub mod open_files;
pub mod options;
pub mod poll;
mod program;
pub mod quiesce;
pub mod run;
pub mod signals;
pub mod state;
mod syslog;

pub(crate) use errno::words;
