//! Node frames: nodes that are stored, fetched and verified together.

use crate::address::PACK_NAME_BYTES;
use crate::{NODE_FRAME_NODES_MAX, Node, NodeError, PackName};
use std::collections::HashMap;

/// Writers close a node frame here.
const TARGET_BYTES: usize = 64 << 10;

/// Gathers nodes for one frame.
#[derive(Debug, Default)]
pub struct NodeFrameBuilder {
    packs: Vec<PackName>,
    places: HashMap<PackName, u16>,
    ends: Vec<u32>,
    nodes: Vec<u8>,
}

impl NodeFrameBuilder {
    /// Adds a node and returns its number in the frame. Call `is_full` before.
    pub fn push(&mut self, node: &Node) -> u8 {
        for pack in node.packs() {
            self.places.entry(pack).or_insert_with(|| {
                self.packs.push(pack);
                u16::try_from(self.packs.len() - 1).expect("255 nodes name at most 16,320 packs")
            });
        }
        node.encode(&mut self.nodes, |pack| self.places[&pack]);
        self.ends.push(u32::try_from(self.nodes.len()).expect("a node frame has at most 256 KiB"));
        u8::try_from(self.ends.len() - 1).expect("is_full refuses the 256th node")
    }

    /// Whether the next node belongs into another frame.
    pub fn is_full(&self) -> bool {
        self.ends.len() == NODE_FRAME_NODES_MAX
            || self.nodes.len() + self.packs.len() * PACK_NAME_BYTES >= TARGET_BYTES
    }

    /// Whether there is nothing to store.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The frame's plaintext.
    pub fn finish(self) -> Vec<u8> {
        let mut plaintext =
            Vec::with_capacity(4 + self.packs.len() * 20 + self.ends.len() * 4 + self.nodes.len());
        let count = |n: usize| u16::try_from(n).expect("both lists are bounded").to_le_bytes();
        plaintext.extend_from_slice(&count(self.packs.len()));
        plaintext.extend_from_slice(&count(self.ends.len()));
        self.packs.iter().for_each(|pack| plaintext.extend_from_slice(&pack.to_bytes()));
        self.ends.iter().for_each(|end| plaintext.extend_from_slice(&end.to_le_bytes()));
        plaintext.extend_from_slice(&self.nodes);
        plaintext
    }
}

/// A node frame that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFrame {
    packs: Vec<PackName>,
    ends: Vec<u32>,
    nodes: Vec<u8>,
}

impl NodeFrame {
    /// Splits a plaintext into its lists.
    ///
    /// # Errors
    /// `Length` when they do not fit it.
    pub fn decode(plaintext: &[u8]) -> Result<NodeFrame, NodeError> {
        let (counts, rest) = plaintext.split_at_checked(4).ok_or(NodeError::Length)?;
        let packs = usize::from(u16::from_le_bytes([counts[0], counts[1]]));
        let ends = usize::from(u16::from_le_bytes([counts[2], counts[3]]));
        if ends == 0 || ends > NODE_FRAME_NODES_MAX {
            return Err(NodeError::Header);
        }
        let (packs, rest) = rest.split_at_checked(packs * PACK_NAME_BYTES).ok_or(NodeError::Length)?;
        let (ends, nodes) = rest.split_at_checked(ends * 4).ok_or(NodeError::Length)?;
        let packs = packs.chunks_exact(PACK_NAME_BYTES);
        let packs = packs.map(|pack| PackName::from_bytes(pack.try_into().expect("20 bytes a chunk")));
        let ends =
            ends.chunks_exact(4).map(|end| u32::from_le_bytes(end.try_into().expect("4 bytes a chunk")));
        let frame = NodeFrame { packs: packs.collect(), ends: ends.collect(), nodes: nodes.to_vec() };
        let rising = frame.ends.is_sorted_by(|a, b| a < b);
        if !rising || frame.ends.last().map(|&end| end as usize) != Some(frame.nodes.len()) {
            return Err(NodeError::Length);
        }
        Ok(frame)
    }

    /// One of the nodes.
    ///
    /// # Errors
    /// `NotTheChild` when the frame has no such node; else the rule that its bytes break.
    pub fn node(&self, index: u8) -> Result<Node, NodeError> {
        let end = *self.ends.get(usize::from(index)).ok_or(NodeError::NotTheChild)?;
        let start = if index == 0 { 0 } else { self.ends[usize::from(index) - 1] };
        Node::decode(&self.nodes[start as usize..end as usize], &self.packs)
    }

    /// Bytes in memory, for a cache's bound.
    pub fn bytes(&self) -> usize {
        self.packs.len() * PACK_NAME_BYTES + self.ends.len() * 4 + self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checksum, Entry, FANOUT, FrameAddress, Identifier, Inner, Leaf, LeaseId, NodeAddress};
    use proptest::prelude::*;

    fn frame_address() -> impl Strategy<Value = FrameAddress> {
        (0u8..3, 0u32..3, 0u32..1 << 20, 0u32..1 << 17).prop_map(|(lease, sequence, offset, length)| {
            FrameAddress {
                pack: PackName { lease: LeaseId(Identifier::from_bytes([lease; 16])), sequence },
                offset,
                length,
            }
        })
    }

    fn leaf() -> impl Strategy<Value = Node> {
        let entry = (frame_address(), 0u8..32, any::<[u8; 16]>()).prop_map(|(frame, index, sum)| Entry {
            frame,
            index,
            checksum: Checksum(sum),
        });
        (proptest::collection::vec(proptest::option::of(entry), FANOUT), 0u64..1 << 30).prop_map(
            |(blocks, at)| {
                let blocks = blocks.try_into().expect("64 blocks");
                Node::Leaf(Box::new(Leaf { first_block: at * 64, blocks }))
            },
        )
    }

    fn inner() -> impl Strategy<Value = Node> {
        let child = (frame_address(), any::<u8>()).prop_map(|(frame, index)| NodeAddress { frame, index });
        let child = proptest::option::weighted(0.9, child);
        (1u8..4, proptest::collection::vec(child, FANOUT)).prop_map(|(level, children)| {
            let children = children.try_into().expect("64 children");
            Node::Inner(Box::new(Inner { level, first_block: 1 << 24, children }))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nodes_survive_their_frame(nodes in proptest::collection::vec(prop_oneof![leaf(), inner()], 1..20)) {
            let mut builder = NodeFrameBuilder::default();
            let numbers: Vec<u8> = nodes.iter().map(|node| builder.push(node)).collect();
            let frame = NodeFrame::decode(&builder.finish()).unwrap();
            for (number, node) in numbers.into_iter().zip(nodes) {
                prop_assert_eq!(frame.node(number), Ok(node));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(mut plaintext in proptest::collection::vec(0u8..3, 0..400), junk: Vec<u8>) {
            plaintext.extend(junk);
            if let Ok(frame) = NodeFrame::decode(&plaintext) {
                for number in 0..=254 {
                    prop_assert!(frame.node(number).is_ok() || frame.node(number).is_err());
                }
            }
        }

        #[test]
        fn no_altered_node_makes_it_panic(node in leaf(), at: prop::sample::Index, value: u8) {
            let mut builder = NodeFrameBuilder::default();
            builder.push(&node);
            let mut plaintext = builder.finish();
            let at = at.index(plaintext.len());
            plaintext[at] = value;
            if let Ok(frame) = NodeFrame::decode(&plaintext) {
                prop_assert!(frame.node(0).is_ok() || frame.node(0).is_err());
            }
        }
    }
}
