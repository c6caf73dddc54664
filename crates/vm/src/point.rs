//! The point: one instant at which all disks of a running VM are cut, and the way back.
//!
//! A `copy-before-write` filter is put between each guest device and its disk while the vCPUs are stopped for a few
//! milliseconds; in the same stop the old bitmap ends and a new one begins. From then on old data is copied to a
//! scratch image before the guest overwrites it, and the disk as it was is read over QEMU's own NBD server on a
//! private unix socket. A full or slow scratch breaks the snapshot, never the guest's write.
//!
//! ```text
//!  guest device ──▶ FILTER (copy-before-write) ──▶ DISK (bitmaps)
//!                     │  └─ target ─▶ SCRATCH (qcow2) ──▶ FILE
//!                     └◀─ ACCESS (snapshot-access) ◀── NBD export
//! ```
//!
//! The way back is one pure function from what is there ([`undo::steps`]), so releasing a good run, undoing a failed
//! one and cleaning up after a program that was killed at any step are the same code.

pub mod claim;
mod cut;
mod here;
pub mod plan;
pub mod reserve;
pub mod restart;
#[cfg(test)]
mod scripted;
mod settle;
pub mod steps;
pub mod undo;

pub use claim::{ClaimError, claim, unclaim};
pub use cut::{Cut, PointError, Prepared, export, prepare};
pub use here::{Away, here};
pub use plan::{DiskExport, DiskPlan, DiskRequest, Plan, PlanError, Request};
pub use reserve::{Reserve, Short};
pub use undo::{Outcome, UndoError, release};
