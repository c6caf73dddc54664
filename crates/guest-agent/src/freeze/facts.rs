//! What the plan is made from: mount tables and what sysfs says about block devices. Plain values, no I/O.

use super::mountinfo::{DeviceNumber, Mount};
use guest_protocol::stillpoint::{GuestDisk, Reason};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// From where a mount can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum View {
    /// The agent's own mount namespace.
    Own,
    /// Another mount namespace, through `/proc/PID/root` of a process in it.
    Process(u32),
}

/// One mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// How to get there.
    pub view: View,
    /// Its table.
    pub mounts: Vec<Mount>,
}

/// What a loop device lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Number of the file's device, as the loop driver knows it (`lo_device`).
    Device(DeviceNumber),
    /// Name of the file, as sysfs shows it: less sure, because mounts may have moved since.
    Path(PathBuf),
}

/// One block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Kernel name, e.g. `dm-0`.
    pub name: String,
    /// Devices directly below: `slaves/`, or the whole disk of a partition.
    pub below: Vec<DeviceNumber>,
    /// For loop devices.
    pub backing: Option<Backing>,
    /// For whole disks with nothing below.
    pub disk: Option<GuestDisk>,
}

/// Everything that the plan needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The agent's own namespace first, whole; of the others as much as can be needed to reach a superblock.
    pub namespaces: Vec<Namespace>,
    /// Number and superblock of further mounts: a descriptor may lie on them, but nothing is opened through them.
    pub further: Vec<(u64, DeviceNumber)>,
    /// Block devices under any mounted file system, down to the disks.
    pub blocks: BTreeMap<DeviceNumber, Block>,
    /// Block devices of superblocks that have an anonymous number (btrfs, bcachefs).
    pub members: BTreeMap<DeviceNumber, Vec<DeviceNumber>>,
    /// What could not be looked at.
    pub unseen: Vec<Reason>,
}
