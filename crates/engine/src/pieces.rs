//! Which parts of a disk are read and which are known to be zero: a plan, computed from extents.
//!
//! The repository stores blocks of 4 KiB, while extents may end at any sector, so data is rounded outwards: a
//! block that holds any byte to read is read whole. A large disk is planned part by part: its extents may be too many
//! to be held at once.

use std::ops::Range;

/// The repository's block, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// One part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Must be read.
    Read(Range<u64>),
    /// Reads as zeroes.
    Zero(Range<u64>),
}

/// Full read of one part of a disk: every range of `data` is read, everything else is zero. Ranges may touch, overlap,
/// or leave the part, which begins and ends with a block (or with the disk).
pub fn full(data: impl IntoIterator<Item = Range<u64>>, part: &Range<u64>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut done = part.start;
    for range in blocks(data, part) {
        if done < range.start {
            pieces.push(Piece::Zero(done..range.start));
        }
        done = range.end;
        pieces.push(Piece::Read(range));
    }
    if done < part.end {
        pieces.push(Piece::Zero(done..part.end));
    }
    pieces
}

/// Increment of one part of a disk: every dirty range is read, everything else is as in the parent.
pub fn changes(dirty: impl IntoIterator<Item = Range<u64>>, part: &Range<u64>) -> Vec<Piece> {
    blocks(dirty, part).into_iter().map(Piece::Read).collect()
}

/// What of a part is not read, in whole multiples of `unit` bytes.
pub fn unread<'p>(
    pieces: &'p [Piece],
    part: &Range<u64>,
    unit: u64,
) -> impl Iterator<Item = Range<u64>> + use<'p> {
    let (mut from, end) = (part.start, part.end);
    let reads = pieces.iter().filter_map(|piece| match piece {
        Piece::Read(range) => Some(range.clone()),
        Piece::Zero(_) => None,
    });
    let gaps = reads.chain(std::iter::once(end..end)).map(move |read| {
        let gap = from.next_multiple_of(unit)..read.start / unit * unit;
        from = read.end;
        gap
    });
    gaps.filter(|gap| !gap.is_empty())
}

/// Sum of what is read, in bytes.
pub fn read_bytes(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| if let Piece::Read(range) = piece { range.end - range.start } else { 0 }).sum()
}

/// The ranges rounded outwards to blocks, sorted, merged, and cut to the part.
fn blocks(ranges: impl IntoIterator<Item = Range<u64>>, part: &Range<u64>) -> Vec<Range<u64>> {
    let mut rounded: Vec<Range<u64>> = ranges
        .into_iter()
        .map(|range| range.start.max(part.start)..range.end.min(part.end))
        .filter(|range| range.start < range.end)
        .map(|range| {
            let start = range.start / BLOCK_BYTES * BLOCK_BYTES;
            start..range.end.next_multiple_of(BLOCK_BYTES).min(part.end)
        })
        .collect();
    rounded.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(rounded.len());
    for range in rounded {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::iter::once;

    #[test]
    fn a_sector_of_data_reads_its_whole_block() {
        assert_eq!(
            full(once(4608..5120), &(0..16384)),
            [Piece::Zero(0..4096), Piece::Read(4096..8192), Piece::Zero(8192..16384)]
        );
    }

    #[test]
    fn two_sectors_of_one_block_are_one_read() {
        assert_eq!(changes([0..512, 1024..1536], &(0..8192)), [Piece::Read(0..4096)]);
    }

    #[test]
    fn the_last_block_may_be_short() {
        assert_eq!(changes(once(8192..9216), &(0..9216)), [Piece::Read(8192..9216)]);
    }

    #[test]
    fn what_lies_beyond_the_part_is_cut() {
        assert_eq!(changes([4096..u64::MAX, 9000..9001], &(0..8192)), [Piece::Read(4096..8192)]);
        assert_eq!(
            changes([0..5000, 12_288..20_000], &(4096..16_384)),
            [Piece::Read(4096..8192), Piece::Read(12_288..16_384)]
        );
    }

    #[test]
    fn what_is_not_read_is_told_in_whole_units_within_the_part() {
        let unread = |reads: &[(u64, u64)], part: Range<u64>| {
            let pieces = changes(reads.iter().map(|&(start, end)| start..end), &part);
            super::unread(&pieces, &part, 16_384).map(|gap| (gap.start, gap.end)).collect::<Vec<_>>()
        };
        assert_eq!(unread(&[], 0..70_000), [(0, 65_536)], "the end is no unit");
        assert_eq!(
            unread(&[(16_384, 20_480), (61_440, 65_536)], 0..98_304),
            [(0, 16_384), (32_768, 49_152), (65_536, 98_304)]
        );
        assert_eq!(unread(&[(0, 4096), (24_576, 28_672)], 0..32_768), [], "gaps below a unit");
        assert_eq!(unread(&[(40_960, 45_056)], 32_768..65_536), [(49_152, 65_536)], "of this part alone");
    }

    proptest! {
        #[test]
        fn a_full_plan_covers_its_part_once_and_reads_all_data(
            data in proptest::collection::vec((0_u64..100_000, 1_u64..9_000), 0..20),
            first_block in 0_u64..8,
            sectors in 1_u64..200,
        ) {
            let part = first_block * BLOCK_BYTES..first_block * BLOCK_BYTES + sectors * 512;
            let data: Vec<_> = data.into_iter().map(|(start, length)| start..start + length).collect();
            let mut at = part.start;
            for piece in full(data.clone(), &part) {
                let (Piece::Read(range) | Piece::Zero(range)) = &piece;
                prop_assert_eq!(range.start, at);
                prop_assert!(range.end > range.start);
                if matches!(piece, Piece::Zero(_)) {
                    prop_assert!(!data.iter().any(|data| data.start < range.end && range.start < data.end));
                }
                at = range.end;
            }
            prop_assert_eq!(at, part.end);
        }
    }
}
