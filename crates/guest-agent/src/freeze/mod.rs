//! Freezing and thawing file systems.
//!
//! `gather` reads facts, `plan` decides (pure), `selection` leaves out what the administrator wants, `reach` opens a folder on each superblock, `crew` calls the kernel from
//! a thread for each, `guard` is the process that thaws when nobody else does, and `ledger` is the record that all of
//! them and a restarted agent share.

pub mod counters;
pub mod crew;
pub mod developer;
pub mod facts;
pub mod gather;
pub mod grace;
pub mod guard;
pub mod kernel;
pub mod ledger;
pub mod mountinfo;
pub mod plan;
pub mod queue;
pub mod reach;
pub mod selection;
pub mod writers;
