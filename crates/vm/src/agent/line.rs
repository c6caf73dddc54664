//! The channel to an agent and the time in which it is used: a socket and the clock, or those of a simulated world.

use crate::unix;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a conversation with an agent stands on. Every wait ends at its deadline with `TimedOut` or `WouldBlock`.
pub trait Line {
    /// What the channel is called, for people.
    fn path(&self) -> &Path;
    /// The time.
    fn now(&self) -> Instant;
    /// Lets time go by.
    fn pause(&mut self, time: Duration);
    /// Whether there is a connection, as far as is known.
    fn is_connected(&self) -> bool;
    /// Connects anew.
    ///
    /// # Errors
    /// The kernel's.
    fn connect(&mut self, deadline: Instant) -> io::Result<()>;
    /// Gives the connection up.
    fn hang_up(&mut self);
    /// Sends all of it.
    ///
    /// # Errors
    /// The kernel's; `NotConnected` without a connection.
    fn send(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()>;
    /// Takes what has arrived, waiting for something; 0 bytes are the end of the connection.
    ///
    /// # Errors
    /// As `send`.
    fn receive(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize>;
}

/// A unix socket.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    stream: Option<UnixStream>,
}

impl Socket {
    /// One that is not connected yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), stream: None }
    }

    fn stream(&mut self) -> io::Result<&mut UnixStream> {
        self.stream.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Line for Socket {
    fn path(&self) -> &Path {
        &self.path
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    fn connect(&mut self, deadline: Instant) -> io::Result<()> {
        self.stream = Some(unix::connect(&self.path, deadline)?);
        Ok(())
    }

    fn hang_up(&mut self) {
        self.stream = None;
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let left = unix::time_left(deadline)?;
        let stream = self.stream()?;
        stream.set_write_timeout(Some(left))?;
        stream.write_all(bytes)
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        let left = unix::time_left(deadline)?;
        let stream = self.stream()?;
        stream.set_read_timeout(Some(left))?;
        stream.read(buffer)
    }
}
