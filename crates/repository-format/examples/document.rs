//! Prints the examples of `docs/format/repository.md`, section 9. Run it when the format changes, and paste.

use repository_format::{
    Checksum, Compressor, Entry, FANOUT, FrameKind, Identifier, Keys, Leaf, LeaseId, MasterKey, Node,
    NodeFrameBuilder, PackName, RepositoryId, seal_frame, seal_object, write_key_slot,
};

fn main() {
    let master: [u8; 32] = std::array::from_fn(|number| u8::try_from(number).expect("32 fit"));
    let master = MasterKey(master.into());
    let keys = Keys::new(master.clone());
    let lease = LeaseId(Identifier::new(1_700_000_000_000, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]));
    let pack = PackName { lease, sequence: 0 };

    print("key-slot", &write_key_slot(RepositoryId([0xee; 16]), &master)[..]);
    println!("{lease}");
    print("identifier", lease.0.as_bytes());
    let block = [b'a'; 4096];
    let Checksum(checksum) = keys.checksums.of(&block);
    print("checksum", &checksum);

    let mut bytes = Vec::new();
    let frame = seal_frame(&keys, pack, &mut bytes, FrameKind::Data, Compressor::default().compress(&block));
    print("data-frame", &bytes);
    let mut blocks = [None; FANOUT];
    blocks[2] = Some(Entry { frame, index: 0, checksum: Checksum(checksum) });
    let mut builder = NodeFrameBuilder::default();
    builder.push(&Node::Leaf(Box::new(Leaf { first_block: 0, blocks })));
    let plaintext = builder.finish();
    print("nodes", &plaintext);
    let end = bytes.len();
    let mut compressor = Compressor::default();
    let nodes = seal_frame(&keys, pack, &mut bytes, FrameKind::Nodes, compressor.compress(&plaintext));
    print("node-frame", &bytes[end..]);
    println!("node frame: {nodes:?}\n");

    let name = format!("leases/{lease}");
    let sealed = seal_object(&keys, &name, [0x0c; 12], br#"{"created_at_ms":1700000000000}"#);
    print("lease", &sealed.expect("a small object"));
}

fn print(name: &str, bytes: &[u8]) {
    println!("```hex {name}");
    for line in bytes.chunks(32) {
        println!("{}", line.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    }
    println!("```\n");
}
