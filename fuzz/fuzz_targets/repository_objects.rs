//! Configuration, key slots, manifests, leases and names as a store could give them back. What is accepted is
//! written again as the same, a manifest passes only under its own name, and a sealed object opens only unchanged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use repository_format::{
    Condemned, Config, FORMAT, Identifier, Keys, LeaseNote, ManifestFile, MasterKey, PackName, RepositoryId,
    SnapshotId, from_json, open_object, read_key_slot, seal_object, to_json, write_key_slot,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::str::FromStr;
use zeroize::Zeroizing;

/// The snapshot of the seeds.
const SNAPSHOT: &str = "01hf7yat00041061050r3gg28a";
const REPOSITORY: RepositoryId = RepositoryId([0xEE; 16]);

fn json<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let value: T = from_json(bytes).ok()?;
    let again = to_json(&value).expect("what was JSON is JSON");
    assert_eq!(from_json::<T>(&again).as_ref(), Ok(&value));
    Some(value)
}

/// A name has one spelling.
fn name<T: FromStr + ToString>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        assert_eq!(value.to_string(), text);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 8 {
        0 => {
            if let Ok(config) = Config::read(bytes) {
                assert_eq!(config.format, FORMAT);
                assert_eq!(json::<Config>(bytes), Some(config));
            }
        }
        1 => {
            if let Ok(master) = read_key_slot(bytes, REPOSITORY) {
                assert_eq!(&write_key_slot(REPOSITORY, &master)[..], bytes);
            }
        }
        2 => {
            let snapshot: SnapshotId = SNAPSHOT.parse().expect("an identifier");
            if let Ok(file) = ManifestFile::read(bytes, snapshot) {
                assert_eq!((file.format, file.snapshot), (FORMAT, snapshot));
                let other = SnapshotId(Identifier::from_bytes([1; 16]));
                assert!(ManifestFile::read(bytes, other).is_err());
                json::<ManifestFile>(bytes);
            }
        }
        3 => drop(json::<LeaseNote>(bytes)),
        4 => drop(json::<Condemned>(bytes)),
        5 => {
            let text = String::from_utf8_lossy(bytes);
            name::<Identifier>(&text);
            name::<RepositoryId>(&text);
            name::<PackName>(&text);
        }
        6 => {
            let keys = Keys::new(MasterKey(Zeroizing::new([7; 32])));
            assert!(open_object(&keys, "manifests/x", bytes).is_err(), "nobody guesses an authentication");
        }
        _ => {
            let keys = Keys::new(MasterKey(Zeroizing::new([7; 32])));
            let mut sealed = seal_object(&keys, "manifests/x", [3; 12], bytes).expect("a short object");
            assert_eq!(open_object(&keys, "manifests/x", &sealed).as_deref(), Ok(bytes));
            assert!(open_object(&keys, "manifests/y", &sealed).is_err());
            let at = bytes.first().map_or(0, |at| usize::from(*at)) % sealed.len();
            sealed[at] ^= 1;
            assert!(open_object(&keys, "manifests/x", &sealed).is_err());
        }
    }
});
