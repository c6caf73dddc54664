//! The evidence that is kept with a snapshot.
//!
//! A receipt says what was done and seen, never what it is worth: `judge` computes that, again and again, from
//! the receipt alone. Fields are only ever added; a reader takes a missing one as missing evidence.

use crate::Level;
use guest_protocol::stillpoint::{GuestReport, Reason};
use serde::{Deserialize, Serialize};

/// Everything that happened in one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Receipt {
    /// The VM's name in the register of the host that took the snapshot.
    pub vm: String,
    /// The run's id; the guest half names the same.
    pub run: String,
    /// Level that was tried for.
    pub wanted: Option<Level>,
    /// Least level that would have been kept.
    pub required: Option<Level>,
    /// How the disks were cut; absent: they were not.
    pub point: Option<Point>,
    /// Every disk of the VM that counts, in the point or not.
    pub disks: Vec<DiskEvidence>,
    /// Someone chose the disks (`--disk`); otherwise every disk that counts was wanted.
    pub disks_chosen: bool,
    /// Who answered in the guest.
    pub agent: Agent,
    /// The order in which three messages were seen on the host.
    pub order: Order,
    /// What our agent says of the freeze.
    pub guest: Option<GuestReport>,
    /// What was seen of a freeze by a stock qemu-ga.
    pub stock: Option<StockFreeze>,
    /// What went wrong on the host, or was left out.
    pub reasons: Vec<Reason>,
    /// How long each phase took on the host.
    pub phases_ms: Phases,
}

/// The cut.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Point {
    /// Host's wall clock, milliseconds since 1970; for people, proves nothing.
    pub at_ms: u64,
    /// No virtual CPU ran between the first disk's cut and the last one's.
    pub vcpus_stopped: bool,
    /// How long they were stopped at most, in milliseconds: from sending `stop` until `cont` was answered.
    pub stopped_ms: f64,
    /// The VM was shut off: from before the first read until after the last no program had an image of these disks open
    /// for writing, and none changed. So they are the same at every instant between, and no cut was needed.
    pub shut_off: bool,
    /// Disks of a VM that was shut off for which that cannot be shown: on a block device or another host's storage.
    pub writers_unseen: Vec<String>,
    /// Names of the disks that were cut together.
    pub disks: Vec<String>,
}

/// One disk as the host knows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskEvidence {
    /// Name on the host.
    pub name: String,
    /// Serial number that the guest sees.
    pub serial: Option<String>,
    /// PCI address that the guest sees, `DDDD:BB:SS.F`.
    pub pci: Option<String>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What was read and stored of it; absent: it was not in the point.
    pub copy: Option<CopyEvidence>,
}

/// What was read and stored of one disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyEvidence {
    /// How changes were found.
    pub method: CopyMethod,
    /// Bytes read from the point.
    pub read_bytes: u64,
    /// Bytes that differ from the parent, or all data of a first snapshot.
    pub changed_bytes: u64,
    /// Bytes added to the repository.
    pub stored_bytes: u64,
}

/// How changes against the parent were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyMethod {
    /// There is no parent: everything was read.
    #[default]
    Full,
    /// QEMU's dirty bitmap said what to read.
    Bitmap,
    /// The bitmap was lost: everything was read and compared with the parent's checksums.
    Compared,
}

/// Who answered in the guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Agent {
    /// Nobody, or nobody was asked.
    #[default]
    None,
    /// qemu-ga or a like: freezes, but quiesces nothing and proves little.
    QemuGa {
        /// Its version.
        version: String,
    },
    /// Ours.
    Stillpoint {
        /// Its version.
        version: String,
    },
}

/// Proof without clocks: the point lies inside the freeze if these messages came in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Order {
    /// The guest's answer to freeze had arrived before the point was asked for.
    pub frozen_before_point: bool,
    /// The guest could not thaw before the point: thaw was sent after QEMU's answer to it, or while the vCPUs stood still, as they
    /// did until the last disk was cut.
    pub point_before_thaw: bool,
    /// The guest answered the thaw, for the same run.
    pub thaw_answered: bool,
    /// Host's wall clock when freeze was sent, milliseconds since 1970; for people and tests, proves nothing.
    pub freeze_sent_ms: Option<u64>,
}

impl Order {
    /// All three were seen.
    pub const fn proves_inside(self) -> bool {
        self.frozen_before_point && self.point_before_thaw && self.thaw_answered
    }
}

/// A freeze by a stock qemu-ga.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StockFreeze {
    /// What freeze answered.
    pub frozen: u64,
    /// What thaw answered.
    pub thawed: u64,
    /// It still said `frozen` after the point.
    pub frozen_after_point: bool,
    /// What guest-get-fsinfo listed before.
    pub filesystems: Vec<StockFilesystem>,
}

/// A file system that a stock qemu-ga lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StockFilesystem {
    /// Mount point.
    pub mountpoint: String,
    /// Type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Device, e.g. `vda1`.
    pub device: String,
}

/// Host-side times of one run, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Phases {
    /// Everything before the freeze was sent.
    pub prepare: u64,
    /// Freeze sent to answer: the guest's own prepare and quiesce included.
    pub freeze: u64,
    /// The point.
    pub point: u64,
    /// Thaw sent to answer.
    pub thaw: u64,
    /// Reading and storing.
    pub copy: u64,
    /// Manifest.
    pub seal: u64,
}
