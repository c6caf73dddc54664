//! The program in the guest, as a library so that its tests can reach every room.

pub mod freeze;
pub mod logging;
pub mod quiesce;
pub mod run;
