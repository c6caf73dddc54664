//! Unix sockets whose every wait ends.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two attempts to connect to a server whose queue is full.
const RETRY: Duration = Duration::from_millis(20);

/// Connects, or gives up at the deadline. A plain `connect` waits for ever when the server's queue is full, as
/// QEMU's is while another client holds the monitor.
///
/// # Errors
/// The kernel's, and `TimedOut`.
pub fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    loop {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether nobody listens at a socket, or there is none. Does not wait: one whose queue is full is alive, only busy.
///
/// Any other failure to connect (no permission, no descriptors left) says nothing about the listener, and counts as one.
pub fn nobody_listens(path: &Path) -> bool {
    let gone = |kind| matches!(kind, io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound);
    connect(path, Instant::now()).is_err_and(|error| gone(error.kind()))
}

/// Time left until the deadline; `TimedOut` if none is.
///
/// # Errors
/// `TimedOut`.
pub fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    // A time-out of zero would mean "none" to the kernel.
    if left < Duration::from_micros(1) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Whether an error of a read or write with a time limit means that the limit was reached.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// Who made the other end of the socket: process and user.
///
/// # Errors
/// The kernel's.
pub fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    Ok(Peer {
        pid: credentials.pid.as_raw_nonzero().get().unsigned_abs(),
        uid: credentials.uid.as_raw(),
        gid: credentials.gid.as_raw(),
    })
}

/// The maker of a socket's other end. For a listening socket: who called `listen`, which may be the starter of the
/// program that now serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl Peer {
    /// Whether the process has ended; one that nobody has waited for yet has.
    pub fn has_ended(self) -> bool {
        // The state follows the name, which is in parentheses. Source: proc_pid_stat(5).
        std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).map_or(true, |stat| {
            stat.rsplit_once(')')
                .is_some_and(|(_, rest)| matches!(rest.trim_start().chars().next(), Some('Z' | 'X')))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{bind, listen, socket};

    #[test]
    fn a_server_whose_queue_is_full_is_alive_and_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        assert!(nobody_listens(&path), "there is none");
        let server = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&server, 1).unwrap();
        let queue: Vec<UnixStream> =
            std::iter::from_fn(|| connect(&path, Instant::now()).ok()).take(64).collect();
        let began = Instant::now();
        let refused = connect(&path, began + Duration::from_millis(100)).unwrap_err();
        assert!(queue.len() < 64 && is_timeout(&refused), "{refused}");
        assert!(!nobody_listens(&path) && began.elapsed() < Duration::from_secs(10));
        drop(server);
        assert!(nobody_listens(&path), "its file is still there");
    }
}
