//! Secrets that do not fit, and a repository that someone else changes: what is wrong is said before it is used.

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use vm_tests::bare::{fill, image, run, same};
use vm_tests::{Bare, BareDisk, Ended, Stillpoint};

const MIB: u64 = 1 << 20;

struct Case {
    stillpoint: Stillpoint,
    bare: Bare,
    first: String,
    second: String,
}

/// Two snapshots of a VM with one disk.
fn case(stillpoint: Stillpoint) -> Case {
    let folder = Bare::folder();
    image(folder.path(), "d.raw", "raw", "8M");
    // Not to be compressed to nothing.
    fs::write(folder.path().join("noise"), noise(4 * MIB)).expect("room");
    run(std::process::Command::new("dd").current_dir(folder.path()).args([
        "if=noise",
        "of=d.raw",
        "conv=notrunc",
        "status=none",
    ]));
    let bare = Bare::start(folder, &[BareDisk::new("d", "d.raw", "raw")], &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    let id = |snapshot: &Value| snapshot["snapshot"].as_str().expect("an id").to_owned();
    let first = id(&stillpoint.must(&["snapshot", "vm"]));
    bare.write("d", 0xa1, MIB, 4096);
    let second = id(&stillpoint.must(&["snapshot", "vm"]));
    Case { stillpoint, bare, first, second }
}

fn noise(bytes: u64) -> Vec<u8> {
    let mut state = 1_u64;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56).to_le_bytes()[0]
    };
    (0..bytes).map(step).collect()
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path()).collect();
    let folders: Vec<PathBuf> = files.iter().filter(|path| path.is_dir()).cloned().collect();
    files.retain(|path| !path.is_dir());
    files.extend(folders.iter().flat_map(|folder| files_in(folder)));
    files.sort();
    files
}

#[test]
fn wrong_words_and_wrong_keys_are_told_apart_and_repeat_no_secret() {
    let stillpoint = Stillpoint::new().expect("a repository");
    let bare = stillpoint.run(&["vm", "add", "a/b", "--qmp", "x"]).expect("it ends");
    bare.assert_refused(2, "cannot be a VM's name");
    let wish =
        stillpoint.run(&["snapshot", "vm", "--want", "crash", "--require", "application"]).expect("it ends");
    wish.assert_refused(2, "only crash is wanted");
    let unknown = stillpoint.run(&["snapshot", "vm", "--no-such-option"]).expect("it ends");
    assert_eq!((unknown.code(), &unknown.object["error"]["exit_code"]), (2, &json!(2)), "{unknown:?}");
    stillpoint.run(&["show", "vm"]).expect("it ends").assert_refused(3, "no snapshot");

    fs::write(stillpoint.path("passphrase"), "another marked-secret-1\n").expect("written");
    let wrong = stillpoint.run(&["snapshots"]).expect("it ends");
    wrong.assert_refused(6, "no key of this repository opens with this passphrase");
    assert!(!format!("{wrong:?}").contains("marked-secret"), "{wrong:?}");
    for (text, word) in [("", "its first line is empty"), (&*"x".repeat(5000), "5000 bytes")] {
        fs::write(stillpoint.path("passphrase"), text).expect("written");
        stillpoint.run(&["snapshots"]).expect("it ends").assert_refused(2, word);
    }
    fs::remove_file(stillpoint.path("passphrase")).expect("it is there");
    stillpoint.run(&["snapshots"]).expect("it ends").assert_refused(2, "No such file");

    let keyed = Stillpoint::with_key_file().expect("a repository");
    let key = fs::read(keyed.path("key")).expect("a key");
    // A key that is one, but of another repository.
    fs::copy(stillpoint.path("key"), keyed.path("key")).expect("copied");
    keyed
        .run(&["snapshots"])
        .expect("it ends")
        .assert_refused(6, "no key of this repository opens with this key file");
    for text in ["", "AGE-SECRET-KEY-1MARKEDSECRET", "\u{0}\u{1b}[2J"] {
        fs::write(keyed.path("key"), text).expect("written");
        let wrong = keyed.run(&["snapshots"]).expect("it ends");
        wrong.assert_refused(6, "the key file");
        assert!(!format!("{wrong:?}").contains("MARKEDSECRET"), "{wrong:?}");
    }
    fs::write(keyed.path("key"), key).expect("written");
    keyed.must(&["snapshots"]);
}

#[test]
fn what_someone_else_changed_in_the_repository_is_told_and_not_used() {
    let case = case(Stillpoint::with_key_file().expect("a repository"));
    let Case { stillpoint, bare, first, second } = &case;
    let repository = stillpoint.repository();
    let aside = stillpoint.path("aside");
    run(std::process::Command::new("cp").arg("-aT").arg(&repository).arg(&aside));
    let target = stillpoint.path("restored");
    let wish = format!("d={}", target.display());
    let mend = || {
        fs::remove_dir_all(&repository).expect("it is there");
        run(std::process::Command::new("cp").arg("-aT").arg(&aside).arg(&repository));
    };
    let packs = || files_in(&repository.join("packs"));
    // The first snapshot's pack is the large one.
    let large = || {
        packs().into_iter().max_by_key(|pack| fs::metadata(pack).expect("it is there").len()).expect("a pack")
    };
    let manifest = |id: &str| repository.join("manifests").join(id);
    let change = |path: &Path, how: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(path).expect("it is there");
        how(&mut bytes);
        fs::write(path, bytes).expect("it is ours");
    };
    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    };
    stillpoint.assert_sound(2);

    type Damage<'d> = (&'d str, &'d dyn Fn());
    let of_packs: [Damage<'_>; 4] = [
        ("a flipped bit", &|| change(&large(), &flip)),
        ("cut off", &|| change(&large(), &|bytes| bytes.truncate(bytes.len() / 2))),
        ("gone", &|| fs::remove_file(large()).expect("it is there")),
        ("exchanged", &|| {
            let packs = packs();
            let (one, other) = (fs::read(&packs[0]).expect("a pack"), fs::read(&packs[1]).expect("a pack"));
            fs::write(&packs[0], other).expect("it is ours");
            fs::write(&packs[1], one).expect("it is ours");
        }),
    ];
    for (name, damage) in of_packs {
        println!("-- a pack: {name}");
        damage();
        let verified = stillpoint.run(&["verify"]).expect("it ends");
        assert_eq!(verified.code(), 5, "{verified:?}");
        for format in ["raw", "qcow2"] {
            let restored =
                stillpoint.run(&["restore", second, "--disk", &wish, "--format", format]).expect("it ends");
            println!("{}", restored.stderr.trim_end());
            assert_ne!(restored.code(), 0, "{name}, {format}");
            assert!(format != "raw" || restored.code() == 5, "{restored:?}");
            assert!(!target.exists(), "{name}, {format}: what is damaged is not restored");
        }
        // A run that needs the damaged parent says so, or shares what it does not read; then `verify` tells of it.
        bare.write("d", 0xa2, 2 * MIB, MIB);
        let next = stillpoint.run(&["snapshot", "vm"]).expect("it ends");
        println!("the next run: {} {}", next.code(), next.stderr.trim_end());
        if next.code() != 0 {
            next.assert_refused(5, "or delete them");
            for id in [first, second] {
                stillpoint.must(&["delete", id]);
            }
            stillpoint.must(&["snapshot", "vm"]);
            stillpoint.assert_sound(1);
        } else {
            let id = next.object["snapshot"].as_str().expect("an id");
            let restored = stillpoint.run(&["restore", id, "--disk", &wish]).expect("it ends");
            let verified = stillpoint.run(&["verify"]).expect("it ends");
            let damage = verified.object["damage"].as_array().expect("a list");
            let named = damage.iter().any(|place| place["snapshot"] == id);
            println!("it restores with {}; verify names it: {named}", restored.code());
            if restored.code() == 0 {
                assert!(same(&target, "raw", &bare.path("d.raw"), "raw"), "{name}: on a damaged parent");
                fs::remove_file(&target).expect("it is there");
            } else {
                assert!(restored.code() == 5 && !target.exists(), "{restored:?}");
            }
            assert_eq!(named, restored.code() != 0, "{name}: {verified:?}");
        }
        mend();
        bare.write("d", 0xa3, 3 * MIB, 4096);
        let next = stillpoint.must(&["snapshot", "vm"]);
        stillpoint.must(&["restore", next["snapshot"].as_str().expect("an id"), "--disk", &wish]);
        assert!(same(&target, "raw", &bare.path("d.raw"), "raw"), "{name}: the run after it was mended");
        fs::remove_file(&target).expect("it is there");
        mend();
    }

    let of_manifests: [Damage<'_>; 4] = [
        ("a flipped bit", &|| change(&manifest(first), &flip)),
        ("empty", &|| change(&manifest(first), &|bytes| bytes.clear())),
        ("huge", &|| change(&manifest(first), &|bytes| bytes.resize(80 << 20, 0))),
        ("another's", &|| {
            fs::copy(manifest(second), manifest(first)).expect("copied");
        }),
    ];
    for (name, damage) in of_manifests {
        println!("-- a manifest: {name}");
        damage();
        for words in [&["show", &**first][..], &["restore", first, "--disk", &wish]] {
            let ended = stillpoint.run(words).expect("it ends");
            println!("{}", ended.stderr.trim_end());
            ended.assert_refused(5, "manifests/");
        }
        assert_eq!(stillpoint.run(&["verify"]).expect("it ends").code(), 5);
        let listed = stillpoint.must(&["snapshots"]);
        let damaged =
            listed["snapshots"].as_array().expect("a list").iter().filter(|row| !row["damage"].is_null());
        assert_eq!(damaged.count(), 1, "{listed}");
        stillpoint.must(&["verify", second]);
        mend();
    }

    println!("-- config and keys");
    let config = repository.join("config");
    let keys = || files_in(&repository.join("keys"));
    let other = Stillpoint::with_key_file().expect("another repository");
    let of_config: [(&str, &dyn Fn(), i32); 7] = [
        ("garbage", &|| change(&config, &|bytes| *bytes = b"{]".to_vec()), 5),
        ("empty", &|| change(&config, &|bytes| bytes.clear()), 5),
        ("gone", &|| fs::remove_file(&config).expect("it is there"), 3),
        (
            "another's",
            &|| {
                fs::copy(other.repository().join("config"), &config).expect("copied");
            },
            5,
        ),
        (
            "a later format",
            &|| {
                change(&config, &|bytes| {
                    *bytes = String::from_utf8_lossy(bytes).replacen(":1", ":99", 1).into_bytes();
                })
            },
            1,
        ),
        ("no key", &|| keys().iter().for_each(|key| fs::remove_file(key).expect("it is there")), 6),
        ("a damaged key", &|| keys().iter().for_each(|key| change(key, &flip)), 5),
    ];
    for (name, damage, code) in of_config {
        damage();
        let ended = stillpoint.run(&["snapshots"]).expect("it ends");
        println!("{name}: {} {}", ended.code(), ended.stderr.trim_end());
        ended.assert_refused(code, "cannot be opened");
        mend();
    }
    stillpoint.assert_sound(2);
}

#[test]
fn a_run_leaves_its_secret_in_nothing_that_it_writes_and_its_files_to_nobody_else() {
    const MARK: &str = "marked-secret-of-a-whole-run";
    let stillpoint = Stillpoint::new().expect("a repository");
    fs::remove_dir_all(stillpoint.repository()).expect("it is there");
    fs::write(stillpoint.path("passphrase"), format!("{MARK}\n")).expect("written");
    let made = stillpoint.run(&["init"]).expect("it ends");
    let folder = Bare::folder();
    image(folder.path(), "d.raw", "raw", "8M");
    fill(folder.path(), "d.raw", "raw", 0x11, 0, 8 * MIB);
    let bare = Bare::start(folder, &[BareDisk::new("d", "d.raw", "raw").slow()], &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    let mut run = stillpoint.start(&["snapshot", "vm"]).expect("it starts");
    let scratch = stillpoint.state().join("scratch");
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !files_in(&scratch).iter().any(|path| path.ends_with("nbd")) {
        assert!(!run.has_ended() && std::time::Instant::now() < end, "no scratch was seen");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }

    println!("-- while it copies");
    let private = |folder: &Path| {
        for entry in walk(folder) {
            let facts = fs::symlink_metadata(&entry).expect("it is there");
            let mode = facts.permissions().mode() & 0o777;
            let wanted = if facts.is_dir() { 0o700 } else { 0o600 };
            // QEMU makes its socket by its own umask; the folder is closed to everyone else. Through root's `scratch` another
            // user's QEMU must pass.
            let other = entry.ends_with("nbd") || entry.ends_with("state/scratch") && mode == 0o711;
            assert!(mode == wanted || other, "{} has mode {mode:o}", entry.display());
        }
    };
    for part in ["vms", "journal", "scratch"] {
        assert!(!files_in(&stillpoint.state().join(part)).is_empty(), "{part} has something to look at");
        private(&stillpoint.state().join(part));
    }
    for process in fs::read_dir("/proc").expect("it is mounted").flatten() {
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(process.path().join(file)).unwrap_or_default();
            assert!(!holds(&bytes, MARK), "{} shows it", process.path().join(file).display());
        }
    }
    bare.unthrottle();
    let taken = run.wait().expect("it ends");
    private(&stillpoint.repository());

    println!("-- afterwards");
    let wish = format!("d={}", stillpoint.path("restored").display());
    let others = [
        &["check", "vm"][..],
        &["show", "vm"],
        &["snapshots"],
        &["verify"],
        &["restore", "vm", "--disk", &wish],
    ];
    let mut ended: Vec<Ended> = others.iter().map(|words| stillpoint.run(words).expect("it ends")).collect();
    ended.extend([made, taken]);
    for ended in ended {
        assert!(ended.status.success() && !format!("{ended:?}").contains(MARK), "{ended:?}");
    }
    for folder in [stillpoint.repository(), stillpoint.state(), stillpoint.path("cache")] {
        let files = files_in(&folder);
        assert!(!files.is_empty(), "{} has something to look at", folder.display());
        for file in files {
            assert!(!holds(&fs::read(&file).unwrap_or_default(), MARK), "{} holds it", file.display());
        }
    }
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path()).collect();
    let deeper: Vec<PathBuf> =
        found.iter().filter(|path| path.is_dir()).flat_map(|path| walk(path)).collect();
    found.extend(deeper);
    found.push(folder.to_owned());
    found
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// `nobody`. Source: Debian's base-passwd.
const NOBODY: u32 = 65534;

#[test]
fn root_takes_snapshots_of_a_vm_that_runs_as_another_user() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root may start a QEMU as another user");
        return;
    }
    let stillpoint = Stillpoint::with_key_file().expect("a repository");
    let folder = Bare::folder();
    image(folder.path(), "d.raw", "raw", "8M");
    fill(folder.path(), "d.raw", "raw", 0x11, 0, MIB);
    let bare = Bare::start_as(NOBODY, folder, &[BareDisk::new("d", "d.raw", "raw")], &[]);
    stillpoint.register("vm", &bare.qmp_socket(), None).expect("registered");
    stillpoint.must(&["snapshot", "vm"]);
    bare.write("d", 0x22, MIB, MIB);
    let increment = stillpoint.must(&["snapshot", "vm"]);
    assert_eq!(increment["disks"][0]["method"], "bitmap", "{increment}");
    assert_eq!(files_in(&stillpoint.state().join("scratch")), Vec::<PathBuf>::new());
    stillpoint.assert_sound(2);
}
