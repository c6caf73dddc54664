//! Payloads, node frames and nodes as a store could give them back. Nothing grows beyond its limit, what is accepted
//! means what it says, and what a writer makes is read back as it was.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use repository_format::{
    BLOCK_BYTES, Checksum, Compressor, Entry, FANOUT, FRAME_BLOCKS_MAX, FrameAddress, FrameKind, Identifier,
    Inner, Keys, Leaf, LeaseId, MasterKey, NODE_FRAME_BYTES_MAX, Node, NodeAddress, NodeFrame,
    NodeFrameBuilder, PackName, decompress, open_frame, seal_frame,
};
use zeroize::Zeroizing;

#[derive(Arbitrary, Debug)]
struct Address {
    lease: u8,
    sequence: u8,
    offset: u32,
    length: u16,
    index: u8,
}

#[derive(Arbitrary, Debug)]
enum Made {
    Leaf { first: u32, blocks: Vec<Option<(Address, [u8; 16])>> },
    Inner { level: u8, first: u32, children: Vec<Option<Address>> },
}

#[derive(Arbitrary, Debug)]
enum Input {
    Payload { bytes: Vec<u8>, limit: u32 },
    Compressed { plaintext: Vec<u8>, repeat: u8, flip: Option<(u16, u8)> },
    NodeFrame(Vec<u8>),
    Nodes { nodes: Vec<Made>, flip: Option<(u16, u8)> },
    Sealed { payload: Vec<u8>, before: u8, flip: (u16, u8), nodes: bool },
}

fn pack(address: &Address) -> PackName {
    PackName {
        lease: LeaseId(Identifier::from_bytes([address.lease % 4; 16])),
        sequence: u32::from(address.sequence % 4),
    }
}

fn frame(address: &Address) -> FrameAddress {
    FrameAddress {
        pack: pack(address),
        offset: address.offset % (1 << 29),
        length: u32::from(address.length) + 1,
    }
}

fn node(made: &Made) -> Node {
    match made {
        Made::Leaf { first, blocks } => {
            let mut leaf = Leaf { first_block: u64::from(*first) * 64, blocks: [None; FANOUT] };
            for (slot, block) in leaf.blocks.iter_mut().zip(blocks) {
                *slot = block.as_ref().map(|(address, sum)| Entry {
                    frame: frame(address),
                    index: address.index % 32,
                    checksum: Checksum(*sum),
                });
            }
            Node::Leaf(Box::new(leaf))
        }
        Made::Inner { level, first, children } => {
            let level = level % 3 + 1;
            let first_block = u64::from(*first % 4096) << (6 * (u32::from(level) + 1));
            let mut inner = Inner { level, first_block, children: [None; FANOUT] };
            for (slot, child) in inner.children.iter_mut().zip(children) {
                *slot =
                    child.as_ref().map(|address| NodeAddress { frame: frame(address), index: address.index });
            }
            Node::Inner(Box::new(inner))
        }
    }
}

fn flipped(bytes: &mut [u8], (at, value): (u16, u8)) -> bool {
    let length = bytes.len();
    bytes.get_mut(usize::from(at) % length.max(1)).is_some_and(|byte| {
        *byte ^= value;
        value != 0
    })
}

/// Reads every node; each that is accepted stands where it says.
fn look(plaintext: &[u8]) {
    let Ok(frame) = NodeFrame::decode(plaintext) else { return };
    assert!(frame.bytes() <= plaintext.len());
    for number in 0..=u8::MAX {
        let Ok(node) = frame.node(number) else { continue };
        assert!(node.expect_at(node.level(), node.first_block()).is_ok());
        assert!(node.expect_at(node.level() ^ 1, node.first_block()).is_err());
    }
}

fuzz_target!(|input: Input| match input {
    Input::Payload { bytes, limit } => {
        let limit = (limit as usize) % (2 * FRAME_BLOCKS_MAX * BLOCK_BYTES);
        if let Ok(plaintext) = decompress(&bytes, limit) {
            assert!(plaintext.len() <= limit);
        }
    }
    Input::Compressed { plaintext, repeat, flip } => {
        let plaintext = plaintext.repeat(usize::from(repeat % 16) + 1);
        let mut payload = Compressor::default().compress(&plaintext).to_vec();
        assert!(payload.len() <= plaintext.len() + 1);
        let changed = flip.is_some_and(|flip| flipped(&mut payload, flip));
        let read = decompress(&payload, plaintext.len());
        assert!(changed || read.as_ref() == Ok(&plaintext), "what was written is not read");
        assert!(read.is_ok_and(|read| read.len() > plaintext.len()) == false);
    }
    Input::NodeFrame(bytes) => look(&bytes),
    Input::Nodes { nodes, flip } => {
        let nodes: Vec<Node> = nodes.iter().map(node).filter(|node| !node.is_hole()).take(200).collect();
        let mut builder = NodeFrameBuilder::default();
        let mut kept = Vec::new();
        for node in nodes {
            if builder.is_full() {
                break;
            }
            kept.push((builder.push(&node), node));
        }
        if builder.is_empty() {
            return;
        }
        let mut plaintext = builder.finish();
        assert!(plaintext.len() <= NODE_FRAME_BYTES_MAX);
        let frame = NodeFrame::decode(&plaintext).expect("a writer's own frame");
        for (number, node) in kept {
            assert_eq!(frame.node(number).as_ref(), Ok(&node));
        }
        if let Some(flip) = flip {
            flipped(&mut plaintext, flip);
            look(&plaintext);
        }
    }
    Input::Sealed { payload, before, flip, nodes } => {
        let keys = Keys::new(MasterKey(Zeroizing::new([7; 32])));
        let pack = PackName { lease: LeaseId(Identifier::from_bytes([1; 16])), sequence: 0 };
        let kind = if nodes { FrameKind::Nodes } else { FrameKind::Data };
        let mut bytes = vec![0; usize::from(before)];
        let address = seal_frame(&keys, pack, &mut bytes, kind, &payload);
        let mut sealed = bytes[address.offset as usize..].to_vec();
        assert_eq!(open_frame(&keys, &address, kind, &mut sealed.clone()), Ok(&payload[..]));
        if flipped(&mut sealed, flip) {
            assert!(open_frame(&keys, &address, kind, &mut sealed).is_err(), "a change went unnoticed");
        }
    }
});
