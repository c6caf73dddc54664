//! Carries runs out: snapshot, restore, boot, verify.

pub mod blocks;
pub mod pieces;
pub mod register;
pub mod watch;
