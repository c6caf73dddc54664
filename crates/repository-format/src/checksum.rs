//! The keyed checksum of a block.

use crate::BLOCK_BYTES;

/// The first 16 bytes of keyed BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Checksum(pub [u8; 16]);

/// Computes checksums under a repository's checksum key.
#[derive(Clone)]
pub struct Checksums {
    key: zeroize::Zeroizing<[u8; 32]>,
}

impl Checksums {
    pub(crate) fn new(key: [u8; 32]) -> Checksums {
        Checksums { key: zeroize::Zeroizing::new(key) }
    }

    /// The checksum of one block.
    pub fn of(&self, block: &[u8; BLOCK_BYTES]) -> Checksum {
        let mut checksum = [0; 16];
        checksum.copy_from_slice(&blake3::keyed_hash(&self.key, block).as_bytes()[..16]);
        Checksum(checksum)
    }
}

/// Whether a block is a hole. Stops at the first difference, so data costs next to nothing.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|&first| first == 0 && bytes[1..] == bytes[..bytes.len() - 1])
}
