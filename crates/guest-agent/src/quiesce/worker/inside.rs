//! A worker from inside: gives up what it does not need, then does what it is asked until the agent is gone.

use super::super::channel::{self, Answer, Phase, Request};
use super::super::kinds;
use super::WORKER_ARGUMENT;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::time::{Duration, Instant};

/// Memory that a worker may map, in bytes: a server that sends without end must not starve the guest.
const MEMORY_BYTES_MAX: u64 = 1 << 30;

/// What a worker does for one instance. Each phase ends at its deadline by itself.
pub(in crate::quiesce) trait Session {
    fn phase(&mut self, phase: Phase, until: Instant) -> Answer;
}

/// Becomes a worker, and never returns, if this process was started as one. Call it first in `main`, before any
/// thread or file is opened.
pub fn main_if_worker() {
    let mut arguments = std::env::args();
    let (_, Some(first)) = (arguments.next(), arguments.next()) else { return };
    if first != WORKER_ARGUMENT {
        return;
    }
    let (kind, socket) = (arguments.next(), arguments.next().and_then(|number| number.parse().ok()));
    let (Some(kind), Some(socket)) = (kind, socket) else { std::process::exit(2) };
    // Nobody reads what a worker would print; its end is what the agent sees.
    std::panic::set_hook(Box::new(|_| {}));
    let served = confine(socket).and_then(|()| serve(&kind, socket));
    std::process::exit(i32::from(served.is_err()));
}

/// Answers requests until the agent closes the channel.
fn serve(kind: &str, socket: RawFd) -> io::Result<()> {
    // SAFETY: descriptor 0 is the channel, and nothing else in a worker uses it.
    let channel = unsafe { File::from_raw_fd(0) };
    let Some(order) = channel::receive(&channel)? else { return Ok(()) };
    let kind = kinds::KINDS.iter().find(|known| known.name == kind).ok_or(io::ErrorKind::NotFound)?;
    let mut session = (kind.session)(order, socket)?;
    while let Some(Request { phase, budget_ms }) = channel::receive(&channel)? {
        let until = Instant::now() + Duration::from_millis(budget_ms);
        channel::send(&channel, &session.phase(phase, until))?;
    }
    Ok(())
}

/// Undumpable (so that no process of the same user can attach), no core, bounded memory, and no descriptor open
/// but 0 to 2 and the application's socket.
fn confine(socket: RawFd) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on values and on structures that live here.
    unsafe {
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_NAME, c"stillpoint-work".as_ptr()))?;
        for (what, most) in [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_AS, MEMORY_BYTES_MAX)] {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            check(libc::setrlimit(what, &raw const limit))?;
        }
    }
    // The agent marks what it opens close-on-exec; this is the second lock on that door.
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(entry?.file_name().to_str().and_then(|number| number.parse::<RawFd>().ok()));
    }
    for number in open {
        if number > 2 && number != socket {
            // SAFETY: nothing in this process holds these; the listing's own descriptor is closed already.
            unsafe { libc::close(number) };
        }
    }
    Ok(())
}
