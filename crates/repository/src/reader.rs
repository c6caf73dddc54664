//! Reading a disk: any range, every block verified.

use crate::Error;
use crate::frames::Frames;
use repository_format::{
    BLOCK_BYTES, DiskRoot, FANOUT, FRAME_BLOCKS_MAX, Leaf, Node, NodeAddress, level_for, node_blocks,
};
use std::ops::Range;
use std::sync::Arc;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// `data_ranges` looks this far ahead at a time.
const LOOK_AHEAD_BYTES: u64 = 1 << 30;

/// Larger reads are made in pieces: a sixteenth of the cache, and enough for one request to a distant store.
const PREFETCH_BYTES: usize = 4 << 20;

/// A disk of a snapshot, read-only. Any number of threads may read.
#[derive(Debug, Clone)]
pub struct DiskReader {
    frames: Arc<Frames>,
    root: DiskRoot,
}

/// Either a leaf or a hole of any size.
enum Region<'a> {
    Hole,
    Leaf(&'a Leaf),
}

/// Told of blocks and what they are, in order.
type Visitor<'v> = dyn FnMut(Range<u64>, Region<'_>) -> Result<(), Error> + 'v;

impl DiskReader {
    pub(crate) fn new(frames: Arc<Frames>, root: DiskRoot) -> DiskReader {
        DiskReader { frames, root }
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.root.size_bytes
    }

    /// Fills `buffer` from `offset` on. No alignment is needed.
    ///
    /// # Errors
    /// `BadRange` beyond the end; `Damaged`, `WrongBlock`, `Missing`: `buffer` then holds nothing to be used.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.blocks(offset, buffer.len() as u64)?;
        for (number, piece) in (0u64..).zip(buffer.chunks_mut(PREFETCH_BYTES)) {
            self.read_piece(offset + number * PREFETCH_BYTES as u64, piece)?;
        }
        Ok(())
    }

    fn read_piece(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let range = self.blocks(offset, buffer.len() as u64)?;
        if range.end - range.start > FRAME_BLOCKS_MAX as u64 {
            self.prefetch(range.clone())?;
        }
        let end = offset + buffer.len() as u64;
        let frames = &self.frames;
        self.visit(range, &mut |blocks, region| {
            for block in blocks.clone() {
                let from = offset.max(block * BLOCK);
                let to = match region {
                    Region::Hole => end.min(blocks.end * BLOCK),
                    Region::Leaf(_) => end.min((block + 1) * BLOCK),
                };
                let place = |at: u64| usize::try_from(at - offset).expect("within the buffer");
                let target = &mut buffer[place(from)..place(to)];
                match &region {
                    Region::Hole => {
                        target.fill(0);
                        break;
                    }
                    Region::Leaf(leaf) => {
                        let within = usize::try_from(from % BLOCK).expect("less than a block");
                        read_block(frames, leaf, block, within, target)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Brings the frames of a range into the cache, neighbours with one request.
    fn prefetch(&self, range: Range<u64>) -> Result<(), Error> {
        let mut wanted = Vec::new();
        self.visit(range, &mut |blocks, region| {
            if let Region::Leaf(leaf) = region {
                let entries = blocks.filter_map(|block| leaf.blocks[slot(block)].as_ref());
                wanted.extend(entries.map(|entry| entry.frame));
                wanted.dedup();
            }
            Ok(())
        })?;
        self.frames.prefetch(wanted);
        Ok(())
    }

    /// Data and holes of a range, in order: bytes, and whether it is a hole. Neighbours differ.
    ///
    /// # Errors
    /// As `read_at`.
    pub fn extents(&self, offset: u64, length: u64) -> Result<Vec<(u64, bool)>, Error> {
        let range = self.blocks(offset, length)?;
        let end = offset + length;
        let mut extents: Vec<(u64, bool)> = Vec::new();
        let mut push = |blocks: Range<u64>, hole: bool| {
            let bytes = end.min(blocks.end * BLOCK) - offset.max(blocks.start * BLOCK);
            match extents.last_mut() {
                Some((last, kind)) if *kind == hole => *last += bytes,
                _ => extents.push((bytes, hole)),
            }
        };
        self.visit(range, &mut |blocks, region| {
            match region {
                Region::Hole => push(blocks, true),
                Region::Leaf(leaf) => {
                    for block in blocks {
                        push(block..block + 1, leaf.blocks[slot(block)].is_none());
                    }
                }
            }
            Ok(())
        })?;
        Ok(extents)
    }

    /// The ranges that are no holes, in order, found as the iterator goes. After an error it ends.
    pub fn data_ranges(&self) -> DataRanges<'_> {
        DataRanges { disk: self, at: 0, found: Vec::new().into_iter() }
    }

    fn blocks(&self, offset: u64, length: u64) -> Result<Range<u64>, Error> {
        match offset.checked_add(length) {
            Some(end) if end <= self.root.size_bytes => Ok(offset / BLOCK..end.div_ceil(BLOCK)),
            _ => Err(Error::BadRange { offset, length, size_bytes: self.root.size_bytes }),
        }
    }

    /// Calls `visitor` for each leaf and each hole of the range, clipped to it, in order.
    fn visit(&self, range: Range<u64>, visitor: &mut Visitor<'_>) -> Result<(), Error> {
        let size_bytes = self.root.size_bytes;
        let level = level_for(size_bytes).ok_or(Error::DiskTooLarge { size_bytes })?;
        self.visit_node(self.root.node, level, 0, &range, visitor)
    }

    fn visit_node(
        &self,
        address: Option<NodeAddress>,
        level: u8,
        first_block: u64,
        range: &Range<u64>,
        visitor: &mut Visitor<'_>,
    ) -> Result<(), Error> {
        let here = range.start.max(first_block)..range.end.min(first_block + node_blocks(level));
        if here.is_empty() {
            return Ok(());
        }
        let Some(address) = address else { return visitor(here, Region::Hole) };
        match self.frames.node(&address, level, first_block)? {
            Node::Leaf(leaf) => visitor(here, Region::Leaf(&leaf)),
            Node::Inner(inner) => (0..FANOUT).try_for_each(|slot| {
                self.visit_node(
                    inner.children[slot],
                    level - 1,
                    inner.child_first_block(slot),
                    range,
                    visitor,
                )
            }),
        }
    }
}

/// Copies a part of one block of a leaf, after verifying all of it.
fn read_block(
    frames: &Frames,
    leaf: &Leaf,
    block: u64,
    within: usize,
    target: &mut [u8],
) -> Result<(), Error> {
    let Some(entry) = &leaf.blocks[slot(block)] else {
        target.fill(0);
        return Ok(());
    };
    let offset = block * BLOCK;
    let frame = frames.data(&entry.frame)?;
    let start = usize::from(entry.index) * BLOCK_BYTES;
    let bytes = frame.get(start..start + BLOCK_BYTES).ok_or(Error::WrongBlock { offset })?;
    let whole: &[u8; BLOCK_BYTES] = bytes.try_into().expect("a block");
    if frames.keys.checksums.of(whole) != entry.checksum {
        return Err(Error::WrongBlock { offset });
    }
    target.copy_from_slice(&bytes[within..within + target.len()]);
    Ok(())
}

fn slot(block: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "a remainder of 64")]
    let slot = (block % FANOUT as u64) as usize;
    slot
}

/// See [`DiskReader::data_ranges`]. A range of more than 1 GiB may come in pieces.
#[derive(Debug)]
pub struct DataRanges<'d> {
    disk: &'d DiskReader,
    at: u64,
    found: std::vec::IntoIter<Range<u64>>,
}

impl DataRanges<'_> {
    fn look_ahead(&mut self) -> Result<(), Error> {
        let length = LOOK_AHEAD_BYTES.min(self.disk.size_bytes() - self.at);
        let mut found = Vec::new();
        for (bytes, hole) in self.disk.extents(self.at, length)? {
            if !hole {
                found.push(self.at..self.at + bytes);
            }
            self.at += bytes;
        }
        self.found = found.into_iter();
        Ok(())
    }
}

impl Iterator for DataRanges<'_> {
    type Item = Result<Range<u64>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(range) = self.found.next() {
                return Some(Ok(range));
            }
            if self.at >= self.disk.size_bytes() {
                return None;
            }
            if let Err(error) = self.look_ahead() {
                self.at = self.disk.size_bytes();
                return Some(Err(error));
            }
        }
    }
}
