//! The host's end of the channel, for `vm::agent`: the clock is the world's, and so are the bytes.

use crate::world::{Doom, World};
use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use vm::agent::Line;

/// The world, shared by everything in it. One thread.
pub(crate) type Shared = Rc<RefCell<World>>;

/// The channel.
pub(crate) struct SimulatedLine(pub(crate) Shared);

/// What unwinds out of the program when its process ends in the middle.
pub(crate) struct Ended(pub(crate) Doom);

/// Lets time go by, and ends the program if that is what happens meanwhile.
pub(crate) fn wait(world: &Shared, until: Duration, for_the_host: bool) {
    world.borrow_mut().advance(until, for_the_host);
    doom(world);
}

/// Ends the program if that is what has happened.
pub(crate) fn doom(world: &Shared) {
    let doom = world.borrow_mut().doom.take();
    if let Some(doom) = doom {
        world.borrow_mut().killed |= doom == Doom::Killed;
        if !std::thread::panicking() {
            std::panic::resume_unwind(Box::new(Ended(doom)));
        }
    }
}

/// The world's time as an `Instant`. Only differences are ever looked at, so the beginning may be any.
fn instant(time: Duration) -> Instant {
    static BEGINNING: OnceLock<Instant> = OnceLock::new();
    #[expect(clippy::disallowed_methods, reason = "there is no other way to have an `Instant`")]
    let beginning = *BEGINNING.get_or_init(Instant::now);
    beginning + time
}

fn since_beginning(at: Instant) -> Duration {
    at.saturating_duration_since(instant(Duration::ZERO))
}

impl Line for SimulatedLine {
    fn path(&self) -> &Path {
        Path::new("/simulated")
    }

    fn now(&self) -> Instant {
        instant(self.0.borrow().now)
    }

    fn pause(&mut self, time: Duration) {
        let until = self.0.borrow().now + time;
        wait(&self.0, until, false);
    }

    fn is_connected(&self) -> bool {
        self.0.borrow().wire.connected
    }

    fn connect(&mut self, deadline: Instant) -> io::Result<()> {
        if self.0.borrow().killed {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let (now, dead_until) = (self.0.borrow().now, self.0.borrow().wire.dead_until);
        if !self.0.borrow().qemu.alive {
            // Nobody listens at the socket of a QEMU that has ended.
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if now < dead_until {
            // Another program holds the channel, and the socket's queue is full.
            wait(&self.0, since_beginning(deadline).min(dead_until), false);
            if self.0.borrow().now < dead_until {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        let mut world = self.0.borrow_mut();
        world.wire.connected = true;
        world.wire.closed = false;
        world.wire.number += 1;
        world.wire.arrived.clear();
        Ok(())
    }

    fn hang_up(&mut self) {
        let mut world = self.0.borrow_mut();
        world.wire.connected = false;
        world.wire.closed = false;
        world.wire.arrived.clear();
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        doom(&self.0);
        let mut world = self.0.borrow_mut();
        if world.killed || world.now >= since_beginning(deadline) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if !world.wire.connected {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if world.wire.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        world.send_to_guest(bytes);
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Instant) -> io::Result<usize> {
        // What arrives for a program that was killed, and only unwinds, is never read: time must go by all the same.
        let reads = !self.0.borrow().killed;
        wait(&self.0, since_beginning(deadline), reads);
        let mut world = self.0.borrow_mut();
        if world.killed {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if !world.wire.connected {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let most = if world.rng.u8(..4) == 0 { world.rng.usize(1..64) } else { buffer.len() };
        let count = world.wire.arrived.len().min(most).min(buffer.len());
        for (place, byte) in buffer.iter_mut().zip(world.wire.arrived.drain(..count)) {
            *place = byte;
        }
        match count {
            0 if world.wire.closed => Ok(0),
            0 => Err(io::ErrorKind::TimedOut.into()),
            count => Ok(count),
        }
    }
}
