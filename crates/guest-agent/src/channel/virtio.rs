//! The virtio-serial port.

use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Where QEMU's port is, by its well-known name.
const PORT: &str = "/dev/virtio-ports/org.qemu.guest_agent.0";

/// Opens the port. It stays open while hosts come and go.
/// # Errors
/// When it is not there, or another agent has it (EBUSY).
pub fn open_port(path: Option<&Path>) -> io::Result<OwnedFd> {
    let path = path.unwrap_or(Path::new(PORT));
    Ok(rustix::fs::open(
        path,
        OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )?)
}
