//! The tree of a disk that is being written: nodes are opened where something changes, the rest is shared.

use crate::Error;
use crate::packs::Packs;
use repository_format::{
    Checksum, DiskRoot, Entry, FANOUT, FrameAddress, Inner, Leaf, Node, NodeAddress, NodeFrameBuilder,
    children_blocks, level_for, node_blocks,
};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// A tree of which only the nodes on the way to a change are in memory.
pub(crate) struct TreeWriter {
    packs: Arc<Packs>,
    level: u8,
    root: Child,
    open_leaves: usize,
    stored_bytes: u64,
}

enum Child {
    Hole,
    Stored(NodeAddress),
    Open(Box<OpenNode>),
}

#[expect(clippy::large_enum_variant, reason = "always boxed; leaves are the many, and differ by a quarter")]
enum OpenNode {
    Leaf(OpenLeaf),
    Inner(OpenInner),
}

/// A leaf in memory.
pub(crate) struct OpenLeaf {
    first_block: u64,
    slots: [Slot; FANOUT],
    origin: Option<NodeAddress>,
    changed: bool,
}

struct OpenInner {
    level: u8,
    first_block: u64,
    children: [Child; FANOUT],
    /// Where it was read from, and what it said: if it ends up the same, it is not written again.
    origin: Option<(NodeAddress, [Option<NodeAddress>; FANOUT])>,
}

/// One block of an open leaf.
#[derive(Clone, Copy)]
enum Slot {
    Hole,
    Stored(Entry),
    /// Its frame is still being made.
    Pending {
        ticket: u64,
        index: u8,
        checksum: Checksum,
    },
}

impl OpenLeaf {
    /// The checksum of a block, or `None` for a hole.
    pub(crate) fn checksum(&self, slot: usize) -> Option<Checksum> {
        match self.slots[slot] {
            Slot::Hole => None,
            Slot::Stored(entry) => Some(entry.checksum),
            Slot::Pending { checksum, .. } => Some(checksum),
        }
    }

    pub(crate) fn set_hole(&mut self, slot: usize) {
        self.changed = true;
        self.slots[slot] = Slot::Hole;
    }

    pub(crate) fn set_stored(&mut self, slot: usize, entry: Entry) {
        self.changed = true;
        self.slots[slot] = Slot::Stored(entry);
    }

    pub(crate) fn set_pending(&mut self, slot: usize, ticket: u64, index: u8, checksum: Checksum) {
        self.changed = true;
        self.slots[slot] = Slot::Pending { ticket, index, checksum };
    }

    /// The stored entry of a block.
    pub(crate) fn stored(&self, slot: usize) -> Option<Entry> {
        match self.slots[slot] {
            Slot::Stored(entry) => Some(entry),
            Slot::Hole | Slot::Pending { .. } => None,
        }
    }
}

impl TreeWriter {
    /// A tree for a disk of this size that begins as its parent is, cut or extended by holes.
    pub(crate) fn new(
        packs: Arc<Packs>,
        size_bytes: u64,
        parent: Option<&DiskRoot>,
    ) -> Result<TreeWriter, Error> {
        let level = level_for(size_bytes).ok_or(Error::DiskTooLarge { size_bytes })?;
        let mut tree = TreeWriter { packs, level, root: Child::Hole, open_leaves: 0, stored_bytes: 0 };
        if let Some(DiskRoot { size_bytes: parent_bytes, node: Some(node) }) = parent {
            let parent_level =
                level_for(*parent_bytes).ok_or(Error::DiskTooLarge { size_bytes: *parent_bytes })?;
            tree.root = tree.refit(*node, parent_level)?;
            let end = size_bytes.div_ceil(repository_format::BLOCK_BYTES as u64);
            if *parent_bytes > size_bytes {
                tree.clear(end..node_blocks(level))?;
            }
        }
        Ok(tree)
    }

    /// A parent's root as a root of our level: the first child of a higher one, or one of its own first descendants.
    fn refit(&self, node: NodeAddress, parent_level: u8) -> Result<Child, Error> {
        let mut address = node;
        for level in (self.level + 1..=parent_level).rev() {
            let Node::Inner(inner) = self.packs.node(&address, level, 0)? else { return Ok(Child::Hole) };
            match inner.children[0] {
                Some(child) => address = child,
                None => return Ok(Child::Hole),
            }
        }
        let mut child = Child::Stored(address);
        for level in parent_level + 1..=self.level {
            let mut children = [const { Child::Hole }; FANOUT];
            children[0] = child;
            child = Child::Open(Box::new(OpenNode::Inner(OpenInner {
                level,
                first_block: 0,
                children,
                origin: None,
            })));
        }
        Ok(child)
    }

    /// Leaves in memory, of about 4 KiB each.
    pub(crate) fn open_leaves(&self) -> usize {
        self.open_leaves
    }

    /// The leaf of a block, opened.
    pub(crate) fn leaf(&mut self, block: u64) -> Result<&mut OpenLeaf, Error> {
        let mut child = &mut self.root;
        let mut level = self.level;
        loop {
            let first_block = block - block % node_blocks(level);
            match open(child, &self.packs, level, first_block, &mut self.open_leaves)? {
                OpenNode::Leaf(leaf) => return Ok(leaf),
                OpenNode::Inner(inner) => {
                    child = &mut inner.children[slot_of(block, level)];
                    level -= 1;
                }
            }
        }
    }

    /// Makes a range of blocks a hole.
    pub(crate) fn clear(&mut self, blocks: Range<u64>) -> Result<(), Error> {
        clear(&mut self.root, &self.packs, self.level, 0, &blocks, &mut self.open_leaves)
    }

    /// Writes every open node that changed; `addresses` tells where pending frames are.
    pub(crate) fn flush(&mut self, addresses: &HashMap<u64, FrameAddress>) -> Result<(), Error> {
        for level in 0..=self.level {
            let mut open = Vec::new();
            collect(&mut self.root, level, &mut open);
            let mut builder = NodeFrameBuilder::default();
            let mut gathered: Vec<(&mut Child, u8)> = Vec::new();
            for child in open {
                let Child::Open(node) = &*child else { continue };
                match node.settle(addresses) {
                    Settled::Unchanged(address) => *child = Child::Stored(address),
                    Settled::Changed(node) if node.is_hole() => *child = Child::Hole,
                    Settled::Changed(node) => {
                        if builder.is_full() {
                            let full = std::mem::take(&mut builder);
                            self.stored_bytes += store(&self.packs, full, std::mem::take(&mut gathered))?;
                        }
                        gathered.push((child, builder.push(&node)));
                    }
                }
            }
            if !builder.is_empty() {
                self.stored_bytes += store(&self.packs, builder, gathered)?;
            }
        }
        self.open_leaves = 0;
        Ok(())
    }

    /// The root, and the bytes of all nodes. Call `flush` before.
    pub(crate) fn root(&self, size_bytes: u64) -> (DiskRoot, u64) {
        let node = match self.root {
            Child::Stored(address) => Some(address),
            Child::Hole => None,
            Child::Open(_) => unreachable!("flush leaves no node open"),
        };
        (DiskRoot { size_bytes, node }, self.stored_bytes)
    }
}

enum Settled {
    Unchanged(NodeAddress),
    Changed(Node),
}

impl OpenNode {
    /// What an open node has become. All its children are stored already.
    fn settle(&self, addresses: &HashMap<u64, FrameAddress>) -> Settled {
        match self {
            OpenNode::Leaf(leaf) => match leaf.origin {
                Some(address) if !leaf.changed => Settled::Unchanged(address),
                _ => {
                    let blocks = leaf.slots.map(|slot| match slot {
                        Slot::Hole => None,
                        Slot::Stored(entry) => Some(entry),
                        Slot::Pending { ticket, index, checksum } => {
                            Some(Entry { frame: addresses[&ticket], index, checksum })
                        }
                    });
                    Settled::Changed(Node::Leaf(Box::new(Leaf { first_block: leaf.first_block, blocks })))
                }
            },
            OpenNode::Inner(inner) => {
                let children = std::array::from_fn(|slot| match inner.children[slot] {
                    Child::Hole => None,
                    Child::Stored(address) => Some(address),
                    Child::Open(_) => unreachable!("lower levels are flushed first"),
                });
                match inner.origin {
                    Some((address, before)) if before == children => Settled::Unchanged(address),
                    _ => {
                        let (level, first_block) = (inner.level, inner.first_block);
                        Settled::Changed(Node::Inner(Box::new(Inner { level, first_block, children })))
                    }
                }
            }
        }
    }

    fn level(&self) -> u8 {
        match self {
            OpenNode::Leaf(_) => 0,
            OpenNode::Inner(inner) => inner.level,
        }
    }
}

/// Stores a node frame and puts the addresses of its nodes where they belong.
fn store(packs: &Packs, builder: NodeFrameBuilder, gathered: Vec<(&mut Child, u8)>) -> Result<u64, Error> {
    let frame = packs.append_nodes(&builder.finish())?;
    for (child, index) in gathered {
        *child = Child::Stored(NodeAddress { frame, index });
    }
    Ok(u64::from(frame.length))
}

fn slot_of(block: u64, level: u8) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "a remainder of 64")]
    let slot = (block / children_blocks(level) % FANOUT as u64) as usize;
    slot
}

fn open<'a>(
    child: &'a mut Child,
    packs: &Packs,
    level: u8,
    first_block: u64,
    open_leaves: &mut usize,
) -> Result<&'a mut OpenNode, Error> {
    if !matches!(child, Child::Open(_)) {
        let node = match child {
            Child::Stored(address) => thaw_node(packs.node(address, level, first_block)?, Some(*address)),
            _ if level == 0 => {
                let slots = [Slot::Hole; FANOUT];
                OpenNode::Leaf(OpenLeaf { first_block, slots, origin: None, changed: false })
            }
            _ => {
                let children = [const { Child::Hole }; FANOUT];
                OpenNode::Inner(OpenInner { level, first_block, children, origin: None })
            }
        };
        *open_leaves += usize::from(level == 0);
        *child = Child::Open(Box::new(node));
    }
    match child {
        Child::Open(node) => Ok(node),
        Child::Hole | Child::Stored(_) => unreachable!("it was opened above"),
    }
}

/// A node that was read, ready to be changed.
fn thaw_node(node: Node, origin: Option<NodeAddress>) -> OpenNode {
    match node {
        Node::Leaf(leaf) => {
            let slots = leaf.blocks.map(|block| block.map_or(Slot::Hole, Slot::Stored));
            OpenNode::Leaf(OpenLeaf { first_block: leaf.first_block, slots, origin, changed: false })
        }
        Node::Inner(inner) => {
            let children = inner.children.map(|child| child.map_or(Child::Hole, Child::Stored));
            let origin = origin.map(|address| (address, inner.children));
            OpenNode::Inner(OpenInner {
                level: inner.level,
                first_block: inner.first_block,
                children,
                origin,
            })
        }
    }
}

/// Open nodes of one level, in order of their blocks.
fn collect<'a>(child: &'a mut Child, level: u8, found: &mut Vec<&'a mut Child>) {
    let here = match child {
        Child::Open(node) => node.level(),
        Child::Hole | Child::Stored(_) => return,
    };
    if here == level {
        found.push(child);
    } else if let Child::Open(node) = child
        && let OpenNode::Inner(inner) = &mut **node
    {
        inner.children.iter_mut().for_each(|child| collect(child, level, found));
    }
}

fn clear(
    child: &mut Child,
    packs: &Packs,
    level: u8,
    first_block: u64,
    blocks: &Range<u64>,
    open_leaves: &mut usize,
) -> Result<(), Error> {
    let end = first_block + node_blocks(level);
    if blocks.end <= first_block || end <= blocks.start || matches!(child, Child::Hole) {
        return Ok(());
    }
    if blocks.start <= first_block && end <= blocks.end {
        *open_leaves -= count_open_leaves(child);
        *child = Child::Hole;
        return Ok(());
    }
    match open(child, packs, level, first_block, open_leaves)? {
        OpenNode::Leaf(leaf) => {
            for (block, slot) in (first_block..).zip(0..FANOUT) {
                if blocks.contains(&block) && leaf.checksum(slot).is_some() {
                    leaf.set_hole(slot);
                }
            }
        }
        OpenNode::Inner(inner) => {
            for (slot, child) in (0u64..).zip(&mut inner.children) {
                let first_block = first_block + slot * children_blocks(level);
                clear(child, packs, level - 1, first_block, blocks, open_leaves)?;
            }
        }
    }
    Ok(())
}

fn count_open_leaves(child: &Child) -> usize {
    match child {
        Child::Hole | Child::Stored(_) => 0,
        Child::Open(node) => match &**node {
            OpenNode::Leaf(_) => 1,
            OpenNode::Inner(inner) => inner.children.iter().map(count_open_leaves).sum(),
        },
    }
}
