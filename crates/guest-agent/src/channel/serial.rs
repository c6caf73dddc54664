//! A serial line (`isa-serial`).

use rustix::fs::{Mode, OFlags};
use rustix::termios::{ControlModes, OptionalActions, QueueSelector, SpecialCodeIndex, speed};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Opens it raw: without echo, or the agent would hear itself. What was said before it was open is dropped.
/// # Errors
/// When it is not there or is no terminal.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let line = rustix::fs::open(path, flags, Mode::empty())?;
    let mut settings = rustix::termios::tcgetattr(&line)?;
    settings.make_raw();
    settings.set_speed(speed::B38400)?;
    // No modem stands between us and the host whose silence would mean something.
    settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
    settings.special_codes[SpecialCodeIndex::VMIN] = 1;
    settings.special_codes[SpecialCodeIndex::VTIME] = 0;
    rustix::termios::tcflush(&line, QueueSelector::IFlush)?;
    rustix::termios::tcsetattr(&line, OptionalActions::Now, &settings)?;
    Ok(line)
}
