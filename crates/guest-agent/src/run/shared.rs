//! What the main loop and the thread of a run share.

use super::{Outcome, Refusal};
use crate::freeze::guard::Bell;
use crate::freeze::ledger::{Ledger, Phase};
use crate::hooks::Leftovers;
use guest_protocol::stillpoint::{GuestReport, State};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most thaws that may wait for one run: hosts ask once, monitors may ask again.
const THAWS_MAX: usize = 64;

/// Who asked for a thaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Thawing {
    pub(super) ticket: u64,
    /// qemu-ga's own, which wants a number.
    pub(super) plain: bool,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) state: State,
    pub(super) id: Option<String>,
    pub(super) ledger: Option<Arc<Ledger>>,
    pub(super) bell: Option<Bell>,
    /// Ends what applications do before the freeze.
    pub(super) abort: Arc<AtomicBool>,
    /// The rehearsal that is under way; raised, it ends early.
    checking: Option<Arc<AtomicBool>>,
    pub(super) stop: Option<Phase>,
    pub(super) thaws: Vec<Thawing>,
    pub(super) last: Option<GuestReport>,
    /// What the first plain thaw after a plain freeze that ended by itself must be told.
    pub(super) ended: Option<String>,
    /// Another agent (qemu-ga) left its mark and perhaps frozen file systems: until when they may stay so, in nanoseconds
    /// since boot.
    pub(super) foreign: Option<u64>,
    finished: Vec<(u64, Result<Outcome, Refusal>)>,
}

#[derive(Debug)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    notifier: OwnedFd,
    leftovers: Arc<Leftovers>,
    wake: OwnedFd,
    frozen: AtomicBool,
    stopped: AtomicBool,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let notifier = bell()?;
        let leftovers = Arc::new(Leftovers::beside(&notifier)?);
        Ok(Self {
            inner: Mutex::default(),
            changed: Condvar::new(),
            notifier,
            leftovers,
            wake: bell()?,
            frozen: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere must not keep a guest from being thawed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notifier(&self) -> BorrowedFd<'_> {
        self.leftovers.bell()
    }

    /// Where hooks leave the output of their children.
    pub(super) fn leftovers(&self) -> &Arc<Leftovers> {
        &self.leftovers
    }

    /// For the run's thread: readable when it is to look at `stop`.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen.load(SeqCst)
    }

    pub(super) fn set_frozen(&self, frozen: bool) {
        self.frozen.store(frozen, SeqCst);
    }

    /// Whether the run was asked to end; cheap, for loops.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(SeqCst)
    }

    /// Why the run is to end, if it is.
    pub(super) fn asked_to_stop(&self) -> Option<Phase> {
        self.lock().stop
    }

    /// Enters a state, unless the run was asked to end.
    pub(super) fn enter(&self, state: State) -> Result<(), Phase> {
        let mut inner = self.lock();
        inner.state = state;
        match inner.stop {
            Some(why) if state != State::Thawing => Err(why),
            _ => Ok(()),
        }
    }

    /// Asks the run to end.
    pub(super) fn stop(&self, inner: &mut Inner, why: Phase) {
        inner.stop.get_or_insert(why);
        self.stopped.store(true, SeqCst);
        inner.abort.store(true, SeqCst);
        if let Some(ledger) = &inner.ledger {
            ledger.end(why);
        }
        ring(&self.wake);
    }

    /// Makes ready for a run. False if one holds the guest.
    pub(super) fn begin(&self, id: &str) -> bool {
        let mut inner = self.lock();
        if inner.state != State::Thawed || inner.foreign.is_some() {
            return false;
        }
        let (last, finished) = (inner.last.take(), std::mem::take(&mut inner.finished));
        let checking = inner.checking.take();
        *inner = Inner {
            state: State::Preparing,
            id: Some(id.to_owned()),
            last,
            checking,
            finished,
            ..Inner::default()
        };
        self.stopped.store(false, SeqCst);
        drain(&self.wake);
        true
    }

    /// Makes ready for a rehearsal; answers what is raised when it is to end early. `None` if a run holds the guest, or another
    /// rehearsal is under way.
    pub(super) fn begin_check(&self) -> Option<Arc<AtomicBool>> {
        let mut inner = self.lock();
        if inner.state != State::Thawed || inner.foreign.is_some() || inner.checking.is_some() {
            return None;
        }
        Some(Arc::clone(inner.checking.insert(Arc::default())))
    }

    /// The rehearsal has ended.
    pub(super) fn end_check(&self) {
        self.lock().checking = None;
        self.changed.notify_all();
    }

    /// Ends a rehearsal that is under way: it may not be about its work while the guest is frozen. False if it does not end
    /// within `at_most`.
    pub(super) fn call_off_check(&self, at_most: Duration) -> bool {
        let inner = self.lock();
        if let Some(checking) = &inner.checking {
            checking.store(true, SeqCst);
        }
        let waited = self.changed.wait_timeout_while(inner, at_most, |inner| inner.checking.is_some());
        waited.unwrap_or_else(PoisonError::into_inner).0.checking.is_none()
    }

    /// Ends the run: keeps its report and answers whoever waits for a thaw. True if `ended` was told to someone; otherwise the
    /// next plain thaw will be.
    pub(super) fn end(&self, report: Option<GuestReport>, thawed: i64, ended: Option<String>) -> bool {
        let mut inner = self.lock();
        if report.is_some() {
            inner.last = report;
        }
        let thaws = std::mem::take(&mut inner.thaws);
        let told = thaws.iter().any(|thaw| thaw.plain);
        for thaw in thaws {
            let outcome = if thaw.plain {
                match &ended {
                    Some(message) => Err(Refusal { code: "lease_ended", message: message.clone() }),
                    None => Ok(Outcome::Count(thawed)),
                }
            } else {
                Ok(Outcome::Thawed(Box::new(inner.last.clone().unwrap_or_default())))
            };
            inner.finished.push((thaw.ticket, outcome));
        }
        inner.ended = if told { None } else { ended };
        inner.state = State::Thawed;
        (inner.id, inner.ledger, inner.bell, inner.stop) = (None, None, None, None);
        drop(inner);
        self.changed.notify_all();
        ring(&self.notifier);
        told
    }

    pub(super) fn finish(&self, ticket: u64, outcome: Result<Outcome, Refusal>) {
        self.lock().finished.push((ticket, outcome));
        ring(&self.notifier);
    }

    /// Lets a thaw wait for the run's end.
    pub(super) fn await_thaw(inner: &mut Inner, thaw: Thawing) -> Result<(), Refusal> {
        if inner.thaws.len() >= THAWS_MAX {
            return Err(Refusal { code: "busy", message: "too many thaws wait already".to_owned() });
        }
        inner.thaws.push(thaw);
        Ok(())
    }

    pub(super) fn take_finished(&self) -> Vec<(u64, Result<Outcome, Refusal>)> {
        drain(&self.notifier);
        if self.leftovers.drop_some() {
            ring(&self.notifier);
        }
        std::mem::take(&mut self.lock().finished)
    }

    /// Waits until something has changed, at most so long.
    pub(super) fn wait<'s>(&self, inner: MutexGuard<'s, Inner>, at_most: Duration) -> MutexGuard<'s, Inner> {
        self.changed.wait_timeout(inner, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits until no run holds the guest.
    pub(super) fn wait_thawed(&self, at_most: Duration) -> bool {
        let inner = self.lock();
        let waited = self.changed.wait_timeout_while(inner, at_most, |inner| inner.state != State::Thawed);
        waited.map_or_else(
            |poisoned| poisoned.into_inner().0.state == State::Thawed,
            |(inner, _)| inner.state == State::Thawed,
        )
    }
}

fn ring(bell: &OwnedFd) {
    // A full counter is readable all the same.
    let _rung = rustix::io::write(bell, &1u64.to_ne_bytes()).is_ok();
}

fn drain(bell: &OwnedFd) {
    // Nothing to read means that nobody rang.
    let _rang = rustix::io::read(bell, &mut [0u8; 8][..]).is_ok();
}
