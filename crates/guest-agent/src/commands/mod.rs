//! The commands: what is answered at once, what is answered later, and what is not allowed now.
//!
//! Nothing here waits. What may touch a disk or take time runs as a job in a thread of its own, what freezes runs
//! in `run`, and both ring a bell when their answer is ready.

mod exec;
mod fsfreeze;
mod fsinfo;
mod info;
mod jobs;
mod osinfo;
mod shutdown;
mod time;

use crate::note;
use crate::poll::Poll;
use crate::run::{self, Runs};
use crate::state::Handles;
use guest_protocol::connection::Dispatch;
use guest_protocol::{Call, Command, Error};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Tokens with this bit belong to pipes of `guest-exec`.
pub const EXEC_TOKEN: u64 = 1 << 63;

/// An answer, or none yet.
#[derive(Debug)]
pub enum Reply {
    /// Here it is.
    Now(Result<Value, Error>),
    /// It will be among `Commands::finished`, under the ticket.
    Later,
}

/// What the command line decides about commands.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Version that hosts are told.
    pub reported_version: String,
    /// Commands that are refused.
    pub blocked: Vec<String>,
    /// If given, all others are refused.
    pub allowed: Option<Vec<String>>,
    /// What concerns freezing.
    pub runs: run::Settings,
}

/// Everything that outlives one request.
#[derive(Debug)]
pub struct Commands {
    version: String,
    refused: BTreeSet<&'static str>,
    runs: Runs,
    jobs: jobs::Jobs,
    exec: exec::Processes,
    #[expect(dead_code, reason = "guest-file-open takes its numbers here")]
    handles: Arc<Handles>,
}

impl Commands {
    /// Takes up what a dead agent left behind, then is ready.
    /// # Errors
    /// When state files or kernel objects cannot be had.
    pub fn new(settings: Settings, poll: Rc<Poll>) -> io::Result<Commands> {
        let refused = |command: &&Command| {
            let named = |list: &[String]| list.iter().any(|name| name == command.name);
            named(&settings.blocked) || settings.allowed.as_deref().is_some_and(|allowed| !named(allowed))
        };
        let statedir = settings.runs.statedir.clone();
        // First of all: what a dead agent left frozen is thawed meanwhile.
        let runs = Runs::new(settings.runs)?;
        let handles = Arc::new(Handles::open(&statedir)?);
        Ok(Commands {
            refused: guest_protocol::COMMANDS.iter().filter(refused).map(|command| command.name).collect(),
            version: settings.reported_version,
            runs,
            jobs: jobs::Jobs::new()?,
            exec: exec::Processes::new(poll),
            handles,
        })
    }

    /// Readable when a run has something for `finished`.
    pub fn runs_bell(&self) -> BorrowedFd<'_> {
        self.runs.notifier()
    }

    /// Readable when a job has something for `finished`.
    pub fn jobs_bell(&self) -> BorrowedFd<'_> {
        self.jobs.bell()
    }

    /// Carries a request out, or begins to.
    pub fn carry_out(&mut self, Dispatch { ticket, command, members }: Dispatch) -> Reply {
        if !self.is_enabled(command) {
            return Reply::Now(Err(Error::disabled(command.name)));
        }
        match command.read(members) {
            Ok(call) => self.call(ticket, call),
            Err(error) => Reply::Now(Err(error)),
        }
    }

    fn call(&mut self, ticket: u64, call: Call) -> Reply {
        match call {
            Call::Sync(id) => Reply::Now(Ok(id.into())),
            Call::Ping => {
                note!("guest-ping called");
                Reply::Now(Ok(json!({})))
            }
            Call::Info => Reply::Now(answer(&info::info(&self.version, |command| self.is_enabled(command)))),
            Call::GetTime => Reply::Now(time::now().map(Value::from)),
            Call::GetOsinfo => self.jobs.start(ticket, || answer(&osinfo::osinfo())),
            Call::GetFsinfo => self.jobs.start(ticket, || answer(&fsinfo::fsinfo(Path::new("/"))?)),
            Call::Shutdown(mode) => self.jobs.start(ticket, move || shutdown::shutdown(mode)),
            Call::Exec(exec) => {
                let starter = self.exec.starter();
                self.jobs.start(ticket, move || exec::start(&exec, &starter))
            }
            Call::ExecStatus(pid) => {
                note!("guest-exec-status called, pid: {pid}");
                Reply::Now(self.exec.status(pid).and_then(|status| answer(&status)))
            }
            Call::FsfreezeStatus => Reply::Now(Ok(fsfreeze::status(&self.runs))),
            Call::FsfreezeFreeze(mountpoints) => {
                note!("guest-fsfreeze called");
                self.runs.start_plain_freeze(ticket, mountpoints);
                Reply::Later
            }
            Call::FsfreezeThaw => {
                self.runs.start_thaw(ticket, None);
                Reply::Later
            }
            Call::StillpointCheck(arguments) => {
                self.runs.start_check(ticket, arguments);
                Reply::Later
            }
            Call::StillpointFreeze(arguments) => {
                self.runs.start_freeze(ticket, arguments);
                Reply::Later
            }
            Call::StillpointThaw(arguments) => {
                self.runs.start_thaw(ticket, Some(arguments));
                Reply::Later
            }
            Call::StillpointRenew(arguments) => Reply::Now(match self.runs.renew(arguments) {
                Ok(report) => answer(&report),
                Err(refusal) => Err(fsfreeze::refused(&refusal)),
            }),
            Call::StillpointStatus => Reply::Now(answer(&self.runs.status())),
        }
    }

    /// Blocked wins over allowed, frozen over both.
    fn is_enabled(&self, command: &Command) -> bool {
        !self.refused.contains(command.name) && (command.while_frozen || !self.runs.is_frozen())
    }

    /// Answers that have become ready, by ticket.
    pub fn finished(&mut self) -> Vec<(u64, Result<Value, Error>)> {
        let runs =
            self.runs.finished().into_iter().map(|(ticket, outcome)| (ticket, fsfreeze::outcome(outcome)));
        runs.chain(self.jobs.finished()).collect()
    }

    /// Looks after started programs: some child has ended, or `Commands::finished` brought a new one.
    pub fn reap(&mut self) {
        self.exec.reap();
    }

    /// A pipe of a started program can go on.
    pub fn pipe_event(&mut self, token: u64) {
        self.exec.pipe_event(token & !EXEC_TOKEN);
    }

    /// Whether anything is frozen.
    pub fn is_frozen(&self) -> bool {
        self.runs.is_frozen()
    }

    /// Thaws whatever is held, and returns when that is done.
    pub fn thaw_now(&mut self) {
        self.runs.thaw_now();
    }
}

fn answer(value: &impl serde::Serialize) -> Result<Value, Error> {
    serde_json::to_value(value)
        .map_err(|error| Error::generic(format!("the answer cannot be written: {error}")))
}
