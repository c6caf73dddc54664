//! The machine as a whole: is it running, what is it called, how many CPUs and how much memory has it.

use crate::command::{Nothing, commands};
use serde::{Deserialize, Serialize};

/// Asks whether the vCPUs run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryStatus {}
/// Asks how far a migration is.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryMigrate {}
/// Stops the vCPUs, drains and flushes every disk.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stop {}
/// Lets the vCPUs run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cont {}
/// Presses the power button.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SystemPowerdown {}
/// Ends QEMU.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Quit {}
/// Asks for the VM's name.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryName {}
/// Asks for the VM's UUID.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryUuid {}
/// Asks whether KVM is used.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryKvm {}
/// Asks for the vCPUs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryCpusFast {}
/// Asks for the size of the guest's memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueryMemorySizeSummary {}

/// Whether the vCPUs run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// They do.
    pub running: bool,
    /// Why or why not: `running`, `paused`, `prelaunch`, `io-error` …
    #[serde(default)]
    pub status: String,
}

impl Status {
    /// The disks belong to another QEMU, or are being handed over, or loaded over. Source: `RunState` in QEMU's
    /// `qapi/run-state.json`.
    pub fn is_elsewhere(&self) -> bool {
        matches!(
            &*self.status,
            "inmigrate" | "finish-migrate" | "postmigrate" | "save-vm" | "restore-vm" | "colo"
        )
    }
}

/// The newest migration of this VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Migration {
    /// Absent if there was none: `setup`, `active`, `completed` …
    #[serde(default)]
    pub status: Option<String>,
}

impl Migration {
    /// It has begun, and has neither ended nor failed. Whatever is not known counts as that. Source: `MigrationStatus` in QEMU's
    /// `qapi/migration.json`.
    pub fn is_under_way(&self) -> bool {
        self.status.as_deref().is_some_and(|s| !matches!(s, "none" | "completed" | "failed" | "cancelled"))
    }
}

/// The VM's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Name {
    /// Absent if none was given.
    #[serde(default)]
    pub name: Option<String>,
}

/// The VM's UUID.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Uuid {
    /// All zeroes if none was given.
    #[serde(rename = "UUID", default)]
    pub uuid: String,
}

/// Whether KVM is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Kvm {
    /// This VM uses it.
    #[serde(default)]
    pub enabled: bool,
    /// This QEMU could use it.
    #[serde(default)]
    pub present: bool,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// Number from 0.
    #[serde(default)]
    pub cpu_index: u64,
    /// Where it is in the object tree; its `type` there tells the model.
    #[serde(default)]
    pub qom_path: String,
}

/// Size of the guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// At start, in bytes.
    pub base_memory: u64,
    /// Plugged in since, in bytes.
    #[serde(default)]
    pub plugged_memory: u64,
}

commands! {
    QueryStatus => "query-status" -> Status;
    QueryMigrate => "query-migrate" -> Migration;
    Stop => "stop" -> Nothing;
    Cont => "cont" -> Nothing;
    SystemPowerdown => "system_powerdown" -> Nothing;
    Quit => "quit" -> Nothing;
    QueryName => "query-name" -> Name;
    QueryUuid => "query-uuid" -> Uuid;
    QueryKvm => "query-kvm" -> Kvm;
    QueryCpusFast => "query-cpus-fast" -> Vec<Cpu>;
    QueryMemorySizeSummary => "query-memory-size-summary" -> MemorySize;
}
