//! Several writers, readers and deletions on one repository, and what the format says about leases.
#![expect(clippy::unwrap_used, reason = "tests and their plumbing")]

mod house;
use house::*;
use repository::{Error, Repository, Secret, SnapshotId};
use repository_format::{Identifier, seal_object};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const MIB: usize = 1 << 20;

fn stored_bytes(house: &House) -> u64 {
    let packs = house.files().into_iter().filter(|file| file.to_string_lossy().contains("/packs/"));
    packs.map(|file| file.metadata().unwrap().len()).sum()
}

#[test]
fn two_writers_at_once_do_not_notice_each_other() {
    let house = House::new();
    let repository = house.init();
    let (base, _) = snapshot(&repository, &noise(0, 2 * MIB), None).unwrap();
    let contents = [noise(1, 3 * MIB), noise(2, 3 * MIB)];
    let ids: Vec<SnapshotId> = std::thread::scope(|scope| {
        let run = |content: &Vec<u8>| {
            // As two hosts would: each with its own handle.
            let repository = house.open();
            let content = content.clone();
            scope.spawn(move || snapshot(&repository, &content, Some(base)).unwrap().0)
        };
        let threads = contents.each_ref().map(run);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let repository = house.open();
    for (id, content) in ids.iter().zip(&contents) {
        assert!(&read_all(&repository, *id).unwrap() == content);
    }
    assert_eq!(repository.snapshots().unwrap().len(), 3);
    assert!(damage_of(&repository).is_empty());
}

#[test]
fn several_disks_of_one_snapshot_are_written_from_several_threads() {
    let house = House::new();
    let repository = house.init();
    let contents = [noise(1, 2 * MIB), noise(2, 3 * MIB), noise(3, MIB)];
    let writer = repository.begin().unwrap();
    let roots: Vec<_> = std::thread::scope(|scope| {
        let write = |content: &Vec<u8>| {
            let writer = &writer;
            let content = content.clone();
            scope.spawn(move || write_all(writer, &content, None).unwrap().0)
        };
        let threads = contents.each_ref().map(write);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    writer.commit(manifest(None, &roots)).unwrap();
    for (root, content) in roots.iter().zip(&contents) {
        let mut read = vec![0; content.len()];
        repository.disk(root).read_at(0, &mut read).unwrap();
        assert!(&read == content);
    }
}

#[test]
fn the_same_template_on_two_vms_is_stored_once() {
    let house = House::new();
    let repository = house.init();
    let template = noise(1, 8 * MIB);
    snapshot(&repository, &template, None).unwrap();
    let first = stored_bytes(&house);
    let mut other = template.clone();
    other[3 * MIB..3 * MIB + 4096].fill(9);
    let (id, stats) = snapshot(&house.open(), &other, None).unwrap();

    assert!(read_all(&house.open(), id).unwrap() == other);
    assert!(first > 8 * MIB as u64);
    // One window of 128 KiB differs; the rest of the cost is the tree.
    assert!(stats.stored_bytes < 256 << 10, "{stats:?}");
}

#[test]
fn a_kernel_given_twice_is_stored_once() {
    let house = House::new();
    let repository = house.init();
    let kernel = noise(1, 5 * MIB + 77);
    let writer = repository.begin().unwrap();
    let root = writer.blob(&kernel).unwrap();
    writer.commit(manifest(None, &[root])).unwrap();
    let before = stored_bytes(&house);
    let writer = repository.begin().unwrap();
    let root = writer.blob(&kernel).unwrap();
    let id = writer.commit(manifest(None, &[root])).unwrap();
    assert!(read_all(&repository, id).unwrap() == kernel);
    // The last 77 bytes and their neighbours within 128 KiB may be stored again, and the tree.
    assert!(stored_bytes(&house) - before < 300 << 10, "{}", stored_bytes(&house) - before);
}

#[test]
fn a_lost_or_damaged_cache_costs_deduplication_and_nothing_else() {
    let house = House::new();
    let content = noise(1, 2 * MIB);
    snapshot(&house.init(), &content, None).unwrap();
    let cache = house.folder.path().join("cache/windows.redb");
    let whole = std::fs::read(&cache).unwrap();
    let mut rotten = whole.clone();
    rotten.iter_mut().step_by(97).for_each(|byte| *byte ^= 0x55);
    for cached in [&whole[..0], &whole[..whole.len() / 2], &rotten, b"no database at all"] {
        std::fs::write(&cache, cached).unwrap();
        let (id, _) = snapshot(&house.open(), &content, None).unwrap();
        assert!(read_all(&house.open(), id).unwrap() == content);
    }
    assert!(damage_of(&house.open()).is_empty());
}

#[test]
fn the_cache_never_leads_to_a_pack_that_is_gone_or_condemned() {
    for condemned in [false, true] {
        let house = House::new();
        let repository = house.init();
        let content = noise(1, 2 * MIB);
        let (first, _) = snapshot(&repository, &content, None).unwrap();
        repository.delete(&first).unwrap();
        let pack = house.files().into_iter().find(|file| file.to_string_lossy().contains("/packs/")).unwrap();
        if condemned {
            let name = pack.strip_prefix(house.place().join("packs")).unwrap().to_str().unwrap().to_string();
            let collection = Identifier::new(1, [1; 10]);
            let list = serde_json::json!({ "packs": [name] }).to_string();
            put_sealed(&house, &format!("condemned/{collection}"), list.as_bytes());
        } else {
            std::fs::remove_file(&pack).unwrap();
        }
        let (second, _) = snapshot(&house.open(), &content, None).unwrap();
        // What a collection does at the end.
        if condemned {
            std::fs::remove_file(&pack).unwrap();
        }
        assert!(read_all(&house.open(), second).unwrap() == content);
    }
}

/// Puts an object as another program with the key would.
fn put_sealed(house: &House, name: &str, plaintext: &[u8]) {
    let place = house.place();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(place.join("config")).unwrap()).unwrap();
    let slot = place.join("keys").read_dir().unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(house.folder.path().join("key")).unwrap();
    let identity: age::x25519::Identity = text.lines().last().unwrap().parse().unwrap();
    let slot = age::decrypt(&identity, &std::fs::read(slot).unwrap()).unwrap();
    let id = config["repository"].as_str().unwrap().parse().unwrap();
    let keys = repository_format::Keys::new(repository_format::read_key_slot(&slot, id).unwrap());
    let path = place.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, seal_object(&keys, name, [9; 12], plaintext).unwrap()).unwrap();
}

#[test]
fn a_writer_whose_lease_was_revoked_fails_and_leaves_nothing_visible() {
    let house = House::new();
    let repository = house.init();
    let writer = repository.begin().unwrap();
    let (root, _) = write_all(&writer, &noise(1, MIB), None).unwrap();
    let lease = house.place().join("leases").read_dir().unwrap().next().unwrap().unwrap().file_name();
    let revoked = house.place().join("revoked");
    std::fs::create_dir(&revoked).unwrap();
    std::fs::write(revoked.join(lease), b"1").unwrap();

    let error = writer.commit(manifest(None, &[root])).unwrap_err();
    assert!(matches!(error, Error::LeaseEnded), "{error:?}");
    assert!(repository.snapshots().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(house.place().join("manifests")).unwrap().count(), 0);
}

#[test]
fn a_manifest_whose_lease_is_revoked_is_invisible_to_every_reader() {
    let house = House::new();
    let repository = house.init();
    let (id, _) = snapshot(&repository, &noise(1, MIB), None).unwrap();
    let lease = house.place().join("packs").read_dir().unwrap().next().unwrap().unwrap().file_name();
    std::fs::create_dir(house.place().join("revoked")).unwrap();
    std::fs::write(house.place().join("revoked").join(lease), b"1").unwrap();

    assert!(repository.snapshots().unwrap().is_empty());
    assert!(matches!(repository.manifest(&id), Err(Error::NoSuchSnapshot { .. })));
    assert!(matches!(repository.find(&id.to_string()), Err(Error::NoSuchSnapshot { .. })));
    assert!(matches!(repository.verify(Some(&id), &mut |_, _| ()), Err(Error::NoSuchSnapshot { .. })));
    assert_eq!(repository.verify(None, &mut |_, _| ()).unwrap().snapshots, 0);
}

#[test]
fn a_snapshot_compared_with_a_deleted_one_is_refused() {
    let house = House::new();
    let repository = house.init();
    let (parent, _) = snapshot(&repository, &noise(1, MIB), None).unwrap();
    let root = repository.manifest(&parent).unwrap().parts[0].root;
    let write = || {
        let writer = repository.begin().unwrap();
        let (root, _) = write_all(&writer, &noise(2, MIB), Some(&root)).unwrap();
        (writer, root)
    };
    let (writer, child) = write();
    // A manifest that does not name the parent whose tree it shares.
    assert!(matches!(writer.commit(manifest(None, &[child])), Err(Error::ParentGone)));
    let (writer, child) = write();
    repository.delete(&parent).unwrap();
    assert!(matches!(writer.commit(manifest(Some(parent), &[child])), Err(Error::ParentGone)));
    assert!(repository.snapshots().unwrap().is_empty());
}

#[test]
fn deleting_a_snapshot_keeps_what_others_share_with_it() {
    let house = House::new();
    let repository = house.init();
    let before = noise(1, 2 * MIB);
    let mut after = before.clone();
    after[..4096].fill(3);
    let (parent, _) = snapshot(&repository, &before, None).unwrap();
    let (child, _) = snapshot(&repository, &after, Some(parent)).unwrap();
    repository.delete(&parent).unwrap();

    assert!(matches!(repository.manifest(&parent), Err(Error::NoSuchSnapshot { .. })));
    assert!(matches!(repository.delete(&parent), Err(Error::NoSuchSnapshot { .. })));
    assert!(read_all(&house.open(), child).unwrap() == after);
    assert!(damage_of(&house.open()).is_empty());
    // Its tombstone holds the manifest, for collection.
    assert!(house.place().join("deleted").join(parent.to_string()).exists());
}

#[test]
fn snapshots_are_found_by_any_unique_beginning_of_their_id() {
    let house = House::new();
    let repository = house.init();
    let (first, _) = snapshot(&repository, &noise(1, 4096), None).unwrap();
    let text = first.to_string();
    assert_eq!(repository.find(&text[..1]).unwrap(), first);
    assert_eq!(repository.find(&text.to_uppercase()).unwrap(), first);
    let (second, _) = snapshot(&repository, &noise(2, 4096), None).unwrap();
    // Both were created in the same millisecond, by their manifests.
    let Err(Error::AmbiguousSnapshot { matches, .. }) = repository.find(&text[..5]) else {
        panic!("not ambiguous")
    };
    assert!(matches.contains(&first) && matches.contains(&second));
    assert_eq!(repository.find(&second.to_string()).unwrap(), second);
    for nobody in ["", "zzzz", "../config"] {
        assert!(matches!(repository.find(nobody), Err(Error::NoSuchSnapshot { .. })), "{nobody}");
    }
}

#[test]
fn folders_that_are_not_ours_are_refused() {
    let house = House::new();
    let secret = house.secret();
    let place = house.place();
    assert!(matches!(Repository::open(&place, &secret), Err(Error::NotARepository { .. })));
    std::fs::create_dir(&place).unwrap();
    assert!(matches!(Repository::open(&place, &secret), Err(Error::NotARepository { .. })));
    std::fs::write(place.join("holiday.jpg"), "").unwrap();
    assert!(matches!(Repository::init(&place, &secret), Err(Error::FolderNotEmpty { .. })));
    std::fs::remove_file(place.join("holiday.jpg")).unwrap();
    Repository::init(&place, &secret).unwrap();
    assert!(matches!(Repository::init(&place, &secret), Err(Error::AlreadyARepository { .. })));
    let later = r#"{"format":2,"repository":"00000000000000000000000000000000"}"#;
    std::fs::write(place.join("config"), later).unwrap();
    assert!(matches!(Repository::open(&place, &secret), Err(Error::UnknownFormat { found: 2 })));
}

#[test]
fn files_and_folders_are_private() {
    fn check(path: &Path) {
        let mode = path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, if path.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        if path.is_dir() {
            path.read_dir().unwrap().for_each(|entry| check(&entry.unwrap().path()));
        }
    }
    let house = House::new();
    // As made by a person, before `init`.
    std::fs::create_dir(house.place()).unwrap();
    let repository = house.init();
    let (id, _) = snapshot(&repository, &noise(1, MIB), None).unwrap();
    let (_, _) = snapshot(&repository, &noise(1, MIB), Some(id)).unwrap();
    repository.delete(&id).unwrap();
    check(&house.place());
    check(&house.folder.path().join("cache"));
    check(&house.folder.path().join("key"));
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let house = House::new();
    let repository = house.init();
    let writer = repository.begin().unwrap();
    assert!(matches!(writer.disk(u64::MAX, None), Err(Error::DiskTooLarge { .. })));
    let mut disk = writer.disk(10_000, None).unwrap();
    for (offset, length) in [(1, 4096), (0, 100), (8192, 1809), (u64::MAX - 4095, 4096), (12_288, 0)] {
        let data = vec![0; usize::try_from(length).unwrap()];
        assert!(matches!(disk.write(offset, &data), Err(Error::BadRange { .. })), "{offset} {length}");
        assert!(matches!(disk.zero(offset, length), Err(Error::BadRange { .. })), "{offset} {length}");
    }
    disk.write(8192, &[1; 1808]).unwrap();
    let (root, _) = disk.finish().unwrap();
    let id = writer.commit(manifest(None, &[root])).unwrap();
    let disk = repository.disk(&repository.manifest(&id).unwrap().parts[0].root);
    assert!(matches!(disk.read_at(9_999, &mut [0; 2]), Err(Error::BadRange { .. })));
    disk.read_at(9_999, &mut [0; 1]).unwrap();
}

#[test]
fn every_error_says_what_to_do_in_one_line() {
    let house = House::new();
    let error = Repository::open(Path::new("/nonexistent"), &house.secret()).unwrap_err();
    assert_eq!(error.to_string(), "/nonexistent holds no repository");
    assert_eq!(error.to_do(), "check the path, or make a repository there with `stillpoint init`");
    let error = Repository::open(&house.place(), &Secret::KeyFile("/nonexistent".into())).unwrap_err();
    assert!(!error.to_string().contains('\n') && !error.to_do().ends_with('.'));
}
