//! The agent's log: standard error or a file, and memory only while the guest is frozen.
//!
//! A line written while frozen could wait for the very file system that is frozen, so `hold` diverts lines into
//! a bounded ring before the first FIFREEZE, and `release` writes them out after the last FITHAW.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Most lines kept while frozen; the oldest go first.
const HELD_LINES_MAX: usize = 512;
/// Longest line, in bytes; a longer one is cut.
const LINE_BYTES_MAX: usize = 2048;

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
    held: Option<VecDeque<String>>,
}

static LOG: Mutex<Log> = Mutex::new(Log { file: None, verbose: false, held: None });

/// Sets where lines go (`None`: standard error) and whether all levels are written.
pub fn start(file: Option<File>, verbose: bool) {
    with(|log| {
        log.file = file;
        log.verbose = verbose;
    });
}

/// From now on lines stay in memory. Call before the first FIFREEZE.
pub fn hold() {
    with(|log| {
        // The room is taken now: while frozen nothing large is allocated.
        log.held.get_or_insert_with(|| VecDeque::with_capacity(HELD_LINES_MAX));
    });
}

/// Writes out what was kept, and later lines at once. Call after the last FITHAW.
pub fn release() {
    with(|log| {
        for line in log.held.take().unwrap_or_default() {
            log.emit(&line);
        }
    });
}

/// Writes or keeps one line.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    with(|log| {
        if level > Level::Error && !log.verbose {
            return;
        }
        let line = line(level, message);
        match &mut log.held {
            Some(held) => {
                if held.len() == HELD_LINES_MAX {
                    held.pop_front();
                }
                held.push_back(line);
            }
            None => log.emit(&line),
        }
    });
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
    let mut line = format!("{}.{:06}: {}: {message}", now.as_secs(), now.subsec_micros(), level.name());
    // What a host sends must not forge further lines.
    line = line.replace(['\n', '\r'], " ");
    if line.len() > LINE_BYTES_MAX {
        let end = (0..=LINE_BYTES_MAX).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
    }
    line.push('\n');
    line
}

impl Log {
    fn emit(&mut self, line: &str) {
        // A log that cannot be written has nowhere to say so.
        let _written = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        }
        .is_ok();
    }
}
