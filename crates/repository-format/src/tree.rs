//! The shape of a disk's tree.

use crate::{BLOCK_BYTES, FANOUT, LEVEL_MAX};

/// Blocks that one node of this level covers.
pub fn node_blocks(level: u8) -> u64 {
    (FANOUT as u64).pow(u32::from(level) + 1)
}

/// Blocks that one child of a node of this level covers; a leaf's children are blocks.
pub fn children_blocks(level: u8) -> u64 {
    (FANOUT as u64).pow(u32::from(level))
}

/// The level of the root of a disk of this size, or `None` above 16 PiB.
pub fn level_for(size_bytes: u64) -> Option<u8> {
    let blocks = size_bytes.div_ceil(BLOCK_BYTES as u64);
    (0..=LEVEL_MAX).find(|&level| node_blocks(level) >= blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_follow_from_sizes() {
        assert_eq!(level_for(0), Some(0));
        assert_eq!(level_for(256 << 10), Some(0));
        assert_eq!(level_for((256 << 10) + 1), Some(1));
        assert_eq!(level_for(16 << 20), Some(1));
        assert_eq!(level_for(4 << 30), Some(3));
        assert_eq!(level_for(16 << 50), Some(6));
        assert_eq!(level_for((16 << 50) + 1), None);
    }
}
