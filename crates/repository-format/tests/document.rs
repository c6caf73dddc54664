//! The examples of the format document say what the code does.
#![expect(clippy::unwrap_used, reason = "tests and their plumbing")]

use repository_format::{
    BLOCK_BYTES, Checksum, FrameAddress, FrameKind, Keys, LeaseId, LeaseNote, MasterKey, Node, NodeFrame,
    PackName, RepositoryId, decompress, from_json, open_frame, open_object, read_key_slot,
};

const DOCUMENT: &str = include_str!("../../../docs/format/repository.md");
const LEASE: &str = "01hf7yat00041061050r3gg28a";

/// The bytes of a block that begins with "```hex NAME".
fn example(name: &str) -> Vec<u8> {
    let (_, rest) =
        DOCUMENT.split_once(&format!("```hex {name}\n")).unwrap_or_else(|| panic!("no example {name}"));
    let (digits, _) = rest.split_once("```").unwrap();
    let digits: String = digits.split_whitespace().collect();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn master() -> MasterKey {
    read_key_slot(&example("key-slot"), RepositoryId([0xee; 16])).unwrap()
}

fn pack() -> PackName {
    format!("{LEASE}/00000000").parse().unwrap()
}

#[test]
fn the_example_slot_holds_the_example_key() {
    assert!(master().0.iter().copied().eq(0..32));
    assert!(DOCUMENT.contains(LEASE));
    assert_eq!(LEASE.parse::<LeaseId>().unwrap().0.as_bytes()[..], example("identifier"));
}

#[test]
fn keys_are_derived_as_the_document_says() {
    let mut hasher = blake3::Hasher::new_derive_key("stillpoint repository v1 pack");
    hasher.update(&*master().0).update(&example("identifier")).update(&[0; 4]);
    assert_eq!(hasher.finalize().as_bytes()[..], example("pack-key"));
    let checksum = Keys::new(master()).checksums.of(&[b'a'; BLOCK_BYTES]);
    assert_eq!(checksum.0[..], example("checksum"));
}

#[test]
fn the_example_frames_open_at_their_addresses() {
    let keys = Keys::new(master());
    let mut data = example("data-frame");
    let length = u32::try_from(data.len()).unwrap();
    let frame = FrameAddress { pack: pack(), offset: 0, length };
    let payload = open_frame(&keys, &frame, FrameKind::Data, &mut data).unwrap();
    assert_eq!(decompress(payload, BLOCK_BYTES).unwrap(), [b'a'; BLOCK_BYTES]);

    let mut nodes = example("node-frame");
    let nodes_length = u32::try_from(nodes.len()).unwrap();
    let address = FrameAddress { pack: pack(), offset: length, length: nodes_length };
    let payload = open_frame(&keys, &address, FrameKind::Nodes, &mut nodes).unwrap();
    assert_eq!(decompress(payload, 1 << 18).unwrap(), example("nodes"));

    let Node::Leaf(leaf) = NodeFrame::decode(&example("nodes")).unwrap().node(0).unwrap() else {
        panic!("no leaf")
    };
    assert_eq!(leaf.first_block, 0);
    let data: Vec<usize> = (0..64).filter(|&block| leaf.blocks[block].is_some()).collect();
    assert_eq!(data, [2]);
    let entry = leaf.blocks[2].unwrap();
    assert_eq!((entry.frame, entry.index), (frame, 0));
    assert_eq!(entry.checksum, Checksum(example("checksum").try_into().unwrap()));
}

#[test]
fn the_example_lease_opens_under_its_name() {
    let plaintext = open_object(&Keys::new(master()), &format!("leases/{LEASE}"), &example("lease")).unwrap();
    assert_eq!(from_json(&plaintext), Ok(LeaseNote { created_at_ms: 1_700_000_000_000 }));
}

#[test]
fn the_example_manifest_has_the_shape_that_is_read() {
    let (_, rest) = DOCUMENT.split_once("```json\n").unwrap();
    let (json, _) = rest.split_once("```").unwrap();
    let json =
        json.replace("\"SNAPSHOT\"", &format!("\"{LEASE}\"")).replace("\"LEASE\"", &format!("\"{LEASE}\""));
    let file = repository_format::ManifestFile::read(json.as_bytes(), LEASE.parse().unwrap()).unwrap();
    assert_eq!((file.stored_bytes, file.manifest.parts.len()), (123, 1));
}
