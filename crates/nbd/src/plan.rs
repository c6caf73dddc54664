//! Cutting the disk into requests and replies into pieces.

use crate::error::PlanError;
use crate::wire::allocation;
use std::iter::Peekable;
use std::ops::Range;

/// Turns ascending ranges into requests of at most `request_bytes`, joining ranges that touch.
///
/// Requests end at multiples of `request_bytes`, so that whatever the caller does with aligned blocks sees as few
/// blocks as possible cut in two. Empty ranges are passed over.
pub fn plan_reads<I>(ranges: I, request_bytes: u32, disk_bytes: u64) -> PlannedReads<I::IntoIter>
where
    I: IntoIterator<Item = Range<u64>>,
{
    PlannedReads {
        ranges: ranges.into_iter().peekable(),
        request_bytes: request_bytes.max(1),
        disk_bytes,
        rest: 0..0,
    }
}

/// The iterator behind [`plan_reads`]: offset and length of each request, both in bytes.
#[derive(Debug)]
pub struct PlannedReads<I: Iterator<Item = Range<u64>>> {
    ranges: Peekable<I>,
    request_bytes: u32,
    disk_bytes: u64,
    /// What of the ranges taken so far is not asked for yet.
    rest: Range<u64>,
}

impl<I: Iterator<Item = Range<u64>>> PlannedReads<I> {
    /// Takes ranges until there is a whole request's worth, or a gap.
    fn refill(&mut self, wanted_end: u64) -> Result<(), PlanError> {
        while self.rest.is_empty() || self.rest.end < wanted_end {
            let joins =
                |range: &Range<u64>| self.rest.is_empty() || range.start <= self.rest.end || range.is_empty();
            let Some(range) = self.ranges.next_if(joins) else { break };
            let Range { start, end } = range;
            if start > end || start < self.rest.end {
                return Err(PlanError::OutOfOrder { start, end });
            }
            if end > self.disk_bytes {
                return Err(PlanError::OutsideDisk { start, end });
            }
            if start == end {
                continue;
            }
            if self.rest.is_empty() {
                self.rest = range;
                break;
            }
            self.rest.end = end;
        }
        Ok(())
    }
}

impl<I: Iterator<Item = Range<u64>>> Iterator for PlannedReads<I> {
    type Item = Result<(u64, u32), PlanError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty()
            && let Err(error) = self.refill(0)
        {
            return Some(Err(error));
        }
        if self.rest.is_empty() {
            return None;
        }
        let start = self.rest.start;
        let step = u64::from(self.request_bytes);
        let boundary = (start / step + 1).saturating_mul(step);
        if let Err(error) = self.refill(boundary) {
            return Some(Err(error));
        }
        let end = self.rest.end.min(boundary);
        self.rest.start = end;
        let length = u32::try_from(end - start).unwrap_or(self.request_bytes);
        Some(Ok((start, length)))
    }
}

/// A stretch of a read's reply that goes out as one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never 0.
    pub length: u32,
    /// Reads as zeroes; nothing is sent.
    pub hole: bool,
}

/// Cuts a READ of `offset`+`length` at holes, data in pieces of at most `piece_bytes_max`.
///
/// `extents` are (length, hole) from `offset` on. What they do not reach is data: it is read, so nothing is lost.
pub fn split_at_holes(offset: u64, length: u32, extents: &[(u64, bool)], piece_bytes_max: u32) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let (mut at, mut left) = (offset, length);
    let beyond = (u64::MAX, false);
    for &(extent_length, hole) in extents.iter().chain([&beyond]) {
        let mut stretch = u32::try_from(extent_length).unwrap_or(u32::MAX).min(left);
        while stretch > 0 {
            let now = if hole { stretch } else { stretch.min(piece_bytes_max.max(1)) };
            pieces.push(Piece { offset: at, length: now, hole });
            at += u64::from(now);
            left -= now;
            stretch -= now;
        }
    }
    pieces
}

/// The reply to a BLOCK_STATUS of `length` bytes: (length, flags of `base:allocation`), neighbours joined.
///
/// `extents` are (length, hole) from the request's offset on. What they leave out at the end stays out, as long as
/// they say anything at all; if not, all is data. With `one` only the first extent is told, never longer than asked.
pub fn allocation_status(length: u32, extents: &[(u64, bool)], one: bool) -> Vec<(u32, u32)> {
    let mut told: Vec<(u32, u32)> = Vec::new();
    let mut left = length;
    for &(extent_length, hole) in extents {
        let now = u32::try_from(extent_length).unwrap_or(u32::MAX).min(left);
        let flags = if hole { allocation::HOLE | allocation::ZERO } else { 0 };
        left -= now;
        match told.last_mut() {
            _ if now == 0 => {}
            Some(last) if last.1 == flags => last.0 += now,
            Some(_) if one => break,
            _ => told.push((now, flags)),
        }
    }
    if told.is_empty() {
        told.push((length, 0));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan(ranges: &[Range<u64>]) -> Result<Vec<(u64, u32)>, PlanError> {
        plan_reads(ranges.iter().cloned(), 100, 1000).collect()
    }

    #[test]
    fn joins_ranges_that_touch_and_keeps_gaps() {
        assert_eq!(plan(&[10..20, 20..30, 40..50]), Ok(vec![(10, 20), (40, 10)]));
    }

    #[test]
    fn cuts_at_multiples_of_the_request_size() {
        assert_eq!(plan(&[50..90, 90..260]), Ok(vec![(50, 50), (100, 100), (200, 60)]));
    }

    #[test]
    fn passes_over_empty_ranges() {
        assert_eq!(plan(&[5..5, 10..20, 20..20, 20..30]), Ok(vec![(10, 20)]));
    }

    #[test]
    #[expect(clippy::reversed_empty_ranges, reason = "that is what the test is about")]
    fn refuses_ranges_that_go_back_overlap_or_leave_the_disk() {
        assert_eq!(plan(&[10..20, 15..30]), Err(PlanError::OutOfOrder { start: 15, end: 30 }));
        assert_eq!(plan(&[10..20, 0..5]), Err(PlanError::OutOfOrder { start: 0, end: 5 }));
        assert_eq!(plan(&[10..20, 30..25]), Err(PlanError::OutOfOrder { start: 30, end: 25 }));
        assert_eq!(plan(&[980..990, 990..1001]), Err(PlanError::OutsideDisk { start: 990, end: 1001 }));
    }

    #[test]
    fn status_is_clipped_joined_and_never_empty() {
        let extents = [(10, false), (0, true), (5, false), (7, true), (1 << 40, false)];
        assert_eq!(allocation_status(20, &extents, false), [(15, 0), (5, 3)]);
        assert_eq!(allocation_status(20, &extents, true), [(15, 0)]);
        assert_eq!(allocation_status(4, &extents, true), [(4, 0)]);
        assert_eq!(allocation_status(20, &[(5, true)], false), [(5, 3)]);
        assert_eq!(allocation_status(20, &[], true), [(20, 0)]);
        assert_eq!(allocation_status(20, &[(0, true)], true), [(20, 0)]);
    }

    proptest! {
        #[test]
        fn requests_cover_exactly_the_ranges(steps in prop::collection::vec((0u64..50, 0u64..400), 0..20)) {
            let mut at = 0;
            let ranges: Vec<_> = steps
                .iter()
                .map(|&(gap, length)| {
                    let start = at + gap;
                    at = start + length;
                    start..at
                })
                .collect();
            let asked: Vec<u64> = ranges.iter().cloned().flatten().collect();
            let mut planned = Vec::new();
            for request in plan_reads(ranges, 64, at) {
                let (offset, length) = request.unwrap();
                prop_assert!((1..=64).contains(&length));
                planned.extend(offset..offset + u64::from(length));
            }
            prop_assert_eq!(planned, asked);
        }

        #[test]
        fn pieces_cover_exactly_the_read(
            length in 1u32..10_000,
            extents in prop::collection::vec((0u64..3000, any::<bool>()), 0..8),
        ) {
            let mut at = 7;
            for piece in split_at_holes(7, length, &extents, 512) {
                prop_assert_eq!(piece.offset, at);
                prop_assert!(piece.length > 0 && (piece.hole || piece.length <= 512));
                at += u64::from(piece.length);
            }
            prop_assert_eq!(at, 7 + u64::from(length));
        }
    }
}
