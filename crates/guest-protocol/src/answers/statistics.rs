//! Answers of `guest-get-diskstats`, `guest-get-cpustats` and `guest-get-load`.

use serde::{Deserialize, Serialize};

/// One block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatistics {
    /// Name, e.g. `vda1`.
    pub name: String,
    /// Kind of device.
    pub major: u64,
    /// Which of its kind.
    pub minor: u64,
    /// What it did.
    pub stats: DiskCounts,
}

/// What a block device did since boot. Which are there depends on the kernel. Ticks are milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[expect(missing_docs, reason = "the names are those of the kernel's Documentation/admin-guide/iostats.rst")]
pub struct DiskCounts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_sectors: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_ios: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_merges: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_sectors: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_ios: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_merges: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard_sectors: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard_ios: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard_merges: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush_ios: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_ticks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_ticks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard_ticks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush_ticks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ios_pgr: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_ticks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_ticks: Option<u64>,
}

/// One processor, by operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum CpuStatistics {
    /// Linux.
    Linux(LinuxCpuStatistics),
}

/// Where a processor's time went since boot, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are those of proc_stat(5)")]
pub struct LinuxCpuStatistics {
    pub cpu: u64,
    pub user: u64,
    pub nice: u64,
    pub system: u64,
    pub idle: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iowait: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub irq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub softirq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steal: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guestnice: Option<u64>,
}

/// Answer of `guest-get-load`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Over one minute.
    pub load1m: f64,
    /// Over five minutes.
    pub load5m: f64,
    /// Over fifteen minutes.
    pub load15m: f64,
}
