//! How long each fsync and each commit took, and when: written down in the guest's memory, read out afterwards.
//!
//! A line for each, `LETTER BEGAN TOOK`, in nanoseconds. BEGAN counts from 1970 by the guest's wall clock as it was when the
//! load started, and by its monotonic clock from then on: it never steps, and a host that asks the guest for its time can
//! place it. The file belongs on a tmpfs, which no freeze touches.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const BLOCK: usize = 4096;
/// The file that is synced, as large as a segment of a database's log, which is overwritten in place as well.
const SYNCED_BYTES: u64 = 16 << 20;
/// What the random writes are spread over, and a page of a database at a time.
const DIRTIED_BYTES: u64 = 768 << 20;
const PAGE: usize = 16 << 10;
/// Noise to write from; each write begins somewhere else in it.
const NOISE_BYTES: usize = 1 << 20;
/// How often the random writer looks whether it is behind its pace.
const TICK: Duration = Duration::from_millis(10);
/// How far behind it may be before it forgives itself: after a freeze it does not catch up what it could not write.
const BEHIND_MAX: Duration = Duration::from_millis(100);

/// Where times are written down; cheap to clone.
#[derive(Clone)]
pub(crate) struct Log {
    file: Arc<Mutex<File>>,
    started: Instant,
    started_at: Duration,
}

impl Log {
    pub(crate) fn create(path: &str) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let started_at = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        Ok(Self { file: Arc::new(Mutex::new(file)), started: Instant::now(), started_at })
    }

    /// Notes what began then and has just ended.
    pub(crate) fn note(&self, letter: &str, began: Instant) -> io::Result<()> {
        self.line(letter, began, began.elapsed().as_nanos())
    }

    fn line(&self, letter: &str, began: Instant, figure: u128) -> io::Result<()> {
        let at = (self.started_at + began.duration_since(self.started)).as_nanos();
        let line = format!("{letter} {at} {figure}\n");
        self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes())
    }
}

/// Overwrites one block after the other and has each synced, until it fails.
pub(crate) fn sync_blocks(path: &str, letter: &str, log: &Log, pause: Duration) -> io::Result<()> {
    let file = filled(path, SYNCED_BYTES)?;
    let block = [0x5A; BLOCK];
    for offset in (0..SYNCED_BYTES).step_by(BLOCK).cycle() {
        let began = Instant::now();
        file.write_all_at(&block, offset)?;
        file.sync_all()?;
        log.note(letter, began)?;
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Overwrites pages anywhere in a file without syncing them, so many MiB each second, until it fails. What it came to is
/// noted each second, in bytes.
pub(crate) fn dirty_pages(path: &str, letter: &str, log: &Log, mib_per_s: u64) -> io::Result<()> {
    let file = filled(path, DIRTIED_BYTES)?;
    let mut random = Random(1);
    let noise: Vec<u8> = (0..NOISE_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let rate = f64::from(u32::try_from(mib_per_s << 20).map_err(io::Error::other)?);
    let (mut since, mut second) = (Instant::now(), Instant::now());
    let (mut written, mut noted) = (0.0, 0_u128);
    loop {
        let due = since.elapsed().as_secs_f64() * rate;
        if due - written > BEHIND_MAX.as_secs_f64() * rate {
            (since, written) = (Instant::now(), 0.0);
        } else if due > written {
            let from = usize::try_from(random.next()).unwrap_or(0) % (NOISE_BYTES - PAGE);
            let to = random.next() % (DIRTIED_BYTES / PAGE as u64) * PAGE as u64;
            file.write_all_at(&noise[from..from + PAGE], to)?;
            written += PAGE as f64;
            noted += PAGE as u128;
        } else {
            std::thread::sleep(TICK);
        }
        if second.elapsed() >= Duration::from_secs(1) {
            log.line(letter, second, noted)?;
            (second, noted) = (Instant::now(), 0);
        }
    }
}

/// A file of that size, all of it allocated and on disk: what is measured is overwriting.
fn filled(path: &str, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let fill = vec![0xA5; 1 << 20];
    for offset in (0..bytes).step_by(fill.len()) {
        file.write_all_at(&fill, offset)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// Numbers that look random, the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
