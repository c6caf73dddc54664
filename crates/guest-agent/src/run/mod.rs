//! Freeze runs, as the main loop sees them: started by a ticket, carried out in a thread of their own,
//! reported through a file descriptor that the loop watches.

mod check;
pub mod evidence;
mod foreign;
mod frozen;
mod record;
mod shared;
mod survey;
mod undo;
mod walk;

use crate::freeze::kernel::boottime_ns;
use crate::freeze::ledger::Phase;
use crate::freeze::selection::Selection;
use crate::hooks;
use crate::log;
use frozen::thawed_count;
use guest_protocol::stillpoint::{
    CheckArguments, CheckReport, FreezeArguments, FreezeReport, GuestReport, LEASE_MS_MAX, RUN_ID_BYTES_MAX,
    RenewArguments, RenewReport, State, StatusReport, ThawArguments, Want,
};
use record::Records;
use shared::{Shared, Thawing};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use walk::{Order, Prepared, Stopped};

/// Longest time that a host may give to prepare: a CHECKPOINT of a big server on a slow disk.
const PREPARE_MAX: Duration = Duration::from_secs(3600);
/// Longest time that a host may give to taking locks: nobody who waits for them bears more.
const QUIESCE_MAX: Duration = Duration::from_secs(300);
/// Longest time that a stopping agent waits for the thaw. What takes longer waits in the kernel for a FIFREEZE, and
/// the guard sees to it.
const STOP_MAX: Duration = Duration::from_secs(20);
/// The same where hooks are owed their call after the thaw. systemd's own patience is 90 s.
const STOP_WITH_HOOKS_MAX: Duration = Duration::from_secs(80);

/// What the command line decides about runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of state files (`-t`); must not lie on a file system that is frozen.
    pub statedir: PathBuf,
    /// Lease of a plain `guest-fsfreeze-freeze`.
    pub compat_lease: Duration,
    /// Longest quiescing before a plain `guest-fsfreeze-freeze`.
    pub compat_quiesce: Duration,
    /// What is frozen, of all that could be.
    pub selection: Selection,
    /// QEMU's freeze hook (`-F`), if any.
    pub hooks: Option<hooks::Settings>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            statedir: PathBuf::from("/var/run"),
            compat_lease: Duration::from_secs(300),
            compat_quiesce: Duration::from_secs(10),
            selection: Selection::default(),
            hooks: None,
        }
    }
}

/// What a finished run answers.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// `stillpoint-check`.
    Checked(Box<CheckReport>),
    /// `stillpoint-freeze`.
    Frozen(FreezeReport),
    /// `stillpoint-thaw`.
    Thawed(Box<GuestReport>),
    /// `guest-fsfreeze-freeze`, `-freeze-list` and `-thaw`: file systems frozen or thawed by this call.
    Count(i64),
}

/// Why a run was not begun or did not end well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// Stable code, e.g. `lease_ended`.
    pub code: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// All runs of this agent. One at a time holds the guest.
#[derive(Debug)]
pub struct Runs {
    shared: Arc<Shared>,
    settings: Settings,
    plain_count: u64,
}

impl Runs {
    /// Takes up what a dead agent left behind (undo records), then is ready. The undoing itself goes on in a thread,
    /// because it may wait for the kernel; `status` says `thawing` meanwhile.
    /// # Errors
    /// When the notifier cannot be had.
    pub fn new(settings: Settings) -> io::Result<Runs> {
        let shared = Arc::new(Shared::new()?);
        let records = Records::new(&settings.statedir);
        // What an agent before this one still had to tell.
        shared.lock().ended = records.ended();
        if !undo::take_up(&shared, &records, settings.hooks.as_ref()) {
            foreign::take_up(&shared, &records, &settings);
        }
        Ok(Runs { shared, settings, plain_count: 0 })
    }

    /// Readable when `finished` has something; `finished` makes it unreadable again.
    pub fn notifier(&self) -> BorrowedFd<'_> {
        self.shared.notifier()
    }

    /// Begins a rehearsal.
    pub fn start_check(&mut self, ticket: u64, args: CheckArguments) {
        let Some(abort) = self.shared.begin_check() else {
            return self.shared.finish(ticket, Err(busy("a run, or another rehearsal, is under way")));
        };
        let checking = Checking(Arc::clone(&self.shared));
        let settings = self.settings.clone();
        self.spawn(ticket, move |owed| {
            let checked = check::check(&args, &settings, &abort);
            // Before the answer: a host that hears it may ask for the next at once.
            drop(checking);
            owed.answer(checked.map(|report| Outcome::Checked(Box::new(report))));
        });
    }

    /// Begins a run.
    pub fn start_freeze(&mut self, ticket: u64, args: FreezeArguments) {
        let FreezeArguments { id, lease_ms, prepare_ms_max, quiesce_ms_max, budget_ms, want, applications } =
            args;
        let id_fits =
            !id.is_empty() && id.len() <= RUN_ID_BYTES_MAX && id.chars().all(|c| c.is_ascii_graphic());
        if !id_fits || lease_ms == 0 {
            let message =
                format!("the id is 1 to {RUN_ID_BYTES_MAX} visible ASCII characters, and the lease is not 0");
            return self.shared.finish(ticket, Err(Refusal { code: "bad_arguments", message }));
        }
        let order = Order {
            id,
            plain: false,
            lease_ms: lease_ms.min(LEASE_MS_MAX),
            prepare: Duration::from_millis(prepare_ms_max).min(PREPARE_MAX),
            quiesce: Duration::from_millis(quiesce_ms_max).min(QUIESCE_MAX),
            budget: Duration::from_millis(budget_ms.min(LEASE_MS_MAX)),
            want,
            policies: applications,
            only: None,
            selection: self.settings.selection.clone(),
        };
        self.start(ticket, order);
    }

    /// Begins qemu-ga's own freeze, of the named mount points or of all, under the compat lease.
    pub fn start_plain_freeze(&mut self, ticket: u64, mountpoints: Option<Vec<String>>) {
        self.plain_count += 1;
        // Preparing and quiescing share the time: a host that knows no phases counts them together.
        let half = self.settings.compat_quiesce / 2;
        let order = Order {
            id: format!("plain-{}", self.plain_count),
            plain: true,
            lease_ms: evidence::ms(self.settings.compat_lease).min(LEASE_MS_MAX),
            prepare: half,
            quiesce: half,
            budget: self.settings.compat_lease,
            want: Want::Application,
            policies: Vec::new(),
            only: mountpoints,
            selection: self.settings.selection.clone(),
        };
        self.start(ticket, order);
    }

    fn start(&mut self, ticket: u64, order: Order) {
        if !self.shared.begin(&order.id) {
            return self.shared.finish(ticket, Err(busy("another run holds the guest")));
        }
        Records::new(&self.settings.statedir).forget_ended();
        let shared = Arc::clone(&self.shared);
        let settings = self.settings.clone();
        if !self.spawn(ticket, move |owed| carry_out(&shared, order, &settings, owed)) {
            let _told = self.shared.end(None, 0, None); // nothing to be told
        }
    }

    /// Starts the work in a thread; answers whether it could be had.
    fn spawn(&self, ticket: u64, work: impl FnOnce(Owed) + Send + 'static) -> bool {
        let owed = Owed { shared: Arc::clone(&self.shared), ticket: Some(ticket) };
        // Without a thread, `owed` is dropped with the work and answers.
        thread::Builder::new().name("run".to_owned()).spawn(move || work(owed)).is_ok()
    }

    /// Extends the lease of the run that holds the guest.
    /// # Errors
    /// When that run does not hold it.
    pub fn renew(&mut self, args: RenewArguments) -> Result<RenewReport, Refusal> {
        let inner = self.shared.lock();
        if inner.id.as_deref() != Some(args.id.as_str()) {
            return Err(unknown_run(&args.id));
        }
        let holds = matches!(inner.state, State::Freezing | State::Frozen) && args.lease_ms > 0;
        let Some(ledger) = inner.ledger.as_ref().filter(|ledger| holds && ledger.deadline_ns() != 0) else {
            return Err(Refusal {
                code: "not_frozen",
                message: "that run does not hold a freeze to be renewed".to_owned(),
            });
        };
        let lease_ms = args.lease_ms.min(LEASE_MS_MAX);
        if !ledger.renew(boottime_ns().saturating_add(lease_ms.saturating_mul(1_000_000))) {
            return Err(Refusal { code: "lease_ended", message: "the freeze has ended already".to_owned() });
        }
        if let Some(bell) = &inner.bell {
            bell.ring();
        }
        Ok(RenewReport { id: args.id, lease_ms })
    }

    /// Thaws, aborting a freeze that still runs. `None` is qemu-ga's own thaw, which thaws whatever is held.
    /// It is answered when everything is thawed and the applications are resumed.
    pub fn start_thaw(&mut self, ticket: u64, args: Option<ThawArguments>) {
        let mut inner = self.shared.lock();
        let plain = args.is_none();
        if let Some(args) = &args
            && inner.id.as_deref().filter(|_| inner.state != State::Thawed) != Some(args.id.as_str())
        {
            let last = inner.last.clone().filter(|last| last.id == args.id);
            drop(inner);
            let outcome =
                last.map(|last| Outcome::Thawed(Box::new(last))).ok_or_else(|| unknown_run(&args.id));
            return self.shared.finish(ticket, outcome);
        }
        if inner.foreign.is_some() {
            return foreign::thaw_for_host(&self.shared, inner, &self.settings, ticket);
        }
        if inner.state == State::Thawed {
            let ended = inner.ended.take();
            drop(inner);
            if ended.is_some() {
                Records::new(&self.settings.statedir).forget_ended();
            }
            let outcome =
                ended.map_or(Ok(Outcome::Count(0)), |message| Err(Refusal { code: "lease_ended", message }));
            return self.shared.finish(ticket, outcome);
        }
        let waits = Shared::await_thaw(&mut inner, Thawing { ticket, plain });
        self.shared.stop(&mut inner, Phase::Host);
        drop(inner);
        if let Err(refusal) = waits {
            self.shared.finish(ticket, Err(refusal));
        }
    }

    /// Where the guest stands.
    pub fn status(&self) -> StatusReport {
        let inner = self.shared.lock();
        let ours = inner.ledger.as_ref().map(|ledger| ledger.deadline_ns()).filter(|deadline| *deadline != 0);
        let lease_left_ms = ours.or(inner.foreign);
        StatusReport {
            state: if inner.foreign.is_some() { State::Frozen } else { inner.state },
            id: inner.id.clone(),
            lease_left_ms: lease_left_ms.map(|deadline| deadline.saturating_sub(boottime_ns()) / 1_000_000),
            last: inner.last.clone(),
        }
    }

    /// From just before the first FIFREEZE to just after the last FITHAW.
    pub fn is_frozen(&self) -> bool {
        self.shared.is_frozen()
    }

    /// What has ended since the last call, by ticket.
    pub fn finished(&mut self) -> Vec<(u64, Result<Outcome, Refusal>)> {
        self.shared.take_finished()
    }

    /// Thaws whatever is held and returns when that is done: the program is about to end.
    pub fn thaw_now(&mut self) {
        let owes_hooks = {
            let mut inner = self.shared.lock();
            if inner.state == State::Thawed {
                return;
            }
            self.shared.stop(&mut inner, Phase::AgentGone);
            inner.ledger.as_ref().is_some_and(|ledger| ledger.hooks_owed() > 0)
        };
        // If it is not done by then, a FITHAW waits in the kernel, and the guard waits with it; or a hook hangs, and the
        // record says to the next agent what is owed.
        let _thawed = self.shared.wait_thawed(if owes_hooks { STOP_WITH_HOOKS_MAX } else { STOP_MAX });
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        self.thaw_now();
    }
}

/// A run from its first step to its last, in its own thread.
fn carry_out(shared: &Arc<Shared>, order: Order, settings: &Settings, owed: Owed) {
    // However this thread ends, the main loop must not believe for ever that a run holds the guest.
    let ending = Ending { shared, records: Records::new(&settings.statedir), done: false };
    let (id, plain, lease_ms) = (order.id.clone(), order.plain, order.lease_ms);
    let frozen = Prepared::prepare(shared, order, settings)
        .and_then(Prepared::quiesce)
        .and_then(walk::Quiesced::freeze);
    let mut frozen = match frozen {
        Ok(frozen) => frozen,
        Err(stopped) => {
            log!(Warning, "freeze {id} failed: {}", stopped.refusal);
            let refusal = stopped.refusal.clone();
            // Before the answer: a host that hears it may freeze again at once.
            ending.end(plain, &id, *stopped);
            return owed.answer(Err(refusal));
        }
    };
    let count = frozen.count();
    if plain && count == 0 {
        let stopped = frozen.thaw(Phase::Host);
        ending.end(plain, &id, *stopped);
        return owed.answer(Ok(Outcome::Count(0)));
    }
    let outcome = if plain {
        Outcome::Count(i64::try_from(count).unwrap_or(i64::MAX))
    } else {
        Outcome::Frozen(FreezeReport {
            id: id.clone(),
            frozen: count,
            lease_ms,
            freeze_ms: frozen.freeze_ms(),
        })
    };
    owed.answer(Ok(outcome));
    let why = frozen.wait();
    ending.end(plain, &id, *frozen.thaw(why));
}

/// A rehearsal is under way, until this is dropped.
struct Checking(Arc<Shared>);

impl Drop for Checking {
    fn drop(&mut self) {
        self.0.end_check();
    }
}

/// The answer to a ticket, given on a panic too: a host must not wait for ever.
struct Owed {
    shared: Arc<Shared>,
    ticket: Option<u64>,
}

impl Owed {
    fn answer(mut self, outcome: Result<Outcome, Refusal>) {
        if let Some(ticket) = self.ticket.take() {
            self.shared.finish(ticket, outcome);
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let message = "the agent could not carry it out; what was frozen is thawed".to_owned();
            self.shared.finish(ticket, Err(Refusal { code: "internal", message }));
        }
    }
}

/// Ends the run for the main loop, on a panic too.
struct Ending<'s> {
    shared: &'s Arc<Shared>,
    records: Records,
    done: bool,
}

impl Ending<'_> {
    fn end(mut self, plain: bool, id: &str, stopped: Stopped) {
        self.done = true;
        let thawed = thawed_count(&stopped.report);
        // Only a freeze that the host believes to hold is worth an error at its thaw.
        let unasked = matches!(stopped.cause, Phase::LeaseEnded | Phase::GuardGone)
            && stopped.report.frozen_at_ms.is_some();
        let ended = (plain && unasked).then(|| {
            let why = format!("the lease of {} ms ended or its guard died", stopped.report.lease_ms);
            ended_message(&stopped.report, &why)
        });
        if let Some(message) = &ended {
            // An agent that dies before the host asks must not leave it in the belief that nothing happened.
            self.records.note_ended(message);
        }
        if unasked {
            log!(Error, "run {id}: thawed without the host ({:?})", stopped.cause);
        }
        if self.shared.end(Some(stopped.report), thawed, ended) {
            self.records.forget_ended();
        }
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.shared.set_frozen(false);
            let _told = self.shared.end(None, 0, None); // nothing to be told
        }
    }
}

/// What the first plain thaw after a freeze that ended by itself is told.
fn ended_message(report: &GuestReport, why: &str) -> String {
    let Some(frozen_at_ms) = report.frozen_at_ms else {
        return format!("the guest was not frozen: {why}; a snapshot taken since is not of a frozen guest");
    };
    let at = frozen_at_ms.saturating_add(report.frozen_ms);
    format!(
        "the guest was frozen no longer: it thawed by itself {} ms after the freeze (at {}.{:03} s since 1970), \
         because {why}; a snapshot taken later is not of a frozen guest",
        report.frozen_ms,
        at / 1000,
        at % 1000,
    )
}

fn busy(message: &str) -> Refusal {
    Refusal { code: "busy", message: message.to_owned() }
}

fn unknown_run(id: &str) -> Refusal {
    Refusal { code: "unknown_run", message: format!("no run has the id {id:?}") }
}
