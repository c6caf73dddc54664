//! What the repositories in `testdata/` hold. Never changed: they were made from this.

const BLOCK: usize = 4096;

/// Bytes of a fixed sequence that hardly compresses.
fn sequence(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// 20 MiB and 1234 bytes: noise, text, mostly holes.
pub(crate) fn first_disk() -> Vec<u8> {
    let mut disk = vec![0; (20 << 20) + 1234];
    disk[..128 << 10].copy_from_slice(&sequence(1, 128 << 10));
    disk[1 << 20..2 << 20].fill(b'x');
    disk[17 << 20..][..3 * BLOCK].copy_from_slice(&sequence(2, 3 * BLOCK));
    disk[20 << 20..].fill(b'e');
    disk
}

/// The same, with scattered changes, a new hole, and cut within a block.
pub(crate) fn second_disk() -> Vec<u8> {
    let mut disk = first_disk();
    for block in (0..disk.len() / BLOCK).step_by(509) {
        disk[block * BLOCK..][..BLOCK].fill(b'c');
    }
    disk[1 << 20..][..64 << 10].fill(0);
    disk.truncate((20 << 20) - 100);
    disk
}

/// A small file.
pub(crate) fn kernel() -> Vec<u8> {
    sequence(3, 5000)
}
