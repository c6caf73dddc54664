//! What the disks hold: noise, text and holes, the same in every run.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCK_BYTES: u64 = BLOCK as u64;
/// One kind of data follows another after so many bytes.
const STRIPE_BYTES: usize = 4 << 20;

/// What fills a stripe.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fill {
    /// Does not compress.
    Noise,
    /// Compresses as prose and logs do.
    Text,
    /// Never written.
    Hole,
}

/// Numbers that look random, the same for the same seed (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn noise(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]);
        }
    }

    fn text(&mut self, words: &[String], bytes: &mut Vec<u8>, length: usize) {
        bytes.clear();
        while bytes.len() < length {
            // The smaller of two: some words are frequent, most are rare.
            let (a, b) = (self.next() % words.len() as u64, self.next() % words.len() as u64);
            bytes.extend_from_slice(words[usize::try_from(a.min(b)).unwrap_or(0)].as_bytes());
            bytes.push(b' ');
            if a % 16 == 0 {
                bytes.extend_from_slice(self.next().to_string().as_bytes());
                bytes.push(b'\n');
            }
        }
        bytes.truncate(length);
    }
}

/// Fills a raw image in stripes of the kinds in `pattern`, again and again.
pub(crate) fn fill(path: &Path, size_bytes: u64, pattern: &[Fill]) -> io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(size_bytes)?;
    let mut random = Random(1);
    let words: Vec<String> = (0..4096)
        .map(|_| (0..random.next() % 9 + 2).map(|_| char::from(b'a' + (random.next() % 26) as u8)).collect())
        .collect();
    let mut bytes = vec![0; STRIPE_BYTES];
    for (offset, fill) in (0..size_bytes).step_by(STRIPE_BYTES).zip(pattern.iter().cycle()) {
        match fill {
            Fill::Noise => random.noise(&mut bytes),
            Fill::Text => random.text(&words, &mut bytes, STRIPE_BYTES),
            Fill::Hole => continue,
        }
        file.write_all_at(&bytes, offset)?;
    }
    Ok(())
}

/// So many different blocks, anywhere on the disk, in random order.
pub(crate) fn scattered_blocks(count: usize, size_bytes: u64) -> Vec<u64> {
    let mut random = Random(2);
    let mut seen = BTreeSet::new();
    let mut blocks = Vec::with_capacity(count);
    while blocks.len() < count {
        let block = random.next() % (size_bytes / BLOCK_BYTES);
        if seen.insert(block) {
            blocks.push(block);
        }
    }
    blocks
}
