//! The config object and the plaintext of key slots.

use crate::{FormatError, MasterKey, RepositoryId};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// The format that this program reads and writes.
pub const FORMAT: u64 = 1;
/// Bytes of a key slot's plaintext.
pub const KEY_SLOT_BYTES: usize = 64;

const CONFIG_BYTES_MAX: usize = 4096;
const MAGIC: &[u8; 8] = b"stillpt\0";

/// What anyone may read: the object `config`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Always [`FORMAT`].
    pub format: u64,
    /// Names the repository.
    pub repository: RepositoryId,
}

impl Config {
    /// Reads the object.
    ///
    /// # Errors
    /// `UnknownFormat` for another format, else `Json`.
    pub fn read(bytes: &[u8]) -> Result<Config, FormatError> {
        /// The one member that every format keeps.
        #[derive(Deserialize)]
        struct AnyFormat {
            format: u64,
        }
        if bytes.len() > CONFIG_BYTES_MAX {
            return Err(FormatError::TooLarge);
        }
        let any: AnyFormat = crate::from_json(bytes)?;
        if any.format != FORMAT {
            return Err(FormatError::UnknownFormat { found: any.format });
        }
        crate::from_json(bytes)
    }
}

/// The plaintext of a key slot.
pub fn write_key_slot(repository: RepositoryId, master: &MasterKey) -> Zeroizing<[u8; KEY_SLOT_BYTES]> {
    let mut slot = Zeroizing::new([0; KEY_SLOT_BYTES]);
    slot[..8].copy_from_slice(MAGIC);
    slot[8..12].copy_from_slice(&1u32.to_le_bytes());
    slot[16..32].copy_from_slice(&repository.0);
    slot[32..].copy_from_slice(&*master.0);
    slot
}

/// The master key in an unwrapped key slot.
///
/// # Errors
/// `ForeignKeySlot` when it is not a slot of this repository.
pub fn read_key_slot(plaintext: &[u8], repository: RepositoryId) -> Result<MasterKey, FormatError> {
    let expected = write_key_slot(repository, &MasterKey(Zeroizing::new([0; 32])));
    if plaintext.len() != KEY_SLOT_BYTES || plaintext[..32] != expected[..32] {
        return Err(FormatError::ForeignKeySlot);
    }
    let mut master = Zeroizing::new([0; 32]);
    master.copy_from_slice(&plaintext[32..]);
    Ok(MasterKey(master))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: RepositoryId = RepositoryId([7; 16]);

    #[test]
    fn names_both_formats_when_it_meets_a_later_one() {
        let later = br#"{"format":2,"repository":"anything","more":true}"#;
        assert_eq!(Config::read(later), Err(FormatError::UnknownFormat { found: 2 }));
    }

    #[test]
    fn no_flipped_bit_of_a_config_goes_unnoticed() {
        let config = Config { format: FORMAT, repository: ID };
        let bytes = crate::to_json(&config).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Config::read(&flipped), Ok(config.clone()), "bit {bit}");
        }
    }

    #[test]
    fn a_slot_of_another_repository_is_refused() {
        let slot = write_key_slot(ID, &MasterKey(Zeroizing::new([9; 32])));
        assert_eq!(*read_key_slot(&*slot, ID).unwrap().0, [9; 32]);
        assert!(matches!(read_key_slot(&*slot, RepositoryId([8; 16])), Err(FormatError::ForeignKeySlot)));
        assert!(matches!(read_key_slot(&slot[..63], ID), Err(FormatError::ForeignKeySlot)));
    }
}
