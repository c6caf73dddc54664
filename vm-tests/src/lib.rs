//! Real guests under real QEMU prove what only a kernel can.
//!
//! ```no_run
//! use std::time::Duration;
//! use vm_tests::{Agent, Guest};
//! let guest = Guest::builder().agent(Agent::Stock).start().expect("QEMU starts");
//! guest.booted(Duration::from_secs(10));
//! guest.postgresql_ready(Duration::from_secs(10));
//! guest.start_load();
//! assert!(guest.acks().wait_for('c', 200, Duration::from_secs(60)));
//! println!("{} commits", guest.sql("select count(*) from commits"));
//! // The program under test gets guest.qmp_socket() and guest.agent_socket(); the test keeps exec(), sql() and
//! // second_qmp_socket(), which work beside it.
//! guest.power_off(Duration::from_secs(10));
//! ```
//!
//! The image, our agent and the load come from `cargo xtask guest` (see [`Image`]); `STILLPOINT_ACCEL=kvm|tcg` overrides the
//! probe of the accelerator. A boot takes about six seconds under emulation: tests that can share one do.

mod accelerator;
mod acks;
pub mod bare;
mod block_graph;
mod commands;
mod gate;
mod guest;
mod harness;
mod image;
pub mod libvirt;
pub mod lying_agent;
mod ordeal;
mod overlay;
pub mod packages;
mod process;
mod proof;
mod qemu;
mod stillpoint;
pub mod view;

pub use accelerator::{Accelerator, accelerator};
pub use acks::{Ack, Acks};
pub use bare::{Bare, BareDisk};
pub use block_graph::BlockGraph;
pub use commands::{
    CHECK_FILE_SYSTEMS, DATA_RECORDS, RECOVERY_LOG, ROOT_RECORDS, amcheck, count_records, psql,
};
pub use gate::{At, Gate};
pub use guest::{Agent, DiskFormat, Guest, GuestBuilder, Init};
pub use harness::{Output, shell};
pub use image::{Image, checkout};
pub use ordeal::{Extent, Ordeal, Victim, signal};
pub use process::spawn;
pub use proof::{Found, Promised, prove, snapshot_id};
pub use qemu::{Disk, Machine};
pub use stillpoint::{Ended, Running, Stillpoint, Twin, until, writing_guest};
