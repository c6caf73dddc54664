//! A thread for each superblock, started before anything is frozen: flushes, freezes and thaws it.
//!
//! Each call may wait in the kernel, and one that waits must not hold up the others. The threads keep no state:
//! what they have done is in the ledger.

use super::kernel::{boottime_ns, freeze, thaw};
use super::ledger::{Freeze, Ledger, Phase, Thaw};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Stack of a thread that makes one call at a time.
const STACK_BYTES: usize = 64 << 10;
/// How often a wait looks whether it is still wanted.
const MOMENT: Duration = Duration::from_millis(5);
/// Pause before a FITHAW that failed for a reason of the file system's own is tried again.
const RETRY: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug)]
enum Order {
    Flush { turn: u64 },
    Freeze { turn: u64 },
    Thaw { whoever_claimed: bool },
}

/// What a thread has done.
#[derive(Clone, Copy, Debug)]
struct Done {
    at: usize,
    /// Of which order: a flush that was given up answers late, and must not pass for a later one.
    turn: u64,
    took: Duration,
}

/// All the threads.
#[derive(Debug)]
pub struct Crew {
    orders: Vec<SyncSender<Order>>,
    done: Receiver<Done>,
    turn: u64,
}

impl Crew {
    /// Starts a thread for each folder, in the order of the ledger.
    /// # Errors
    /// When threads cannot be had.
    pub fn start(folders: &[Arc<OwnedFd>], ledger: &Arc<Ledger>) -> io::Result<Self> {
        let (report, done) = channel();
        let mut orders = Vec::with_capacity(folders.len());
        for (at, folder) in folders.iter().enumerate() {
            // Freeze and the thaw that aborts it may both be waiting for a thread that still flushes.
            let (sender, receiver) = sync_channel(4);
            let hand =
                Hand { at, folder: Arc::clone(folder), ledger: Arc::clone(ledger), report: report.clone() };
            thread::Builder::new()
                .name(format!("fs-{at}"))
                .stack_size(STACK_BYTES)
                .spawn(move || hand.work(&receiver))?;
            orders.push(sender);
        }
        Ok(Self { orders, done, turn: 0 })
    }

    /// Writes out what each file system holds in memory, all at once. Answers how long each one took; `None` for
    /// those that are not done at the deadline, or when `interrupted`, which is asked every few milliseconds.
    pub fn flush(&mut self, deadline: Instant, interrupted: impl Fn() -> bool) -> Vec<Option<Duration>> {
        self.turn += 1;
        let order = Order::Flush { turn: self.turn };
        let mut waiting = (0..self.orders.len()).filter(|at| self.order(*at, order)).count();
        let mut took = vec![None; self.orders.len()];
        while waiting > 0 {
            match self.hear(deadline) {
                Ok(done) if done.turn == self.turn => {
                    took[done.at] = Some(done.took);
                    waiting -= 1;
                }
                // The late answer to a flush that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline && !interrupted() => {}
                Err(_) => break,
            }
        }
        took
    }

    /// Freezes these at the same time. Answers which are done at the deadline; the ledger says with what result.
    /// `interrupted` is asked every few milliseconds and ends the wait, not the calls.
    pub fn freeze(&mut self, which: &[usize], deadline: Instant, interrupted: impl Fn() -> bool) -> bool {
        self.turn += 1;
        for at in which {
            self.order(*at, Order::Freeze { turn: self.turn });
        }
        let mut waiting = which.len();
        while waiting > 0 {
            match self.hear(deadline) {
                Ok(done) if done.turn == self.turn => waiting -= 1,
                // The late answer to a flush that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline || interrupted() => {
                    return false;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        true
    }

    /// The next answer, waiting for it no longer than a moment.
    fn hear(&self, deadline: Instant) -> Result<Done, RecvTimeoutError> {
        let moment = (Instant::now() + MOMENT).min(deadline);
        self.done.recv_timeout(moment.saturating_duration_since(Instant::now()))
    }

    /// Thaws what we froze and nobody else has taken upon himself, last frozen first. Does not wait: see `Ledger::settled`.
    pub fn thaw(&self) {
        for at in (0..self.orders.len()).rev() {
            self.order(at, Order::Thaw { whoever_claimed: false });
        }
    }

    /// Thaws also what the guard took upon itself: it is dead, or hangs.
    pub fn thaw_for_guard(&self) {
        for at in (0..self.orders.len()).rev() {
            self.order(at, Order::Thaw { whoever_claimed: true });
        }
    }

    /// False if the thread is still busy with earlier orders, which a thread in the kernel may be for long.
    fn order(&self, at: usize, order: Order) -> bool {
        self.orders[at].try_send(order).is_ok()
    }
}

struct Hand {
    at: usize,
    folder: Arc<OwnedFd>,
    ledger: Arc<Ledger>,
    report: Sender<Done>,
}

impl Hand {
    fn work(self, orders: &Receiver<Order>) {
        while let Ok(order) = orders.recv() {
            let begun = Instant::now();
            let turn = match order {
                Order::Flush { turn } => {
                    // What a flush answers (EIO …) the freeze will answer again.
                    let _flushed = rustix::fs::syncfs(&self.folder).is_ok();
                    turn
                }
                Order::Freeze { turn } => {
                    self.freeze();
                    turn
                }
                Order::Thaw { whoever_claimed } => {
                    self.thaw(whoever_claimed);
                    continue;
                }
            };
            if self.report.send(Done { at: self.at, turn, took: begun.elapsed() }).is_err() {
                return;
            }
        }
    }

    fn freeze(&self) {
        if !self.ledger.begin_freeze(self.at, boottime_ns()) {
            return;
        }
        let (outcome, errno) = match freeze(self.folder.as_fd()) {
            Ok(()) => (Freeze::Frozen, 0),
            Err(Errno::BUSY) => (Freeze::Busy, 0),
            Err(error @ (Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS)) => {
                (Freeze::Unsupported, error.raw_os_error())
            }
            Err(error) => (Freeze::Failed, error.raw_os_error()),
        };
        self.ledger.end_freeze(self.at, outcome, errno, boottime_ns());
        if self.ledger.phase() != Phase::Armed {
            self.thaw(false);
        }
    }

    fn thaw(&self, whoever_claimed: bool) {
        if self.ledger.settled(self.at) {
            return;
        }
        if !self.ledger.claim(self.at, Thaw::Agent, boottime_ns()) && !whoever_claimed {
            return;
        }
        thaw_until_settled(self.folder.as_fd(), &self.ledger, self.at, || {
            self.ledger.frozen(self.at) == Freeze::Called
        });
    }
}

/// Calls FITHAW until the superblock is thawed. `freeze_may_come` says whether a FIFREEZE of ours may still enter the
/// kernel, so that "not frozen" is not yet the last word.
pub(super) fn thaw_until_settled(
    folder: std::os::fd::BorrowedFd<'_>,
    ledger: &Ledger,
    at: usize,
    freeze_may_come: impl Fn() -> bool,
) {
    loop {
        let may_come = freeze_may_come();
        match thaw(folder) {
            Ok(()) => return ledger.end_thaw(at, Thaw::Done, boottime_ns()),
            Err(Errno::INVAL) if may_come => {
                if ledger.settled(at) {
                    return;
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(Errno::INVAL) => return ledger.end_thaw(at, Thaw::Early, boottime_ns()),
            // The file system could not write that it is thawed, and stays frozen: there is nothing to do but insist.
            Err(_) => thread::sleep(RETRY),
        }
    }
}

/// Thaws what a dead agent left: no FIFREEZE of it can come any more.
pub fn thaw_left(folder: std::os::fd::BorrowedFd<'_>, ledger: &Ledger, at: usize) {
    thaw_until_settled(folder, ledger, at, || false);
}
