//! The listening unix socket.

use super::listener::{BACKLOG, Listener};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::path::Path;

/// Listens at `path`, taking the place of a socket left there by an agent before. Only our own user may connect.
/// # Errors
/// When the path cannot be used, or is something else than a socket.
pub(super) fn listen(path: &Path) -> io::Result<Listener> {
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
    Ok(Listener::new(socket))
}
