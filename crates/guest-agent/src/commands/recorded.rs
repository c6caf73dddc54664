//! Guests recorded as text in `testdata/guests`, made into folders that look like their `/proc`, `/sys` and `/run`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A guest that was recorded, in a folder.
#[derive(Debug)]
pub(super) struct Guest(tempfile::TempDir);

impl Guest {
    /// Each line of a recording is `f PATH TEXT` (a file; `\n` and `\\` stand for a newline and a backslash), `d PATH` (a
    /// folder), `l PATH TARGET` (a link, both from the root) or a `#` and what to know about it.
    pub(super) fn recorded(name: &str) -> Guest {
        // Relative to the package, where cargo starts tests: where this was built may be another checkout.
        let recording = Path::new("../../testdata/guests").join(name);
        let recording = fs::read_to_string(recording).expect("a recording");
        let guest = Guest(tempfile::tempdir().expect("a folder"));
        for line in recording.lines().filter(|line| !line.starts_with('#')) {
            let mut words = line.splitn(3, ' ');
            let (kind, path) = (words.next().expect("a kind"), words.next().expect("a path"));
            let text = words.next().unwrap_or_default();
            let path = guest.path().join(path);
            let parent = if kind == "d" { Some(&*path) } else { path.parent() };
            fs::create_dir_all(parent.expect("a folder")).expect("made");
            match kind {
                "f" => fs::write(path, unescape(text)).expect("written"),
                "l" => symlink(guest.path().join(text), path).expect("linked"),
                _ => assert_eq!(kind, "d", "{line}"),
            }
        }
        guest
    }

    /// What stands for `/`.
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Mounts each of these `(MAJOR:MINOR, mount point)` as ext4.
    pub(super) fn mount(&self, mounts: &[(&str, &str)]) {
        let line = |(at, (device, place)): (usize, &(&str, &str))| {
            format!("{} 1 {device} / {place} rw - ext4 /dev/x rw\n", at + 20)
        };
        fs::create_dir_all(self.path().join("proc/self")).expect("made");
        let table: String = mounts.iter().enumerate().map(line).collect();
        fs::write(self.path().join("proc/self/mountinfo"), table).expect("written");
    }
}

fn unescape(text: &str) -> String {
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => plain.push(if letters.next() == Some('n') { '\n' } else { '\\' }),
            _ => plain.push(letter),
        }
    }
    plain
}
