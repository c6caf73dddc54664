//! Leads one run from its first action to its last: what each answer means for the receipt, the level and the end.
//!
//! [`run`](crate::run) is the table of what comes next; this fills the receipt on the way, judges it, and keeps what
//! the run owes. What the actions do to a guest, a QEMU and a store is in [`Hands`]: the engine's are real, a
//! simulation's are not, and both are led by the same code.

use crate::receipt::{Point, Receipt, StockFreeze};
use crate::run::{Action, Event, Run, State};
use crate::{Level, Reason, Request, Verdict, judge, required_unmet};
use guest_protocol::stillpoint::GuestReport;
use std::time::Duration;

/// Carries actions out. Each returns when the action is over, or given up.
pub trait Hands {
    /// Why an action failed.
    type Error;
    /// Time since some beginning.
    fn now(&self) -> Duration;
    /// Host's wall clock, milliseconds since 1970; for people.
    fn wall_ms(&self) -> u64;
    /// Someone wants the run to end.
    fn interrupted(&self) -> bool;
    /// An action begins; for progress.
    fn begins(&mut self, action: Action);
    /// Does everything slow that changes nothing for the guest.
    ///
    /// # Errors
    /// Whatever of it was done is released.
    fn prepare(&mut self, run: &str) -> Result<(), Self::Error>;
    /// Asks the guest to freeze.
    ///
    /// # Errors
    /// In words; what the guest did is not known then.
    fn freeze(&mut self, run: &str) -> Result<(), String>;
    /// Cuts the disks; `None` if no disk is wanted.
    ///
    /// # Errors
    /// No disk may be taken for cut then.
    fn cut(&mut self) -> Result<Option<Point>, Self::Error>;
    /// Asks the guest to thaw, until it answers or patience ends.
    fn thaw(&mut self, run: &str) -> Ended;
    /// Reads and stores the disks, and notes in the receipt how.
    ///
    /// # Errors
    /// No disk may be taken for stored then.
    fn copy(&mut self, receipt: &mut Receipt) -> Result<(), Self::Error>;
    /// Writes the manifest. From its success on the snapshot exists.
    ///
    /// # Errors
    /// There is no snapshot then.
    fn seal(&mut self, receipt: &Receipt, verdict: &Verdict) -> Result<(), Self::Error>;
    /// Takes out of QEMU what the run put there; `kept` says whether the snapshot exists. A failure is the hands' own
    /// to tell: the journal has it, and the next run tries again.
    fn release(&mut self, run: &str, kept: bool);
}

/// How a freeze ended.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    /// The guest answered the thaw.
    pub answered: bool,
    /// The agent knows nothing of the run, so nothing of it is frozen.
    pub unknown: bool,
    /// What our agent says of the freeze.
    pub report: Option<GuestReport>,
    /// What was seen of a stock agent's freeze.
    pub stock: Option<StockFreeze>,
    /// What went wrong.
    pub reasons: Vec<Reason>,
}

/// Why there is no snapshot.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure<E> {
    /// The guest could not be frozen, and a frozen one was required.
    Freeze {
        /// The agent's words.
        cause: String,
        /// The guest answered the thaw that followed, or said that nothing of the run is frozen.
        thawed: bool,
    },
    /// A required application was not quiesced.
    RequiredApplication(Reason),
    /// The snapshot would be worth less than required.
    BelowRequired {
        /// What it would be worth.
        reached: Level,
        /// What was required.
        required: Level,
        /// Why.
        reasons: Vec<Reason>,
    },
    /// Someone wanted it to end.
    Interrupted,
    /// An action failed.
    Action(E),
}

/// A run that was kept: the snapshot exists.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// The evidence.
    pub receipt: Receipt,
    /// What it is worth.
    pub verdict: Verdict,
}

/// Leads a run. Whatever happens, a panic of the hands included, a guest that was asked to freeze is asked to thaw,
/// and what was put into QEMU is released.
///
/// # Errors
/// Why there is no snapshot.
pub fn conduct<H: Hands>(
    hands: H,
    request: &Request,
    receipt: Receipt,
    can_freeze: bool,
) -> (H, Result<Kept, Failure<H::Error>>) {
    let run = Run::new(request, can_freeze);
    let owes = Owes::default();
    let mut led = Led { hands: Some(hands), request, run, receipt, verdict: None, failure: None, owes };
    match led.prepare() {
        Ok(()) => led.walk(),
        Err(error) => {
            led.fail(Failure::Action(error));
            led.release(false);
        }
    }
    led.end()
}

/// What must still be done whatever happens.
#[derive(Clone, Copy, Debug, Default)]
struct Owes {
    thaw: bool,
    release: bool,
}

struct Led<'r, H: Hands> {
    /// Absent only once the run is over.
    hands: Option<H>,
    request: &'r Request,
    run: Run,
    receipt: Receipt,
    verdict: Option<Verdict>,
    failure: Option<Failure<H::Error>>,
    owes: Owes,
}

impl<H: Hands> Led<'_, H> {
    fn prepare(&mut self) -> Result<(), H::Error> {
        self.owes.release = true;
        let run = self.receipt.run.clone();
        let prepared = self.hands().prepare(&run);
        self.receipt.phases_ms.prepare = self.since(Duration::ZERO);
        prepared
    }

    fn walk(&mut self) {
        let mut action = self.run.next(Event::Begin);
        while let Some(wanted) = action {
            // The table says where an interruption means something; elsewhere it is heard before the next action.
            if self.hands().interrupted()
                && let Some(instead) = self.run.next(Event::Interrupted)
            {
                self.fail(Failure::Interrupted);
                action = Some(instead);
                continue;
            }
            self.hands().begins(wanted);
            let event = self.perform(wanted);
            action = self.run.next(event);
        }
    }

    fn hands(&mut self) -> &mut H {
        self.hands.as_mut().expect("the run is not over")
    }

    fn perform(&mut self, action: Action) -> Event {
        match action {
            Action::Freeze => self.freeze(),
            Action::Cut => self.cut(),
            Action::Thaw => {
                self.thaw();
                Event::ThawEnded
            }
            Action::Judge => self.judge(),
            Action::Copy => {
                let began = self.hands().now();
                let mut receipt = std::mem::take(&mut self.receipt);
                let copied = self.hands().copy(&mut receipt);
                self.receipt = receipt;
                self.receipt.phases_ms.copy = self.since(began);
                match copied {
                    Ok(()) => Event::Copied,
                    Err(error) => {
                        // Whatever it broke off with: it was told to.
                        let interrupted = self.hands().interrupted();
                        self.fail(if interrupted { Failure::Interrupted } else { Failure::Action(error) });
                        Event::CopyFailed
                    }
                }
            }
            Action::Seal => self.seal(),
            Action::Release => {
                self.release(true);
                Event::Cleared
            }
            Action::Undo => {
                self.release(false);
                Event::Cleared
            }
        }
    }

    fn freeze(&mut self) -> Event {
        let began = self.hands().now();
        self.owes.thaw = true;
        self.receipt.order.freeze_sent_ms = Some(self.hands().wall_ms());
        let run = self.receipt.run.clone();
        let frozen = self.hands().freeze(&run);
        self.receipt.phases_ms.freeze = self.since(began);
        match frozen {
            Ok(()) => {
                self.receipt.order.frozen_before_point = true;
                Event::Frozen
            }
            Err(cause) => {
                self.receipt.reasons.push(Reason::new("freeze_failed", &self.request.vm, &cause));
                if self.request.require > Level::Crash {
                    self.fail(Failure::Freeze { cause, thawed: false });
                }
                Event::FreezeFailed
            }
        }
    }

    fn cut(&mut self) -> Event {
        let began = self.hands().now();
        match self.hands().cut() {
            // No disk was wanted: the receipt says that there is no point.
            Ok(None) => Event::PointTaken,
            Ok(Some(point)) => {
                // A guest that did not stand still may have thawed before the last disk was cut.
                self.receipt.order.point_before_thaw = point.vcpus_stopped || point.shut_off;
                self.receipt.phases_ms.point = self.since(began);
                self.receipt.point = Some(point);
                Event::PointTaken
            }
            Err(error) => {
                self.fail(Failure::Action(error));
                Event::PointFailed
            }
        }
    }

    fn thaw(&mut self) {
        let began = self.hands().now();
        let run = self.receipt.run.clone();
        let ended = self.hands().thaw(&run);
        self.owes.thaw = false;
        if let Some(Failure::Freeze { thawed, .. }) = &mut self.failure {
            *thawed = ended.answered || ended.unknown;
        }
        self.receipt.order.thaw_answered = ended.answered;
        self.receipt.guest = ended.report;
        self.receipt.stock = ended.stock;
        self.receipt.reasons.extend(ended.reasons);
        self.receipt.phases_ms.thaw = self.since(began);
    }

    fn judge(&mut self) -> Event {
        let verdict = judge(&self.receipt);
        let (reached, required) = (verdict.level, self.request.require);
        if let Some(reason) = required_unmet(self.request, &self.receipt, &verdict) {
            self.fail(Failure::RequiredApplication(reason));
        } else if reached < required {
            self.fail(Failure::BelowRequired { reached, required, reasons: verdict.reasons.clone() });
        } else {
            self.verdict = Some(verdict);
            return Event::LevelReached;
        }
        Event::LevelMissed
    }

    fn seal(&mut self) -> Event {
        let began = self.hands().now();
        let verdict = self.verdict.clone().expect("it was judged before the copy");
        let receipt = self.receipt.clone();
        let sealed = self.hands().seal(&receipt, &verdict);
        self.receipt.phases_ms.seal = self.since(began);
        match sealed {
            Ok(()) => Event::Sealed,
            Err(error) => {
                self.fail(Failure::Action(error));
                Event::SealFailed
            }
        }
    }

    fn release(&mut self, kept: bool) {
        // Before it is tried: what a second attempt in `drop` would meet is not known.
        self.owes.release = false;
        let run = self.receipt.run.clone();
        self.hands().release(&run, kept);
    }

    fn fail(&mut self, failure: Failure<H::Error>) {
        self.failure.get_or_insert(failure);
    }

    fn since(&mut self, began: Duration) -> u64 {
        let time = self.hands().now().saturating_sub(began);
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    }

    fn end(mut self) -> (H, Result<Kept, Failure<H::Error>>) {
        let state = self.run.state();
        debug_assert!(matches!(state, State::Prepared | State::Kept | State::Abandoned), "{state:?}");
        let receipt = std::mem::take(&mut self.receipt);
        let outcome = match self.verdict.take().filter(|_| state == State::Kept) {
            Some(verdict) => Ok(Kept { receipt, verdict }),
            None => Err(self.failure.take().unwrap_or(Failure::Interrupted)),
        };
        let hands = self.hands.take().expect("taken once, here");
        (hands, outcome)
    }
}

impl<H: Hands> Drop for Led<'_, H> {
    /// A panic: nobody is left to tell.
    fn drop(&mut self) {
        let run = std::mem::take(&mut self.receipt.run);
        let kept = matches!(self.run.state(), State::Releasing | State::Kept);
        let Some(hands) = &mut self.hands else { return };
        if self.owes.thaw {
            hands.thaw(&run);
        }
        if self.owes.release {
            hands.release(&run, kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything goes well, but the vCPUs may not have stood still in the cut.
    struct Well {
        vcpus_stopped: bool,
    }

    impl Hands for Well {
        type Error = String;

        fn now(&self) -> Duration {
            Duration::ZERO
        }

        fn wall_ms(&self) -> u64 {
            0
        }

        fn interrupted(&self) -> bool {
            false
        }

        fn begins(&mut self, _action: Action) {}

        fn prepare(&mut self, _run: &str) -> Result<(), String> {
            Ok(())
        }

        fn freeze(&mut self, _run: &str) -> Result<(), String> {
            Ok(())
        }

        fn cut(&mut self) -> Result<Option<Point>, String> {
            Ok(Some(Point { vcpus_stopped: self.vcpus_stopped, ..Point::default() }))
        }

        fn thaw(&mut self, _run: &str) -> Ended {
            Ended { answered: true, ..Ended::default() }
        }

        fn copy(&mut self, _receipt: &mut Receipt) -> Result<(), String> {
            Ok(())
        }

        fn seal(&mut self, _receipt: &Receipt, _verdict: &Verdict) -> Result<(), String> {
            Ok(())
        }

        fn release(&mut self, _run: &str, _kept: bool) {}
    }

    #[test]
    fn a_guest_that_did_not_stand_still_may_have_thawed_before_the_point() {
        let request = Request { require: Level::None, ..Request::new("db1") };
        let inside = |vcpus_stopped| {
            let (_, outcome) = conduct(Well { vcpus_stopped }, &request, Receipt::default(), true);
            outcome.unwrap().receipt.order.proves_inside()
        };
        assert_eq!([true, false].map(inside), [true, false]);
    }
}
