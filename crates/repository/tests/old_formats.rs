//! Every format that was ever released is read, from repositories that are never edited.

#[path = "house/old_content.rs"]
mod old_content;

use old_content::{first_disk, kernel, second_disk};
use repository::{Repository, Role, Secret};
use std::path::{Path, PathBuf};

fn testdata(name: &str) -> PathBuf {
    // Relative to the package, where cargo starts tests: where this was built may be another checkout.
    Path::new("../../testdata").join(name)
}

#[test]
fn format_1_is_read_with_its_key_and_with_its_passphrase() {
    let folder = testdata("repository-v1");
    for secret in [Secret::KeyFile(folder.join("key")), Secret::Passphrase("still".to_string().into())] {
        let repository = Repository::open(&folder.join("repository"), &secret).unwrap();
        let snapshots = repository.snapshots().unwrap();
        assert_eq!(snapshots.len(), 2);
        assert_eq!(snapshots[1].1.parent, Some(snapshots[0].0));
        for ((id, summary), disk) in snapshots.iter().zip([first_disk(), second_disk()]) {
            assert_eq!((summary.vm.as_str(), summary.level.as_str()), ("db1", "application"));
            let manifest = repository.manifest(id).unwrap();
            for (part, (role, expected)) in
                manifest.parts.iter().zip([(Role::Disk, disk), (Role::Kernel, kernel())])
            {
                let mut content = vec![1; expected.len()];
                let reader = repository.disk(&part.root);
                assert_eq!((part.role, reader.size_bytes()), (role, expected.len() as u64));
                reader.read_at(0, &mut content).unwrap();
                assert!(content == expected, "{} of {id}", part.name);
            }
        }
        assert!(repository.verify(None, &mut |_, _| ()).unwrap().damage.is_empty());
    }
}
