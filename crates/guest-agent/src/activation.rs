//! Socket activation: a listening socket that the one who started us has opened (systemd's `.socket` units).
//!
//! Source: `sd_listen_fds(3)`. The crates for it return typed std sockets, of which there is none for vsock.

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, sockopt};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// The first descriptor that is passed.
const FIRST: i32 = 3;

/// Takes the socket, if one was passed to this very process. What says so is removed from the environment, so that no
/// program that the agent starts takes it to be about itself. Call it before any thread is started.
/// # Errors
/// A sentence, where more than one was passed or one of a kind that no host connects to.
pub fn take() -> Result<Option<OwnedFd>, String> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let (pid, count) = (number("LISTEN_PID"), number("LISTEN_FDS"));
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // SAFETY: there is one thread only.
        unsafe { std::env::remove_var(name) };
    }
    let count = count.filter(|_| pid == Some(std::process::id())).unwrap_or(0);
    match count {
        0 => return Ok(None),
        1 => {}
        _ => return Err("only one listening socket can be served".to_owned()),
    }
    // SAFETY: the borrow ends with this line's call, which fails where the descriptor is not open.
    if let Err(error) = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(FIRST) }) {
        return Err(format!("the listening socket that was passed is not open: {error}"));
    }
    // SAFETY: it is open, and by the protocol it is ours: nothing else in this process has it.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    let domain = sockopt::socket_domain(&socket);
    let listens = sockopt::socket_acceptconn(&socket) == Ok(true);
    if !listens || !matches!(domain, Ok(AddressFamily::UNIX | AddressFamily::VSOCK)) {
        return Err("unsupported listen fd type".to_owned());
    }
    let prepared =
        fcntl_setfd(&socket, FdFlags::CLOEXEC).and_then(|()| rustix::io::ioctl_fionbio(&socket, true));
    prepared.map_err(|error| format!("the listening socket that was passed cannot be used: {error}"))?;
    Ok(Some(socket))
}
