//! The world that a run takes place in: one clock, one queue of what happens next, a guest, a QEMU, a channel and a
//! store. Nothing here reads a real clock or starts a thread, so a seed decides everything.

use crate::guest::{Application, Filesystem, Guest, Kind, Later};
use crate::qemu::Qemu;
use crate::schedule::{Fault, Step, draw};
use engine::watch::Cancel;
use guest_agent::freeze::ledger::Freeze;
use guest_protocol::stillpoint::{ApplicationPolicy, Policy};
use snapshot::{Level, Request};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vm::point::{Outcome, Plan};

/// How the program's process ends in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doom {
    /// `kill -9`: no more instruction is carried out.
    Killed,
    /// A defect: unwinding.
    Panicked,
}

/// A defect put into the world on purpose, to see whether the simulation would notice one like it in the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// An unanswered thaw passes for an answered one, with a fine report.
    ThawAssumed,
    /// A file system thawed early passes for one that was held.
    EarlyThawIgnored,
    /// After a freeze that failed or was not answered no thaw is sent.
    ThawForgotten,
    /// A copy that broke off passes for complete.
    CopyAssumed,
    /// The way back leaves the filter where it is.
    FilterForgotten,
    /// The way back of a failed run loses what was written meanwhile.
    WritesForgotten,
    /// The virtual CPUs run during the cut.
    CutRunning,
    /// The thaw is sent before they stand still.
    ThawTooEarly,
    /// The guard sleeps through the lease's end.
    GuardAsleep,
    /// The agent relies on its guard to thaw when the lease ends.
    GuardTrusted,
}

/// Something to happen.
enum Event {
    ToGuest(Vec<u8>),
    ToHost(Vec<u8>, u32),
    Guest(Later),
    Fault(Fault),
    /// The VM's owner lets it go on.
    GoesOn,
}

/// The channel between host and guest.
#[derive(Default)]
pub(crate) struct Wire {
    pub(crate) connected: bool,
    /// Counts connections: what was sent to an earlier one mostly does not reach the next.
    pub(crate) number: u32,
    pub(crate) arrived: VecDeque<u8>,
    pub(crate) dead_until: Duration,
    /// The other end hung up: the next read says so.
    pub(crate) closed: bool,
    faults: BTreeSet<Fault>,
    pub(crate) freeze_sent: Option<Duration>,
    pub(crate) thaw_sent: Option<Duration>,
    /// The last time that a thaw was tried, sent or not.
    pub(crate) thaw_tried: Option<Duration>,
}

/// The store: a model of the repository's promise that a snapshot is seen only through its manifest.
#[derive(Default)]
pub(crate) struct Store {
    /// Manifests with the packs that they need; the text is the new one's.
    pub(crate) manifests: BTreeMap<String, (BTreeSet<String>, Option<serde_json::Value>)>,
    pub(crate) packs: BTreeSet<String>,
    fails: Option<(u32, Fault)>,
    full: bool,
}

impl Store {
    /// One write.
    pub(crate) fn put(&mut self) -> Result<(), String> {
        if self.full {
            return Err("the store is full".to_owned());
        }
        match &mut self.fails {
            Some((0, fault)) => {
                self.full = *fault == Fault::StoreFull;
                self.fails = None;
                Err("the store failed".to_owned())
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Everything.
pub(crate) struct World {
    pub(crate) now: Duration,
    /// How long the guest's clock stood, in all the pauses that have begun.
    stood: Duration,
    /// When the pause that is now, or was last, ends.
    goes_on: Duration,
    /// The virtual CPUs stand still for the cut.
    pub(crate) standing: bool,
    /// What has reached the guest's port meanwhile.
    at_port: Vec<Vec<u8>>,
    /// When the last bytes for the guest are there: none overtake others.
    heard_until: Duration,
    pub(crate) rng: fastrand::Rng,
    events: BTreeMap<(Duration, u64), Event>,
    numbered: u64,
    pub(crate) guest: Guest,
    pub(crate) qemu: Qemu,
    pub(crate) wire: Wire,
    pub(crate) store: Store,
    pub(crate) cancel: Cancel,
    pub(crate) journal: Option<(Plan, Outcome)>,
    pub(crate) request: Request,
    /// Serial numbers, which are names here, of the disks that the host knows.
    pub(crate) disks: Vec<String>,
    pub(crate) wanted: Vec<String>,
    pub(crate) base: Option<String>,
    pub(crate) truth: Option<Level>,
    pub(crate) truth_of_application: Level,
    faults: Vec<(Step, Fault)>,
    step: Step,
    pub(crate) met: BTreeSet<(Step, Fault)>,
    pub(crate) doom: Option<Doom>,
    pub(crate) killed: bool,
    /// The run is over: nothing strikes any more.
    pub(crate) over: bool,
    pub(crate) sabotage: Option<Sabotage>,
    pub(crate) violations: Vec<String>,
    pub(crate) log: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64, sabotage: Option<Sabotage>, folder: &Path) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let faults = draw(&mut rng);
        let disks: Vec<String> =
            ["root", "data", "log"][..rng.usize(1..=3)].iter().map(|&d| d.to_owned()).collect();
        let chosen = disks.len() > 1 && rng.u8(..6) == 0;
        let wanted = if chosen { disks[..1].to_vec() } else { disks.clone() };
        let mut filesystems: Vec<Filesystem> = disks.iter().map(|disk| Filesystem::new(disk)).collect();
        let kinds = [Kind::Ours, Kind::Ours, Kind::Ours, Kind::Ours, Kind::Ours, Kind::Stock, Kind::Nobody];
        let kind = kinds[rng.usize(..kinds.len())];
        // With a stock agent nobody can tell that such a one lies outside: a gap that SPECIFICATION.md names.
        if rng.u8(..12) == 0 && kind != Kind::Stock {
            filesystems.push(Filesystem::new("iscsi"));
        }
        if rng.u8(..8) == 0 {
            filesystems.pop();
        }
        for part in &mut filesystems {
            part.read_only = rng.u8(..16) == 0;
            part.quiet = rng.bool();
            if rng.u8(..20) == 0 {
                let refusals = [Freeze::Busy, Freeze::Unsupported, Freeze::Unsupported, Freeze::Failed];
                part.refuses = Some(refusals[rng.usize(..4)]);
            }
        }
        let mut guest = Guest::new(kind, filesystems, folder.to_owned());
        let mut request = Request::new("vm");
        if rng.u8(..4) > 0 && !guest.filesystems.is_empty() {
            let policy =
                [Policy::Preferred, Policy::Preferred, Policy::Required, Policy::Off][rng.usize(..4)];
            let places: BTreeSet<usize> =
                (0..rng.usize(1..3)).map(|_| rng.usize(..guest.filesystems.len())).collect();
            guest.application = Some(Application {
                places: places.into_iter().collect(),
                policy,
                refuses: rng.u8(..10) == 0,
                crash_safe: rng.u8(..10) > 0,
                life: 0,
            });
            if policy != Policy::Preferred {
                request.applications =
                    vec![ApplicationPolicy { kind: "postgresql".to_owned(), instance: None, policy }];
            }
        }
        request.require =
            [Level::Crash, Level::Crash, Level::None, Level::Filesystem, Level::Application][rng.usize(..5)];
        request.want = if rng.u8(..12) == 0 { Level::Filesystem } else { Level::Application };
        if request.want < request.require {
            request.require = request.want;
        }
        request.lease_ms = [10_000, 10_000, 2_000, 300][rng.usize(..4)];
        if chosen {
            request.disks.clone_from(&wanted);
        }
        guest.quiesce_takes = Duration::from_millis([1, 50, 900, 8_000][rng.usize(..4)]);
        for takes in &mut guest.kernel_takes {
            // Rarely longer than budget and lease.
            *takes = Duration::from_millis([1, 5, 40, 40, 300, 300, 1_500, 13_000][rng.usize(..8)]);
        }
        guest.guard_sleeps = sabotage == Some(Sabotage::GuardAsleep);
        guest.trusts_guard = sabotage == Some(Sabotage::GuardTrusted);
        let base = rng.bool().then(|| "stillpoint-repo-old".to_owned());
        let mut store = Store::default();
        for name in ["first", "second"] {
            let packs: BTreeSet<String> = [format!("{name}-0"), "shared".to_owned()].into();
            store.packs.extend(packs.clone());
            store.manifests.insert(name.to_owned(), (packs, None));
        }
        Self {
            now: Duration::from_secs(1),
            stood: Duration::ZERO,
            goes_on: Duration::ZERO,
            standing: false,
            at_port: Vec::new(),
            heard_until: Duration::ZERO,
            events: BTreeMap::new(),
            numbered: 0,
            qemu: Qemu::new(&wanted, base.as_deref()),
            guest,
            wire: Wire::default(),
            store,
            cancel: Cancel::default(),
            journal: None,
            request,
            disks,
            wanted,
            base,
            truth: None,
            truth_of_application: Level::None,
            faults,
            step: Step::Prepare,
            met: BTreeSet::new(),
            doom: None,
            killed: false,
            over: false,
            sabotage,
            violations: Vec::new(),
            log: Vec::new(),
            rng,
        }
    }

    pub(crate) fn note(&mut self, what: impl Into<String>) {
        self.log.push(format!("{:>9.3} {}", self.now.as_secs_f64(), what.into()));
    }

    fn later(&mut self, at: Duration, event: Event) {
        self.numbered += 1;
        self.events.insert((at, self.numbered), event);
    }

    /// Lets time go by until then, or until something arrives for the host if that is waited for.
    pub(crate) fn advance(&mut self, to: Duration, for_the_host: bool) {
        self.gather();
        while self.doom.is_none() {
            if for_the_host && (!self.wire.arrived.is_empty() || self.wire.closed) {
                return;
            }
            let Some((&(at, number), _)) = self.events.first_key_value().filter(|((at, _), _)| *at <= to)
            else {
                break;
            };
            let Some(event) = self.events.remove(&(at, number)) else { break };
            self.now = self.now.max(at);
            if !self.guest.anything_frozen() {
                self.qemu.write(&mut self.rng);
            }
            self.happens(event);
            self.gather();
        }
        if self.doom.is_none() {
            self.now = self.now.max(to);
        }
    }

    /// What the guest wants to happen later goes into the queue.
    fn gather(&mut self) {
        for (at, later) in std::mem::take(&mut self.guest.later) {
            // The guest counts by its own clock.
            let at = at.saturating_add(self.stood);
            self.later(at.max(self.now).max(self.goes_on), Event::Guest(later));
        }
        self.violations.append(&mut self.guest.violations);
    }

    /// Its owner has paused the VM.
    pub(crate) fn is_paused(&self) -> bool {
        self.now < self.goes_on
    }

    /// The guest's own clock, which stands while the VM is paused.
    fn guests_now(&self) -> Duration {
        self.now.max(self.goes_on) - self.stood
    }

    /// The VM's owner pauses it: what would happen in the guest happens later, by as long as that lasts.
    fn pause(&mut self, time: Duration) {
        let inside = |event: &Event| matches!(event, Event::Guest(_) | Event::ToGuest(_));
        let put_off: Vec<_> = self.events.extract_if(.., |_, event| inside(event)).collect();
        self.events.extend(
            put_off.into_iter().map(|((at, number), event)| ((at.saturating_add(time), number), event)),
        );
        self.stood += time;
        self.goes_on = self.now + time;
        self.qemu.running = false;
        self.later(self.goes_on, Event::GoesOn);
    }

    fn happens(&mut self, event: Event) {
        let now = self.guests_now();
        let said = match event {
            Event::ToGuest(bytes) => self.guest.hears(&bytes, now),
            Event::Guest(later) => {
                self.note(format!("{later:?}"));
                self.guest.happens(&later, now)
            }
            Event::ToHost(bytes, number) => {
                // The port outlives a connection: what was on its way may meet the next one.
                if self.wire.connected && (number == self.wire.number || self.rng.bool()) {
                    self.wire.arrived.extend(bytes);
                }
                return;
            }
            Event::Fault(fault) => {
                self.strike(fault);
                return;
            }
            Event::GoesOn => {
                self.note("the VM goes on");
                self.go_on();
                return;
            }
        };
        self.send_to_host(said);
    }

    /// The host sends something.
    pub(crate) fn send_to_guest(&mut self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        let now = self.now;
        if text.contains("stillpoint-freeze") || text.contains("guest-fsfreeze-freeze") {
            self.wire.freeze_sent = Some(now);
        }
        if text.contains("stillpoint-thaw") || text.contains("guest-fsfreeze-thaw") {
            self.wire.thaw_sent = Some(now);
        }
        self.note(format!("> {}", text.trim_matches(['\u{fffd}', '\n'])));
        if self.wire.faults.contains(&Fault::RequestsLost) && self.rng.u8(..3) > 0 {
            return;
        }
        if self.standing {
            self.at_port.push(bytes.to_vec());
        } else {
            self.reach_guest(bytes);
        }
    }

    /// The virtual CPUs run, unless the VM's owner has paused it.
    pub(crate) fn go_on(&mut self) {
        self.qemu.running = self.qemu.alive && !self.is_paused();
        self.standing = false;
        for bytes in std::mem::take(&mut self.at_port) {
            self.reach_guest(&bytes);
        }
    }

    fn reach_guest(&mut self, bytes: &[u8]) {
        // What reaches a VM that is paused waits at its port.
        let mut at = self.now.max(self.goes_on).max(self.heard_until);
        for piece in self.pieces(bytes) {
            at += Duration::from_micros(self.rng.u64(10..800));
            self.later(at, Event::ToGuest(piece));
        }
        self.heard_until = at;
    }

    fn send_to_host(&mut self, bytes: Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        self.note(format!("< {}", String::from_utf8_lossy(&bytes).trim_matches(['\u{fffd}', '\n'])));
        let faults = self.wire.faults.clone();
        let has = |fault| faults.contains(&fault);
        if has(Fault::AnswersLost) && self.rng.u8(..3) > 0 {
            return;
        }
        let mut bytes = bytes;
        if has(Fault::StrayLines) {
            let stray = ["{\"return\": {}}\n", "{\"return\": 7, \"id\": 7}\n", "garbage\n", "{\"retu"];
            bytes.splice(0..0, stray[self.rng.usize(..4)].bytes());
        }
        if has(Fault::AnswersTwice) {
            bytes.extend(bytes.clone());
        }
        let mut at = self.now;
        if has(Fault::AnswersLate) {
            at += Duration::from_millis([200, 3_000, 12_000, 40_000, 200_000][self.rng.usize(..5)]);
        }
        let number = self.wire.number;
        for piece in self.pieces(&bytes) {
            at += Duration::from_micros(self.rng.u64(10..800));
            self.later(at, Event::ToHost(piece, number));
        }
    }

    fn pieces(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let length = if self.rng.u8(..4) == 0 { self.rng.usize(1..=rest.len()) } else { rest.len() };
            pieces.push(rest[..length].to_vec());
            rest = &rest[length..];
        }
        pieces
    }

    /// A step begins: the faults that were drawn for it are on their way.
    pub(crate) fn begin(&mut self, step: Step) {
        self.step = step;
        self.wire.faults.clear();
        self.note(format!("== {step:?}"));
        for fault in self.faults.clone().into_iter().filter(|(at, _)| *at == step).map(|(_, fault)| fault) {
            let delay = Duration::from_millis([0, 0, 0, 1, 30, 400, 3_000][self.rng.usize(..7)]);
            match fault {
                // What lies in wait for the step's own doings, or hits at its beginning.
                _ if delay.is_zero() => self.strike(fault),
                // A thaw by someone else is only of interest while the disks are not cut yet.
                Fault::ForeignThaw if step == Step::Cut => self.strike(fault),
                Fault::MonitorFails | Fault::MonitorSilent | Fault::StoreFails | Fault::StoreFull => {
                    self.strike(fault)
                }
                _ => self.later(self.now + delay, Event::Fault(fault)),
            }
        }
        // One fault meets one step of one run, also where a step comes twice.
        self.faults.retain(|(at, _)| *at != step);
    }

    /// When a fault can strike that cannot now.
    fn put_off(&self, fault: Fault) -> Option<Duration> {
        match fault {
            // Nobody is killed, hangs or thaws in a guest that stands still.
            Fault::AgentKilled
            | Fault::AgentHangs
            | Fault::GuardKilled
            | Fault::GuardHangs
            | Fault::BothKilled
            | Fault::GuestReset
            | Fault::ForeignThaw
            | Fault::SessionLost
                if self.is_paused() =>
            {
                Some(self.goes_on)
            }
            // In the cut the virtual CPUs are stopped already, and the program would let them run.
            Fault::GuestPaused if self.qemu.alive && !self.qemu.running && !self.is_paused() => {
                Some(self.now + Duration::from_millis(10))
            }
            _ => None,
        }
    }

    fn strike(&mut self, fault: Fault) {
        if self.over {
            return;
        }
        if let Some(later) = self.put_off(fault) {
            return self.later(later, Event::Fault(fault));
        }
        self.note(format!("!! {fault}"));
        let now = self.guests_now();
        let soon = now + Duration::from_millis(self.rng.u64(50..900));
        let whole = self.guest.whole();
        let mut met = true;
        match fault {
            Fault::AnswersLate
            | Fault::AnswersTwice
            | Fault::AnswersLost
            | Fault::RequestsLost
            | Fault::StrayLines => {
                self.wire.faults.insert(fault);
            }
            Fault::LineCut | Fault::LineDead => {
                self.wire.closed = self.wire.connected;
                if fault == Fault::LineDead {
                    self.wire.dead_until = self.now + Duration::from_millis(self.rng.u64(100..100_000));
                }
            }
            Fault::AgentKilled | Fault::GuardKilled | Fault::BothKilled if whole => {
                let (agent, guard) = (fault != Fault::GuardKilled, fault != Fault::AgentKilled);
                let said = self.guest.kill(agent, guard, now, soon);
                self.send_to_host(said);
            }
            Fault::AgentHangs if whole => {
                let until = now + Duration::from_millis([300, 5_000, 20_000, 90_000][self.rng.usize(..4)]);
                self.guest.hang(until);
            }
            Fault::GuardHangs if whole => {
                let until = now + Duration::from_millis([300, 5_000, 20_000, 90_000][self.rng.usize(..4)]);
                met = self.guest.hang_guard(until);
            }
            Fault::GuestPaused if self.qemu.running => {
                let time = Duration::from_millis([300, 5_000, 20_000, 90_000][self.rng.usize(..4)]);
                self.pause(time);
            }
            Fault::GuestReset => self.guest.reset(soon + Duration::from_secs(5)),
            Fault::ForeignThaw => {
                if let Some(part) = self.guest.filesystems.iter_mut().find(|part| part.frozen) {
                    part.frozen = false;
                } else {
                    met = false;
                }
            }
            Fault::SessionLost => {
                self.guest.application.iter_mut().for_each(|application| application.life += 1)
            }
            Fault::HostStalls => {
                let time = Duration::from_millis([20, 700, 5_000, 15_000, 60_000][self.rng.usize(..5)]);
                self.advance(self.now + time, false);
            }
            Fault::Interrupted => self.cancel.flag().store(true, Ordering::SeqCst),
            Fault::HostKilled => self.doom = Some(Doom::Killed),
            Fault::HostPanics => self.doom = Some(Doom::Panicked),
            Fault::MonitorFails | Fault::MonitorSilent => {
                self.qemu.fault = Some((self.rng.u32(..4), fault));
            }
            Fault::QemuDies => {
                self.qemu.die();
                self.wire.closed = self.wire.connected;
                self.wire.dead_until = Duration::MAX;
                self.guest.reset(Duration::MAX);
            }
            Fault::SnapshotBreaks => self.qemu.broken = true,
            Fault::StoreFails | Fault::StoreFull => self.store.fails = Some((self.rng.u32(..3), fault)),
            _ => met = false,
        }
        // What could not happen (a thaw of nothing, a second death) may be drawn again by another seed.
        if met {
            self.met.insert((self.step, fault));
        }
    }
}
