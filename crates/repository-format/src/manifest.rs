//! What sealed objects say: manifests, leases, condemned packs.

use crate::{FORMAT, FormatError, LeaseId, NodeAddress, PackName, SnapshotId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A disk in the repository: its size and the topmost node of its tree. Small; it may be kept anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct DiskRoot {
    /// Size of the disk, not rounded.
    pub size_bytes: u64,
    /// `None` when all of it is a hole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeAddress>,
}

/// What a part of a snapshot is to its VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A disk of the guest.
    Disk,
    /// A kernel that the host boots directly.
    Kernel,
    /// Its initial RAM disk.
    Initrd,
    /// Firmware code.
    Firmware,
    /// The firmware's writable variables.
    FirmwareVariables,
}

/// One disk, kernel, … of a snapshot.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Part {
    /// The name by which people and later snapshots know it.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Size in the VM.
    pub size_bytes: u64,
    /// Its content.
    pub root: DiskRoot,
    /// What else the engine wants to remember: serial, bus, format …
    #[serde(default)]
    pub facts: BTreeMap<String, String>,
}

/// A snapshot as its maker describes it. The two JSON values mean nothing to the repository.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The VM's name.
    pub vm: String,
    /// The snapshot with which this one was compared.
    pub parent: Option<SnapshotId>,
    /// Milliseconds since 1970.
    pub created_at_ms: u64,
    /// The user's words.
    pub description: Option<String>,
    /// Name of the level that was reached.
    pub level: String,
    /// Disks, kernel, firmware.
    pub parts: Vec<Part>,
    /// The VM's definition, redacted.
    pub definition: serde_json::Value,
    /// The evidence.
    pub receipt: serde_json::Value,
}

/// The plaintext of a manifest object.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Always [`FORMAT`].
    pub format: u64,
    /// Equal to the object's name.
    pub snapshot: SnapshotId,
    /// Its writer; a revocation of this lease hides the snapshot.
    pub lease: LeaseId,
    /// What the writer added in packs.
    pub stored_bytes: u64,
    /// The snapshot itself.
    pub manifest: Manifest,
}

impl ManifestFile {
    /// Reads a manifest's plaintext and checks that it is the one that was asked for.
    ///
    /// # Errors
    /// `Json`, `UnknownFormat`, or `Name` for another snapshot's manifest.
    pub fn read(plaintext: &[u8], snapshot: SnapshotId) -> Result<ManifestFile, FormatError> {
        let file: ManifestFile = from_json(plaintext)?;
        if file.format != FORMAT {
            return Err(FormatError::UnknownFormat { found: file.format });
        }
        if file.snapshot == snapshot { Ok(file) } else { Err(FormatError::Name) }
    }
}

/// The plaintext of a lease.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseNote {
    /// The writer's clock at its begin.
    pub created_at_ms: u64,
}

/// The plaintext of a list of packs that a collection will delete.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Condemned {
    /// No new reference to these.
    pub packs: Vec<PackName>,
}

/// JSON of a sealed object's plaintext.
///
/// # Errors
/// `Json` when the value has no JSON form.
pub fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, FormatError> {
    serde_json::to_vec(value).map_err(|error| FormatError::Json(error.to_string()))
}

/// The value of a sealed object's plaintext.
///
/// # Errors
/// `Json` when it has another shape.
pub fn from_json<T: DeserializeOwned>(plaintext: &[u8]) -> Result<T, FormatError> {
    serde_json::from_slice(plaintext).map_err(|error| FormatError::Json(error.to_string()))
}
