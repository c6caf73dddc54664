//! Ways in: a virtio-serial port, a serial line, or a listening socket with many clients. All give links.

mod link;
mod listener;
mod serial;
mod unix;
mod virtio;
mod vsock;

pub use link::{Kind, Link, State};
pub use listener::Listener;

use crate::options::Method;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// One way in.
#[derive(Debug)]
pub enum Channel {
    /// Opened, and perhaps opened again (`-r`).
    Port(Port),
    /// Gives a link for each client.
    Listener(Listener),
}

impl Channel {
    /// Makes ready what `-m` and `-p` say. A port is not opened yet.
    /// # Errors
    /// A sentence, where there is nothing to listen at.
    pub fn new(method: Method, path: Option<PathBuf>) -> Result<Channel, String> {
        let path = path.or(method.default_path()).ok_or("must specify a path for this channel")?;
        let failed = |error: io::Error| format!("cannot listen at {}: {error}", path.display());
        Ok(match method {
            Method::UnixListen => Channel::Listener(unix::listen(&path).map_err(failed)?),
            Method::VsockListen => {
                let address = vsock::Address::read(&path.to_string_lossy())?;
                Channel::Listener(vsock::listen(address).map_err(failed)?)
            }
            Method::IsaSerial => Channel::Port(Port { kind: Kind::SerialLine, path }),
            Method::VirtioSerial => Channel::Port(Port { kind: Kind::VirtioPort, path }),
        })
    }
}

/// A port that hosts come and go on.
#[derive(Debug)]
pub struct Port {
    /// What it is.
    pub kind: Kind,
    path: PathBuf,
}

impl Port {
    /// Opens it. It stays open while hosts come and go.
    /// # Errors
    /// When it is not there, or another agent has it (EBUSY).
    pub fn open(&self) -> io::Result<OwnedFd> {
        if self.kind == Kind::SerialLine { serial::open(&self.path) } else { virtio::open(&self.path) }
    }
}
