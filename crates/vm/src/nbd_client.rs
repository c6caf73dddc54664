//! Reading a disk over NBD from a unix socket: its size, what its contexts say, and its bytes, several requests at
//! a time on one connection.
//!
//! One connection with eight requests of 512 KiB under way is as fast as several connections, and requests of this
//! length cost QEMU a fifth less CPU than those of 1 MiB. Every wait is bounded: the timeout given to
//! [`NbdClient::connect`] is the longest wait for the handshake, and later for the next finished request.

mod error;

pub use error::NbdClientError;

use crate::nbd_received::Received;
use crate::unix;
use nbd::{Body, ClientHandshake, ClientTransmission, Decoded, Extent, Reply, Session};
use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Extents that [`NbdClient::extents`] collects, 24 bytes each; [`NbdClient::visit_extents`] has no such limit.
pub const EXTENTS_MAX: usize = 16 << 20;
/// One block status request. Servers answer as much of it as they like.
const STATUS_REQUEST_BYTES: u64 = 1 << 30;

/// One request to discard, and so many at once. Each is quick.
const DISCARD_BYTES: u32 = 1 << 30;
const DISCARDS_IN_FLIGHT: usize = 16;

/// What a stretch of the disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk<'b> {
    /// These bytes.
    Data(&'b [u8]),
    /// So many zeroes, which were neither sent nor written anywhere.
    Hole(u64),
}

/// How [`NbdClient::read_pipelined`] goes about it.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions<'c> {
    /// Requests under way at once; 1 to [`nbd::limits::REQUESTS_IN_FLIGHT_MAX`].
    pub in_flight: usize,
    /// Length of a request; chunks never cross a multiple of it, and the buffer is hardly longer. At most what the
    /// server accepts.
    pub request_bytes: u32,
    /// Ends the reading within [`CANCEL_LATENCY`] once true.
    pub cancel: Option<&'c AtomicBool>,
}

impl Default for ReadOptions<'_> {
    fn default() -> Self {
        Self { in_flight: 8, request_bytes: 512 << 10, cancel: None }
    }
}

/// How long a raised cancel flag may stay unseen while no byte arrives.
pub const CANCEL_LATENCY: Duration = Duration::from_millis(100);

/// A connection to one export.
///
/// After an error from one of its methods replies may still be under way, so every later call fails with
/// [`NbdClientError::Broken`]: connect anew.
#[derive(Debug)]
pub struct NbdClient {
    stream: UnixStream,
    received: Received,
    transmission: ClientTransmission,
    timeout: Duration,
    broken: bool,
}

impl NbdClient {
    /// Opens `export` with all of `contexts`, such as [`nbd::BASE_ALLOCATION`] or [`nbd::dirty_bitmap_context`].
    ///
    /// # Errors
    /// `Connect` or `TimedOut` if nobody listens or answers, `Handshake` if the export or one of the contexts does
    /// not exist or the server does not speak our language.
    pub fn connect(
        path: &Path,
        export: &str,
        contexts: &[&str],
        timeout: Duration,
    ) -> Result<Self, NbdClientError> {
        let handshake = ClientHandshake::open(export, contexts)?;
        let (stream, received, session) = shake_hands(path, handshake, timeout)?;
        let transmission = ClientTransmission::new(session);
        Ok(Self { stream, received, transmission, timeout, broken: false })
    }

    /// The contexts that `export` offers.
    ///
    /// # Errors
    /// As of [`NbdClient::connect`].
    pub fn list_contexts(
        path: &Path,
        export: &str,
        timeout: Duration,
    ) -> Result<Vec<String>, NbdClientError> {
        let handshake = ClientHandshake::list_contexts(export)?;
        let (_, _, session) = shake_hands(path, handshake, timeout)?;
        Ok(session.contexts.into_iter().map(|(_, name)| name).collect())
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.session().size_bytes
    }

    /// What was agreed on.
    pub fn session(&self) -> &Session {
        self.transmission.session()
    }

    /// Everything that `context` says about `range`: ascending, without gaps, neighbours of the same flags joined.
    ///
    /// # Errors
    /// `TooManyExtents` above [`EXTENTS_MAX`]; else as of [`NbdClient::visit_extents`].
    pub fn extents(&mut self, context: &str, range: Range<u64>) -> Result<Vec<Extent>, NbdClientError> {
        let mut extents: Vec<Extent> = Vec::new();
        self.visit_extents(context, range, |extent| {
            let full = extents.len() == EXTENTS_MAX;
            match extents.last_mut() {
                Some(last) if last.flags == extent.flags => last.length += extent.length,
                _ if full => return Err(NbdClientError::TooManyExtents),
                _ => extents.push(extent),
            }
            Ok(())
        })?;
        Ok(extents)
    }

    /// Shows what `context` says about `range`, in ascending order without gaps, in memory that does not grow with
    /// the disk. Neighbours may have the same flags.
    ///
    /// # Errors
    /// `NoContext` if it was not among those given to [`NbdClient::connect`]; else what went wrong with the server,
    /// or what `visit` returned.
    pub fn visit_extents<E: From<NbdClientError>>(
        &mut self,
        context: &str,
        range: Range<u64>,
        mut visit: impl FnMut(Extent) -> Result<(), E>,
    ) -> Result<(), E> {
        let agreed = self.session().contexts.iter().find(|(_, name)| name == context);
        let id = agreed.map(|&(id, _)| id).ok_or_else(|| NbdClientError::NoContext(context.to_owned()))?;
        self.begin()?;
        let mut at = range.start;
        while at < range.end {
            at = self.status(id, at, range.end, &mut visit)?;
        }
        self.broken = false;
        Ok(())
    }

    /// One block status request; returns where it left off.
    fn status<E: From<NbdClientError>>(
        &mut self,
        id: u32,
        at: u64,
        end: u64,
        visit: &mut impl FnMut(Extent) -> Result<(), E>,
    ) -> Result<u64, E> {
        // Requests end at multiples of their length, which suits every server's alignment.
        let boundary = (at / STATUS_REQUEST_BYTES + 1).saturating_mul(STATUS_REQUEST_BYTES);
        let length = u32::try_from(end.min(boundary) - at).unwrap_or(u32::MAX);
        let mut out = Vec::new();
        self.transmission.block_status(at, length, &mut out).map_err(NbdClientError::from)?;
        send(&mut self.stream, &mut out, self.timeout)?;
        let mut next = at;
        let mut patience = Patience::new(self.timeout, None);
        loop {
            match self.transmission.decode(self.received.shown()).map_err(NbdClientError::from)? {
                Decoded::More(wanted) => fill(&mut self.received, &mut self.stream, wanted, &mut patience)?,
                Decoded::Ready(consumed, Reply { body, finished, .. }) => {
                    match body {
                        Body::Status { context, extents } if context == id => {
                            for extent in extents {
                                next = extent.end();
                                visit(extent)?;
                            }
                        }
                        Body::Failed { code, message, offset } => {
                            return Err(NbdClientError::Refused { code, message, offset }.into());
                        }
                        _ => {}
                    }
                    self.received.consume(consumed);
                    if finished {
                        return Ok(next);
                    }
                }
            }
        }
    }

    /// Reads all of `ranges` and shows what they hold, in the order in which it arrives.
    ///
    /// `ranges` ascend without overlap; touching ones are joined and long ones cut. Each byte of them is shown
    /// exactly once before this returns `Ok`. The chunks of one request need not be neighbours in time.
    ///
    /// # Errors
    /// `Plan` if the ranges are out of order or leave the disk, `Cancelled`; what went wrong with the server, or
    /// what `show` returned.
    pub fn read_pipelined<E: From<NbdClientError>>(
        &mut self,
        ranges: impl IntoIterator<Item = Range<u64>>,
        options: ReadOptions<'_>,
        mut show: impl FnMut(u64, Chunk<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.begin()?;
        let in_flight = options.in_flight.clamp(1, nbd::limits::REQUESTS_IN_FLIGHT_MAX);
        let request_bytes = options.request_bytes.clamp(1, self.session().read_bytes_max);
        let mut plan = nbd::plan_reads(ranges, request_bytes, self.size_bytes());
        let mut patience = Patience::new(self.timeout, options.cancel);
        let mut out = Vec::new();
        let mut more_to_ask = true;
        loop {
            while more_to_ask && self.transmission.in_flight() < in_flight {
                match plan.next() {
                    None => more_to_ask = false,
                    Some(request) => {
                        let (offset, length) = request.map_err(NbdClientError::from)?;
                        self.transmission.read(offset, length, &mut out).map_err(NbdClientError::from)?;
                    }
                }
            }
            if self.transmission.in_flight() == 0 {
                break;
            }
            match self.transmission.decode(self.received.shown()).map_err(NbdClientError::from)? {
                Decoded::More(wanted) => {
                    // New requests wait until everything received is used up: with small ones, many leave at once.
                    send(&mut self.stream, &mut out, self.timeout)?;
                    fill(&mut self.received, &mut self.stream, wanted, &mut patience)?;
                }
                Decoded::Ready(consumed, Reply { body, finished, .. }) => {
                    match body {
                        Body::Data { offset, bytes } => show(offset, Chunk::Data(bytes))?,
                        Body::Hole { offset, length } => show(offset, Chunk::Hole(u64::from(length)))?,
                        Body::Failed { code, message, offset } => {
                            return Err(NbdClientError::Refused { code, message, offset }.into());
                        }
                        Body::Status { .. } | Body::Nothing => {}
                    }
                    self.received.consume(consumed);
                    patience.check()?;
                    if finished {
                        patience.renew();
                    }
                }
            }
        }
        self.broken = false;
        Ok(())
    }

    /// Says that these ranges will not be read, so that what serves them need not keep them; false if the server knows no such
    /// request. How much of each counts is the server's to say: less than a block of its own does not.
    ///
    /// # Errors
    /// `Plan` if a range leaves the disk, or what went wrong with the server.
    pub fn discard(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) -> Result<bool, NbdClientError> {
        if self.session().flags & nbd::transmission_flags::SEND_TRIM == 0 {
            return Ok(false);
        }
        self.begin()?;
        let mut requests = nbd::plan_reads(ranges, DISCARD_BYTES, self.size_bytes());
        let mut patience = Patience::new(self.timeout, None);
        let mut out = Vec::new();
        let mut more_to_ask = true;
        loop {
            while more_to_ask && self.transmission.in_flight() < DISCARDS_IN_FLIGHT {
                match requests.next() {
                    None => more_to_ask = false,
                    Some(request) => {
                        let (offset, length) = request?;
                        self.transmission.trim(offset, length, &mut out)?;
                    }
                }
            }
            if self.transmission.in_flight() == 0 {
                break;
            }
            match self.transmission.decode(self.received.shown())? {
                Decoded::More(wanted) => {
                    send(&mut self.stream, &mut out, self.timeout)?;
                    fill(&mut self.received, &mut self.stream, wanted, &mut patience)?;
                }
                Decoded::Ready(consumed, Reply { body, .. }) => {
                    if let Body::Failed { code, message, offset } = body {
                        return Err(NbdClientError::Refused { code, message, offset });
                    }
                    self.received.consume(consumed);
                    patience.renew();
                }
            }
        }
        self.broken = false;
        Ok(true)
    }

    /// Until the work begun here ends well, the connection counts as broken.
    fn begin(&mut self) -> Result<(), NbdClientError> {
        if self.broken {
            return Err(NbdClientError::Broken);
        }
        self.broken = true;
        Ok(())
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        if !self.broken {
            let mut out = Vec::new();
            self.transmission.disconnect(&mut out);
            let _ = self.stream.write_all(&out); // the server sees the closed socket anyway
        }
    }
}

/// How long to wait for the peer, and for whom to stop. Only waiting counts: a caller may take its time.
#[derive(Debug)]
struct Patience<'c> {
    timeout: Duration,
    waited: Duration,
    cancel: Option<&'c AtomicBool>,
}

impl<'c> Patience<'c> {
    fn new(timeout: Duration, cancel: Option<&'c AtomicBool>) -> Self {
        Self { timeout, waited: Duration::ZERO, cancel }
    }

    fn renew(&mut self) {
        self.waited = Duration::ZERO;
    }

    /// Whether somebody wants the work to end.
    fn check(&self) -> Result<(), NbdClientError> {
        match self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => Err(NbdClientError::Cancelled),
            _ => Ok(()),
        }
    }

    /// Notes a wait that did not bring all that was hoped for.
    fn waited(&mut self, longer: Duration) -> Result<(), NbdClientError> {
        self.check()?;
        self.waited += longer;
        if self.waited >= self.timeout {
            return Err(NbdClientError::TimedOut(self.timeout));
        }
        Ok(())
    }
}

fn send(stream: &mut UnixStream, out: &mut Vec<u8>, timeout: Duration) -> Result<(), NbdClientError> {
    stream.write_all(out).map_err(|error| {
        if unix::is_timeout(&error) { NbdClientError::TimedOut(timeout) } else { error.into() }
    })?;
    out.clear();
    Ok(())
}

fn shake_hands(
    path: &Path,
    mut handshake: ClientHandshake,
    timeout: Duration,
) -> Result<(UnixStream, Received, Session), NbdClientError> {
    let mut stream = connect(path, timeout)?;
    let mut received = Received::default();
    let mut patience = Patience::new(timeout, None);
    let mut out = Vec::new();
    loop {
        let decoded = handshake.decode(received.shown(), &mut out)?;
        send(&mut stream, &mut out, timeout)?;
        match decoded {
            Decoded::More(wanted) => fill(&mut received, &mut stream, wanted, &mut patience)?,
            Decoded::Ready(consumed, session) => {
                received.consume(consumed);
                if let Some(session) = session {
                    return Ok((stream, received, session));
                }
            }
        }
    }
}

fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, NbdClientError> {
    let stream = unix::connect(path, Instant::now() + timeout).map_err(|source| {
        if unix::is_timeout(&source) {
            return NbdClientError::TimedOut(timeout);
        }
        NbdClientError::Connect { path: path.to_owned(), source }
    })?;
    stream.set_write_timeout(Some(timeout))?;
    stream.set_read_timeout(Some(timeout.min(CANCEL_LATENCY)))?;
    Ok(stream)
}

/// Reads until at least `wanted` bytes are there, or patience ends.
fn fill(
    received: &mut Received,
    stream: &mut UnixStream,
    wanted: usize,
    patience: &mut Patience<'_>,
) -> Result<(), NbdClientError> {
    while received.shown().len() < wanted {
        let began = Instant::now();
        match stream.read(received.room(wanted)) {
            Ok(0) => return Err(NbdClientError::Closed),
            Ok(bytes) => received.arrived(bytes),
            Err(error) if error.kind() == ErrorKind::Interrupted || unix::is_timeout(&error) => {}
            Err(error) => return Err(error.into()),
        }
        if received.shown().len() < wanted {
            patience.waited(began.elapsed())?;
        }
    }
    Ok(())
}
