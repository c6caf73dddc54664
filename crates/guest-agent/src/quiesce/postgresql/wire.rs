//! A connection to one server: made through the socket that the agent opened, to the process that it recognised.

use super::Order;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// Databases to try: the usual one, and the one that nobody may drop.
const DATABASES: [&str; 2] = ["postgres", "template1"];
/// How often a connect is tried while the server's queue of waiting connections is full.
const RETRY: Duration = Duration::from_millis(50);
/// Set in the start-up packet, so that no statement runs without them. Names are resolved in the system's own
/// schema only: nobody's function of the same name runs with our role.
const OPTIONS: &str =
    "-c search_path= -c statement_timeout=10s -c lock_timeout=5s -c client_min_messages=error";

/// What can go wrong with a server.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    NotReady(String),
    #[error("{0}")]
    NotPermitted(String),
    #[error("the server's own time limit for the statement was reached")]
    Cancelled,
    #[error("the server let nobody in within {0} s")]
    Silent(u64),
    #[error("the socket belongs to process {0}, not to the server that was found")]
    LookAlike(u32),
    #[error("the connection was closed")]
    Closed,
    #[error("{0}")]
    Other(String),
}

impl Trouble {
    /// The stable code of the reason that it becomes; `timeout` is that of the phase.
    pub(super) fn code(&self, timeout: &'static str) -> &'static str {
        match self {
            Self::Refused(_) | Self::LookAlike(_) => "auth_failed",
            Self::NotReady(_) | Self::Silent(_) => "not_ready",
            Self::NotPermitted(_) => "not_permitted",
            Self::Cancelled => timeout,
            Self::Closed => "session_lost",
            Self::Other(_) => "server_error",
        }
    }
}

impl From<tokio_postgres::Error> for Trouble {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(server) = error.as_db_error() else {
            let io = std::error::Error::source(&error).is_some_and(|source| source.is::<io::Error>());
            let words = error.to_string();
            // The crate keeps the kind of such an error to itself, and shows it as the beginning of its words. The
            // first is a server that asks for a password, of which a worker has none.
            let refused = ["invalid configuration", "authentication error"];
            return if error.is_closed() || io {
                Self::Closed
            } else if refused.iter().any(|kind| words.starts_with(kind)) {
                Self::Refused(words)
            } else {
                Self::Other(words)
            };
        };
        let words = format!("{} ({})", server.message(), server.code().code());
        match server.code() {
            code if code.code().starts_with("28") => Self::Refused(words),
            &SqlState::CANNOT_CONNECT_NOW | &SqlState::TOO_MANY_CONNECTIONS => Self::NotReady(words),
            &SqlState::INSUFFICIENT_PRIVILEGE => Self::NotPermitted(words),
            &SqlState::QUERY_CANCELED => Self::Cancelled,
            &SqlState::ADMIN_SHUTDOWN | &SqlState::CRASH_SHUTDOWN => Self::Closed,
            _ => Self::Other(words),
        }
    }
}

/// Connects as the first role that is let in. Must run on a runtime, which also carries the connection.
/// # Errors
/// When none is.
pub(super) async fn connect_as_any(order: &Order, socket: RawFd) -> Result<(Client, String), Trouble> {
    let mut first = None;
    for role in &order.roles {
        for database in DATABASES {
            match connect_to(order, socket, role, database).await {
                Ok(client) => return Ok((client, role.clone())),
                // Only a refusal of this role or this database is a reason to try another.
                Err(trouble @ Trouble::Refused(_)) => {
                    first.get_or_insert(trouble);
                    break;
                }
                Err(trouble @ (Trouble::Other(_) | Trouble::NotPermitted(_))) => {
                    first.get_or_insert(trouble);
                }
                Err(trouble) => return Err(trouble),
            }
        }
    }
    Err(first.unwrap_or(Trouble::Closed))
}

/// Connects as one role to one database.
/// # Errors
/// As the server says; `LookAlike` before a byte was sent, if the socket is another process's.
pub(super) async fn connect_to(
    order: &Order,
    socket: RawFd,
    role: &str,
    database: &str,
) -> Result<Client, Trouble> {
    let local = |error: io::Error| Trouble::Other(error.to_string());
    let stream = UnixStream::from_std(open(socket).await.map_err(local)?).map_err(local)?;
    let peer = stream.peer_cred().map_err(local)?;
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
    if pid != order.server_pid || peer.uid() != order.server_uid {
        return Err(Trouble::LookAlike(pid));
    }
    let mut config = Config::new();
    config.user(role).dbname(database).application_name("stillpoint").options(OPTIONS);
    let (client, connection) = config.connect_raw(stream, NoTls).await?;
    // Carried while the runtime is blocked on, that is, within phases only: in between nothing is sent or read.
    // Its error reaches whoever waits for an answer.
    let _carrier = tokio::spawn(connection);
    Ok(client)
}

/// Through the descriptor, so that no path is resolved here: whatever now bears the socket's name does not count.
async fn open(socket: RawFd) -> io::Result<StdStream> {
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{socket}"))?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect(&stream, &address) {
            Ok(()) => return Ok(stream.into()),
            // The queue is full: as likely a moment of load as a stopped server. The phase's deadline ends this.
            Err(rustix::io::Errno::AGAIN) => tokio::time::sleep(RETRY).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// The rows of a statement, as text; null is `None`.
/// # Errors
/// As the server says.
pub(super) async fn rows(client: &Client, statement: &str) -> Result<Vec<Vec<Option<String>>>, Trouble> {
    let messages = client.simple_query(statement).await?;
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
        }
        _ => None,
    };
    Ok(messages.iter().filter_map(row).collect())
}

/// The only row of a statement, null as an empty text.
/// # Errors
/// As the server says; `Other` when there is no row.
pub(super) async fn row(client: &Client, statement: &str) -> Result<Vec<String>, Trouble> {
    let first = rows(client, statement).await?.into_iter().next();
    let first = first.ok_or_else(|| Trouble::Other("an empty answer".to_owned()))?;
    Ok(first.into_iter().map(Option::unwrap_or_default).collect())
}
