//! A model of the guest: file systems, one application, a kernel, the agent and its guard.
//!
//! The model is the processes and the kernel. What they decide with is the agent's own code: its half of the
//! connection, the ledger in which agent, guard and the next agent agree who thaws, and the making of the report.

use guest_agent::freeze::ledger::{Freeze, Ledger, Phase, Thaw};
use guest_agent::freeze::mountinfo::DeviceNumber;
use guest_agent::freeze::plan::{Plan, Superblock};
use guest_agent::run::evidence::{Evidence, thaw_cause};
use guest_protocol::stillpoint::{
    ApplicationReport, FreezeArguments, FreezeReport, GuestDisk, GuestReport, Policy, Reason, State,
    StatusReport, Want,
};
use guest_protocol::{Connection, Error, json::Limits};
use serde_json::Value;
use snapshot::Level;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// How long after the lease's end an agent waits for its guard. Source: `run/frozen.rs`.
pub(crate) const GUARD_LATE: Duration = Duration::from_millis(300);
/// How long an agent waits until its guard has set its timer. Source: `freeze/guard.rs`.
const ARM_MAX: Duration = Duration::from_secs(1);
/// What invariant 1 allows after the lease or a FIFREEZE in the kernel.
const GRACE: Duration = Duration::from_secs(1);

/// A file system.
#[derive(Clone, Debug)]
pub(crate) struct Filesystem {
    /// Serial number of its disk.
    pub(crate) serial: String,
    pub(crate) read_only: bool,
    /// What FIFREEZE answers instead of success.
    pub(crate) refuses: Option<Freeze>,
    /// Nothing writes to it.
    pub(crate) quiet: bool,
    pub(crate) frozen: bool,
    /// When the last FIFREEZE of ours returned.
    frozen_at: Duration,
}

impl Filesystem {
    pub(crate) fn new(serial: &str) -> Self {
        Self {
            serial: serial.to_owned(),
            read_only: false,
            refuses: None,
            quiet: false,
            frozen: false,
            frozen_at: Duration::ZERO,
        }
    }
}

/// An application that keeps its data on some of them.
#[derive(Clone, Debug)]
pub(crate) struct Application {
    pub(crate) places: Vec<usize>,
    pub(crate) policy: Policy,
    pub(crate) refuses: bool,
    pub(crate) crash_safe: bool,
    /// Counts the lives of its server and session.
    pub(crate) life: u32,
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    Stock,
    Nobody,
}

/// A run, as the agent holds it.
struct Run {
    number: u64,
    id: String,
    budget: Duration,
    wants: Want,
    lease: Duration,
    ledger: Option<Ledger>,
    began: Duration,
    /// FIFREEZE calls that are in the kernel.
    in_kernel: BTreeSet<usize>,
    /// The application's life in which it was quiesced.
    quiesced: Option<u32>,
    evidence: Evidence,
    freeze_ticket: Option<u64>,
    thaw_tickets: Vec<u64>,
    refusal: Option<String>,
}

/// What the guest wants to happen later.
#[derive(Clone, Debug)]
pub(crate) enum Later {
    Quiesce(u64),
    Armed(u64),
    Kernel(u64, usize),
    LeaseEnds(u64),
    GuardLate(u64),
    GuardWakes(u64),
    AgentWakes,
    AgentStarts,
}

/// The guest.
pub(crate) struct Guest {
    pub(crate) kind: Kind,
    pub(crate) filesystems: Vec<Filesystem>,
    pub(crate) application: Option<Application>,
    connection: Connection,
    connections: u32,
    up: bool,
    hangs: bool,
    guard: bool,
    guard_hangs: bool,
    /// The agent leaves the lease's end to the guard alone: sabotage.
    pub(crate) trusts_guard: bool,
    /// The guard sleeps through the lease's end: sabotage.
    pub(crate) guard_sleeps: bool,
    /// Bytes for an agent that does not read now.
    unread: Vec<u8>,
    run: Option<Run>,
    runs: u64,
    last: Option<GuestReport>,
    /// What a dead agent and guard left.
    left: Option<(Ledger, Duration)>,
    folder: PathBuf,
    /// How long prepare and quiesce, and each FIFREEZE, take.
    pub(crate) quiesce_takes: Duration,
    pub(crate) kernel_takes: Vec<Duration>,
    pub(crate) later: Vec<(Duration, Later)>,
    pub(crate) violations: Vec<String>,
}

fn nanoseconds(time: Duration) -> u64 {
    // The ledger takes a deadline of 0 for none.
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) + 1
}

impl Guest {
    pub(crate) fn new(kind: Kind, filesystems: Vec<Filesystem>, folder: PathBuf) -> Self {
        Self {
            kind,
            kernel_takes: vec![Duration::from_millis(5); filesystems.len()],
            filesystems,
            application: None,
            connection: Connection::new(Limits::default(), 0),
            connections: 0,
            up: kind != Kind::Nobody,
            hangs: false,
            guard: true,
            guard_hangs: false,
            trusts_guard: false,
            guard_sleeps: false,
            unread: Vec::new(),
            run: None,
            runs: 0,
            last: None,
            left: None,
            folder,
            quiesce_takes: Duration::from_millis(50),
            later: Vec::new(),
            violations: Vec::new(),
        }
    }

    /// What a cut at this instant is worth, as only the world can know it; and the same for the application alone.
    pub(crate) fn truth(&self, cut: &[String], known: &[String], chosen: bool) -> (Level, Level) {
        let mut level = Level::Clean;
        let mut counted = 0;
        let mut worth = Vec::new();
        for part in &self.filesystems {
            let left_out = chosen && known.contains(&part.serial) && !cut.contains(&part.serial);
            let still =
                part.read_only || part.frozen || (part.refuses == Some(Freeze::Unsupported) && part.quiet);
            let this = match (cut.contains(&part.serial), still) {
                (false, _) if part.read_only => Level::Filesystem,
                // A disk that only the guest knows: where it says so, `evidence` asks for *none*; where it cannot be
                // asked, the snapshot is still one cut of the disks that the host knows.
                (false, _) => Level::Crash,
                (true, true) => Level::Clean,
                (true, false) => Level::Crash,
            };
            worth.push(this);
            if !left_out && (!part.read_only || cut.contains(&part.serial)) {
                counted += 1;
                level = level.min(this);
            }
        }
        if counted == 0 {
            level = Level::Crash;
        }
        // Levels count the applications that were discovered, which a stock agent does not do.
        let discovered = self.application.as_ref().filter(|_| self.kind == Kind::Ours);
        let Some(application) = discovered else { return (level.min(Level::Filesystem), Level::None) };
        let parts = application.places.iter().map(|at| worth[*at]).min().unwrap_or(Level::Crash);
        let granted = self.run.as_ref().and_then(|run| run.quiesced) == Some(application.life);
        let own = if granted && application.crash_safe { Level::Application } else { Level::Filesystem };
        (level.min(parts).min(own), parts.min(own))
    }

    pub(crate) fn anything_frozen(&self) -> bool {
        self.filesystems.iter().any(|part| part.frozen)
    }

    /// Whether agent and guard are such that this is one death and not two.
    pub(crate) fn whole(&self) -> bool {
        self.up && !self.hangs && self.guard && !self.guard_hangs
    }

    /// Bytes arrive at the port. Returns what the agent says.
    pub(crate) fn hears(&mut self, bytes: &[u8], now: Duration) -> Vec<u8> {
        if !self.up {
            return Vec::new();
        }
        self.unread.extend_from_slice(bytes);
        self.work(now)
    }

    fn work(&mut self, now: Duration) -> Vec<u8> {
        if !self.up || self.hangs {
            return Vec::new();
        }
        let bytes = std::mem::take(&mut self.unread);
        let mut rest = &bytes[..];
        while let Some(dispatch) = self.connection.next_request(&mut rest) {
            let ticket = dispatch.ticket;
            match dispatch.command.read(dispatch.members) {
                Err(error) => self.connection.answer(ticket, Err(error)),
                Ok(call) => self.carry_out(ticket, dispatch.command.name, call, now),
            }
        }
        self.says()
    }

    fn says(&mut self) -> Vec<u8> {
        let mut said = Vec::new();
        while !self.connection.output().is_empty() {
            let bytes = self.connection.output();
            said.extend_from_slice(bytes);
            let sent = bytes.len();
            self.connection.sent(sent);
        }
        said
    }

    fn answer(&mut self, ticket: u64, answer: Result<Value, Error>) {
        self.connection.answer(ticket, answer);
    }

    fn carry_out(&mut self, ticket: u64, name: &str, call: guest_protocol::Call, now: Duration) {
        use guest_protocol::Call;
        let ours = self.kind == Kind::Ours;
        let answer = match call {
            Call::Sync(number) => Ok(number.into()),
            Call::Ping => Ok(Value::Object(serde_json::Map::new())),
            Call::Info => Ok(self.info()),
            Call::GetFsinfo if !ours => Ok(self.fsinfo()),
            Call::FsfreezeStatus if !ours => {
                Ok(if self.anything_frozen() { "frozen" } else { "thawed" }.into())
            }
            Call::FsfreezeFreeze(_) if !ours => {
                let mut frozen = 0;
                for part in &mut self.filesystems {
                    if part.refuses.is_none() && !part.frozen {
                        (part.frozen, part.frozen_at) = (true, now);
                        frozen += 1;
                    }
                }
                Ok(frozen.into())
            }
            Call::FsfreezeThaw if !ours => {
                let frozen = self.filesystems.iter_mut().filter(|part| part.frozen);
                Ok(frozen.map(|part| part.frozen = false).count().into())
            }
            Call::StillpointFreeze(arguments) if ours => return self.freeze(ticket, arguments, now),
            Call::StillpointThaw(arguments) if ours => return self.thaw(ticket, &arguments.id, now),
            Call::StillpointStatus if ours => Ok(self.status()),
            _ => Err(Error::not_found(name)),
        };
        self.answer(ticket, answer);
    }

    fn status(&self) -> Value {
        let state = match &self.run {
            None => State::Thawed,
            Some(run) if run.ledger.is_none() => State::Preparing,
            Some(run) if run.freeze_ticket.is_some() => State::Freezing,
            Some(_) => State::Frozen,
        };
        let id = self.run.as_ref().map(|run| run.id.clone());
        let report = StatusReport { state, id, last: self.last.clone(), ..StatusReport::default() };
        serde_json::to_value(report).expect("a report is JSON")
    }

    fn info(&self) -> Value {
        let stock =
            ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-get-fsinfo"];
        let ours = ["stillpoint-freeze", "stillpoint-thaw"];
        let names = stock.iter().chain(ours.iter().filter(|_| self.kind == Kind::Ours));
        let commands: Vec<Value> = names
            .map(|name| serde_json::json!({ "enabled": true, "name": name, "success-response": true }))
            .collect();
        serde_json::json!({ "version": "11.1.3", "supported_commands": commands })
    }

    fn fsinfo(&self) -> Value {
        let each = self.filesystems.iter().enumerate().map(|(at, part)| {
            let kind = if part.refuses.is_some() { "vfat" } else { "ext4" };
            serde_json::json!({ "name": format!("vd{at}"), "mountpoint": format!("/{at}"), "type": kind, "disk": [],
                "serial": part.serial })
        });
        each.collect()
    }

    fn freeze(&mut self, ticket: u64, arguments: FreezeArguments, now: Duration) {
        if self.run.is_some() || self.left.is_some() {
            return self.answer(ticket, Err(Error::generic("busy: another run holds the guest")));
        }
        self.runs += 1;
        let lease = Duration::from_millis(arguments.lease_ms);
        let plan = Plan {
            superblocks: self.filesystems.iter().enumerate().map(superblock).collect(),
            steps: vec![0; self.filesystems.len()],
            ..Plan::default()
        };
        (self.guard, self.guard_hangs) = (true, false);
        self.run = Some(Run {
            number: self.runs,
            evidence: Evidence::new(&arguments.id, arguments.lease_ms, &plan),
            id: arguments.id,
            budget: Duration::from_millis(arguments.budget_ms),
            wants: arguments.want,
            lease,
            ledger: None,
            began: now,
            in_kernel: BTreeSet::new(),
            quiesced: None,
            freeze_ticket: Some(ticket),
            thaw_tickets: Vec::new(),
            refusal: None,
        });
        self.later.push((now + self.quiesce_takes, Later::Quiesce(self.runs)));
    }

    fn thaw(&mut self, ticket: u64, id: &str, now: Duration) {
        match &mut self.run {
            Some(run) if run.id == id => {
                run.thaw_tickets.push(ticket);
                self.end_run(Phase::Host, now);
            }
            _ => {
                let last = self.last.clone().filter(|last| last.id == id);
                let report = last.map(|last| serde_json::to_value(last).expect("a report is JSON"));
                let unknown = || Error::generic(format!("unknown_run: no run has the id {id:?}"));
                self.answer(ticket, report.ok_or_else(unknown));
            }
        }
    }

    /// Something that the guest wanted to happen now. Returns what the agent says.
    pub(crate) fn happens(&mut self, what: &Later, now: Duration) -> Vec<u8> {
        match what {
            Later::Quiesce(number) if self.is_run(*number) && !self.hangs => self.quiesce(now),
            Later::Quiesce(number) if self.is_run(*number) => {
                self.later.push((now + Duration::from_millis(100), what.clone()));
            }
            Later::Armed(number) if self.is_run(*number) => self.armed(now),
            Later::Kernel(number, at) => self.frozen_by_kernel(*number, *at, now),
            Later::LeaseEnds(number) if self.is_run(*number) => self.lease_ends(*number, now),
            Later::GuardLate(number) if self.is_run(*number) && !self.hangs => {
                self.end_run(Phase::LeaseEnded, now)
            }
            Later::GuardWakes(number) if self.is_run(*number) => {
                self.guard_hangs = false;
                let ledger = self.run.as_ref().and_then(|run| run.ledger.as_ref());
                if ledger.is_some_and(|ledger| ledger.deadline_ns() <= nanoseconds(now)) {
                    self.lease_ends(*number, now);
                }
            }
            Later::AgentWakes => {
                self.hangs = false;
                // It looks at the ledger before anything else.
                let ended = self.run.as_ref().and_then(|run| run.ledger.as_ref()).map(Ledger::phase);
                if let Some(why) = ended.filter(|why| *why != Phase::Armed) {
                    self.end_run(why, now);
                }
            }
            Later::AgentStarts => self.start(now),
            _ => {}
        }
        self.work(now)
    }

    fn is_run(&self, number: u64) -> bool {
        self.run.as_ref().is_some_and(|run| run.number == number)
    }

    fn quiesce(&mut self, now: Duration) {
        let Some(run) = &mut self.run else { return };
        // Nothing is taken or frozen before the guard has answered.
        if !self.guard {
            return self.unguarded(now);
        }
        if self.guard_hangs {
            return self.later.push((now + ARM_MAX, Later::Armed(run.number)));
        }
        if let Some(application) = &self.application {
            let off = application.policy == Policy::Off || run.wants != Want::Application;
            run.quiesced = (!off && !application.refuses).then_some(application.life);
            if application.policy == Policy::Required && run.quiesced.is_none() {
                run.refusal = Some("required_application: it did not answer".to_owned());
                return self.end_run(Phase::Failed, now);
            }
        }
        let devices: Vec<DeviceNumber> = (0..self.filesystems.len()).map(device).collect();
        let path = self.folder.join(format!("ledger-{}", run.number));
        let ledger = Ledger::create(&path, &devices, &[]).expect("a file in a temporary folder");
        std::fs::remove_file(&path).expect("it is ours");
        ledger.renew(nanoseconds(now + run.lease));
        self.later.push((now + run.lease, Later::LeaseEnds(run.number)));
        run.began = now;
        for at in 0..self.filesystems.len() {
            if ledger.begin_freeze(at, nanoseconds(now)) {
                run.in_kernel.insert(at);
                self.later.push((now + self.kernel_takes[at], Later::Kernel(run.number, at)));
            }
        }
        run.ledger = Some(ledger);
    }

    /// The guard has had its time to answer.
    fn armed(&mut self, now: Duration) {
        if self.guard_hangs { self.unguarded(now) } else { self.quiesce(now) }
    }

    fn unguarded(&mut self, now: Duration) {
        let Some(run) = &mut self.run else { return };
        run.refusal = Some("guard_failed: the guard process did not set its timer".to_owned());
        self.end_run(Phase::GuardGone, now);
    }

    /// A FIFREEZE returns to the thread that called it, if that still lives.
    fn frozen_by_kernel(&mut self, number: u64, at: usize, now: Duration) {
        let part = &mut self.filesystems[at];
        let outcome = part.refuses.unwrap_or(Freeze::Frozen);
        let Some(run) = self.run.as_mut().filter(|run| run.number == number) else {
            // Its agent died: the guard, or the next agent, waits behind it with a FITHAW.
            return;
        };
        run.in_kernel.remove(&at);
        if outcome == Freeze::Frozen {
            (part.frozen, part.frozen_at) = (true, now);
        }
        let Some(ledger) = &run.ledger else { return };
        ledger.end_freeze(at, outcome, if outcome == Freeze::Frozen { 0 } else { 95 }, nanoseconds(now));
        if ledger.phase() != Phase::Armed {
            return self.thaw_all(Thaw::Agent, now);
        }
        if !run.in_kernel.is_empty() || self.hangs {
            return;
        }
        if now - run.began > run.budget {
            run.refusal = Some("freeze_over_budget: it took too long".to_owned());
            return self.end_run(Phase::Failed, now);
        }
        let report = FreezeReport {
            id: run.id.clone(),
            frozen: ledger.frozen_count(),
            lease_ms: u64::try_from(run.lease.as_millis()).unwrap_or(0),
            freeze_ms: 1,
        };
        if let Some(ticket) = run.freeze_ticket.take() {
            self.answer(ticket, Ok(serde_json::to_value(report).expect("a report is JSON")));
        }
    }

    fn lease_ends(&mut self, number: u64, now: Duration) {
        let Some(ledger) = self.run.as_ref().and_then(|run| run.ledger.as_ref()) else { return };
        let awake = self.guard && !self.guard_hangs && !self.guard_sleeps;
        if awake && ledger.end_of_lease(nanoseconds(now)) {
            self.thaw_all(Thaw::Guard, now);
            if !self.hangs {
                self.end_run(Phase::LeaseEnded, now);
            }
        } else if !self.guard_sleeps && !self.trusts_guard {
            self.later.push((now + GUARD_LATE, Later::GuardLate(number)));
        }
    }

    /// FITHAW for whatever is not settled, by agent or guard. What is still in the kernel is thawed when it returns.
    fn thaw_all(&mut self, who: Thaw, now: Duration) {
        let Some(run) = &mut self.run else { return };
        let Some(ledger) = &run.ledger else { return };
        for at in 0..ledger.count() {
            if ledger.settled(at) || run.in_kernel.contains(&at) {
                continue;
            }
            // Whoever comes second leaves it to the first, which never dies halfway in this model.
            if ledger.claim(at, who, nanoseconds(now)) || ledger.frozen(at) == Freeze::Frozen {
                let outcome = if self.filesystems[at].frozen { Thaw::Done } else { Thaw::Early };
                fithaw(&mut self.filesystems[at], run.began, run.lease, now, &mut self.violations);
                ledger.end_thaw(at, outcome, nanoseconds(now));
            }
        }
        let settled = |at| ledger.settled(at) && ledger.frozen(at) != Freeze::Called;
        if (0..ledger.count()).all(settled) && !self.hangs && ledger.phase() != Phase::Armed {
            self.finish();
        }
    }

    /// The agent ends its run: thaws what the ledger says, and reports once nothing is in the kernel.
    fn end_run(&mut self, why: Phase, now: Duration) {
        let Some(run) = &mut self.run else { return };
        match &run.ledger {
            None => self.finish(),
            Some(ledger) => {
                ledger.end(why);
                self.thaw_all(Thaw::Agent, now);
            }
        }
    }

    fn finish(&mut self) {
        let Some(mut run) = self.run.take() else { return };
        let (mut frozen, mut cause) = (0, Phase::Failed);
        if let Some(ledger) = &run.ledger {
            cause = ledger.phase();
            frozen = ledger.frozen_count();
            run.evidence.times(ledger);
            for at in 0..ledger.count() {
                run.evidence.filesystem(at, ledger, at, self.filesystems[at].quiet);
            }
        }
        let refused = run.refusal.is_some() || run.freeze_ticket.is_some();
        run.evidence.report.thawed_by = thaw_cause(frozen, refused, cause);
        if cause == Phase::LeaseEnded {
            run.evidence.reason(Reason::new(
                "lease_ended",
                "",
                "the lease ended before the host asked for the thaw",
            ));
        }
        if let Some(refusal) = &run.refusal {
            run.evidence.reason(Reason::new("freeze_failed", "", refusal.as_str()));
        }
        run.evidence.report.applications = self.application.iter().map(|one| reported(one, &run)).collect();
        let report = run.evidence.report;
        if let Some(ticket) = run.freeze_ticket {
            let words = run.refusal.unwrap_or_else(|| "aborted: the host asked for a thaw".to_owned());
            self.answer(ticket, Err(Error::generic(words)));
        }
        for ticket in run.thaw_tickets {
            self.answer(ticket, Ok(serde_json::to_value(&report).expect("a report is JSON")));
        }
        self.last = Some(report);
    }

    /// The agent stands still until then.
    pub(crate) fn hang(&mut self, until: Duration) {
        self.hangs = true;
        self.later.push((until, Later::AgentWakes));
    }

    /// The guard stands still until then, if there is one: it lives no longer than its run.
    pub(crate) fn hang_guard(&mut self, until: Duration) -> bool {
        let Some(run) = &self.run else { return false };
        self.guard_hangs = true;
        self.later.push((until, Later::GuardWakes(run.number)));
        true
    }

    /// Agent, guard or both are killed. Returns what the agent says before anything else.
    pub(crate) fn kill(&mut self, agent: bool, guard: bool, now: Duration, starts: Duration) -> Vec<u8> {
        if guard {
            self.guard = false;
        }
        if !agent {
            // The agent sees it at once, and thaws.
            if self.run.as_ref().is_some_and(|run| run.ledger.is_some()) {
                self.end_run(Phase::GuardGone, now);
            }
            return self.says();
        }
        self.up = false;
        self.hangs = false;
        self.unread.clear();
        self.last = None;
        self.connection.hang_up();
        self.later.push((starts, Later::AgentStarts));
        let Some(mut run) = self.run.take() else { return Vec::new() };
        let Some(ledger) = run.ledger.take() else { return Vec::new() };
        // Its threads leave the kernel first: a FIFREEZE that was there has frozen.
        for at in std::mem::take(&mut run.in_kernel) {
            let part = &mut self.filesystems[at];
            (part.frozen, part.frozen_at) = (part.refuses.is_none(), now);
        }
        if self.guard {
            ledger.end(Phase::AgentGone);
            self.thaw_left(&ledger, run.began, run.lease, now);
        } else {
            self.left = Some((ledger, run.began + run.lease));
        }
        Vec::new()
    }

    fn thaw_left(&mut self, ledger: &Ledger, began: Duration, lease: Duration, now: Duration) {
        for at in 0..ledger.count() {
            if !ledger.settled(at) {
                fithaw(&mut self.filesystems[at], began, lease, now, &mut self.violations);
            }
        }
    }

    fn start(&mut self, now: Duration) {
        self.connections += 1;
        self.connection = Connection::new(Limits::default(), self.connections);
        self.up = true;
        if let Some((ledger, deadline)) = self.left.take() {
            self.thaw_left(&ledger, Duration::ZERO, deadline, now);
        }
    }

    /// The whole guest begins anew.
    pub(crate) fn reset(&mut self, starts: Duration) {
        self.filesystems.iter_mut().for_each(|part| part.frozen = false);
        self.application.iter_mut().for_each(|application| application.life += 1);
        self.run = None;
        self.left = None;
        self.last = None;
        self.hangs = false;
        self.up = false;
        self.unread.clear();
        self.connection.hang_up();
        self.later.retain(|(_, later)| matches!(later, Later::AgentStarts));
        if self.kind != Kind::Nobody {
            self.later.push((starts, Later::AgentStarts));
        }
    }

    /// Nothing may be frozen any more, unless a stock agent was never told.
    pub(crate) fn still_frozen(&self) -> Vec<usize> {
        (0..self.filesystems.len()).filter(|at| self.filesystems[*at].frozen).collect()
    }
}

fn device(at: usize) -> DeviceNumber {
    DeviceNumber { major: 254, minor: u32::try_from(at).unwrap_or(0) * 16 }
}

fn superblock((at, part): (usize, &Filesystem)) -> Superblock {
    Superblock {
        device: device(at),
        kind: "ext4".to_owned(),
        source: format!("/dev/vd{at}"),
        read_only: part.read_only,
        places: vec![],
        disks: vec![GuestDisk {
            name: format!("vd{at}"),
            serial: Some(part.serial.clone()),
            ..GuestDisk::default()
        }],
        lies_on: BTreeSet::new(),
    }
}

fn reported(application: &Application, run: &Run) -> ApplicationReport {
    ApplicationReport {
        kind: "postgresql".to_owned(),
        instance: "main".to_owned(),
        policy: application.policy,
        device_numbers: application.places.iter().map(|at| device(*at).to_string()).collect(),
        quiesced: run.quiesced.is_some(),
        held: run.quiesced == Some(application.life),
        crash_safe: application.crash_safe,
        ..ApplicationReport::default()
    }
}

/// Lets writers go on, and looks whether that comes too late.
fn fithaw(
    part: &mut Filesystem,
    began: Duration,
    lease: Duration,
    now: Duration,
    violations: &mut Vec<String>,
) {
    let allowed = (began + lease).max(part.frozen_at) + GRACE;
    if part.frozen && now > allowed {
        violations.push(format!("frozen until {now:?}, which may last until {allowed:?} (invariant 1)"));
    }
    part.frozen = false;
}
