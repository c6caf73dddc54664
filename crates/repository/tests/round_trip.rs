//! What was written is read, through parents, holes, growing and shrinking.
#![expect(clippy::unwrap_used, reason = "tests and their plumbing")]

mod house;
use house::*;
use proptest::prelude::*;
use repository::{DiskReader, DiskRoot, Repository, Writer};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

#[test]
fn a_snapshot_reads_as_the_disk_was() {
    let house = House::new();
    let repository = house.init();
    let mut content = noise(1, 5 * MIB + 1000);
    content[MIB..2 * MIB].fill(0);
    let (id, stats) = snapshot(&repository, &content, None).unwrap();

    assert!(read_all(&house.open(), id).unwrap() == content);
    assert_eq!(stats.read_bytes, content.len() as u64);
    assert_eq!(stats.changed_bytes, (4 * MIB + 1000) as u64);
}

#[test]
fn writers_and_readers_may_cross_threads() {
    fn crosses<T: Send + Sync>() {}
    crosses::<Repository>();
    crosses::<Writer>();
    crosses::<DiskReader>();
}

#[test]
fn an_unchanged_disk_shares_its_parents_root_and_stores_nothing() {
    let house = House::new();
    let repository = house.init();
    let content = noise(1, 3 * MIB);
    let (parent, _) = snapshot(&repository, &content, None).unwrap();
    let (child, stats) = snapshot(&repository, &content, Some(parent)).unwrap();

    assert_eq!((stats.changed_bytes, stats.stored_bytes), (0, 0));
    let root = |id| repository.manifest(&id).unwrap().parts[0].root;
    assert_eq!(root(parent), root(child));
}

#[test]
fn extents_and_data_ranges_tell_holes_from_data() {
    let house = House::new();
    let repository = house.init();
    let mut content = vec![0; 3 * MIB + 500];
    content[MIB + 8 * KIB..MIB + 16 * KIB].fill(7);
    content[3 * MIB + 499] = 7;
    let (id, _) = snapshot(&repository, &content, None).unwrap();
    let disk = repository.disk(&repository.manifest(&id).unwrap().parts[0].root);

    let (mib, kib) = (MIB as u64, KIB as u64);
    let whole = disk.extents(0, disk.size_bytes()).unwrap();
    assert_eq!(whole, [(mib + 8 * kib, true), (8 * kib, false), (2 * mib - 16 * kib, true), (500, false)]);
    assert_eq!(disk.extents(mib + 9 * kib, 10 * kib).unwrap(), [(7 * kib, false), (3 * kib, true)]);
    let ranges: Vec<_> = disk.data_ranges().map(Result::unwrap).collect();
    assert_eq!(ranges, [mib + 8 * kib..mib + 16 * kib, 3 * mib..3 * mib + 500]);
}

/// More leaves than a writer keeps in memory, and more data than one pack: the tree is written out in between, and what was
/// written out is opened again, from packs in memory and from packs in the store.
#[test]
fn a_writer_that_returns_to_places_it_has_left_loses_nothing() {
    const LEAVES: u64 = 9_000;
    const LEAF: u64 = 256 << 10;
    let house = House::new();
    let repository = house.init();
    let writer = repository.begin().unwrap();
    let mut disk = writer.disk(LEAVES * LEAF, None).unwrap();
    for round in 0..3 {
        for number in 0..LEAVES {
            // Each round walks the leaves in another order; 7919 is a prime.
            let leaf = number * [1, 7919, 8999][usize::try_from(round).unwrap()] % LEAVES;
            let content = leaf * 10 + round + 1;
            let block = if round == 2 { 63 } else { round };
            disk.write(leaf * LEAF + block * 4096, &noise(content, 4096)).unwrap();
            if round == 1 && leaf.is_multiple_of(3) {
                disk.zero(leaf * LEAF, 4096).unwrap();
            }
        }
    }
    let (root, stats) = disk.finish().unwrap();
    writer.commit(manifest(None, &[root])).unwrap();
    assert_eq!(stats.changed_bytes, 3 * LEAVES * 4096);

    let repository = house.open();
    let disk = repository.disk(&root);
    let mut read = vec![0; usize::try_from(LEAF).unwrap()];
    for leaf in 0..LEAVES {
        disk.read_at(leaf * LEAF, &mut read).unwrap();
        let mut expected = vec![0; read.len()];
        for (round, block) in [(0, 0), (1, 1), (2, 63)] {
            if round > 0 || !leaf.is_multiple_of(3) {
                expected[block * 4096..][..4096].copy_from_slice(&noise(leaf * 10 + round + 1, 4096));
            }
        }
        assert!(read == expected, "leaf {leaf}");
    }
}

/// What may happen to a disk in a snapshot.
#[derive(Debug, Clone)]
enum Step {
    Write { block: usize, blocks: usize, seed: u64 },
    WriteZeroes { block: usize, blocks: usize },
    Zero { block: usize, blocks: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0usize..700, prop_oneof![1usize..4, 1usize..200]);
    prop_oneof![
        4 => (range.clone(), 0u64..5).prop_map(|((block, blocks), seed)| Step::Write { block, blocks, seed }),
        1 => range.clone().prop_map(|(block, blocks)| Step::WriteZeroes { block, blocks }),
        1 => range.prop_map(|(block, blocks)| Step::Zero { block, blocks }),
    ]
}

/// A size in bytes, often one that is no multiple of a block.
fn size() -> impl Strategy<Value = usize> {
    (0usize..700, prop_oneof![Just(0usize), 1usize..4096]).prop_map(|(blocks, rest)| blocks * 4096 + rest)
}

fn apply(
    writer: &Writer,
    model: &mut Vec<u8>,
    size: usize,
    parent: Option<&DiskRoot>,
    steps: &[Step],
) -> DiskRoot {
    model.resize(size, 0);
    let mut disk = writer.disk(size as u64, parent).unwrap();
    for step in steps {
        let (Step::Write { block, blocks, .. }
        | Step::WriteZeroes { block, blocks }
        | Step::Zero { block, blocks }) = *step;
        let range = (block * 4096).min(size / 4096 * 4096)..((block + blocks) * 4096).min(size);
        if range.is_empty() {
            continue;
        }
        let (offset, length) = (range.start as u64, range.len() as u64);
        match step {
            Step::Write { seed, .. } => model[range.clone()].copy_from_slice(&noise(*seed, range.len())),
            Step::WriteZeroes { .. } | Step::Zero { .. } => model[range.clone()].fill(0),
        }
        match step {
            Step::Zero { .. } => disk.zero(offset, length).unwrap(),
            _ => disk.write(offset, &model[range]).unwrap(),
        }
    }
    disk.finish().unwrap().0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn a_chain_of_snapshots_reads_as_a_vector_would(
        generations in proptest::collection::vec((size(), proptest::collection::vec(step(), 0..12)), 1..5),
        reads in proptest::collection::vec((any::<prop::sample::Index>(), 1usize..20_000), 8),
    ) {
        let house = House::new();
        let repository = house.init();
        let mut model = Vec::new();
        let mut kept: Vec<(repository::SnapshotId, DiskRoot, Vec<u8>)> = Vec::new();
        for (size, steps) in &generations {
            let writer = repository.begin().unwrap();
            let parent = kept.last().map(|(id, root, _)| (*id, *root));
            let root = apply(&writer, &mut model, *size, parent.map(|(_, root)| root).as_ref(), steps);
            let id = writer.commit(manifest(parent.map(|(id, _)| id), &[root])).unwrap();
            kept.push((id, root, model.clone()));
        }
        let repository = house.open();
        for (id, root, content) in &kept {
            prop_assert!(&read_all(&repository, *id).unwrap() == content);
            let disk = repository.disk(root);
            for (offset, length) in &reads {
                if content.is_empty() { continue }
                let offset = offset.index(content.len());
                let mut buffer = vec![1; (*length).min(content.len() - offset)];
                disk.read_at(offset as u64, &mut buffer).unwrap();
                prop_assert!(buffer == content[offset..offset + buffer.len()]);
            }
            let mut from_ranges = vec![0; content.len()];
            for range in disk.data_ranges() {
                let range = range.unwrap();
                let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                disk.read_at(range.start as u64, &mut from_ranges[range]).unwrap();
            }
            prop_assert!(&from_ranges == content);
        }
        prop_assert!(damage_of(&repository).is_empty());
    }
}
