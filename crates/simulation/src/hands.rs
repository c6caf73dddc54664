//! The hands of a simulated run: the engine's own guest side, `vm::point`'s own steps and way back, over the world.
//!
//! What is repeated here and not shared with the engine is what its shell does between sockets and files: the order of
//! stop, steps and `cont` in a cut, and when the journal is written.

use crate::line::{Shared, SimulatedLine, doom, wait};
use crate::schedule::Step;
use crate::world::Sabotage;
use engine::guest::Guest;
use guest_protocol::stillpoint::{FilesystemState, GuestReport, ThawCause};
use qmp::transaction::Action as BitmapAction;
use snapshot::Verdict;
use snapshot::conduct::{Ended, Hands};
use snapshot::receipt::{Point, Receipt};
use snapshot::run::Action;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use vm::monitor::MonitorError;
use vm::point::steps::StepError;
use vm::point::undo::{Facts, Place, release};
use vm::point::{Outcome, Plan, steps};

/// Packs that the copy of one disk writes.
const PACKS: usize = 2;

pub(crate) struct SimulatedHands {
    pub(crate) world: Shared,
    pub(crate) guest: Guest<SimulatedLine>,
    pub(crate) plan: Plan,
    pub(crate) packs: BTreeSet<String>,
    pub(crate) froze: Option<bool>,
    /// What could not be released; the journal has it.
    pub(crate) left: Option<String>,
}

impl SimulatedHands {
    fn dead(&self) -> bool {
        self.world.borrow().killed
    }

    fn sabotaged(&self, how: Sabotage) -> bool {
        self.world.borrow().sabotage == Some(how)
    }

    fn begin(&self, step: Step) {
        if !self.dead() {
            self.world.borrow_mut().begin(step);
            self.pass(Duration::ZERO);
        }
    }

    /// Time goes by, in which the guest writes.
    fn pass(&self, time: Duration) {
        let until = self.world.borrow().now + time;
        wait(&self.world, until, false);
        let mut world = self.world.borrow_mut();
        if !world.guest.anything_frozen() {
            let mut rng = world.rng.clone();
            world.qemu.write(&mut rng);
            world.rng = rng;
        }
    }

    fn carry_out(&self, step: &steps::Step) -> Result<(), StepError> {
        self.pass(Duration::from_millis(1));
        self.world.borrow_mut().qemu.carry_out(step)
    }

    fn monitor(&self, name: &str, act: impl FnOnce(&mut crate::qemu::Qemu)) -> Result<(), MonitorError> {
        self.pass(Duration::from_millis(1));
        self.world.borrow_mut().qemu.command(name, |qemu| {
            act(qemu);
            Ok(())
        })
    }

    fn put(&self) -> Result<(), String> {
        self.pass(Duration::from_millis(20));
        self.world.borrow_mut().store.put()
    }

    /// The steps while the virtual CPUs stand still, as `Prepared::cut` has them. Answers whether they still stood at the end.
    fn cut_steps(&mut self) -> Result<bool, String> {
        let words = |error: MonitorError| error.to_string();
        let running = self.world.borrow().qemu.running;
        let restarter = running.then(|| Restarter(Rc::clone(&self.world)));
        if running && self.sabotaged(Sabotage::ThawTooEarly) {
            self.guest.send_thaw_ahead();
        }
        let mut outcome = Ok(());
        if running && !self.sabotaged(Sabotage::CutRunning) {
            outcome = self.monitor("stop", |qemu| qemu.running = false).map_err(words);
            let mut world = self.world.borrow_mut();
            world.standing = !world.qemu.running;
        }
        if running && outcome.is_ok() {
            self.guest.send_thaw_ahead();
        }
        let steps = self.plan.cut_steps();
        outcome = outcome.and_then(|()| {
            steps.iter().try_for_each(|step| self.carry_out(step).map_err(|error| error.to_string()))
        });
        if outcome.is_ok() {
            let mut world = self.world.borrow_mut();
            let truth = world.guest.truth(&world.wanted, &world.disks, !world.request.disks.is_empty());
            world.truth_of_application = truth.1;
            world.truth = Some(if world.qemu.cut_running && world.wanted.len() > 1 {
                snapshot::Level::None
            } else {
                truth.0
            });
        }
        let stood = !self.world.borrow().qemu.running || self.sabotaged(Sabotage::CutRunning);
        if running {
            let again = self.monitor("cont", |_| ());
            outcome = again.map_err(words).and(outcome);
        }
        drop(restarter);
        outcome.map(|()| stood)
    }
}

/// Lets the virtual CPUs run when the cut is over, however it ends: as the process that holds the monitor's second handle does. An
/// owner who paused the VM meanwhile does so again.
struct Restarter(Shared);

impl Drop for Restarter {
    fn drop(&mut self) {
        self.0.borrow_mut().go_on();
    }
}

impl Hands for SimulatedHands {
    type Error = String;

    fn now(&self) -> Duration {
        self.world.borrow().now
    }

    fn wall_ms(&self) -> u64 {
        u64::try_from(self.world.borrow().now.as_millis()).unwrap_or(0)
    }

    fn interrupted(&self) -> bool {
        self.world.borrow().cancel.is_set()
    }

    fn begins(&mut self, action: Action) {
        self.begin(match action {
            Action::Freeze => Step::Freeze,
            Action::Cut => Step::Cut,
            Action::Thaw => Step::Thaw,
            Action::Judge => return,
            Action::Copy => Step::Copy,
            Action::Seal => Step::Seal,
            Action::Release => Step::Release,
            Action::Undo => Step::Undo,
        });
    }

    fn prepare(&mut self, _run: &str) -> Result<(), String> {
        self.world.borrow_mut().journal = Some((self.plan.clone(), Outcome::Dropped));
        self.begin(Step::Prepare);
        let steps = self.plan.prepare_steps();
        steps.iter().try_for_each(|step| self.carry_out(step).map_err(|error| error.to_string()))
    }

    fn freeze(&mut self, run: &str) -> Result<(), String> {
        let (request, cancel) = {
            let world = self.world.borrow();
            (world.request.clone(), world.cancel.clone())
        };
        let frozen = self.guest.freeze(&request, run, &cancel);
        self.froze = Some(frozen.is_ok());
        frozen
    }

    fn cut(&mut self) -> Result<Option<Point>, String> {
        let vcpus_stopped = self.cut_steps()?;
        // If the VM is found paused from now on, its owner did it.
        self.plan.running = false;
        let world = self.world.borrow();
        let at_ms = u64::try_from(world.now.as_millis()).unwrap_or(0);
        let disks = world.wanted.clone();
        Ok(Some(Point { at_ms, vcpus_stopped, stopped_ms: 5.0, disks, ..Point::default() }))
    }

    fn thaw(&mut self, run: &str) -> Ended {
        if self.dead() {
            return Ended::default();
        }
        if self.sabotaged(Sabotage::ThawForgotten) && self.froze == Some(false) {
            return Ended::default();
        }
        let mut ended = self.guest.thaw(run);
        doom(&self.world);
        let now = self.world.borrow().now;
        self.world.borrow_mut().wire.thaw_tried = Some(now);
        if self.sabotaged(Sabotage::ThawAssumed) && !ended.answered {
            let report =
                GuestReport { id: run.to_owned(), thawed_by: ThawCause::Host, ..GuestReport::default() };
            let part = |serial: &String| guest_protocol::stillpoint::FilesystemReport {
                device_number: "254:0".to_owned(),
                disks: vec![guest_protocol::stillpoint::GuestDisk {
                    serial: Some(serial.clone()),
                    ..Default::default()
                }],
                state: FilesystemState::Held,
                ..Default::default()
            };
            let filesystems = self.world.borrow().wanted.iter().map(part).collect();
            ended = Ended { answered: true, report: Some(GuestReport { filesystems, ..report }), ..ended };
        }
        if self.sabotaged(Sabotage::EarlyThawIgnored) {
            for part in ended.report.iter_mut().flat_map(|report| &mut report.filesystems) {
                if part.state == FilesystemState::EarlyThaw {
                    part.state = FilesystemState::Held;
                }
            }
        }
        ended
    }

    fn copy(&mut self, _receipt: &mut Receipt) -> Result<(), String> {
        let steps = self.plan.export_steps();
        let exported =
            steps.iter().try_for_each(|step| self.carry_out(step).map_err(|error| error.to_string()));
        let disks = self.world.borrow().wanted.clone();
        let copied = exported.and_then(|()| {
            for disk in &disks {
                for number in 0..PACKS {
                    self.put()?;
                    let mut world = self.world.borrow_mut();
                    if world.qemu.broken || !world.qemu.alive {
                        return Err("the snapshot broke".to_owned());
                    }
                    if world.cancel.is_set() {
                        return Err("interrupted".to_owned());
                    }
                    let pack = format!("new-{disk}-{number}");
                    world.store.packs.insert(pack.clone());
                    drop(world);
                    self.packs.insert(pack);
                }
            }
            Ok(())
        });
        if self.sabotaged(Sabotage::CopyAssumed) { Ok(()) } else { copied }
    }

    fn seal(&mut self, receipt: &Receipt, verdict: &Verdict) -> Result<(), String> {
        self.put()?;
        let manifest = serde_json::json!({ "level": verdict.level.to_string(), "receipt": receipt });
        let mut world = self.world.borrow_mut();
        world.store.manifests.insert("new".to_owned(), (self.packs.clone(), Some(manifest)));
        Ok(())
    }

    fn release(&mut self, _run: &str, kept: bool) {
        if self.dead() {
            return;
        }
        let outcome = if kept { Outcome::Kept } else { Outcome::Dropped };
        if kept {
            self.world.borrow_mut().journal = Some((self.plan.clone(), outcome));
        }
        let plan = self.plan.clone();
        match release(&mut Behind(&self.world), &plan, outcome) {
            Ok(()) => self.world.borrow_mut().journal = None,
            Err(error) => self.left = Some(error.to_string()),
        }
    }
}

/// The world's QEMU, as the way back sees it.
pub(crate) struct Behind<'w>(pub(crate) &'w Shared);

impl Place for Behind<'_> {
    fn look(&mut self, plan: &Plan) -> Result<Facts, MonitorError> {
        doom(self.0);
        let mut world = self.0.borrow_mut();
        world.qemu.command("query-block", |_| Ok(()))?;
        Ok(world.qemu.facts(plan))
    }

    fn run(&mut self, step: &steps::Step) -> Result<(), StepError> {
        let until = self.0.borrow().now + Duration::from_millis(1);
        wait(self.0, until, false);
        let mut world = self.0.borrow_mut();
        let forgotten = match step {
            steps::Step::Close(node) => {
                world.sabotage == Some(Sabotage::FilterForgotten) && node.ends_with("-cbw")
            }
            _ => false,
        };
        if forgotten {
            return Ok(());
        }
        match step {
            steps::Step::Change(actions) if world.sabotage == Some(Sabotage::WritesForgotten) => {
                let merges = |action: &BitmapAction| matches!(action, BitmapAction::BlockDirtyBitmapMerge(_));
                let fewer = actions.iter().filter(|action| !merges(action)).cloned().collect();
                world.qemu.carry_out(&steps::Step::Change(fewer))
            }
            step => world.qemu.carry_out(step),
        }
    }

    fn pause(&mut self, time: Duration) {
        let until = self.0.borrow().now + time;
        wait(self.0, until, false);
    }
}
