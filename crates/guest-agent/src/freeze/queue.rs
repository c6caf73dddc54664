//! Short queues while what is dirty is written out.
//!
//! A flush fills a disk's queue with hundreds of requests, and what an application syncs beside it waits behind them three times:
//! a journal's commit is a flush, a write, and a flush. With few requests at once the same is written out a little later,
//! and whoever comes between waits for few. The queue is the whole machine's, so it is short for the flush rounds only, and the
//! undo record says so before it is touched.
//!
//! The kernel stops a queue to change its length, and waits for what is under way and for a grace period of RCU: that one is made short,
//! or the change would stall writers for as long as it saves. A disk that does not answer stops it altogether, so a thread of its own
//! does it, and nobody waits for that one for long.
//!
//! Source: `queue_requests_store` in Linux `block/blk-sysfs.c`, `blk_mq_update_nr_requests` in `block/blk-mq.c`,
//! `Documentation/ABI/stable/sysfs-block`.

use super::gather::read_bounded;
use super::grace::{self, ShortGrace};
use super::ledger::{Ledger, QUEUES_MAX};
use super::mountinfo::DeviceNumber;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

/// Requests of a short queue. Of 8, 16, 32 and 64 this made the longest waits shortest: `docs/performance.md`.
const REQUESTS: u64 = 16;
/// Longest wait until queues are changed. It takes milliseconds.
const CHANGE_MAX: Duration = Duration::from_secs(1);
/// Stack of the thread that changes them.
const STACK_BYTES: usize = 64 << 10;
const ATTRIBUTE_BYTES_MAX: u64 = 64;

/// Of these disks, by kernel name, those with longer queues.
pub fn long<'n>(names: impl IntoIterator<Item = &'n str>) -> Vec<DeviceNumber> {
    let block = Path::new("/sys/block");
    let number = |name: &str| read_text(&block.join(name).join("dev"))?.parse::<DeviceNumber>().ok();
    let mut numbers: Vec<DeviceNumber> = names.into_iter().filter_map(number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let queues = Queues::of_this_machine();
    numbers.retain(|device| queues.requests(*device).is_some_and(|requests| requests > REQUESTS));
    numbers.truncate(QUEUES_MAX);
    numbers
}

/// The queues of the record's disks are short while this lives, if they can be.
#[derive(Debug)]
#[must_use = "dropping it makes the queues as long as before"]
pub struct ShortQueues {
    /// Its end ends the thread's wait.
    release: Option<Sender<()>>,
    /// Says something once they are short, and ends when they are as before.
    changed: Receiver<()>,
}

impl ShortQueues {
    /// Shortens them. `None` where there is nothing to shorten, or no thread to be had: a flush works without.
    pub fn begin(ledger: &Arc<Ledger>) -> Option<Self> {
        ledger.queues().next()?;
        let (release, released) = channel::<()>();
        let (change, changed) = channel();
        let ledger = Arc::clone(ledger);
        let work = move || {
            let queues = Queues::of_this_machine();
            queues.shorten(&ledger);
            // Nobody may listen any more.
            let _heard = change.send(()).is_ok();
            let _released = released.recv().is_err();
            queues.lengthen(&ledger);
        };
        thread::Builder::new().name("queues".to_owned()).stack_size(STACK_BYTES).spawn(work).ok()?;
        // One that is late shortens them later, and lengthens them all the same.
        let _in_time = changed.recv_timeout(CHANGE_MAX).is_ok();
        Some(Self { release: Some(release), changed })
    }
}

impl Drop for ShortQueues {
    fn drop(&mut self) {
        self.release = None;
        // Once for each change that was not heard of yet.
        while self.changed.recv_timeout(CHANGE_MAX).is_ok() {}
    }
}

/// Makes as long as before what an agent that is gone, or hangs, has shortened by its record.
pub fn undo(ledger: &Arc<Ledger>) {
    if ledger.queues().any(|(_, before)| before != 0) {
        Queues::of_this_machine().lengthen(ledger);
    }
}

/// The queues of a machine, or a test's.
#[derive(Debug)]
struct Queues {
    /// What `/sys/dev/block` is.
    devices: PathBuf,
    switch: PathBuf,
}

impl Queues {
    fn of_this_machine() -> Self {
        Self { devices: "/sys/dev/block".into(), switch: grace::SWITCH.into() }
    }

    fn path(&self, device: DeviceNumber) -> PathBuf {
        self.devices.join(device.to_string()).join("queue/nr_requests")
    }

    fn requests(&self, device: DeviceNumber) -> Option<u64> {
        read_text(&self.path(device))?.parse().ok()
    }

    fn shorten(&self, ledger: &Arc<Ledger>) {
        let _short = ShortGrace::begin(&self.switch, ledger);
        for (at, (device, _)) in ledger.queues().enumerate() {
            let Some(before) = self.requests(device).filter(|requests| *requests > REQUESTS) else {
                continue;
            };
            ledger.note_queue(at, before);
            if self.set(device, REQUESTS).is_err() {
                // A container's, say, that may not.
                ledger.note_queue(at, 0);
            }
        }
    }

    fn lengthen(&self, ledger: &Arc<Ledger>) {
        let _short = ShortGrace::begin(&self.switch, ledger);
        for (at, (device, before)) in ledger.queues().enumerate().filter(|(_, (_, before))| *before != 0) {
            if self.set(device, before).is_ok() {
                ledger.note_queue(at, 0);
            }
        }
    }

    fn set(&self, device: DeviceNumber, requests: u64) -> io::Result<()> {
        fs::write(self.path(device), requests.to_string())
    }
}

fn read_text(path: &Path) -> Option<String> {
    let bytes = read_bounded(path, ATTRIBUTE_BYTES_MAX).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        folder: tempfile::TempDir,
        ledger: Arc<Ledger>,
        queues: Queues,
    }

    const DISKS: [DeviceNumber; 2] =
        [DeviceNumber { major: 254, minor: 0 }, DeviceNumber { major: 254, minor: 16 }];

    impl Machine {
        fn with(requests: [&str; 2]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (disk, requests) in DISKS.iter().zip(requests) {
                let queue = folder.path().join(disk.to_string()).join("queue");
                fs::create_dir_all(&queue).unwrap();
                fs::write(queue.join("nr_requests"), requests).unwrap();
            }
            fs::write(folder.path().join("switch"), "0\n").unwrap();
            let ledger = Arc::new(Ledger::create(&folder.path().join("undo"), &[], &DISKS).unwrap());
            let queues = Queues { devices: folder.path().into(), switch: folder.path().join("switch") };
            Self { folder, ledger, queues }
        }

        fn requests(&self) -> [u64; 2] {
            DISKS.map(|disk| self.queues.requests(disk).unwrap())
        }

        fn noted(&self) -> Vec<u64> {
            self.ledger.queues().map(|(_, before)| before).collect()
        }
    }

    #[test]
    fn long_queues_are_shortened_and_the_record_says_so() {
        let machine = Machine::with(["256\n", "64\n"]);
        machine.queues.shorten(&machine.ledger);
        assert_eq!((machine.requests(), machine.noted()), ([16, 16], vec![256, 64]));
        machine.queues.lengthen(&machine.ledger);
        assert_eq!((machine.requests(), machine.noted()), ([256, 64], vec![0, 0]));
        let switch = fs::read_to_string(machine.folder.path().join("switch")).unwrap();
        assert_eq!(switch.trim(), "0", "grace periods are as long as before");
    }

    #[test]
    fn queues_that_are_short_or_not_there_are_left_alone() {
        let machine = Machine::with(["8\n", "256\n"]);
        fs::remove_file(machine.queues.path(DISKS[1])).unwrap();
        machine.queues.shorten(&machine.ledger);
        assert_eq!(machine.noted(), [0, 0]);
        machine.queues.lengthen(&machine.ledger);
        assert_eq!(machine.queues.requests(DISKS[0]), Some(8));
    }

    #[test]
    fn what_a_dead_agent_shortened_is_as_long_as_before_by_its_record() {
        let machine = Machine::with(["256\n", "8\n"]);
        machine.queues.shorten(&machine.ledger);
        let found = Arc::new(Ledger::open(&machine.folder.path().join("undo")).unwrap());
        machine.queues.lengthen(&found);
        assert_eq!((machine.requests(), machine.noted()), ([256, 8], vec![0, 0]));
    }
}
