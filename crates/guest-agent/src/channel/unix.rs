//! The listening unix socket.

use crate::log;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Clients that may wait to be taken up.
const BACKLOG: i32 = 16;

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens at `path`, taking the place of a socket left there by an agent before. Only our own user may connect.
    /// # Errors
    /// When the path cannot be used, or is something else than a socket.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        match rustix::fs::lstat(path) {
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_socket() => {
                rustix::fs::unlink(path)?
            }
            // Anything else makes the bind fail, and is not ours to remove.
            Ok(_) | Err(_) => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file gets the mode of the unbound socket, less the umask: it is never open to others, not for a moment.
        // Source: `unix_bind_bsd` in Linux's `net/unix/af_unix.c`.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Listener { socket })
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
