//! Where frames and nodes are.

use crate::{FormatError, LeaseId};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A pack: which writer's, and its number in that writer's count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    /// The writer.
    pub lease: LeaseId,
    /// Counted from 0.
    pub sequence: u32,
}

/// Bytes of a pack's name in tables and key derivations.
pub(crate) const PACK_NAME_BYTES: usize = 20;

impl PackName {
    /// Lease, then sequence.
    pub fn to_bytes(self) -> [u8; PACK_NAME_BYTES] {
        let mut bytes = [0; PACK_NAME_BYTES];
        bytes[..16].copy_from_slice(self.lease.0.as_bytes());
        bytes[16..].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }

    /// See [`PackName::to_bytes`].
    pub fn from_bytes(bytes: [u8; PACK_NAME_BYTES]) -> PackName {
        let (lease, sequence) = bytes.split_at(16);
        PackName {
            lease: LeaseId(crate::Identifier::from_bytes(lease.try_into().expect("16 of 20 bytes"))),
            sequence: u32::from_le_bytes(sequence.try_into().expect("4 of 20 bytes")),
        }
    }

    /// The object's name in the repository.
    pub fn object(&self) -> String {
        format!("packs/{self}")
    }
}

impl fmt::Display for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:08x}", self.lease, self.sequence)
    }
}

impl fmt::Debug for PackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PackName {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<PackName, FormatError> {
        let (lease, sequence) = text.split_once('/').ok_or(FormatError::Name)?;
        let lease = lease.parse()?;
        let sequence = u32::from_str_radix(sequence, 16).map_err(|_| FormatError::Name)?;
        let name = PackName { lease, sequence };
        if name.to_string() == text { Ok(name) } else { Err(FormatError::Name) }
    }
}

impl Serialize for PackName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PackName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PackName, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Where a frame is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct FrameAddress {
    /// The object.
    pub pack: PackName,
    /// First byte.
    pub offset: u32,
    /// Bytes, sealed.
    pub length: u32,
}

/// Where a node is: a node frame, and the node's number in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct NodeAddress {
    /// The node frame.
    #[serde(flatten)]
    pub frame: FrameAddress,
    /// Which of its nodes.
    pub index: u8,
}
