//! The loop: hears hosts, hands requests to the commands, sends answers. It never waits for anything but events.

use crate::channel::{Channel, Kind, Link, Listener, State};
use crate::commands::{Commands, Delivery, EXEC_TOKEN, Reply, Settings, Transfer};
use crate::daemon::PidFile;
use crate::hooks;
use crate::log;
use crate::options::Options;
use crate::poll::{Event, Poll};
use crate::run;
use crate::signals::Signals;
use guest_protocol::connection::Dispatch;
use guest_protocol::{Command, Connection};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Most clients of a unix socket; the one that did nothing for longest makes room for a new one.
const CLIENTS_MAX: usize = 32;
/// Most that all clients together make us keep, in bytes. One of them alone is bounded by its connection; when they are more,
/// the one that holds most is dismissed.
const HELD_BYTES_MAX: usize = 192 << 20;
/// How long until a port is tried again (`-r`), as in qemu-ga.
const RETRY: Duration = Duration::from_secs(5);

const SIGNALS: u64 = u64::MAX >> 1;
const RUNS: u64 = SIGNALS - 1;
const JOBS: u64 = SIGNALS - 2;
const LISTENER: u64 = SIGNALS - 3;

/// The agent, serving.
#[derive(Debug)]
pub struct Agent {
    poll: Rc<Poll>,
    signals: Signals,
    commands: Commands,
    channel: Channel,
    links: BTreeMap<u32, Link>,
    /// Links that could do more at once.
    busy: BTreeSet<u32>,
    /// By ticket, answers of which there is more than was sent.
    transfers: BTreeMap<u64, Transfer>,
    numbers: u32,
    clock: u64,
    /// Clients may wait though the kernel does not tell.
    look_at_door: bool,
    /// A port is opened again and again (`-r`).
    retry: bool,
    pid_file: Option<PidFile>,
    /// Where it is to be as soon as nothing is frozen.
    pid_file_wanted: Option<PathBuf>,
}

impl Agent {
    /// Takes up what a dead agent left, and opens the channel, which `activated` is if it was passed.
    /// # Errors
    /// A sentence about what could not be had.
    pub fn start(options: Options, signals: Signals, activated: Option<OwnedFd>) -> Result<Agent, String> {
        let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let poll = Rc::new(Poll::new().map_err(failed("cannot watch files"))?);
        warn_of_unknown(&options.blocked, &options.allowed);
        let settings = Settings {
            reported_version: options.reported_version,
            allowed: (!options.allowed.is_empty()).then_some(options.allowed),
            blocked: options.blocked,
            runs: run::Settings {
                statedir: options.statedir,
                compat_lease: options.compat_lease,
                selection: options.selection,
                hooks: options.hook.map(|path| hooks::Settings {
                    path,
                    limit: options.hook_limit,
                    tell_output: options.report_hook_output,
                }),
                ..run::Settings::default()
            },
        };
        let commands =
            Commands::new(settings, poll.clone()).map_err(failed("cannot use the state folder"))?;
        let watch = failed("cannot watch files");
        poll.add(&signals, SIGNALS).map_err(watch)?;
        poll.add(commands.runs_bell(), RUNS).map_err(watch)?;
        poll.add(commands.jobs_bell(), JOBS).map_err(watch)?;
        let channel = match activated {
            Some(socket) => Channel::Listener(Listener::new(socket)),
            None => Channel::new(options.method, options.path)?,
        };
        if let Channel::Listener(listener) = &channel {
            poll.add(listener, LISTENER).map_err(watch)?;
        }
        let mut agent = Agent {
            poll,
            signals,
            commands,
            channel,
            links: BTreeMap::new(),
            busy: BTreeSet::new(),
            transfers: BTreeMap::new(),
            numbers: 0,
            clock: 0,
            look_at_door: false,
            retry: options.retry_path,
            pid_file: None,
            pid_file_wanted: None,
        };
        match agent.open_port() {
            Err(error) if !agent.retries() => Err(format!("failed to open the channel: {error}")),
            _ => Ok(agent),
        }
    }

    /// Writes the pid file: at once, or after the thaw if this agent starts while its guest is frozen, for the file might lie
    /// where it is.
    /// # Errors
    /// A sentence, also where another agent has it locked.
    pub fn write_pid_file(&mut self, path: PathBuf) -> Result<(), String> {
        if self.commands.is_frozen() {
            self.pid_file_wanted = Some(path);
        } else {
            self.pid_file = Some(PidFile::create(&path)?);
        }
        Ok(())
    }

    /// Serves until told to end or the channel is gone. Whatever is frozen then is thawed before this returns.
    /// # Errors
    /// When waiting for events is impossible.
    pub fn serve(mut self) -> io::Result<()> {
        let served = self.serve_until_end();
        self.commands.thaw_now();
        served
    }

    fn serve_until_end(&mut self) -> io::Result<()> {
        loop {
            let waits_for_port = matches!(self.channel, Channel::Port(_)) && self.links.is_empty();
            if waits_for_port && !self.retries() {
                log!(Warning, "the channel is gone");
                return Ok(());
            }
            if std::mem::take(&mut self.look_at_door) {
                self.take_up_clients();
            }
            let at_most = match self.busy.is_empty() && !self.look_at_door {
                false => Some(Duration::ZERO),
                true if waits_for_port => Some(RETRY),
                true => None,
            };
            let events = self.poll.wait(at_most)?;
            if waits_for_port && events.is_empty() {
                log!(Warning, "waiting for channel path...");
                // Not there yet is what we wait for.
                let _opened = self.open_port().is_ok();
            }
            for event in events {
                match event.token {
                    SIGNALS => {
                        let asked = self.signals.take();
                        if asked.reap {
                            self.commands.reap();
                        }
                        if asked.end {
                            log!(Info, "told to end");
                            return Ok(());
                        }
                    }
                    RUNS | JOBS => self.deliver(),
                    LISTENER => self.take_up_clients(),
                    token if token & EXEC_TOKEN != 0 => self.commands.pipe_event(token),
                    token => self.hear(token, event),
                }
            }
            for number in std::mem::take(&mut self.busy) {
                self.work(number);
            }
            self.limit_memory();
        }
    }

    fn retries(&self) -> bool {
        self.retry && matches!(self.channel, Channel::Port(_))
    }

    fn open_port(&mut self) -> io::Result<()> {
        let Channel::Port(port) = &self.channel else { return Ok(()) };
        let (opened, kind) = (port.open()?, port.kind);
        self.link(opened, kind)
    }

    fn take_up_clients(&mut self) {
        while let Channel::Listener(listener) = &self.channel
            && let Some(client) = listener.accept()
        {
            if self.links.len() >= CLIENTS_MAX {
                self.make_room();
            }
            if let Err(error) = self.link(client, Kind::Socket) {
                log!(Error, "cannot take up a client: {error}");
            }
        }
    }

    /// Dismisses the idlest client. One that waits for an answer does nothing either, and is not idle.
    fn make_room(&mut self) {
        let numbers: Vec<u32> = self.links.keys().copied().collect();
        for number in numbers {
            // What it has said may not have been read yet.
            if let Some(link) = self.links.get_mut(&number).filter(|link| !link.is_waiting()) {
                link.look();
                self.work(number);
            }
        }
        let idlest = self.links.iter().min_by_key(|(_, link)| (link.is_waiting(), link.last_active));
        if self.links.len() >= CLIENTS_MAX
            && let Some(idlest) = idlest.map(|(number, _)| *number)
        {
            log!(Warning, "too many clients: the idlest is dismissed");
            self.drop_link(idlest);
        }
    }

    fn link(&mut self, fd: OwnedFd, kind: Kind) -> io::Result<()> {
        self.numbers = self.numbers.wrapping_add(1);
        let mut link = Link::new(fd, self.numbers, kind);
        link.last_active = self.tick();
        self.poll.add(&link, u64::from(self.numbers))?;
        self.links.insert(self.numbers, link);
        Ok(())
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn hear(&mut self, token: u64, event: Event) {
        let now = self.tick();
        let Ok(number) = u32::try_from(token) else { return };
        if let Some(link) = self.links.get_mut(&number) {
            link.last_active = now;
            link.hear(event);
            self.work(number);
        }
    }

    fn work(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(&number) else { return };
        let commands = &mut self.commands;
        match link.work(|connection, dispatch| carry_out(commands, connection, dispatch)) {
            State::Idle => self.transfer(number),
            State::Busy => {
                self.busy.insert(number);
                self.transfer(number);
            }
            State::Closed => self.close(number),
        }
    }

    /// Goes on with answers of which there is more, and ends those that nobody wants any more.
    fn transfer(&mut self, number: u32) {
        if self.transfers.is_empty() {
            return;
        }
        let Some(link) = self.links.get_mut(&number) else { return };
        let connection = link.connection();
        if let Some(ticket) = connection.wants_piece()
            && let Some(transfer) = self.transfers.remove(&ticket)
            && !self.commands.go_on(ticket, transfer, connection.take_spare())
        {
            connection.cut(ticket);
            self.busy.insert(number);
        }
        let unwanted =
            |ticket: &u64| Connection::number_of(*ticket) == number && !connection.is_wanted(*ticket);
        let unwanted: Vec<u64> = self.transfers.keys().copied().filter(unwanted).collect();
        for transfer in unwanted.iter().filter_map(|ticket| self.transfers.remove(ticket)) {
            self.commands.end(transfer);
        }
    }

    fn limit_memory(&mut self) {
        let held: usize = self.links.values().map(Link::held_bytes).sum();
        if held > HELD_BYTES_MAX
            && self.links.len() > 1
            && let Some((number, _)) = self.links.iter().max_by_key(|(_, link)| link.held_bytes())
        {
            log!(Warning, "the clients hold {held} bytes: the one that holds most is dismissed");
            self.close(*number);
        }
    }

    /// Answers that became ready go to whoever still waits for them.
    fn deliver(&mut self) {
        let finished = self.commands.finished();
        self.commands.reap();
        self.write_delayed_pid_file();
        for (ticket, delivery) in finished {
            let number = Connection::number_of(ticket);
            let connection = self.links.get_mut(&number).map(Link::connection);
            match (delivery, connection) {
                (Delivery::Answer(answer), Some(connection)) => connection.answer(ticket, answer),
                (Delivery::Answer(_), None) => {}
                (Delivery::Piece(piece, more), connection) => {
                    let is_wanted = connection.is_some_and(|connection| connection.piece(ticket, piece));
                    match more {
                        Some(transfer) if is_wanted => drop(self.transfers.insert(ticket, transfer)),
                        Some(transfer) => self.commands.end(transfer),
                        None => {}
                    }
                }
            }
            self.work(number);
        }
    }

    fn write_delayed_pid_file(&mut self) {
        if !self.commands.is_frozen()
            && let Some(path) = self.pid_file_wanted.take()
        {
            match PidFile::create(&path) {
                Ok(file) => self.pid_file = Some(file),
                Err(problem) => log!(Error, "{problem}"),
            }
        }
    }

    fn close(&mut self, number: u32) {
        self.drop_link(number);
        if self.retries() {
            log!(Warning, "agent stopped unexpectedly, restarting...");
        }
        // Descriptors may have been short: whoever waits at the door since then was told of once.
        self.look_at_door = true;
    }

    fn drop_link(&mut self, number: u32) {
        let Some(mut link) = self.links.remove(&number) else { return };
        self.busy.remove(&number);
        let theirs = |ticket: &u64| Connection::number_of(*ticket) == number;
        for transfer in self.transfers.keys().copied().filter(theirs).collect::<Vec<_>>() {
            if let Some(transfer) = self.transfers.remove(&transfer) {
                self.commands.end(transfer);
            }
        }
        // A thaw that the host had asked for is carried out, though nobody hears the answer.
        let connection = link.connection();
        connection.hang_up();
        while let Some(dispatch) = connection.next_request(&mut &[][..]) {
            carry_out(&mut self.commands, connection, dispatch);
        }
    }
}

fn carry_out(commands: &mut Commands, connection: &mut Connection, dispatch: Dispatch) {
    let ticket = dispatch.ticket;
    match commands.carry_out(dispatch) {
        Reply::Now(answer) => connection.answer(ticket, answer),
        Reply::Written(answer) => connection.answer_written(ticket, &answer),
        Reply::Later => {}
    }
}

/// A misspelt name protects nobody. Not an error: a list may name what other versions have.
fn warn_of_unknown(blocked: &[String], allowed: &[String]) {
    for name in blocked.iter().chain(allowed).filter(|name| Command::find(name).is_none()) {
        log!(Warning, "block-rpcs or allow-rpcs: there is no command {name}");
    }
}
