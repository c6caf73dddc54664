//! What increments may cost.
#![expect(clippy::unwrap_used, reason = "tests and their plumbing")]

mod house;
use house::*;

const MIB: u64 = 1 << 20;

/// A disk without holes whose blocks all differ, and compress well; then `changes` random blocks of noise.
fn increment_bytes(size: u64, changes: u64) -> u64 {
    let house = House::new();
    let repository = house.init();
    let writer = repository.begin().unwrap();
    let mut disk = writer.disk(size, None).unwrap();
    let mut piece = vec![0; 1 << 20];
    for at in (0..size).step_by(1 << 20) {
        for (number, block) in (0u64..).zip(piece.chunks_mut(4096)) {
            block[..8].copy_from_slice(&(at + number * 4096 + 1).to_le_bytes());
        }
        disk.write(at, &piece).unwrap();
    }
    let (root, _) = disk.finish().unwrap();
    let parent = writer.commit(manifest(None, &[root])).unwrap();

    let places = noise(7, usize::try_from(changes * 8).unwrap());
    let blocks: std::collections::BTreeSet<u64> =
        places.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()) % (size / 4096)).collect();
    let writer = repository.begin().unwrap();
    let mut disk = writer.disk(size, Some(&root)).unwrap();
    for block in &blocks {
        disk.write(block * 4096, &noise(*block, 4096)).unwrap();
    }
    let (root, stats) = disk.finish().unwrap();
    let id = writer.commit(manifest(Some(parent), &[root])).unwrap();
    assert_eq!(stats.changed_bytes, blocks.len() as u64 * 4096);
    let stored = house.files().into_iter().filter(|file| file.to_string_lossy().contains("/packs/"));
    let stored: u64 = stored.map(|file| file.metadata().unwrap().len()).sum();
    let summary =
        |wanted| repository.snapshots().unwrap().into_iter().find(|(id, _)| *id == wanted).unwrap().1;
    assert_eq!(summary(id).stored_bytes, stats.stored_bytes);
    assert_eq!(summary(parent).stored_bytes + stats.stored_bytes, stored);
    stats.stored_bytes
}

/// The proportions of 10,000 writes over 4 GiB, on an eighth of the disk; `figures` measures the whole.
#[test]
fn scattered_writes_store_little_more_than_themselves() {
    let changes = 1250;
    let stored = increment_bytes(512 * MIB, changes);
    assert!(stored < changes * 4096 * 5 / 4, "{stored} bytes for {} changed", changes * 4096);
}

#[test]
fn one_changed_block_stores_its_data_and_one_path_of_the_tree() {
    let stored = increment_bytes(64 * MIB, 1);
    // The block, a leaf of 1 KiB, and two nodes above it.
    assert!(stored < 4096 + 4096, "{stored} bytes");
}
