//! Carries runs out: snapshot, restore, boot, verify.

pub mod pieces;
pub mod register;
