//! Waiting for many file descriptors at once.
//!
//! All are watched edge-triggered: a virtio port without a host would otherwise be reported without end.

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A set of watched file descriptors.
#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
}

/// What happened to one of them.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// The name under which it was added.
    pub token: u64,
    /// May be read from; also set when the other side is gone, so that the end is read.
    pub readable: bool,
    /// May be written to.
    pub writable: bool,
    /// The other side is gone.
    pub hung_up: bool,
}

impl Poll {
    /// An empty set.
    /// # Errors
    /// When the kernel has no room.
    pub fn new() -> io::Result<Poll> {
        Ok(Poll { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches `fd` for everything until it is closed.
    /// # Errors
    /// When it cannot be watched (a regular file).
    pub fn add(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), everything())?)
    }

    /// Asks to be told once more if `fd` is ready now, for who left some for later.
    /// # Errors
    /// When it was not added.
    pub fn rearm(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(token), everything())?)
    }

    /// Waits for events, at most so long.
    /// # Errors
    /// When waiting is impossible; a signal only ends it early.
    pub fn wait(&self, at_most: Option<Duration>) -> io::Result<Vec<Event>> {
        let timeout = at_most.and_then(|duration| Timespec::try_from(duration).ok());
        let mut events = Vec::with_capacity(64);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(events
            .into_iter()
            .map(|event: epoll::Event| {
                let flags = event.flags;
                let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                Event {
                    token: event.data.u64(),
                    readable: gone || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                    writable: flags.contains(EventFlags::OUT),
                    hung_up: gone,
                }
            })
            .collect())
    }
}

fn everything() -> EventFlags {
    EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
}

/// A bell that one thread rings and the loop hears.
#[derive(Debug)]
pub struct Bell {
    eventfd: OwnedFd,
}

impl Bell {
    /// A silent bell.
    /// # Errors
    /// When the kernel has no room.
    pub fn new() -> io::Result<Bell> {
        Ok(Bell { eventfd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Makes the bell's descriptor readable.
    pub fn ring(&self) {
        // The only failure is a full counter, which is readable as well.
        let _rung = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes()).is_ok();
    }

    /// Silences it, so that the next ring is an edge again.
    pub fn silence(&self) {
        let mut counter = [0u8; 8];
        // The only failure is that nobody rang.
        let _rang = rustix::io::read(&self.eventfd, &mut counter).is_ok();
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
