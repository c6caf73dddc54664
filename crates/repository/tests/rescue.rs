//! The format document is enough: `tools/rescue.py`, written from it alone, restores what this crate wrote.
//!
//! Needs a Python with cryptography, zstandard and blake3: `$STILLPOINT_PYTHON`, else the one that the set-up step made
//! under the cache folder, else `python3`.
#![expect(clippy::unwrap_used, reason = "tests and their plumbing")]

mod house;
#[path = "house/old_content.rs"]
mod old_content;
use house::*;
use repository::{DiskRoot, Repository, Secret, SnapshotId};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MIB: usize = 1 << 20;

/// The Python, or the reason why there is none.
fn python() -> Result<PathBuf, String> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let made = cache.map(|cache| cache.join("stillpoint/python/bin/python3")).filter(|path| path.exists());
    let python = variable("STILLPOINT_PYTHON").or(made).unwrap_or_else(|| "python3".into());
    let imports = Command::new(&python).args(["-c", "import cryptography, zstandard, blake3"]).output();
    match imports {
        Ok(output) if output.status.success() => Ok(python),
        Ok(output) => Err(format!("{} lacks a package: {}", python.display(), last_line(&output.stderr))),
        Err(error) => Err(format!("{} does not run: {error}", python.display())),
    }
}

/// What Python says in the end: the error itself.
fn last_line(said: &[u8]) -> String {
    String::from_utf8_lossy(said).lines().last().unwrap_or_default().to_string()
}

/// Runs the test's body, or says why it cannot be run here.
#[expect(
    clippy::explicit_write,
    reason = "the test program captures eprintln, and shows nothing of a test that ends well"
)]
fn with_python(body: impl FnOnce(&Path)) {
    match python() {
        Ok(python) => body(&python),
        Err(reason) => writeln!(std::io::stderr(), "skipped: {reason}").unwrap(),
    }
}

fn rescue(python: &Path, repository: &Path, secret: [&str; 2], words: &[&str]) -> Output {
    let tool = Path::new("../../tools/rescue.py");
    Command::new(python).arg(tool).arg(repository).args(secret).args(words).output().unwrap()
}

fn restored(
    python: &Path,
    house: &House,
    secret: [&str; 2],
    id: SnapshotId,
    part: &str,
) -> Result<Vec<u8>, String> {
    let output = house.folder.path().join("restored.raw");
    let id = id.to_string();
    let done = rescue(python, &house.place(), secret, &["restore", &id, part, output.to_str().unwrap()]);
    let content = std::fs::read(&output);
    std::fs::remove_file(&output).unwrap_or_default();
    if done.status.success() { Ok(content.unwrap()) } else { Err(String::from_utf8(done.stderr).unwrap()) }
}

/// Holes, noise, text, a size that is no multiple of a block; then a child with scattered changes, grown.
fn chain(repository: &Repository) -> Vec<(SnapshotId, Vec<u8>)> {
    let mut content = noise(1, 20 * MIB + 1234);
    content[3 * MIB..7 * MIB].fill(0);
    content[8 * MIB..9 * MIB].fill(b'x');
    let (first, _) = snapshot(repository, &content, None).unwrap();
    let mut kept = vec![(first, content.clone())];
    for block in (0..content.len() / 4096).step_by(37) {
        content[block * 4096..][..4096].copy_from_slice(&noise(block as u64, 4096));
    }
    content.resize(30 * MIB, 0);
    let (second, _) = snapshot(repository, &content, Some(first)).unwrap();
    kept.push((second, content));
    kept
}

#[test]
fn the_rescue_reader_restores_disks_with_a_key_file_and_with_a_passphrase() {
    with_python(|python| {
        let house = House::new();
        let repository = house.init();
        repository.add_key(&Secret::Passphrase("correct horse".to_string().into())).unwrap();
        let words = house.folder.path().join("words");
        std::fs::write(&words, "correct horse\n").unwrap();
        let key = house.folder.path().join("key");
        let kept = chain(&repository);
        for (id, content) in &kept {
            let secret = ["--key-file", key.to_str().unwrap()];
            assert!(&restored(python, &house, secret, *id, "disk0").unwrap() == content);
        }
        let (id, content) = &kept[1];
        let secret = ["--passphrase-file", words.to_str().unwrap()];
        assert!(&restored(python, &house, secret, *id, "disk0").unwrap() == content);

        let listed = rescue(python, &house.place(), ["--key-file", key.to_str().unwrap()], &["list"]);
        let listed = String::from_utf8(listed.stdout).unwrap();
        let expected: Vec<String> =
            kept.iter().map(|(id, _)| format!("{id} db1 application disk0")).collect();
        let mut lines: Vec<&str> = listed.lines().collect();
        lines.sort_unstable();
        let mut expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        expected.sort_unstable();
        assert_eq!(lines, expected);

        std::fs::write(&words, "wrong\n").unwrap();
        let refused = restored(python, &house, secret, *id, "disk0").unwrap_err();
        assert!(refused.contains("no key of this repository opens"), "{refused}");
    });
}

#[test]
fn the_rescue_reader_reads_format_1_as_it_was_released() {
    with_python(|python| {
        let folder = Path::new("../../testdata/repository-v1");
        let (key, place) = (folder.join("key"), folder.join("repository"));
        let house = House::new();
        let expected = [("vda", old_content::second_disk()), ("kernel", old_content::kernel())];
        for (part, content) in expected {
            let output = house.folder.path().join(part);
            // The second of two snapshots; their ids differ in the last digit of their time.
            let words = ["restore", "01hf7yat02", part, output.to_str().unwrap()];
            let done = rescue(python, &place, ["--key-file", key.to_str().unwrap()], &words);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            assert!(std::fs::read(output).unwrap() == content, "{part}");
        }
    });
}

#[test]
fn the_rescue_reader_refuses_damage() {
    with_python(|python| {
        let house = House::new();
        let (id, _) = snapshot(&house.init(), &noise(1, MIB), None).unwrap();
        let key = house.folder.path().join("key");
        let secret = ["--key-file", key.to_str().unwrap()];
        let damaged = |file: &PathBuf| {
            let name = file.to_string_lossy().into_owned();
            name.contains("/packs/") || name.contains("/manifests/")
        };
        for file in house.files().into_iter().filter(damaged) {
            let bytes = std::fs::read(&file).unwrap();
            for at in [0, bytes.len() / 2, bytes.len() - 1] {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1;
                std::fs::write(&file, flipped).unwrap();
                let refused = restored(python, &house, secret, id, "disk0").unwrap_err();
                assert!(refused.starts_with("damaged"), "{refused}");
            }
            std::fs::write(&file, bytes).unwrap();
        }
        restored(python, &house, secret, id, "disk0").unwrap();
    });
}

#[test]
fn the_rescue_reader_hides_what_a_revocation_hides() {
    with_python(|python| {
        let house = House::new();
        let (id, _) = snapshot(&house.init(), &noise(1, 4096), None).unwrap();
        let lease = house.place().join("packs").read_dir().unwrap().next().unwrap().unwrap().file_name();
        std::fs::create_dir(house.place().join("revoked")).unwrap();
        std::fs::write(house.place().join("revoked").join(lease), b"1").unwrap();
        let key = house.folder.path().join("key");
        let refused =
            restored(python, &house, ["--key-file", key.to_str().unwrap()], id, "disk0").unwrap_err();
        assert!(refused.starts_with("0 snapshots"), "{refused}");
    });
}

#[test]
fn the_rescue_reader_restores_a_disk_without_data() {
    with_python(|python| {
        let house = House::new();
        let repository = house.init();
        let writer = repository.begin().unwrap();
        let root = DiskRoot { size_bytes: 10_000, node: None };
        let id = writer.commit(manifest(None, &[root])).unwrap();
        let key = house.folder.path().join("key");
        let content = restored(python, &house, ["--key-file", key.to_str().unwrap()], id, "disk0").unwrap();
        assert_eq!(content, vec![0; 10_000]);
    });
}
