//! Prints what a repository costs on this machine, one JSON object a line: `figures [full|increment]`.
//!
//! CPU seconds are those of the whole process, its threads included; making the disk's content is not counted.
//! `full`: 2 GiB, of which half is noise, a quarter text, a quarter holes. `increment`: 10,000 random 4 KiB writes
//! of noise over 4 GiB without a hole.
#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has nothing to say")]

use repository::{DiskRoot, Manifest, Options, Part, Repository, Role, Secret, SnapshotId, create_key_file};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

const PIECE: usize = 1 << 20;
const BLOCK: usize = 4096;

fn main() {
    let which = std::env::args().nth(1);
    let folder = tempfile::tempdir().unwrap();
    create_key_file(&folder.path().join("key")).unwrap();
    if which.as_deref() != Some("increment") {
        full(&repository(folder.path(), "full"));
    }
    if which.as_deref() != Some("full") {
        increment(&repository(folder.path(), "increment"));
    }
}

fn repository(folder: &Path, name: &str) -> Repository {
    let secret = Secret::KeyFile(folder.join("key"));
    let place = folder.join(name);
    Repository::init(&place, &secret).unwrap();
    let options = Options { cache: Some(folder.join(format!("{name}-cache"))) };
    Repository::open_with(&place, &secret, &options).unwrap()
}

fn full(repository: &Repository) {
    const PIECES: u64 = 2048;
    let mut meter = Meter::default();
    let mut noise = Noise(1);
    let mut piece = vec![0; PIECE];
    let writer = meter.run(|| repository.begin().unwrap());
    let mut disk = writer.disk(PIECES * PIECE as u64, None).unwrap();
    for number in 0..PIECES {
        // In stretches of 16 MiB, as file systems lay files out.
        match number / 16 % 4 {
            0 | 1 => noise.fill(&mut piece),
            2 => text(&mut noise, &mut piece),
            _ => continue,
        }
        meter.run(|| disk.write(number * PIECE as u64, &piece).unwrap());
    }
    let (root, stats) = meter.run(|| disk.finish().unwrap());
    let id = meter.run(|| writer.commit(manifest(None, root)).unwrap());
    meter.print("full", PIECES * PIECE as u64, stats.changed_bytes, stats.stored_bytes);

    let root = repository.manifest(&id).unwrap().parts[0].root;
    let reader = repository.disk(&root);
    let mut meter = Meter::default();
    let mut read_bytes = 0;
    meter.run(|| {
        for range in reader.data_ranges() {
            let range = range.unwrap();
            for at in range.clone().step_by(PIECE) {
                let length = usize::try_from(range.end - at).unwrap().min(PIECE);
                reader.read_at(at, &mut piece[..length]).unwrap();
                read_bytes += length as u64;
            }
        }
    });
    meter.print("read", reader.size_bytes(), read_bytes, 0);
    let mut meter = Meter::default();
    let report = meter.run(|| repository.verify(None, &mut |_, _| ()).unwrap());
    assert!(report.damage.is_empty());
    meter.print("verify", report.bytes, 0, 0);
}

fn increment(repository: &Repository) {
    const SIZE: u64 = 4 << 30;
    let mut noise = Noise(2);
    let mut piece = vec![0; PIECE];
    let mut meter = Meter::default();
    let writer = repository.begin().unwrap();
    let mut disk = writer.disk(SIZE, None).unwrap();
    for at in (0..SIZE).step_by(PIECE) {
        // Every block differs from every other, and compresses well: a tree without holes, cheap to make.
        for (number, block) in piece.chunks_mut(BLOCK).enumerate() {
            let value = (at + (number * BLOCK) as u64 + 1).to_le_bytes();
            block.chunks_mut(8).for_each(|word| word.copy_from_slice(&value));
        }
        meter.run(|| disk.write(at, &piece).unwrap());
    }
    let (root, stats) = meter.run(|| disk.finish().unwrap());
    let parent = writer.commit(manifest(None, root)).unwrap();
    meter.print("full_compressible", SIZE, stats.changed_bytes, stats.stored_bytes);

    let mut blocks = BTreeSet::new();
    while blocks.len() < 10_000 {
        blocks.insert(noise.next() % (SIZE / BLOCK as u64));
    }
    let mut meter = Meter::default();
    let mut block = [0; BLOCK];
    let writer = repository.begin().unwrap();
    let mut disk = meter.run(|| writer.disk(SIZE, Some(&root)).unwrap());
    for number in blocks {
        noise.fill(&mut block);
        meter.run(|| disk.write(number * BLOCK as u64, &block).unwrap());
    }
    let (root, stats) = meter.run(|| disk.finish().unwrap());
    meter.run(|| writer.commit(manifest(Some(parent), root)).unwrap());
    meter.print("increment", SIZE, stats.changed_bytes, stats.stored_bytes);
}

fn manifest(parent: Option<SnapshotId>, root: DiskRoot) -> Manifest {
    let part =
        Part { name: "vda".into(), role: Role::Disk, size_bytes: root.size_bytes, root, facts: [].into() };
    Manifest {
        vm: "figures".into(),
        parent,
        created_at_ms: 0,
        description: None,
        level: "none".into(),
        parts: vec![part],
        definition: serde_json::Value::Null,
        receipt: serde_json::Value::Null,
    }
}

/// Time and CPU of what it runs, added up.
#[derive(Default)]
struct Meter {
    wall_s: f64,
    cpu_s: f64,
}

impl Meter {
    fn run<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (wall, cpu) = (Instant::now(), cpu_s());
        let value = work();
        self.wall_s += wall.elapsed().as_secs_f64();
        self.cpu_s += cpu_s() - cpu;
        value
    }

    fn print(&self, figure: &str, disk_bytes: u64, data_bytes: u64, stored_bytes: u64) {
        let line = serde_json::json!({
            "figure": figure, "disk_bytes": disk_bytes, "data_bytes": data_bytes, "stored_bytes": stored_bytes,
            "wall_s": (self.wall_s * 100.0).round() / 100.0, "cpu_s": (self.cpu_s * 100.0).round() / 100.0,
            "peak_rss_kib": peak_rss_kib(),
        });
        println!("{line}");
    }
}

/// Fine enough for calls of microseconds: the scheduler's nanoseconds, summed over all threads that live.
fn cpu_s() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    #[expect(clippy::cast_precision_loss, reason = "seconds and nanoseconds of a short run")]
    let seconds = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    seconds
}

fn peak_rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]));
    }
}

/// Words of a small vocabulary in random order.
fn text(noise: &mut Noise, bytes: &mut [u8]) {
    const WORDS: [&[u8]; 8] =
        [b"frozen ", b"the ", b"thaw\n", b"database ", b"of a ", b"snapshot ", b"commit 12345 ", b"and "];
    let mut at = 0;
    while at < bytes.len() {
        let word = WORDS[usize::try_from(noise.next() % 8).unwrap()];
        let length = word.len().min(bytes.len() - at);
        bytes[at..at + length].copy_from_slice(&word[..length]);
        at += length;
    }
}
