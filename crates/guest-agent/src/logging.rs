//! The agent's log: standard error or a file, and memory only while the guest is frozen. Commands of note go to the
//! system's log besides, whatever `-v` says, as qemu-ga's do.
//!
//! A line written while frozen could wait for the very file system that is frozen, so `hold` diverts lines into
//! a bounded ring before the first FIFREEZE, and `release` writes them out after the last FITHAW. For the same
//! reason the log file is opened beside the agent's work: one that starts while its guest is frozen must not wait.

use crate::syslog::Syslog;
use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most lines kept while frozen; the oldest go first.
const HELD_LINES_MAX: usize = 512;
/// Longest line, in bytes; a longer one is cut.
const LINE_BYTES_MAX: usize = 2048;
/// How long the start waits for the log file to open, so that a wrong path is told at once.
const OPEN_WAIT: Duration = Duration::from_secs(2);

/// How much a line matters. Without `-v` only errors and worse are written, as qemu-ga does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The agent cannot go on.
    Critical,
    /// Something failed that should not.
    Error,
    /// Something is odd.
    Warning,
    /// A command of note.
    Info,
    /// For those who look for a fault.
    Debug,
}

impl Level {
    const fn name(self) -> &'static str {
        match self {
            Level::Critical => "critical",
            Level::Error => "error",
            Level::Warning => "warning",
            Level::Info => "info",
            Level::Debug => "debug",
        }
    }
}

#[derive(Debug)]
struct Log {
    file: Option<File>,
    verbose: bool,
    /// The guest is frozen.
    held: bool,
    /// The log file is not open yet.
    opening: bool,
    kept: VecDeque<Line>,
    syslog: Syslog,
}

#[derive(Debug)]
struct Line {
    text: String,
    to_syslog: bool,
}

static LOG: Mutex<Log> = Mutex::new(Log {
    file: None,
    verbose: false,
    held: false,
    opening: false,
    kept: VecDeque::new(),
    syslog: Syslog::new(),
});

/// A log file that is being opened.
#[derive(Debug)]
#[must_use = "whether it could be opened is known only later"]
pub struct Opening {
    opened: Option<Receiver<io::Result<()>>>,
}

impl Opening {
    /// Waits a little for it; where that is not enough, lines go on staying in memory until it is open.
    /// # Errors
    /// When it cannot be opened.
    pub fn wait(self) -> io::Result<()> {
        self.opened.map_or(Ok(()), |opened| opened.recv_timeout(OPEN_WAIT).unwrap_or(Ok(())))
    }
}

/// Sets where lines go (`None`: standard error) and whether all levels are written. Lines stay in memory until the file
/// is open.
/// # Errors
/// When there is no thread for it.
pub fn start(path: Option<PathBuf>, verbose: bool) -> io::Result<Opening> {
    with(|log| log.verbose = verbose);
    let Some(path) = path else { return Ok(Opening { opened: None }) };
    with(|log| log.opening = true);
    let (send, receive) = channel();
    let open = move || {
        let opened = File::options().append(true).create(true).open(path);
        let told =
            opened.as_ref().map(|_| ()).map_err(|error| io::Error::new(error.kind(), error.to_string()));
        with(|log| {
            log.file = opened.ok();
            log.opening = false;
            log.write_out();
        });
        // Nobody listens any more where it took long.
        let _told = send.send(told).is_ok();
    };
    std::thread::Builder::new().name("log".to_owned()).spawn(open)?;
    Ok(Opening { opened: Some(receive) })
}

/// From now on lines stay in memory. Call before the first FIFREEZE.
pub fn hold() {
    write(Level::Warning, format_args!("disabling logging due to filesystem freeze"));
    with(|log| {
        log.held = true;
        // The room is taken now: while frozen nothing large is allocated.
        log.kept.reserve(HELD_LINES_MAX);
    });
}

/// Writes out what was kept, and later lines at once. Call after the last FITHAW.
pub fn release() {
    with(|log| {
        log.held = false;
        log.write_out();
    });
    write(Level::Warning, format_args!("logging re-enabled due to filesystem unfreeze"));
}

/// Writes or keeps one line.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    with(|log| {
        if level > Level::Error && !log.verbose {
            return;
        }
        log.keep(Line { text: line(level, message), to_syslog: false });
        log.write_out();
    });
}

/// Notes a command in the system's log, and as information in the agent's own.
pub fn note(message: fmt::Arguments<'_>) {
    with(|log| {
        if log.verbose {
            log.keep(Line { text: line(Level::Info, message), to_syslog: false });
        }
        log.keep(Line { text: cut(format!("{}: {message}", Level::Info.name())), to_syslog: true });
        log.write_out();
    });
}

/// Notes a command of a host: `note!("guest-ping called")`.
#[macro_export]
macro_rules! note {
    ($($message:tt)+) => {
        $crate::logging::note(format_args!($($message)+))
    };
}

/// Logs a line at a level: `log!(Info, "guest-ping called")`.
#[macro_export]
macro_rules! log {
    ($level:ident, $($message:tt)+) => {
        $crate::logging::write($crate::logging::Level::$level, format_args!($($message)+))
    };
}

fn with<T>(work: impl FnOnce(&mut Log) -> T) -> T {
    // A panic while the log was held must not silence it.
    work(&mut LOG.lock().unwrap_or_else(PoisonError::into_inner))
}

fn line(level: Level, message: fmt::Arguments<'_>) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let line = format!("{}.{:06}: {}: {message}", now.as_secs(), now.subsec_micros(), level.name());
    cut(line) + "\n"
}

fn cut(line: String) -> String {
    // What a host sends must not forge further lines.
    let mut line = line.replace(['\n', '\r'], " ");
    if line.len() > LINE_BYTES_MAX {
        let end = (0..=LINE_BYTES_MAX).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
    }
    line
}

impl Log {
    fn keep(&mut self, line: Line) {
        if self.kept.len() == HELD_LINES_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back(line);
    }

    fn write_out(&mut self) {
        if self.held || self.opening {
            return;
        }
        for line in std::mem::take(&mut self.kept) {
            match line.to_syslog {
                true => self.syslog.send(&line.text),
                false => self.emit(&line.text),
            }
        }
    }

    fn emit(&mut self, line: &str) {
        // A log that cannot be written has nowhere to say so.
        let _written = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        }
        .is_ok();
    }
}
