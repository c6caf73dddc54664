//! Serving disks read-only over NBD on a private unix socket, to a QEMU or a tool that reads a snapshot.
//!
//! One thread accepts; each connection has a thread that reads requests and a few workers that answer them, in
//! whatever order they get ready. Connections, requests and bytes under way are bounded, and a client that does not
//! read its replies is hung up on.

mod connection;
mod listener;

use nbd::{BASE_ALLOCATION, Export, transmission_flags};
use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A disk to serve. Called from several threads at once.
pub trait BlockSource: Send + Sync {
    /// Size of the disk; never changes.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` with what the disk holds from `offset` on; the stretch lies inside the disk.
    ///
    /// # Errors
    /// The client is told the kind of the error, not its text.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// What `length` bytes from `offset` on are, as (length, whether they are a hole that reads as zeroes), at most
    /// `max` of them; the stretch lies inside the disk. Fewer bytes than asked for are fine, more are clipped, and
    /// what is left out by a reply to a read counts as data.
    ///
    /// # Errors
    /// As of [`BlockSource::read_at`].
    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<(u64, bool)>>;
}

/// Limits and rights of a server.
#[derive(Debug, Clone, Copy)]
pub struct ServerOptions {
    /// Connections at once; further ones are closed as they come.
    pub connections_max: usize,
    /// Requests of one connection that are answered at the same time.
    pub workers: usize,
    /// Who may connect besides root and ourselves: the socket is given to this user.
    pub client_uid: Option<u32>,
    /// How long a client may take for its handshake, and to take one piece of a reply (1 MiB, if it lets us choose).
    pub client_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { connections_max: 16, workers: 4, client_uid: None, client_timeout: Duration::from_secs(30) }
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum NbdServerError {
    /// The socket's folder lets others in, or is not ours.
    #[error("{} must be a folder of our own or the client's, with mode 0700", .0.display())]
    FolderNotPrivate(PathBuf),
    /// Two exports of one name, or a name or disk above the protocol's limit.
    #[error("export {0:?} cannot be served: its name is taken or too long, or its disk too large")]
    Export(String),
    /// The socket or a thread could not be made.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Threads that were still inside a [`BlockSource`] when patience ended; they end with their read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} connections of the NBD server are still reading their disk")]
pub struct StillReading(pub usize);

/// A running server. Dropping it stops it, waiting at most [`DROP_WAIT`].
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    socket: PathBuf,
    wake: UnixStream,
}

/// How long dropping a server waits for its threads.
pub const DROP_WAIT: Duration = Duration::from_secs(5);

impl NbdServer {
    /// Serves `exports` by name at `socket`, whose folder must have mode 0700; the socket gets mode 0600.
    ///
    /// # Errors
    /// [`NbdServerError`]; nothing is left behind then.
    pub fn start(
        socket: &Path,
        exports: Vec<(String, Arc<dyn BlockSource>)>,
        options: ServerOptions,
    ) -> Result<Self, NbdServerError> {
        let offers = describe(&exports)?;
        let listener = listener::bind(socket, options.client_uid)?;
        let failed = |source| NbdServerError::Listen { path: socket.to_owned(), source };
        let (wake, woken) = UnixStream::pair().map_err(failed)?;
        let shared = Arc::new(Shared {
            offers,
            sources: exports.into_iter().map(|(_, source)| source).collect(),
            options,
            state: Mutex::default(),
            ended: Condvar::new(),
        });
        let server = Self { shared: Arc::clone(&shared), socket: socket.to_owned(), wake };
        let accept = move || listener::accept_until_woken(&shared, &listener, &woken);
        std::thread::Builder::new().name("nbd-accept".to_owned()).spawn(accept).map_err(failed)?;
        Ok(server)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Hangs up on every client and ends all threads.
    ///
    /// # Errors
    /// If some are still inside a [`BlockSource`] after `within`.
    pub fn stop(self, within: Duration) -> Result<(), StillReading> {
        self.end(within)
    }

    fn end(&self, within: Duration) -> Result<(), StillReading> {
        let mut state = self.shared.lock();
        if !state.stopping {
            state.stopping = true;
            for stream in state.streams.values().chain([&self.wake]) {
                let _ = stream.shutdown(Shutdown::Both); // whoever is gone needs no goodbye
            }
            let _ = std::fs::remove_file(&self.socket); // somebody removed it already
        }
        let deadline = Instant::now() + within;
        while !state.streams.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StillReading(state.streams.len()));
            }
            let waited = self.shared.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if self.shared.lock().stopping {
            return; // stopped, and waited for as long as the caller wished
        }
        let _ = self.end(DROP_WAIT); // a thread that hangs in its disk ends with it
    }
}

fn describe(exports: &[(String, Arc<dyn BlockSource>)]) -> Result<Vec<Export>, NbdServerError> {
    let mut offers = Vec::<Export>::new();
    for (name, source) in exports {
        let size_bytes = source.size_bytes();
        let taken = offers.iter().any(|other| other.name == *name);
        if taken || name.len() > nbd::limits::STRING_BYTES_MAX || size_bytes > nbd::limits::DISK_BYTES_MAX {
            return Err(NbdServerError::Export(name.clone()));
        }
        offers.push(Export {
            name: name.clone(),
            size_bytes,
            // The disk never changes, so all connections see the same, and there is nothing to flush.
            flags: transmission_flags::HAS_FLAGS
                | transmission_flags::READ_ONLY
                | transmission_flags::SEND_FLUSH
                | transmission_flags::SEND_DF
                | transmission_flags::CAN_MULTI_CONN,
            contexts: vec![BASE_ALLOCATION.to_owned()],
            preferred_bytes: 128 << 10,
        });
    }
    Ok(offers)
}

/// What all threads of a server know.
struct Shared {
    offers: Vec<Export>,
    sources: Vec<Arc<dyn BlockSource>>,
    options: ServerOptions,
    state: Mutex<State>,
    ended: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("offers", &self.offers).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    /// Every connection's stream, held until its thread is about to end.
    streams: BTreeMap<u64, UnixStream>,
    next: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among those that [`NbdServer::stop`] hangs up on and waits for.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    number: u64,
}

impl Place {
    /// None if the server is full or stopping.
    fn take(shared: &Arc<Shared>, stream: &UnixStream) -> io::Result<Option<Self>> {
        let stream = stream.try_clone()?;
        let mut state = shared.lock();
        if state.stopping || state.streams.len() >= shared.options.connections_max {
            return Ok(None);
        }
        let number = state.next;
        state.next += 1;
        state.streams.insert(number, stream);
        Ok(Some(Self { shared: Arc::clone(shared), number }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().streams.remove(&self.number);
        self.shared.ended.notify_all();
    }
}
