//! The claim on a VM: one run at a time works on it, whoever started it, under whatever name, from whatever state folder.
//!
//! It lies where the work is done, in QEMU: a node with a fixed name, of which there can be one. Two runs with locks on
//! the host would not meet if they came from two hosts' folders or by two monitors, and the second filter over a disk
//! would take the guest's writes away from the first. The node is made of nothing and used by nothing; below it lies
//! another that names the run.

use crate::disks::OUR_PREFIX;
use crate::monitor::{Monitor, MonitorError};
use qmp::block::{BlockdevAdd, BlockdevDel, QueryNamedBlockNodes};

/// What the name of the claim's node ends with, after our prefix.
const CLAIM: &str = "run";

/// A VM that cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another run works on it, or died at it.
    #[error("the run {0} works on this VM, or died at it")]
    Held(String),
    /// QEMU cannot be asked, or refused.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
}

/// Claims the VM for the run with this tag; a claim of the same run counts.
///
/// # Errors
/// `Held` by another run; those of the monitor.
pub fn claim(monitor: &mut Monitor, tag: &str) -> Result<(), ClaimError> {
    let below = BlockdevAdd::NullCo { node_name: owner_node(tag), size: 0, read_zeroes: true };
    let refused = match monitor.run(&BlockdevAdd::Raw { node_name: claim_node(), file: Box::new(below) }) {
        Ok(_) => return Ok(()),
        Err(error @ MonitorError::Failed { .. }) => error,
        Err(error) => return Err(error.into()),
    };
    match holder(monitor)? {
        Some(by) if by == tag => Ok(()),
        Some(by) => Err(ClaimError::Held(by)),
        None => Err(refused.into()),
    }
}

/// The tag of the run that holds the claim.
///
/// # Errors
/// Those of the monitor.
pub fn holder(monitor: &mut Monitor) -> Result<Option<String>, MonitorError> {
    let nodes = monitor.run(&QueryNamedBlockNodes { flat: true })?;
    let owner = owner_node("");
    Ok(nodes.iter().find_map(|node| node.node_name.as_ref()?.strip_prefix(&owner).map(str::to_owned)))
}

/// Gives the claim back, if the run with this tag holds it.
///
/// # Errors
/// Those of the monitor.
pub fn unclaim(monitor: &mut Monitor, tag: &str) -> Result<(), MonitorError> {
    if holder(monitor)?.as_deref() == Some(tag) {
        monitor.run(&BlockdevDel { node_name: claim_node() })?;
    }
    Ok(())
}

fn claim_node() -> String {
    format!("{OUR_PREFIX}{CLAIM}")
}

fn owner_node(tag: &str) -> String {
    format!("{OUR_PREFIX}{CLAIM}-{tag}")
}
