//! `guest-suspend-disk`, `-ram` and `-hybrid`: by systemd, by pm-utils, or by the kernel's own file.

use super::helper::{self, Failure};
use crate::errno;
use guest_protocol::Error;
use guest_protocol::arguments::Suspend;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Most that is read of the kernel's list of states; real ones are below 32 bytes.
const STATES_BYTES_MAX: u64 = 4096;

/// How each way calls a mode.
struct Names {
    /// systemd's unit, whose presence says that systemd can do it.
    unit: &'static str,
    /// `systemctl`'s verb.
    verb: &'static str,
    /// `pm-is-supported`'s flag.
    flag: &'static str,
    /// The program of pm-utils.
    program: &'static str,
    /// The word in `/sys/power/state`.
    state: Option<&'static str>,
}

fn names(mode: Suspend) -> Names {
    match mode {
        Suspend::Disk => Names {
            unit: "systemd-hibernate",
            verb: "hibernate",
            flag: "--hibernate",
            program: "pm-hibernate",
            state: Some("disk"),
        },
        Suspend::Ram => Names {
            unit: "systemd-suspend",
            verb: "suspend",
            flag: "--suspend",
            program: "pm-suspend",
            state: Some("mem"),
        },
        Suspend::Hybrid => Names {
            unit: "systemd-hybrid-sleep",
            verb: "hybrid-sleep",
            flag: "--suspend-hybrid",
            program: "pm-suspend-hybrid",
            state: None,
        },
    }
}

/// Suspends and returns when the guest is awake again. Tries the next way when one is there but fails; if none is left,
/// the last failure is told, where qemu-ga would pretend success. `root` is `/` but in tests.
pub(super) fn suspend(root: &Path, mode: Suspend) -> Result<Value, Error> {
    let names = names(mode);
    let mut refused = Error::generic("the requested suspend mode is not supported by the guest");
    // `systemctl status` says 4 for a unit that is not there, and 3 for one that does not run.
    if matches!(exit_code(&["systemctl", "status", names.unit]), Ok(Some(1..=3))) {
        let called = format!("systemctl {}", names.verb);
        match by_helper(&["systemctl", names.verb], &called) {
            Ok(()) => return Ok(json!({})),
            Err(error) => refused = error,
        }
    }
    if matches!(exit_code(&["pm-is-supported", names.flag]), Ok(Some(0))) {
        match by_helper(&[names.program], names.program) {
            Ok(()) => return Ok(json!({})),
            Err(error) => refused = error,
        }
    }
    if let Some(state) = names.state
        && is_offered(root, state)
    {
        match write_state(root, state) {
            Ok(()) => return Ok(json!({})),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// `None` if the program is not there.
fn exit_code(argv: &[&str]) -> Result<Option<i32>, Failure> {
    match helper::wait_for(argv, None, None) {
        // One that a signal ended did not do what it was asked for.
        Ok(ended) => Ok(Some(ended.status.code().unwrap_or(128))),
        Err(Failure::Exec(error)) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn by_helper(argv: &[&str], called: &str) -> Result<(), Error> {
    Err(Error::generic(match exit_code(argv) {
        Ok(Some(0)) => return Ok(()),
        Ok(Some(code)) => {
            format!("the helper program '{called}' returned an unexpected exit status code ({code})")
        }
        Ok(None) => format!("the helper program '{called}' was not found"),
        Err(Failure::Exec(error) | Failure::System(error)) => {
            format!("failed to create child process, error '{}'", errno::words(&error))
        }
        Err(Failure::TooLong(_)) => format!("the helper program '{called}' did not end"),
    }))
}

fn is_offered(root: &Path, state: &str) -> bool {
    let mut states = String::new();
    File::open(root.join("sys/power/state"))
        .and_then(|file| file.take(STATES_BYTES_MAX).read_to_string(&mut states))
        .is_ok()
        && states.split_whitespace().any(|offered| offered == state)
}

fn write_state(root: &Path, state: &str) -> Result<(), Error> {
    let file = File::options().write(true).open(root.join("sys/power/state"));
    file.and_then(|mut file| file.write_all(state.as_bytes())).map_err(|error| {
        let words = errno::words(&error);
        Error::generic(format!("suspend: cannot write to '/sys/power/state': {words}"))
    })
}
