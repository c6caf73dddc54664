//! A store that refuses to write a name a second time, and to delete what only a collection may: nothing that the
//! repository does needs either.
#![expect(clippy::unwrap_used, reason = "tests and their plumbing")]

mod house;
use house::*;
use object_store::PutPayload;
use repository::{Error, Objects, Secret};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

const MIB: usize = 1 << 20;

#[derive(Debug)]
struct WriteOnce {
    inner: Arc<dyn Objects>,
    written: Mutex<BTreeSet<String>>,
    /// What was asked for against the rules.
    refused: Mutex<Vec<String>>,
    /// The next deletion of a manifest fails.
    stubborn: Mutex<bool>,
}

impl WriteOnce {
    fn refuse(&self, what: String) -> Result<(), Error> {
        self.refused.lock().unwrap().push(what.clone());
        Err(Error::Store { doing: what, cause: "it is written once".into() })
    }
}

impl Objects for WriteOnce {
    fn put(&self, name: &str, bytes: PutPayload) -> Result<(), Error> {
        // For ever: not even after its deletion.
        if !self.written.lock().unwrap().insert(name.to_owned()) {
            return self.refuse(format!("writing {name} again"));
        }
        self.inner.put(name, bytes)
    }

    fn get(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        self.inner.get(name, limit)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, Error> {
        self.inner.get_range(name, range)
    }

    fn length(&self, name: &str) -> Result<Option<u64>, Error> {
        self.inner.length(name)
    }

    fn list(&self, folder: &str) -> Result<Vec<String>, Error> {
        self.inner.list(folder)
    }

    fn delete(&self, name: &str) -> Result<(), Error> {
        if !["manifests/", "leases/", "probe/"].iter().any(|folder| name.starts_with(folder)) {
            return self.refuse(format!("deleting {name}"));
        }
        if name.starts_with("manifests/") && std::mem::take(&mut *self.stubborn.lock().unwrap()) {
            return Err(Error::Store { doing: format!("deleting {name}"), cause: "not now".into() });
        }
        self.inner.delete(name)
    }
}

#[test]
fn nothing_is_written_twice_and_nothing_but_manifests_and_leases_is_deleted() {
    let house = House::new();
    let store = Arc::new(WriteOnce {
        inner: local(&house.place()),
        written: Mutex::default(),
        refused: Mutex::default(),
        stubborn: Mutex::default(),
    });
    let repository = house.init_in(Arc::clone(&store) as _);
    let before = noise(1, 3 * MIB);
    let mut after = before.clone();
    after[MIB..MIB + 8192].fill(7);
    let (first, _) = snapshot(&repository, &before, None).unwrap();
    let (second, _) = snapshot(&repository, &after, Some(first)).unwrap();
    // The same content again: everything in it is known.
    let (third, _) = snapshot(&repository, &after, Some(second)).unwrap();
    let (fourth, _) = snapshot(&repository, &before, None).unwrap();
    repository.add_key(&Secret::KeyFile(house.folder.path().join("key"))).unwrap();
    // Two at once, and one that is given up.
    std::thread::scope(|scope| {
        for seed in [2, 3] {
            let repository = &repository;
            scope.spawn(move || snapshot(repository, &noise(seed, MIB), None).unwrap());
        }
    });
    let given_up = repository.begin().unwrap();
    write_all(&given_up, &noise(4, MIB), None).unwrap();
    drop(given_up);
    assert!(damage_of(&repository).is_empty());

    repository.delete(&first).unwrap();
    *store.stubborn.lock().unwrap() = true;
    repository.delete(&third).unwrap_err();
    repository.delete(&third).expect("a deletion that failed can be repeated");
    assert!(read_all(&repository, second).unwrap() == after);
    assert!(read_all(&repository, fourth).unwrap() == before);
    assert_eq!(*store.refused.lock().unwrap(), Vec::<String>::new());
}
