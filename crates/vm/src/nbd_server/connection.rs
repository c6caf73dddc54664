//! One client, from its greeting to its end.

use super::{BlockSource, Shared};
use crate::nbd_received::Received;
use crate::unix;
use nbd::{
    Command, Decoded, ErrorCode, ProtocolError, Request, RequestDecoder, ServerHandshake, ServerSession,
    ServerStep,
};
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Data of one chunk, where the client lets us choose: what a worker holds in memory.
const PIECE_BYTES_MAX: u32 = 1 << 20;
/// What the replies under way on one connection hold in memory: one longest READ in one piece.
const BYTES_IN_FLIGHT_MAX: usize = nbd::limits::READ_BYTES_MAX as usize;
/// Requests read ahead of the workers.
const REQUESTS_WAITING_MAX: usize = 64;
/// Extents in one reply.
const EXTENTS_MAX: usize = 8192;
/// A worker's buffer that is kept from one request to the next.
const BUFFER_KEPT_BYTES: usize = 4 << 20;

/// Why a connection ended before its client said goodbye.
enum End {
    /// The client left, is slow, or the server stops.
    Gone,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl From<ProtocolError> for End {
    fn from(_: ProtocolError) -> Self {
        Self::Gone
    }
}

/// Serves one client until it leaves, misbehaves or the server stops.
pub(super) fn serve(shared: &Shared, stream: &UnixStream) {
    let mut received = Received::default();
    if let Ok(Some(session)) = shake_hands(shared, stream, &mut received) {
        let connection = Connection {
            source: &*shared.sources[session.export],
            session,
            stream,
            sending: Mutex::new(()),
            bytes_in_flight: Mutex::new(0),
            released: Condvar::new(),
            over: AtomicBool::new(false),
            timeout: shared.options.client_timeout,
        };
        connection.run(shared.options.workers.max(1), &mut received);
    }
    // The server keeps a copy of the stream, so dropping ours would not close it.
    shut(stream);
}

fn shut(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Both); // the client may have closed it first
}

fn shake_hands(
    shared: &Shared,
    mut stream: &UnixStream,
    received: &mut Received,
) -> Result<Option<ServerSession>, End> {
    let deadline = Instant::now() + shared.options.client_timeout;
    let mut out = Vec::new();
    let mut handshake = ServerHandshake::new(&mut out);
    loop {
        let decoded = handshake.decode(received.shown(), &shared.offers, &mut out);
        stream.set_write_timeout(Some(unix::time_left(deadline)?))?;
        stream.write_all(&out)?;
        out.clear();
        match decoded? {
            Decoded::More(wanted) => {
                while received.shown().len() < wanted {
                    stream.set_read_timeout(Some(unix::time_left(deadline)?))?;
                    read_some(stream, received, wanted)?;
                }
            }
            Decoded::Ready(consumed, step) => {
                received.consume(consumed);
                match step {
                    ServerStep::Continue => {}
                    ServerStep::Abort => return Ok(None),
                    ServerStep::Done(session) => {
                        // From here on a client may be silent for days.
                        stream.set_read_timeout(None)?;
                        stream.set_write_timeout(Some(shared.options.client_timeout))?;
                        return Ok(Some(session));
                    }
                }
            }
        }
    }
}

fn read_some(mut stream: &UnixStream, received: &mut Received, wanted: usize) -> Result<(), End> {
    match stream.read(received.room(wanted)) {
        Ok(0) => return Err(End::Gone),
        Ok(bytes) => received.arrived(bytes),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

struct Connection<'s> {
    source: &'s dyn BlockSource,
    session: ServerSession,
    stream: &'s UnixStream,
    /// Held while one chunk is sent.
    sending: Mutex<()>,
    bytes_in_flight: Mutex<usize>,
    released: Condvar,
    /// The client gets no more replies.
    over: AtomicBool,
    timeout: Duration,
}

impl Connection<'_> {
    fn run(&self, workers: usize, received: &mut Received) {
        let (ask, asked) = sync_channel::<Request>(REQUESTS_WAITING_MAX);
        let asked = Mutex::new(asked);
        std::thread::scope(|scope| {
            let spawned = (0..workers).filter(|_| {
                let worker = std::thread::Builder::new().name("nbd-worker".to_owned());
                worker.spawn_scoped(scope, || self.work(&asked)).is_ok()
            });
            if spawned.count() == 0 {
                return;
            }
            // When this returns, `ask` is dropped: the workers answer what is left, and end.
            let ask = ask;
            let mut decoder = RequestDecoder::new();
            loop {
                match decoder.decode(received.shown()) {
                    Err(_) => return self.hang_up(),
                    Ok(Decoded::More(wanted)) => {
                        if read_some(self.stream, received, wanted).is_err() {
                            return self.hang_up();
                        }
                    }
                    Ok(Decoded::Ready(consumed, request)) => {
                        received.consume(consumed);
                        let Some(request) = request else { continue };
                        if self.session.judge(&request) == Ok(Command::Disconnect) {
                            return;
                        }
                        self.reserve(self.cost(&request));
                        if ask.send(request).is_err() {
                            return self.hang_up();
                        }
                    }
                }
            }
        });
    }

    /// Makes the reader and all workers end: what is owed to the client stays owed.
    fn hang_up(&self) {
        self.over.store(true, Ordering::Relaxed);
        shut(self.stream);
    }

    /// What a request's reply holds in memory at once.
    fn cost(&self, request: &Request) -> usize {
        match self.session.judge(request) {
            Ok(Command::Read { length, fragments: true, .. }) => length.min(PIECE_BYTES_MAX) as usize,
            Ok(Command::Read { length, .. }) => length as usize,
            _ => 0,
        }
    }

    fn in_flight(&self) -> MutexGuard<'_, usize> {
        self.bytes_in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many bytes may be under way. It ends: each reply is sent within its time, or dropped.
    fn reserve(&self, bytes: usize) {
        let full = |in_flight: &mut usize| *in_flight > 0 && *in_flight + bytes > BYTES_IN_FLIGHT_MAX;
        let reserved = self.released.wait_while(self.in_flight(), full);
        *reserved.unwrap_or_else(PoisonError::into_inner) += bytes;
    }

    fn work(&self, asked: &Mutex<Receiver<Request>>) {
        let mut buffer = Vec::new();
        loop {
            let request = asked.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(request) = request else { return };
            let _reserved = Reserved { connection: self, bytes: self.cost(&request) };
            if !self.over.load(Ordering::Relaxed) && self.answer(&request, &mut buffer).is_err() {
                self.hang_up();
            }
            if buffer.len() > BUFFER_KEPT_BYTES {
                buffer = Vec::new();
            }
        }
    }

    fn answer(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), End> {
        let cookie = request.cookie;
        match self.session.judge(request) {
            Err(code) => self.fail(request, code, "not possible on this read-only disk"),
            Ok(Command::Flush | Command::Disconnect) => self.send(&nbd::encode_simple(cookie, None), &[]),
            Ok(Command::Read { offset, length, fragments: true }) => {
                self.read_in_pieces(request, offset, length, buffer)
            }
            Ok(Command::Read { offset, length, .. }) => {
                if let Err(error) = self.read(offset, length, buffer) {
                    return self.fail_by(request, &error);
                }
                let data = &buffer[..length as usize];
                if self.session.structured {
                    return self.send(&nbd::encode_data_header(cookie, offset, length, true)?, data);
                }
                self.send(&nbd::encode_simple(cookie, None), data)
            }
            Ok(Command::BlockStatus { offset, length, one }) => {
                let extents = match self.source.extents(offset, u64::from(length), EXTENTS_MAX) {
                    Ok(extents) => extents,
                    Err(error) => return self.fail_by(request, &error),
                };
                let told = nbd::allocation_status(length, &extents, one);
                let told = &told[..told.len().min(EXTENTS_MAX)];
                let mut out = Vec::new();
                for (place, &context) in self.session.contexts.iter().enumerate() {
                    let last = place + 1 == self.session.contexts.len();
                    nbd::encode_status(&mut out, cookie, u32::try_from(context).unwrap_or(0), told, last);
                }
                self.send(&out, &[])
            }
        }
    }

    fn read_in_pieces(
        &self,
        request: &Request,
        offset: u64,
        length: u32,
        buffer: &mut Vec<u8>,
    ) -> Result<(), End> {
        let cookie = request.cookie;
        let extents = match self.source.extents(offset, u64::from(length), EXTENTS_MAX) {
            Ok(extents) => extents,
            Err(error) => return self.fail_by(request, &error),
        };
        let pieces = nbd::split_at_holes(offset, length, &extents, PIECE_BYTES_MAX);
        let mut head = Vec::new();
        for (place, piece) in pieces.iter().enumerate() {
            let last = place + 1 == pieces.len();
            if piece.hole {
                // Sent along with what follows.
                nbd::encode_hole(&mut head, cookie, piece.offset, piece.length, last);
                if last {
                    self.send(&head, &[])?;
                }
                continue;
            }
            if let Err(error) = self.read(piece.offset, piece.length, buffer) {
                self.send(&head, &[])?;
                return self.fail_by(request, &error);
            }
            head.extend_from_slice(&nbd::encode_data_header(cookie, piece.offset, piece.length, last)?);
            self.send(&head, &buffer[..piece.length as usize])?;
            head.clear();
        }
        Ok(())
    }

    fn read(&self, offset: u64, length: u32, buffer: &mut Vec<u8>) -> io::Result<()> {
        let length = length as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        self.source.read_at(offset, &mut buffer[..length])
    }

    fn fail_by(&self, request: &Request, error: &io::Error) -> Result<(), End> {
        let code = match error.kind() {
            io::ErrorKind::OutOfMemory => ErrorCode::NO_MEMORY,
            _ => ErrorCode::IO,
        };
        // The kind, not the text: an error's text may name things of this host.
        self.fail(request, code, &error.kind().to_string())
    }

    fn fail(&self, request: &Request, code: ErrorCode, message: &str) -> Result<(), End> {
        if !self.session.structured {
            return self.send(&nbd::encode_simple(request.cookie, Some(code)), &[]);
        }
        let mut out = Vec::new();
        nbd::encode_error(&mut out, request.cookie, code, message, None);
        self.send(&out, &[])
    }

    /// Sends one chunk, or several small ones, without another worker's between its bytes.
    fn send(&self, head: &[u8], payload: &[u8]) -> Result<(), End> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + self.timeout;
        let (mut head, mut payload, mut stream) = (head, payload, self.stream);
        while !head.is_empty() || !payload.is_empty() {
            let sent = match stream.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)]) {
                Ok(0) => return Err(End::Gone),
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error.into()),
            };
            let from_head = sent.min(head.len());
            head = &head[from_head..];
            payload = &payload[sent - from_head..];
            if Instant::now() > deadline && !(head.is_empty() && payload.is_empty()) {
                return Err(End::Gone);
            }
        }
        Ok(())
    }
}

/// A reply's bytes under way, given back when it is sent, failed or its worker panics.
struct Reserved<'c> {
    connection: &'c Connection<'c>,
    bytes: usize,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        *self.connection.in_flight() -= self.bytes;
        self.connection.released.notify_one();
    }
}
