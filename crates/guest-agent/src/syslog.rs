//! The system's log, for commands of note: datagrams to `/dev/log` that are never waited for.
//!
//! Not the C library's `syslog`, which waits while the reader is full: a journal that cannot write because its file
//! system is frozen would hold up the thaw.

use std::io;
use std::os::unix::net::UnixDatagram;

const PLACE: &str = "/dev/log";
/// Facility user, severity informational, as in RFC 3164: 1 × 8 + 6.
const PRIORITY: &str = "<14>";

/// A way to it, made when it is first needed.
#[derive(Debug)]
pub(crate) struct Syslog {
    socket: Option<UnixDatagram>,
    program: Option<String>,
}

impl Syslog {
    pub(crate) const fn new() -> Syslog {
        Syslog { socket: None, program: None }
    }

    /// Sends a line, or drops it where nobody reads.
    pub(crate) fn send(&mut self, line: &str) {
        let program = self.program.get_or_insert_with(program);
        let message = format!("{PRIORITY}{program}: {line}");
        // Twice: a reader that was started anew has another socket.
        for _ in 0..2 {
            if self.socket.is_none() {
                self.socket = connect().ok();
            }
            let Some(socket) = &self.socket else { return };
            match socket.send(message.as_bytes()) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.socket = None,
                _ => return,
            }
        }
    }
}

fn connect() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(PLACE)?;
    Ok(socket)
}

/// The name under which the program was started, by which an administrator looks for it.
fn program() -> String {
    let first = std::env::args_os().next().unwrap_or_default();
    let name = std::path::Path::new(&first).file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
