//! Answers of `guest-get-vcpus` and of the commands about memory blocks.

use serde::{Deserialize, Serialize};

/// One processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Vcpu {
    /// Its number in the guest.
    pub logical_id: i64,
    /// In use.
    pub online: bool,
    /// May be taken out of use.
    pub can_offline: bool,
}

/// One block of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryBlock {
    /// Its number in the guest.
    pub phys_index: u64,
    /// In use.
    pub online: bool,
    /// May be taken out of use.
    pub can_offline: bool,
}

/// What became of a wish about a block of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryBlockResponse {
    /// Its number in the guest.
    pub phys_index: u64,
    /// How it went.
    pub response: MemoryBlockOutcome,
    /// The system's error number, where it did not go well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<i64>,
}

/// How a wish about a block of memory went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBlockOutcome {
    /// It is as was wished.
    Success,
    /// There is no such block.
    NotFound,
    /// The guest cannot do that.
    OperationNotSupported,
    /// The guest failed to do it.
    OperationFailed,
}

/// Answer of `guest-get-memory-block-info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBlockInfo {
    /// Bytes of a block.
    pub size: u64,
}
