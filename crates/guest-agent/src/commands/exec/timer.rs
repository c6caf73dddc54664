//! One timer for all programs: their time limits, and how long their output is waited for. It is made when it is first
//! needed, and silent otherwise.

use crate::log;
use crate::poll::Poll;
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub(super) struct Timer {
    fd: Option<OwnedFd>,
    set: Option<Instant>,
}

impl Timer {
    /// Rings at that time, or not at all.
    pub(super) fn set(&mut self, deadline: Option<Instant>, poll: &Poll, token: u64) {
        if self.set == deadline {
            return;
        }
        if let Err(error) = self.arm(deadline, poll, token) {
            log!(Error, "time limits of programs cannot be kept, nor their ends be told in time: {error}");
        }
    }

    fn arm(&mut self, deadline: Option<Instant>, poll: &Poll, token: u64) -> io::Result<()> {
        let fd = match &self.fd {
            Some(fd) => fd,
            None => {
                let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
                let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
                poll.add(&fd, token)?;
                self.fd.insert(fd)
            }
        };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = match deadline {
            // Zero would mean never.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
                Timespec::try_from(left).unwrap_or(never)
            }
            None => never,
        };
        timerfd_settime(fd, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: never, it_value })?;
        self.set = deadline;
        Ok(())
    }
}
