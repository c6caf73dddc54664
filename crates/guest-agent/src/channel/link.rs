//! One open way to a host: a descriptor, what it can do just now, and the conversation on it.

use crate::poll::Event;
use guest_protocol::Connection;
use guest_protocol::connection::Dispatch;
use guest_protocol::json::Limits;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes read at a time.
const READ_BYTES: usize = 16 << 10;

/// How things stand after some work on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing to do until the kernel tells.
    Idle,
    /// More could be done at once; others go first.
    Busy,
    /// The link is of no more use.
    Closed,
}

/// What a link goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Outlives its hosts, and the kernel tells when they come and go.
    VirtioPort,
    /// Outlives its hosts, and nobody tells. Its end is for ever.
    SerialLine,
    /// Ends with its client.
    Socket,
}

/// A link to a host.
#[derive(Debug)]
pub struct Link {
    fd: OwnedFd,
    connection: Connection,
    kind: Kind,
    readable: bool,
    writable: bool,
    hung_up: bool,
    /// On a port: a host is there, as far as we know.
    host_seen: bool,
    /// On a socket: the client sends no more, but may still read.
    input_ended: bool,
    /// When the client last did anything, by the loop's own count.
    pub last_active: u64,
}

impl Link {
    /// A link over a non-blocking descriptor.
    pub fn new(fd: OwnedFd, number: u32, kind: Kind) -> Link {
        Link {
            fd,
            connection: Connection::new(Limits::default(), number),
            kind,
            readable: true,
            writable: true,
            hung_up: false,
            host_seen: false,
            input_ended: false,
            last_active: 0,
        }
    }

    /// Takes what the kernel tells.
    pub fn hear(&mut self, event: Event) {
        self.readable |= event.readable;
        self.writable |= event.writable;
        // On a virtio port the kernel always tells whether a host is there, and a hang-up is not for ever.
        self.hung_up = event.hung_up;
        self.host_seen |= !event.hung_up;
    }

    /// Has the next `work` look for input, told of or not.
    pub fn look(&mut self) {
        self.readable = true;
    }

    /// Whether the client waits for an answer, or for us to read on.
    pub fn is_waiting(&self) -> bool {
        self.connection.owes_answers() || !self.connection.output().is_empty()
    }

    /// What the client makes us keep in memory, about.
    pub fn held_bytes(&self) -> usize {
        self.connection.held_bytes()
    }

    /// The conversation, to give it answers.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Reads once, hands every request to `carry_out` (which may answer at once), and writes what it can.
    pub fn work(&mut self, mut carry_out: impl FnMut(&mut Connection, Dispatch)) -> State {
        let mut buffer = [0; READ_BYTES];
        let mut input: &[u8] = &[];
        if self.readable && self.connection.wants_input() {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(0) if self.kind == Kind::SerialLine => return State::Closed,
                Ok(0) => self.ended(),
                Ok(bytes) => input = &buffer[..bytes],
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                // A client that left with answers unread resets the connection; a port that was pulled is gone.
                Err(_) => return State::Closed,
            }
        }
        while let Some(dispatch) = self.connection.next_request(&mut input) {
            carry_out(&mut self.connection, dispatch);
        }
        if self.flush().is_err() {
            return State::Closed;
        }
        if self.input_ended && !self.connection.owes_answers() && self.connection.output().is_empty() {
            return State::Closed;
        }
        if self.kind == Kind::Socket && self.hung_up && !self.readable {
            return State::Closed;
        }
        let more = self.readable && self.connection.wants_input() && !self.input_ended;
        if more { State::Busy } else { State::Idle }
    }

    fn ended(&mut self) {
        self.readable = false;
        if self.kind == Kind::Socket {
            self.input_ended = true;
        } else if self.hung_up && self.host_seen {
            // Bytes of a new host can arrive a moment before the kernel says that it is there, so only a host that
            // was seen can leave: otherwise those bytes would be dropped with the old ones.
            self.host_seen = false;
            self.connection.hang_up();
        }
    }

    fn flush(&mut self) -> Result<(), Errno> {
        while self.writable && !self.connection.output().is_empty() {
            match rustix::io::write(&self.fd, self.connection.output()) {
                Ok(bytes) => self.connection.sent(bytes),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
