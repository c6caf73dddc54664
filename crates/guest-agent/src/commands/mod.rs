//! The commands: what is answered at once, what is answered later, and what is not allowed now.
//!
//! Nothing here waits. What may touch a disk or take time runs as a job in a thread of its own, what freezes runs
//! in `run`, and both ring a bell when their answer is ready.

pub mod disks;
mod exec;
mod files;
mod fsfreeze;
mod fsinfo;
mod fstrim;
mod helper;
mod hostname;
mod info;
mod jobs;
mod memory_blocks;
mod network;
mod osinfo;
mod password;
#[cfg(test)]
mod recorded;
mod search;
mod shutdown;
mod ssh;
mod statistics;
mod suspend;
mod time;
mod timezone;
mod users;
mod vcpus;

pub use files::Transfer;

use crate::note;
use crate::poll::Poll;
use crate::run::{self, Runs};
use crate::state::Handles;
use guest_protocol::connection::{Dispatch, Piece};
use guest_protocol::{Call, Command, Error, json};
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
    /// Here it is, by `json::written`: a long one that hosts ask for often.
    Written(Vec<u8>),
    /// It will be among `Commands::finished`, under the ticket.
    Later,
}

/// What has become ready for a host.
#[derive(Debug)]
pub enum Delivery {
    /// An answer.
    Answer(Result<Value, Error>),
    /// A piece of one. Where more follow, `Commands::go_on` fetches the next, or `Commands::end` says that none is wanted.
    Piece(Piece, Option<Transfer>),
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
    files: files::Files,
    /// What became ready besides, when something else ended.
    besides: Vec<(u64, Delivery)>,
    /// Freezes by qemu-ga's own commands that are not answered yet, by ticket.
    plain_freezes: BTreeSet<u64>,
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
            files: files::Files::new(handles),
            besides: Vec::new(),
            plain_freezes: BTreeSet::new(),
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
            Call::Info => {
                match json::written(&info::info(&self.version, |command| self.is_enabled(command))) {
                    Ok(text) => Reply::Written(text),
                    Err(error) => Reply::Now(Err(not_written(&error))),
                }
            }
            Call::GetTime => Reply::Now(time::now().map(Value::from)),
            Call::SetTime(time_ns) => self.jobs.start(ticket, move || time::set(time_ns)),
            Call::GetHostName => Reply::Now(answer(&hostname::host_name())),
            Call::GetUsers => self.jobs.start(ticket, || answer(&users::users(Path::new("/")))),
            Call::GetTimezone => self.jobs.start(ticket, || answer(&timezone::timezone(Path::new("/")))),
            Call::GetOsinfo => self.jobs.start(ticket, || answer(&osinfo::osinfo())),
            Call::FileOpen(arguments) => self.files.open(&mut self.jobs, ticket, arguments),
            Call::File(call) => self.files.operate(&mut self.jobs, ticket, call),
            Call::Fstrim(minimum) => {
                self.jobs.start(ticket, move || answer(&fstrim::fstrim(Path::new("/"), minimum)?))
            }
            Call::GetVcpus => self.jobs.start(ticket, || answer(&vcpus::vcpus(Path::new("/"))?)),
            Call::SetVcpus(wishes) => {
                self.jobs.start(ticket, move || vcpus::set(Path::new("/"), &wishes).map(Value::from))
            }
            Call::GetDisks => self.jobs.start(ticket, || answer(&disks::disks(Path::new("/"))?)),
            Call::GetMemoryBlocks => {
                self.jobs.start(ticket, || answer(&memory_blocks::blocks(Path::new("/"))?))
            }
            Call::SetMemoryBlocks(wishes) => {
                self.jobs.start(ticket, move || answer(&memory_blocks::set(Path::new("/"), &wishes)))
            }
            Call::GetMemoryBlockInfo => {
                self.jobs.start(ticket, || answer(&memory_blocks::info(Path::new("/"))?))
            }
            Call::GetDiskstats => self.jobs.start(ticket, || answer(&statistics::disks(Path::new("/"))?)),
            Call::GetCpustats => self.jobs.start(ticket, || answer(&statistics::cpus(Path::new("/"))?)),
            Call::GetLoad => Reply::Now(statistics::load(Path::new("/")).and_then(|load| answer(&load))),
            Call::GetFsinfo => self.jobs.start(ticket, || answer(&fsinfo::fsinfo(Path::new("/"))?)),
            Call::NetworkGetInterfaces => {
                self.jobs.start(ticket, || answer(&network::interfaces(Path::new("/"))?))
            }
            Call::NetworkGetRoute => self.jobs.start(ticket, || answer(&network::routes(Path::new("/"))?)),
            Call::Shutdown(mode) => self.jobs.start(ticket, move || shutdown::shutdown(mode)),
            Call::Suspend(mode) => self.jobs.start(ticket, move || suspend::suspend(Path::new("/"), mode)),
            Call::SetUserPassword(arguments) => {
                self.jobs.start(ticket, move || password::set_user_password(&arguments))
            }
            Call::SshGetAuthorizedKeys(username) => {
                self.jobs.start(ticket, move || answer(&ssh::get(Path::new("/"), &username)?))
            }
            Call::SshAddAuthorizedKeys(arguments) => {
                self.jobs.start(ticket, move || ssh::add(Path::new("/"), &arguments))
            }
            Call::SshRemoveAuthorizedKeys(arguments) => {
                self.jobs.start(ticket, move || ssh::remove(Path::new("/"), &arguments))
            }
            Call::Exec(_) if !self.exec.have_room() => {
                Reply::Now(Err(Error::generic("too many programs are running")))
            }
            Call::Exec(exec) => {
                let starter = self.exec.starter();
                self.jobs.start(ticket, move || exec::start(*exec, &starter))
            }
            Call::ExecStatus(asked) => Reply::Now(self.exec.status(asked).and_then(|status| answer(&status))),
            Call::FsfreezeStatus => Reply::Now(Ok(fsfreeze::status(&self.runs))),
            Call::FsfreezeFreeze(mountpoints) => {
                note!("guest-fsfreeze called");
                self.plain_freezes.insert(ticket);
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

    /// What has become ready, by ticket.
    pub fn finished(&mut self) -> Vec<(u64, Delivery)> {
        self.jobs.hold(self.runs.is_frozen());
        let mut finished = std::mem::take(&mut self.besides);
        for (ticket, outcome) in self.runs.finished() {
            let is_plain = self.plain_freezes.remove(&ticket);
            finished.push((ticket, Delivery::Answer(fsfreeze::outcome(outcome, is_plain))));
        }
        for (ticket, outcome) in self.jobs.finished() {
            match outcome {
                jobs::Finished::Answer(answer) => finished.push((ticket, Delivery::Answer(answer))),
                jobs::Finished::File(done) => {
                    finished.extend(self.files.done(&mut self.jobs, ticket, done));
                }
            }
        }
        self.jobs.begin_waiting();
        finished
    }

    /// Fetches the next piece of an answer, which will be among `finished`, its text in `memory` if that is enough. False
    /// where it cannot: then the answer ends.
    pub fn go_on(&mut self, ticket: u64, transfer: Transfer, memory: Vec<u8>) -> bool {
        self.files.go_on(&mut self.jobs, ticket, transfer, memory)
    }

    /// The rest of an answer is not wanted.
    pub fn end(&mut self, transfer: Transfer) {
        let besides = self.files.end(&mut self.jobs, transfer);
        if !besides.is_empty() {
            self.besides.extend(besides);
            self.jobs.ring();
        }
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
    serde_json::to_value(value).map_err(|error| not_written(&error))
}

fn not_written(error: &serde_json::Error) -> Error {
    Error::generic(format!("the answer cannot be written: {error}"))
}
