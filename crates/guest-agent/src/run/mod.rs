//! Freeze runs, as the main loop sees them: started by a ticket, carried out in a thread of their own,
//! reported through a file descriptor that the loop watches.

use guest_protocol::stillpoint::{
    CheckArguments, CheckReport, FreezeArguments, FreezeReport, GuestReport, RenewArguments, RenewReport,
    StatusReport, ThawArguments,
};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

/// What the command line decides about runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of state files (`-t`); must not lie on a file system that is frozen.
    pub statedir: PathBuf,
    /// Lease of a plain `guest-fsfreeze-freeze`.
    pub compat_lease: Duration,
    /// Longest quiescing before a plain `guest-fsfreeze-freeze`.
    pub compat_quiesce: Duration,
    /// QEMU's freeze hook (`-F`), if any.
    pub hook: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            statedir: PathBuf::from("/var/run"),
            compat_lease: Duration::from_secs(300),
            compat_quiesce: Duration::from_secs(10),
            hook: None,
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
    notifier: OwnedFd,
    finished: Vec<(u64, Result<Outcome, Refusal>)>,
}

impl Runs {
    /// Takes up what a dead agent left behind (undo records), then is ready.
    /// # Errors
    /// When the state folder or the notifier cannot be used.
    pub fn new(_settings: Settings) -> io::Result<Runs> {
        let notifier = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Runs { notifier, finished: Vec::new() })
    }

    /// Readable when `finished` has something; `finished` makes it unreadable again.
    pub fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    /// Begins a rehearsal.
    pub fn start_check(&mut self, ticket: u64, _args: CheckArguments) {
        self.refuse(ticket);
    }

    /// Begins a run.
    pub fn start_freeze(&mut self, ticket: u64, _args: FreezeArguments) {
        self.refuse(ticket);
    }

    /// Begins qemu-ga's own freeze, of the named mount points or of all, under the compat lease.
    pub fn start_plain_freeze(&mut self, ticket: u64, _mountpoints: Option<Vec<String>>) {
        self.refuse(ticket);
    }

    /// Extends the lease of the run that holds the guest.
    /// # Errors
    /// When that run does not hold it.
    pub fn renew(&mut self, _args: RenewArguments) -> Result<RenewReport, Refusal> {
        Err(not_yet())
    }

    /// Thaws, aborting a freeze that still runs. `None` is qemu-ga's own thaw, which thaws whatever is held.
    pub fn start_thaw(&mut self, ticket: u64, _args: Option<ThawArguments>) {
        self.refuse(ticket);
    }

    /// Where the guest stands.
    pub fn status(&self) -> StatusReport {
        StatusReport::default()
    }

    /// From just before the first FIFREEZE to just after the last FITHAW.
    pub fn is_frozen(&self) -> bool {
        false
    }

    /// What has ended since the last call, by ticket.
    pub fn finished(&mut self) -> Vec<(u64, Result<Outcome, Refusal>)> {
        let mut counter = [0u8; 8];
        // Nothing to read (EAGAIN) means that nobody rang, which the list tells better.
        let _rang = rustix::io::read(&self.notifier, &mut counter).is_ok();
        std::mem::take(&mut self.finished)
    }

    /// Thaws whatever is held and returns when that is done: the program is about to end.
    pub fn thaw_now(&mut self) {}

    fn refuse(&mut self, ticket: u64) {
        self.finished.push((ticket, Err(not_yet())));
        // A full counter is readable all the same.
        let _rung = rustix::io::write(&self.notifier, &1u64.to_ne_bytes()).is_ok();
    }
}

fn not_yet() -> Refusal {
    Refusal { code: "no_freeze_machinery", message: "this build of the agent cannot freeze".to_owned() }
}
