//! Writing one disk: blocks are compared with what is known, and only what differs is stored.

use crate::Error;
use crate::tree_writer::TreeWriter;
use crate::workers::Results;
use crate::writer::Writer;
use repository_format::{BLOCK_BYTES, DiskRoot, Entry, FANOUT, FRAME_BLOCKS_MAX, is_zero};
use std::borrow::Cow;
use std::sync::Arc;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// A window whose changed blocks fill half a frame gets a frame of its own, which deduplication can find.
const OWN_FRAME_BLOCKS: usize = FRAME_BLOCKS_MAX / 2;
/// 32 MiB of leaves. Beyond, the tree is written out and goes on from there: 2 GiB of a disk read from end to end.
const OPEN_LEAVES_MAX: usize = 8192;
/// Frames between two writings of the tree, for those who write the same places over and over.
const TICKETS_MAX: u64 = 65_536;

/// What a disk cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Bytes given to `write`.
    pub read_bytes: u64,
    /// Of these, bytes of blocks that differ from the parent. Ranges given to `zero` are not counted.
    pub changed_bytes: u64,
    /// What was added to packs for this disk, its tree included.
    pub stored_bytes: u64,
}

/// Writes one disk of a snapshot. In any order, though ascending costs least; the last write of a block counts.
pub struct DiskWriter<'w> {
    writer: &'w Writer,
    size_bytes: u64,
    tree: TreeWriter,
    results: Arc<Results>,
    /// Scattered changed blocks on the way to a common frame.
    gathered: Vec<u8>,
    gathered_ticket: u64,
    tickets: u64,
    stats: DiskStats,
}

impl<'w> DiskWriter<'w> {
    pub(crate) fn new(
        writer: &'w Writer,
        size_bytes: u64,
        parent: Option<&DiskRoot>,
    ) -> Result<DiskWriter<'w>, Error> {
        let tree = TreeWriter::new(Arc::clone(writer.packs()), size_bytes, parent)?;
        let results = Arc::new(Results::default());
        let stats = DiskStats::default();
        let mut disk = DiskWriter {
            writer,
            size_bytes,
            tree,
            results,
            gathered: Vec::new(),
            gathered_ticket: 0,
            tickets: 0,
            stats,
        };
        if parent.is_some_and(|parent| parent.size_bytes > size_bytes) {
            disk.cut_last_block()?;
        }
        Ok(disk)
    }

    /// A disk cut within a block: what lay behind the cut must not come back when it grows again.
    fn cut_last_block(&mut self) -> Result<(), Error> {
        let kept = usize::try_from(self.size_bytes % BLOCK).expect("less than a block");
        if kept == 0 {
            return Ok(());
        }
        let offset = self.size_bytes - kept as u64;
        let slot = slot(offset);
        let Some(entry) = self.tree.leaf(offset / BLOCK)?.stored(slot) else { return Ok(()) };
        let frame = self.writer.packs().data(&entry.frame)?;
        let start = usize::from(entry.index) * BLOCK_BYTES;
        let block = frame.get(start..start + BLOCK_BYTES).ok_or(Error::WrongBlock { offset })?;
        let whole: &[u8; BLOCK_BYTES] = block.try_into().expect("a block");
        if self.writer.packs().checksums().of(whole) != entry.checksum {
            return Err(Error::WrongBlock { offset });
        }
        self.write(offset, &block[..kept])?;
        self.stats = DiskStats::default();
        Ok(())
    }

    /// Compares and keeps a range. Offset and length are multiples of 4 KiB, except where the disk ends.
    /// Aligned ranges of 128 KiB or more find duplicates in other disks; smaller ones only in their own parent.
    ///
    /// # Errors
    /// `BadRange`; the store's, which may be those of an earlier write. After an error only `drop` makes sense.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.check_range(offset, data.len() as u64)?;
        self.results.check()?;
        self.stats.read_bytes += data.len() as u64;
        let mut at = 0;
        while at < data.len() {
            let window = FRAME_BLOCKS_MAX as u64 * BLOCK;
            let here = offset + at as u64;
            let rest = usize::try_from(window - here % window).expect("at most 128 KiB");
            let piece = &data[at..data.len().min(at + rest)];
            self.write_within_window(here, piece)?;
            at += piece.len();
            if self.tree.open_leaves() > OPEN_LEAVES_MAX || self.tickets > TICKETS_MAX {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// From now on the range reads as zeroes. Offset and length are multiples of 4 KiB, except where the disk ends.
    ///
    /// # Errors
    /// As `write`.
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<(), Error> {
        self.check_range(offset, length)?;
        self.tree.clear(offset / BLOCK..(offset + length).div_ceil(BLOCK))
    }

    /// Writes what is left of the tree. The disk may be referred to after the writer's `commit`.
    ///
    /// # Errors
    /// The store's.
    pub fn finish(mut self) -> Result<(DiskRoot, DiskStats), Error> {
        let data_bytes = self.flush()?;
        let (root, node_bytes) = self.tree.root(self.size_bytes);
        self.stats.stored_bytes = data_bytes + node_bytes;
        self.writer.finished(root);
        Ok((root, self.stats))
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), Error> {
        let end = offset.checked_add(length).filter(|&end| end <= self.size_bytes);
        let whole_blocks = length.is_multiple_of(BLOCK) || end == Some(self.size_bytes);
        if end.is_some() && offset.is_multiple_of(BLOCK) && whole_blocks {
            return Ok(());
        }
        Err(Error::BadRange { offset, length, size_bytes: self.size_bytes })
    }

    /// Up to 128 KiB, of which no aligned boundary of 128 KiB is inside.
    fn write_within_window(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let packs = Arc::clone(self.writer.packs());
        let leaf = self.tree.leaf(offset / BLOCK)?;
        let first_slot = slot(offset);
        let mut changed = Vec::with_capacity(FRAME_BLOCKS_MAX);
        let mut unchanged = false;
        for (slot, block) in (first_slot..).zip(data.chunks(BLOCK_BYTES)) {
            if is_zero(block) {
                if leaf.checksum(slot).is_some() {
                    leaf.set_hole(slot);
                    self.stats.changed_bytes += block.len() as u64;
                }
                continue;
            }
            let whole = whole_block(block);
            let checksum = packs.checksums().of(&whole);
            if leaf.checksum(slot) == Some(checksum) {
                unchanged = true;
            } else {
                self.stats.changed_bytes += block.len() as u64;
                changed.push((slot, whole, checksum));
            }
        }
        let whole_window = data.len() == FRAME_BLOCKS_MAX * BLOCK_BYTES && !unchanged;
        if whole_window && changed.len() >= OWN_FRAME_BLOCKS {
            let mut sums = [0; FRAME_BLOCKS_MAX * 16];
            for (slot, _, checksum) in &changed {
                sums[(slot - first_slot) * 16..][..16].copy_from_slice(&checksum.0);
            }
            let key = packs.window_key(&sums);
            if let Some(frame) = packs.find_window(&key) {
                for (index, (slot, _, checksum)) in (0u8..).zip(&changed) {
                    leaf.set_stored(*slot, Entry { frame, index, checksum: *checksum });
                }
                return Ok(());
            }
            let ticket = self.results.ticket();
            self.tickets += 1;
            let mut blocks = self.results.memory();
            for (index, (slot, block, checksum)) in (0u8..).zip(&changed) {
                leaf.set_pending(*slot, ticket, index, *checksum);
                blocks.extend_from_slice(&block[..]);
            }
            self.writer.workers().submit(self.results.job(ticket, blocks, Some(key)));
            return Ok(());
        }
        for (slot, block, checksum) in changed {
            if self.gathered.is_empty() {
                self.gathered = self.results.memory();
                self.gathered_ticket = self.results.ticket();
                self.tickets += 1;
            }
            let index =
                u8::try_from(self.gathered.len() / BLOCK_BYTES).expect("at most 32 blocks are gathered");
            leaf.set_pending(slot, self.gathered_ticket, index, checksum);
            self.gathered.extend_from_slice(&block[..]);
            if self.gathered.len() == FRAME_BLOCKS_MAX * BLOCK_BYTES {
                let blocks = std::mem::take(&mut self.gathered);
                self.writer.workers().submit(self.results.job(self.gathered_ticket, blocks, None));
            }
        }
        Ok(())
    }

    /// Brings everything so far into packs; returns the bytes of all data frames.
    fn flush(&mut self) -> Result<u64, Error> {
        if !self.gathered.is_empty() {
            let blocks = std::mem::take(&mut self.gathered);
            self.writer.workers().submit(self.results.job(self.gathered_ticket, blocks, None));
        }
        let (addresses, data_bytes) = self.results.wait()?;
        self.tree.flush(&addresses)?;
        self.tickets = 0;
        Ok(data_bytes)
    }
}

/// A block as it is hashed and stored: the last one of a disk is filled up with zeroes.
fn whole_block(block: &[u8]) -> Cow<'_, [u8; BLOCK_BYTES]> {
    match block.try_into() {
        Ok(whole) => Cow::Borrowed(whole),
        Err(_) => {
            let mut whole = [0; BLOCK_BYTES];
            whole[..block.len()].copy_from_slice(block);
            Cow::Owned(whole)
        }
    }
}

/// The place of a byte's block in its leaf.
fn slot(offset: u64) -> usize {
    (offset / BLOCK % FANOUT as u64) as usize
}
