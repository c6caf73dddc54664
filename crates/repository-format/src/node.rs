//! Tree nodes in memory and as bytes. Positions of packs are relative to a node frame's list.

use crate::FRAME_BLOCKS_MAX;
use crate::{Checksum, FANOUT, FrameAddress, LEVEL_MAX, NodeAddress, PackName, children_blocks, node_blocks};

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 12;
const CHECKSUM_BYTES: usize = 16;
const HOLE: u16 = u16::MAX;

/// A rule that a node or node frame breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// It ends too early, or has bytes behind its end.
    #[error("its length does not fit its content")]
    Length,
    /// A level above 6, no entry or more than 64, or a reserved byte that is not zero.
    #[error("its header is out of bounds")]
    Header,
    /// The first block is no multiple of what the node covers.
    #[error("it is not aligned")]
    Position,
    /// Runs that do not add up, slots that do not rise, or members out of bounds.
    #[error("an entry is out of bounds")]
    Entry,
    /// A pack that is not in the node frame's list.
    #[error("it names a pack that is not listed")]
    Pack,
    /// The node is not the one that its parent promised.
    #[error("it is not the node that its parent names")]
    NotTheChild,
}

/// One block of a leaf that is no hole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The data frame.
    pub frame: FrameAddress,
    /// The block's number within the frame.
    pub index: u8,
    /// Of the block's 4096 bytes.
    pub checksum: Checksum,
}

/// A node of level 0.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// Number of its first block on the disk.
    pub first_block: u64,
    /// `None` is a hole.
    pub blocks: [Option<Entry>; FANOUT],
}

/// A node above the leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inner {
    /// 1 to 6.
    pub level: u8,
    /// Number of its first block on the disk.
    pub first_block: u64,
    /// `None` is a hole.
    pub children: [Option<NodeAddress>; FANOUT],
}

/// Any node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// Level 0.
    Leaf(Box<Leaf>),
    /// Higher.
    Inner(Box<Inner>),
}

impl Node {
    /// 0 for leaves.
    pub fn level(&self) -> u8 {
        match self {
            Node::Leaf(_) => 0,
            Node::Inner(inner) => inner.level,
        }
    }

    /// Number of the first block covered.
    pub fn first_block(&self) -> u64 {
        match self {
            Node::Leaf(leaf) => leaf.first_block,
            Node::Inner(inner) => inner.first_block,
        }
    }

    /// Whether nothing but holes is below, so that the node need not be kept.
    pub fn is_hole(&self) -> bool {
        match self {
            Node::Leaf(leaf) => leaf.blocks.iter().all(Option::is_none),
            Node::Inner(inner) => inner.children.iter().all(Option::is_none),
        }
    }

    /// Packs that the node names, with repetitions.
    pub(crate) fn packs(&self) -> Vec<PackName> {
        match self {
            Node::Leaf(leaf) => leaf.blocks.iter().flatten().map(|entry| entry.frame.pack).collect(),
            Node::Inner(inner) => inner.children.iter().flatten().map(|child| child.frame.pack).collect(),
        }
    }

    /// Appends the node's bytes; `place` finds a pack's place in the node frame's list.
    pub(crate) fn encode(&self, out: &mut Vec<u8>, place: impl Fn(PackName) -> u16) {
        out.push(self.level());
        let entries_at = out.len();
        out.extend_from_slice(&[0; 7]);
        out.extend_from_slice(&self.first_block().to_le_bytes());
        let mut entries = 0u8;
        match self {
            Node::Leaf(leaf) => {
                for run in runs(leaf) {
                    let frame = run.first.map(|entry| (place(entry.frame.pack), entry.frame));
                    entry_bytes(out, [run.blocks, run.first.map_or(0, |entry| entry.index)], frame);
                    entries += 1;
                }
                leaf.blocks.iter().flatten().for_each(|entry| out.extend_from_slice(&entry.checksum.0));
            }
            Node::Inner(inner) => {
                for (slot, child) in (0u8..).zip(&inner.children) {
                    if let Some(child) = child {
                        let frame = (place(child.frame.pack), child.frame);
                        entry_bytes(out, [slot, child.index], Some(frame));
                        entries += 1;
                    }
                }
            }
        }
        out[entries_at] = entries;
    }

    /// Reads a node back.
    ///
    /// # Errors
    /// The rule that the bytes break.
    pub(crate) fn decode(bytes: &[u8], packs: &[PackName]) -> Result<Node, NodeError> {
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(NodeError::Length)?;
        let (level, entries) = (header[0], usize::from(header[1]));
        if level > LEVEL_MAX || entries == 0 || entries > FANOUT || header[2..8] != [0; 6] {
            return Err(NodeError::Header);
        }
        let first_block = u64::from_le_bytes(header[8..].try_into().expect("8 of 16 bytes"));
        if !first_block.is_multiple_of(node_blocks(level)) || first_block >= node_blocks(LEVEL_MAX) {
            return Err(NodeError::Position);
        }
        let (entries, rest) = body.split_at_checked(entries * ENTRY_BYTES).ok_or(NodeError::Length)?;
        let entries = entries.chunks_exact(ENTRY_BYTES);
        if level == 0 {
            let leaf = Leaf { first_block, blocks: [None; FANOUT] };
            decode_leaf(leaf, entries, rest, packs)
        } else if rest.is_empty() {
            let inner = Inner { level, first_block, children: [None; FANOUT] };
            decode_inner(inner, entries, packs)
        } else {
            Err(NodeError::Length)
        }
    }

    /// Refuses a node that is not the one at this place of the tree.
    ///
    /// # Errors
    /// `NotTheChild`.
    pub fn expect_at(&self, level: u8, first_block: u64) -> Result<(), NodeError> {
        if (self.level(), self.first_block()) == (level, first_block) {
            Ok(())
        } else {
            Err(NodeError::NotTheChild)
        }
    }
}

impl Inner {
    /// Number of the first block below one of the slots.
    pub fn child_first_block(&self, slot: usize) -> u64 {
        self.first_block + slot as u64 * children_blocks(self.level)
    }
}

/// Neighbouring blocks that are neighbours in one frame too, or neighbouring holes (`first` is `None`).
struct Run {
    blocks: u8,
    first: Option<Entry>,
}

fn runs(leaf: &Leaf) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for block in leaf.blocks {
        let continues = runs.last().is_some_and(|run| match (run.first, block) {
            (None, None) => true,
            (Some(first), Some(block)) => {
                first.frame == block.frame && first.index + run.blocks == block.index
            }
            _ => false,
        });
        match runs.last_mut() {
            Some(run) if continues => run.blocks += 1,
            _ => runs.push(Run { blocks: 1, first: block }),
        }
    }
    runs
}

fn entry_bytes(out: &mut Vec<u8>, head: [u8; 2], frame: Option<(u16, FrameAddress)>) {
    out.extend_from_slice(&head);
    let (place, offset, length) =
        frame.map_or((HOLE, 0, 0), |(place, frame)| (place, frame.offset, frame.length));
    out.extend_from_slice(&place.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
}

/// An entry's frame; `None` is a hole.
fn entry_frame(entry: &[u8], packs: &[PackName]) -> Result<Option<FrameAddress>, NodeError> {
    let place = u16::from_le_bytes([entry[2], entry[3]]);
    let offset = u32::from_le_bytes(entry[4..8].try_into().expect("4 of 12 bytes"));
    let length = u32::from_le_bytes(entry[8..].try_into().expect("4 of 12 bytes"));
    if place == HOLE {
        return if offset == 0 && length == 0 { Ok(None) } else { Err(NodeError::Entry) };
    }
    let pack = *packs.get(usize::from(place)).ok_or(NodeError::Pack)?;
    // Larger than any frame of either kind; a wrong length must not become a large allocation.
    let longest = crate::NODE_FRAME_BYTES_MAX + 1 + crate::TAG_BYTES;
    if length as usize > longest || u64::from(offset) + u64::from(length) > crate::PACK_BYTES_MAX {
        return Err(NodeError::Entry);
    }
    Ok(Some(FrameAddress { pack, offset, length }))
}

fn decode_leaf<'a>(
    mut leaf: Leaf,
    runs: impl Iterator<Item = &'a [u8]>,
    checksums: &[u8],
    packs: &[PackName],
) -> Result<Node, NodeError> {
    let mut checksums = checksums.chunks_exact(CHECKSUM_BYTES);
    let mut at = 0;
    for run in runs {
        let (blocks, first) = (usize::from(run[0]), run[1]);
        let frame = entry_frame(run, packs)?;
        let fits = match frame {
            None => first == 0,
            Some(_) => usize::from(first) + blocks <= FRAME_BLOCKS_MAX,
        };
        let slots = leaf.blocks.get_mut(at..at + blocks).filter(|slots| fits && !slots.is_empty());
        for (index, slot) in (first..).zip(slots.ok_or(NodeError::Entry)?) {
            if let Some(frame) = frame {
                let checksum = checksums.next().ok_or(NodeError::Length)?;
                let checksum = Checksum(checksum.try_into().expect("16 bytes a chunk"));
                *slot = Some(Entry { frame, index, checksum });
            }
        }
        at += blocks;
    }
    if at != FANOUT {
        return Err(NodeError::Entry);
    }
    if checksums.next().is_some() || !checksums.remainder().is_empty() {
        return Err(NodeError::Length);
    }
    Ok(Node::Leaf(Box::new(leaf)))
}

fn decode_inner<'a>(
    mut inner: Inner,
    entries: impl Iterator<Item = &'a [u8]>,
    packs: &[PackName],
) -> Result<Node, NodeError> {
    let mut least = 0;
    for entry in entries {
        let slot = usize::from(entry[0]);
        let frame = entry_frame(entry, packs)?.ok_or(NodeError::Entry)?;
        if slot < least || slot >= FANOUT {
            return Err(NodeError::Entry);
        }
        inner.children[slot] = Some(NodeAddress { frame, index: entry[1] });
        least = slot + 1;
    }
    Ok(Node::Inner(Box::new(inner)))
}
