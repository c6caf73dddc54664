//! The PCI devices as QEMU lists them, for matching a disk's address with what the guest sees.

use crate::command::commands;
use serde::{Deserialize, Serialize};

/// Asks for every PCI bus.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryPci {}

/// A root bus.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Bus {
    /// Its number.
    #[serde(default)]
    pub bus: u64,
    /// What sits on it.
    #[serde(default)]
    pub devices: Vec<Device>,
}

/// A PCI device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Device {
    /// Number of its bus, as the guest's firmware set it; 0 before.
    #[serde(default)]
    pub bus: u64,
    /// Slot.
    #[serde(default)]
    pub slot: u64,
    /// Function.
    #[serde(default)]
    pub function: u64,
    /// The id given on the command line, or empty.
    #[serde(default)]
    pub qdev_id: String,
    /// What is behind it, if it is a bridge.
    #[serde(default)]
    pub pci_bridge: Option<Bridge>,
}

/// The other side of a bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Bridge {
    /// Its bus.
    #[serde(default)]
    pub bus: BridgeBus,
    /// What sits on it.
    #[serde(default)]
    pub devices: Vec<Device>,
}

/// Bus numbers of a bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct BridgeBus {
    /// Number of the bus behind it.
    #[serde(default)]
    pub secondary: u64,
}

commands! {
    QueryPci => "query-pci" -> Vec<Bus>;
}
