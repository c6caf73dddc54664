//! Why a disk could not be read.

use nbd::{ErrorCode, HandshakeError, PlanError, ProtocolError, RequestError};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a disk could not be read.
#[derive(Debug, thiserror::Error)]
pub enum NbdClientError {
    /// Nobody listens there, or we may not connect.
    #[error("cannot connect to the NBD server at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No session came about.
    #[error("NBD handshake failed: {0}")]
    Handshake(#[from] HandshakeError),
    /// The server broke the protocol.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// The server hung up, or died, with answers owed. QEMU 7.2 also hangs up when its storage fails in the middle
    /// of a read.
    #[error("the NBD server closed the connection before everything was answered")]
    Closed,
    /// The server was silent, or too slow.
    #[error("the NBD server finished nothing within {0:?}")]
    TimedOut(Duration),
    /// The server answered with an error. A broken snapshot looks like this.
    #[error("the NBD server answered{}: {code}{}", place(*.offset), said(.message))]
    Refused {
        /// The error number.
        code: ErrorCode,
        /// What the server said, escaped; often empty.
        message: String,
        /// Where on the disk, if the server said so.
        offset: Option<u64>,
    },
    /// The context was not asked for when connecting.
    #[error("the context {0:?} was not asked for when connecting")]
    NoContext(String),
    /// More extents than fit into memory reasonably.
    #[error("more than {} extents", super::EXTENTS_MAX)]
    TooManyExtents,
    /// A request that does not fit the disk.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Ranges that cannot be read.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The caller's flag was raised.
    #[error("reading was cancelled")]
    Cancelled,
    /// An earlier call failed.
    #[error("this NBD connection failed earlier")]
    Broken,
    /// The socket failed.
    #[error("the connection to the NBD server failed")]
    Io(io::Error),
}

impl From<io::Error> for NbdClientError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // Writing to a server that is gone, or does not read.
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

fn place(offset: Option<u64>) -> String {
    offset.map(|offset| format!(" at {offset}")).unwrap_or_default()
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}
