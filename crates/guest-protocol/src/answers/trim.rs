//! Answer of `guest-fstrim`.

use serde::{Deserialize, Serialize};

/// Answer of `guest-fstrim`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trimmed {
    /// Every file system that was tried.
    pub paths: Vec<TrimmedPath>,
}

/// One file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrimmedPath {
    /// Where it is mounted.
    pub path: String,
    /// Bytes given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trimmed: Option<u64>,
    /// Shortest free stretch that was given back, in bytes: the device may need more than was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<u64>,
    /// Why it was not trimmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
