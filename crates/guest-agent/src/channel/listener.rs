//! A listening socket.

use crate::log;
use rustix::net::SocketFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Clients that may wait to be taken up.
pub(super) const BACKLOG: i32 = 16;

/// A listening socket, of whatever family.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Over a socket that listens and does not block.
    pub fn new(socket: OwnedFd) -> Listener {
        Listener { socket }
    }

    /// The next client that waits, if any.
    pub fn accept(&self) -> Option<OwnedFd> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(client) => return Some(client),
                Err(rustix::io::Errno::AGAIN) => return None,
                // A client that left before it was taken up, or a signal.
                Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log!(Error, "cannot take up a client: {error}");
                    return None;
                }
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
