//! Puts chunks of any length back together into whole blocks.
//!
//! NBD may answer one read in several chunks that end at any byte, in any order; the repository takes whole blocks
//! of 4 KiB. Almost every chunk is a run of whole blocks and passes through untouched.

use crate::pieces::BLOCK_BYTES;
use std::collections::HashMap;

const BLOCK: usize = 4096;

/// Blocks of which only some bytes have arrived.
#[derive(Debug)]
pub struct Assembler {
    size_bytes: u64,
    partial: HashMap<u64, Partial>,
}

#[derive(Debug)]
struct Partial {
    bytes: Box<[u8; BLOCK]>,
    missing: u64,
}

/// A chunk that arrived; `None`: zeroes.
pub type Chunk<'c> = Option<&'c [u8]>;

impl Assembler {
    /// For a disk of this size. Each byte of a block must be given exactly once.
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes, partial: HashMap::new() }
    }

    /// Takes a chunk; hands whole blocks to `write` (bytes, or `None` for zeroes, with offset and length).
    ///
    /// # Errors
    /// What `write` returned.
    pub fn take<E>(
        &mut self,
        offset: u64,
        length: u64,
        chunk: Chunk<'_>,
        mut write: impl FnMut(u64, u64, Chunk<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = offset + length;
        let whole_start = offset.next_multiple_of(BLOCK_BYTES).min(end);
        let whole_end =
            if end == self.size_bytes { end } else { (end / BLOCK_BYTES * BLOCK_BYTES).max(whole_start) };
        let part = |from: u64, to: u64| {
            let index = |at: u64| usize::try_from(at - offset).expect("a chunk is at most 32 MiB");
            chunk.map(|bytes| &bytes[index(from)..index(to)])
        };
        if offset < whole_start {
            self.put(offset, whole_start - offset, part(offset, whole_start), &mut write)?;
        }
        if whole_start < whole_end {
            write(whole_start, whole_end - whole_start, part(whole_start, whole_end))?;
        }
        if whole_end < end {
            self.put(whole_end, end - whole_end, part(whole_end, end), &mut write)?;
        }
        Ok(())
    }

    /// Whether every block that was begun is complete.
    pub fn is_complete(&self) -> bool {
        self.partial.is_empty()
    }

    fn put<E>(
        &mut self,
        offset: u64,
        length: u64,
        chunk: Chunk<'_>,
        write: &mut impl FnMut(u64, u64, Chunk<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = offset / BLOCK_BYTES * BLOCK_BYTES;
        let block_bytes = BLOCK_BYTES.min(self.size_bytes - start);
        let fresh = || Partial { bytes: Box::new([0; BLOCK]), missing: block_bytes };
        let partial = self.partial.entry(start).or_insert_with(fresh);
        if let Some(bytes) = chunk {
            let at = usize::try_from(offset - start).expect("within one block");
            partial.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        }
        partial.missing = partial.missing.saturating_sub(length);
        if partial.missing > 0 {
            return Ok(());
        }
        let whole = self.partial.remove(&start).expect("it was just filled");
        let bytes = &whole.bytes[..usize::try_from(block_bytes).expect("within one block")];
        write(start, block_bytes, Some(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_of_any_length_in_any_order_become_whole_blocks_once(
            cuts in proptest::collection::btree_set(1_u64..20_480, 0..12),
            sectors in 1_u64..40,
            seed in any::<u64>(),
        ) {
            let size = sectors * 512;
            let disk: Vec<u8> = (0..size).map(|i| u8::try_from((i * 31 + i / 4096 + 1) % 251).unwrap()).collect();
            let mut edges: Vec<u64> = cuts.into_iter().filter(|&cut| cut < size).collect();
            edges.insert(0, 0);
            edges.push(size);
            let mut chunks: Vec<_> = edges.windows(2).map(|edge| edge[0]..edge[1]).collect();
            let turn = usize::try_from(seed).unwrap_or(7) % chunks.len();
            chunks.rotate_left(turn);
            let mut assembler = Assembler::new(size);
            let mut got = vec![0_u8; disk.len()];
            let mut written = vec![0_u8; disk.len()];
            for chunk in chunks {
                let (from, to) = (usize::try_from(chunk.start).unwrap(), usize::try_from(chunk.end).unwrap());
                assembler.take(chunk.start, chunk.end - chunk.start, Some(&disk[from..to]), |offset, length, bytes| {
                    assert_eq!(offset % BLOCK_BYTES, 0);
                    assert!(length % BLOCK_BYTES == 0 || offset + length == size);
                    let at = usize::try_from(offset).unwrap();
                    let bytes = bytes.unwrap();
                    got[at..at + bytes.len()].copy_from_slice(bytes);
                    written[at..at + bytes.len()].iter_mut().for_each(|count| *count += 1);
                    Ok::<(), ()>(())
                }).unwrap();
            }
            prop_assert!(assembler.is_complete());
            prop_assert_eq!(got, disk);
            prop_assert!(written.iter().all(|&count| count == 1));
        }
    }
}
