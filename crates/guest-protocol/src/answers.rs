//! The answers of qemu-ga's commands that are more than a number, typed; fields and names as in its schema.

mod disks;
mod file;
mod hotplug;
pub mod network;
mod statistics;
pub mod system;
mod trim;

pub use disks::{DiskInfo, DiskSmart, NvmeSmart};
pub use file::{FILE_READ_HEAD, FilePiece, FilePosition, FileWritten};
pub use hotplug::{MemoryBlock, MemoryBlockInfo, MemoryBlockOutcome, MemoryBlockResponse, Vcpu};
pub use statistics::{CpuStatistics, DiskCounts, DiskStatistics, LinuxCpuStatistics, Load};
pub use trim::{Trimmed, TrimmedPath};

use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Answer of `guest-info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Version; hosts compare it as QEMU's.
    pub version: String,
    /// Every command that is compiled in.
    pub supported_commands: Vec<CommandInfo>,
}

impl Info {
    /// Whether this command is there and enabled.
    pub fn has(&self, name: &str) -> bool {
        self.supported_commands.iter().any(|command| command.enabled && command.name == name)
    }
}

/// One command in `guest-info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CommandInfo {
    /// May be called now.
    pub enabled: bool,
    /// Name on the wire.
    pub name: Cow<'static, str>,
    /// Whether success is answered.
    pub success_response: bool,
}

/// Answer of `guest-get-osinfo`; what the guest does not tell is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OsInfo {
    /// `uname -r`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_release: Option<String>,
    /// `uname -v`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_version: Option<String>,
    /// `uname -m`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// `ID` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `NAME` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `PRETTY_NAME` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pretty_name: Option<String>,
    /// `VERSION` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// `VERSION_ID` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// `VARIANT` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// `VARIANT_ID` of os-release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant_id: Option<String>,
}

/// Answer of `guest-exec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecStarted {
    /// Process id, to be asked for with `guest-exec-status`.
    pub pid: i64,
}

/// Answer of `guest-exec-status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExecStatus {
    /// The process has ended; the answer is given once.
    pub exited: bool,
    /// Exit code, if it ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exitcode: Option<i64>,
    /// Signal, if one ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i64>,
    /// Standard output (or both), base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out_data: Option<String>,
    /// Standard error, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub err_data: Option<String>,
    /// Output beyond the limit was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out_truncated: Option<bool>,
    /// Error output beyond the limit was dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub err_truncated: Option<bool>,
    /// Ours: `stillpoint-time-limit-ms` of `guest-exec` was over before the process ended, and it was killed.
    #[serde(default, rename = "stillpoint-time-limit-reached", skip_serializing_if = "Option::is_none")]
    pub time_limit_reached: Option<bool>,
}

/// One file system in `guest-get-fsinfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FilesystemInfo {
    /// Kernel name of the device, e.g. `vda1`.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Type, e.g. `ext4`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// Bytes in all, for unprivileged users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Bytes in all, for root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes_privileged: Option<u64>,
    /// The disks that carry it.
    pub disk: Vec<DiskAddress>,
}

/// A disk in `guest-get-fsinfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskAddress {
    /// Address of its controller; −1 where there is none.
    pub pci_controller: PciAddress,
    /// `virtio`, `scsi`, `sata` …; `unknown` where we cannot tell.
    pub bus_type: String,
    /// Bus of the controller.
    pub bus: i64,
    /// Target on the bus.
    pub target: i64,
    /// Unit of the target.
    pub unit: i64,
    /// Serial number, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Device node, e.g. `/dev/vda`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<String>,
    /// Its address on a mainframe's channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ccw_address: Option<CcwAddress>,
}

/// An address on a mainframe's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CcwAddress {
    /// Channel subsystem image.
    pub cssid: u64,
    /// Subchannel set.
    pub ssid: u64,
    /// Subchannel.
    pub subchno: u64,
    /// Device.
    pub devno: u64,
}

/// A PCI address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciAddress {
    /// Domain.
    pub domain: i64,
    /// Bus.
    pub bus: i64,
    /// Slot.
    pub slot: i64,
    /// Function.
    pub function: i64,
}

impl Default for PciAddress {
    fn default() -> Self {
        Self { domain: -1, bus: -1, slot: -1, function: -1 }
    }
}
