//! What the children of a hook go on writing when it has ended: read and dropped by the agent's loop, so that a lock's
//! holder in the background neither waits for a full pipe nor dies of a closed one, and nobody waits for its end.

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Most pipes; the oldest are closed to make room.
const PIPES_MAX: usize = 256;
/// Most bytes read of each pipe at a time, so that a flood does not keep the loop from others.
const TURN_BYTES: usize = 256 << 10;

/// The pipes that are left.
#[derive(Debug)]
pub struct Leftovers {
    epoll: OwnedFd,
    pipes: Mutex<Vec<OwnedFd>>,
}

impl Leftovers {
    /// None yet. What is to be watched together with a bell, by whoever watches the bell.
    /// # Errors
    /// When the kernel has no room.
    pub fn beside(bell: impl AsFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, bell, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self { epoll, pipes: Mutex::default() })
    }

    /// Readable when there is something to drop, or when the bell was rung.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Takes a pipe over, which must not block. From any thread.
    pub fn adopt(&self, pipe: OwnedFd) {
        // Not watched, it is closed here: what writes to it later fails, which is better than a writer that waits.
        if epoll::add(&self.epoll, &pipe, EventData::new_u64(1), EventFlags::IN).is_ok() {
            let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
            if pipes.len() >= PIPES_MAX {
                pipes.remove(0);
            }
            pipes.push(pipe);
        }
    }

    /// Drops what was written; true if there is more.
    pub fn drop_some(&self) -> bool {
        let mut more = false;
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        pipes.retain(|pipe| {
            let mut buffer = [0; 16 << 10];
            for _ in 0..TURN_BYTES / buffer.len() {
                match rustix::io::read(pipe, &mut buffer) {
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return true,
                    Ok(0) | Err(_) => return false,
                    Ok(_) => {}
                }
            }
            more = true;
            true
        });
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll::{Bell, Poll};
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn what_is_written_later_is_dropped_and_the_bell_is_still_heard() {
        let bell = Bell::new().unwrap();
        let leftovers = Leftovers::beside(&bell).unwrap();
        let poll = Poll::new().unwrap();
        poll.add(leftovers.bell(), 7).unwrap();
        let heard = || !poll.wait(Some(Duration::from_secs(5))).unwrap().is_empty();
        let silent = || poll.wait(Some(Duration::from_millis(20))).unwrap().is_empty();
        let (reader, mut writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        leftovers.adopt(reader.into());
        assert!(silent());
        for _ in 0..3 {
            writer.write_all(&[7; 40_000]).unwrap();
            assert!(heard());
            assert!(!leftovers.drop_some());
            assert!(silent(), "what was read is not told again");
            bell.ring();
            assert!(heard());
            bell.silence();
            assert!(silent());
        }
        drop(writer);
        assert!(heard());
        leftovers.drop_some();
        assert!(leftovers.pipes.lock().unwrap().is_empty(), "a pipe that was closed is forgotten");
    }
}
