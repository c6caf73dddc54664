//! Makes `testdata/repository-v1`: `testdata FOLDER`. Once for each released format; what exists is never edited.
//!
//! `tests/old_formats.rs` knows what must come out of it.
#![expect(clippy::unwrap_used, reason = "run by hand")]

#[path = "../tests/house/old_content.rs"]
mod old_content;

use old_content::{first_disk, kernel, second_disk};
use repository::{Manifest, Part, Repository, Role, Secret, create_key_file};
use std::path::PathBuf;

fn main() {
    let folder = PathBuf::from(std::env::args().nth(1).unwrap());
    let key = folder.join("key");
    std::fs::create_dir(&folder).unwrap();
    create_key_file(&key).unwrap();
    let place = folder.join("repository");
    let repository = Repository::init(&place, &Secret::KeyFile(key)).unwrap();
    repository.add_key(&Secret::Passphrase("still".to_string().into())).unwrap();

    let mut parent = None;
    for (number, content) in (1u64..).zip([first_disk(), second_disk()]) {
        let root = parent.map(|(_, root)| root);
        let writer = repository.begin().unwrap();
        let mut disk = writer.disk(content.len() as u64, root.as_ref()).unwrap();
        disk.write(0, &content).unwrap();
        let (root, _) = disk.finish().unwrap();
        let kernel = writer.blob(&kernel()).unwrap();
        let parts = [("vda", Role::Disk, root), ("kernel", Role::Kernel, kernel)];
        let parts = parts.map(|(name, role, root)| Part {
            name: name.into(),
            role,
            size_bytes: root.size_bytes,
            root,
            facts: [("serial".to_string(), format!("{name}-1"))].into(),
        });
        let manifest = Manifest {
            vm: "db1".into(),
            parent: parent.map(|(id, _)| id),
            created_at_ms: 1_700_000_000_000 + number,
            description: Some(format!("number {number}")),
            level: "application".into(),
            parts: parts.into(),
            definition: serde_json::json!({ "memory_mib": 512 }),
            receipt: serde_json::json!({ "reasons": [] }),
        };
        parent = Some((writer.commit(manifest).unwrap(), root));
    }
}
