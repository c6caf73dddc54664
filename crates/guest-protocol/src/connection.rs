//! The agent's half of one connection: bytes in, requests to carry out, answers in the order that hosts rely on.
//!
//! Most hosts send no ids and take the next answer as the answer to the current command. So a request without id
//! begins when the one before it is answered, and answers keep the order of requests. A sync drops what is still
//! owed and is answered at once; a thaw that waited is then carried out all the same, everything else that waited
//! is not begun. Requests with an id begin at once and may overtake.
//!
//! An answer that is too long to be whole in memory comes in pieces. Its line, once begun, is finished before any other;
//! where nobody wants it any more, it ends after the pieces that are there, as a shorter answer that is whole.

use crate::json::{self, Item, Limits, Reader, Received};
use crate::members::Members;
use crate::{Command, Error, command};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};

/// Input is left unread while more than this many bytes of answers wait for the host.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Input is left unread while more requests than this wait for their turn or their answer.
const REQUESTS_MAX: usize = 256;
/// Input is left unread while the requests that wait for their turn or their answer are longer than this together. One
/// that is stuck leaves room for another of full length, so that a sync or a thaw behind it is heard.
const REQUEST_BYTES_MAX: usize = 128 << 20;
/// The next piece of a long answer is asked for when no more than this is left to be sent.
const PIECE_WAITS_BYTES: usize = 64 << 10;
/// Output is gathered in chunks of this size; what is longer is a chunk of its own.
const CHUNK_BYTES: usize = 64 << 10;

/// A request to be carried out. Its answer comes back through `Connection::answer`.
#[derive(Debug)]
pub struct Dispatch {
    /// Names the request among all connections; the upper half is the connection's number.
    pub ticket: u64,
    /// What to carry out.
    pub command: &'static Command,
    /// With which arguments.
    pub members: Members,
}

/// A piece of an answer that is too long to be whole in memory.
#[derive(Debug)]
pub struct Piece {
    /// The next bytes of the answer's value.
    pub text: Vec<u8>,
    /// What makes the value whole if nothing follows.
    pub tail: String,
    /// Nothing follows.
    pub is_last: bool,
}

/// A host's connection, or the one of a port.
#[derive(Debug)]
pub struct Connection {
    reader: Reader,
    number: u32,
    tickets: u32,
    /// Requests without id, in order; only the first may have begun.
    queue: VecDeque<Turn>,
    /// Requests with an id that have begun.
    begun: BTreeMap<u64, Begun>,
    ready: VecDeque<Dispatch>,
    /// What is to be sent, in chunks; of the first, `sent` bytes are.
    output: VecDeque<Vec<u8>>,
    sent: usize,
    /// All that is still to be sent.
    unsent: usize,
    /// The answer whose line is begun and not ended.
    line: Option<Line>,
    /// Answers that follow when the line has ended.
    behind: Vec<u8>,
    /// First pieces of other answers, which begin when the line has ended.
    held: VecDeque<(u64, Piece)>,
    /// Memory of a piece that was sent, for a later one of its line.
    spare: Option<Vec<u8>>,
}

#[derive(Debug)]
struct Line {
    ticket: u64,
    /// What ends it, as things stand.
    tail: String,
    id: Option<Value>,
}

#[derive(Debug)]
enum Turn {
    Begun(u64, Begun),
    Waiting(Request),
    Refused(Error),
}

#[derive(Debug)]
struct Begun {
    command: &'static Command,
    id: Option<Value>,
    bytes: usize,
}

#[derive(Debug)]
struct Request {
    command: &'static Command,
    arguments: BTreeMap<String, Received>,
    id: Option<Value>,
    /// How long it was.
    bytes: usize,
}

impl Connection {
    /// A connection at its start. No two that live at once have the same number.
    pub fn new(limits: Limits, number: u32) -> Self {
        Self {
            reader: Reader::new(limits),
            number,
            tickets: 0,
            queue: VecDeque::new(),
            begun: BTreeMap::new(),
            ready: VecDeque::new(),
            output: VecDeque::new(),
            sent: 0,
            unsent: 0,
            line: None,
            behind: Vec::new(),
            held: VecDeque::new(),
            spare: None,
        }
    }

    /// The number of the connection to which a ticket belongs.
    pub const fn number_of(ticket: u64) -> u32 {
        (ticket >> 32) as u32
    }

    /// Whether more input may be given; while not, leave it where it is.
    pub fn wants_input(&self) -> bool {
        let waiting = self.queue.iter().map(Turn::bytes).chain(self.begun.values().map(|begun| begun.bytes));
        let held: usize = self.held.iter().map(|(_, piece)| piece.text.len()).sum();
        self.unsent + self.behind.len() + held <= OUTPUT_BYTES_MAX
            && self.queue.len() + self.begun.len() <= REQUESTS_MAX
            && waiting.sum::<usize>() <= REQUEST_BYTES_MAX
    }

    /// What all that is not dealt with takes in memory, about: half a message, requests, answers.
    pub fn held_bytes(&self) -> usize {
        let waiting = self.queue.iter().map(Turn::bytes).chain(self.begun.values().map(|begun| begun.bytes));
        let held: usize = self.held.iter().map(|(_, piece)| piece.text.len()).sum();
        self.reader.pending_bytes() + waiting.sum::<usize>() + held + self.unsent + self.behind.len()
    }

    /// The next request to carry out, taking bytes from `input` only where none is ready: what comes after a request
    /// is looked at when that one was carried out or begun. `None`: all of `input` is taken, nothing is to be done.
    pub fn next_request(&mut self, input: &mut &[u8]) -> Option<Dispatch> {
        loop {
            if let Some(dispatch) = self.ready.pop_front() {
                return Some(dispatch);
            }
            match self.reader.next(input)? {
                Item::Error(error) => self.queue.push_back(Turn::Refused(error)),
                Item::Value(value) => self.request(value, self.reader.value_bytes()),
            }
            self.proceed();
        }
    }

    /// The host is gone: what it began to say and what it is owed is dropped, as by a sync.
    pub fn hang_up(&mut self) {
        self.reader.reset();
        self.drop_owed();
        self.output = VecDeque::new();
        (self.sent, self.unsent) = (0, 0);
    }

    /// Whether any request is still to be answered.
    pub fn owes_answers(&self) -> bool {
        !self.queue.is_empty() || !self.begun.is_empty()
    }

    /// Takes the answer to a request; one that is no longer wanted is dropped.
    pub fn answer(&mut self, ticket: u64, answer: Result<Value, Error>) {
        match answer {
            Ok(value) => self.succeed(ticket, |out| json::encode(&value, out)),
            Err(error) => {
                let Some(begun) = self.take_begun(ticket) else { return };
                self.write_error(&error, begun.id.as_ref());
                self.proceed();
            }
        }
    }

    /// The same, of a success that was written by `json::written`.
    pub fn answer_written(&mut self, ticket: u64, answer: &[u8]) {
        self.succeed(ticket, |out| out.extend_from_slice(answer));
    }

    fn succeed(&mut self, ticket: u64, write: impl FnOnce(&mut Vec<u8>)) {
        let Some(begun) = self.take_begun(ticket) else { return };
        if begun.command.answers_success {
            let is_delimited = begun.command.order == (command::Order::Sync { delimited: true });
            self.write(is_delimited, "return", write, begun.id.as_ref());
        }
        self.proceed();
    }

    fn take_begun(&mut self, ticket: u64) -> Option<Begun> {
        match self.queue.front() {
            Some(Turn::Begun(first, _)) if *first == ticket => match self.queue.pop_front() {
                Some(Turn::Begun(_, begun)) => Some(begun),
                _ => unreachable!("the front was just seen"),
            },
            _ => self.begun.remove(&ticket),
        }
    }

    /// Takes a piece of the answer to a request. False where the answer is no longer wanted; then no more is to come.
    pub fn piece(&mut self, ticket: u64, piece: Piece) -> bool {
        if !self.is_wanted(ticket) {
            return false;
        }
        if self.line.as_ref().is_some_and(|line| line.ticket != ticket) {
            self.held.push_back((ticket, piece));
        } else {
            self.lay(ticket, piece);
        }
        true
    }

    /// Whether the answer to a request would be sent.
    pub fn is_wanted(&self, ticket: u64) -> bool {
        let is_first = matches!(self.queue.front(), Some(Turn::Begun(first, _)) if *first == ticket);
        is_first || self.begun.contains_key(&ticket)
    }

    /// The request whose next piece may come now, if there is one.
    pub fn wants_piece(&self) -> Option<u64> {
        self.line.as_ref().filter(|_| self.unsent <= PIECE_WAITS_BYTES).map(|line| line.ticket)
    }

    /// Memory for the text of that piece, with what was sent from it still in it.
    pub fn take_spare(&mut self) -> Vec<u8> {
        self.spare.take().unwrap_or_default()
    }

    /// Ends the answer to a request after the pieces that were given: there are no more to be had.
    pub fn cut(&mut self, ticket: u64) {
        if self.line.as_ref().is_some_and(|line| line.ticket == ticket) {
            self.end_line();
        }
    }

    /// What is to be sent to the host next; there may be more behind it.
    pub fn output(&self) -> &[u8] {
        self.output.front().map_or(&[], |chunk| &chunk[self.sent..])
    }

    /// So many bytes of `output` were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        self.unsent -= bytes;
        let is_only = self.output.len() == 1;
        let Some(chunk) = self.output.front_mut() else { return };
        if self.sent < chunk.len() {
            return;
        }
        self.sent = 0;
        // A small chunk's memory serves the next answer, a large one's is given back.
        if is_only && chunk.capacity() <= CHUNK_BYTES {
            chunk.clear();
        } else {
            let sent = self.output.pop_front();
            self.spare = sent.filter(|chunk| self.line.is_some() && chunk.capacity() > CHUNK_BYTES);
        }
    }

    fn request(&mut self, value: Received, bytes: usize) {
        let (id, request) = understand(value);
        let request = match request {
            Ok((command, arguments)) => Request { command, arguments, id, bytes },
            Err(error) => {
                if id.is_some() {
                    self.write_error(&error, id.as_ref());
                } else {
                    self.queue.push_back(Turn::Refused(error));
                }
                return;
            }
        };
        let is_sync = matches!(request.command.order, command::Order::Sync { .. });
        if is_sync && request.command.read(Members::new(request.arguments.clone())).is_ok() {
            self.drop_owed();
        }
        if request.id.is_some() {
            let (ticket, begun) = self.begin(request);
            self.begun.insert(ticket, begun);
        } else {
            self.queue.push_back(Turn::Waiting(request));
        }
    }

    fn drop_owed(&mut self) {
        // No piece finds the request behind the line any more, so the line ends here.
        self.held.clear();
        self.finish_line();
        self.begun.clear();
        for turn in std::mem::take(&mut self.queue) {
            if let Turn::Waiting(request) = turn
                && request.command.order == command::Order::Thaw
            {
                // Nobody waits for its answer, but a guest that was to be thawed is thawed.
                self.begin(request);
            }
        }
    }

    /// Answers and begins what has its turn.
    fn proceed(&mut self) {
        loop {
            match self.queue.pop_front() {
                Some(Turn::Refused(error)) => self.write_error(&error, None),
                Some(Turn::Waiting(request)) => {
                    let (ticket, begun) = self.begin(request);
                    self.queue.push_front(Turn::Begun(ticket, begun));
                    return;
                }
                Some(turn @ Turn::Begun(..)) => {
                    self.queue.push_front(turn);
                    return;
                }
                None => return,
            }
        }
    }

    fn begin(&mut self, request: Request) -> (u64, Begun) {
        let ticket = u64::from(self.number) << 32 | u64::from(self.tickets);
        self.tickets = self.tickets.wrapping_add(1);
        let members = Members::new(request.arguments);
        self.ready.push_back(Dispatch { ticket, command: request.command, members });
        (ticket, Begun { command: request.command, id: request.id, bytes: request.bytes })
    }

    /// Adds a piece to its line, which is begun if it was not.
    fn lay(&mut self, ticket: u64, piece: Piece) {
        if self.line.is_none() {
            let id = match self.queue.front() {
                Some(Turn::Begun(first, begun)) if *first == ticket => begun.id.clone(),
                _ => self.begun.get(&ticket).and_then(|begun| begun.id.clone()),
            };
            self.put(b"{\"return\": ");
            self.line = Some(Line { ticket, tail: String::new(), id });
        }
        if self.unsent == 0 {
            // The chunk that is kept for small answers must not stand before it.
            self.output.clear();
        }
        if !piece.text.is_empty() {
            self.unsent += piece.text.len();
            self.output.push_back(piece.text);
        }
        if let Some(line) = &mut self.line {
            line.tail = piece.tail;
        }
        if piece.is_last {
            self.end_line();
        }
    }

    /// Ends the line and the request behind it, and goes on with what waited for that.
    fn end_line(&mut self) {
        let Some(Line { ticket, .. }) = self.line else { return };
        self.finish_line();
        match self.queue.front() {
            Some(Turn::Begun(first, _)) if *first == ticket => drop(self.queue.pop_front()),
            _ => drop(self.begun.remove(&ticket)),
        }
        while self.line.is_none()
            && let Some((ticket, piece)) = self.held.pop_front()
        {
            if self.is_wanted(ticket) {
                self.lay(ticket, piece);
            }
        }
        self.proceed();
    }

    fn finish_line(&mut self) {
        let Some(line) = self.line.take() else { return };
        self.spare = None;
        self.put(line.tail.as_bytes());
        self.end(line.id.as_ref());
        let behind = std::mem::take(&mut self.behind);
        self.put(&behind);
    }

    fn write_error(&mut self, error: &Error, id: Option<&Value>) {
        let members = [("class", format!("{:?}", error.class)), ("desc", error.desc.clone())];
        let value = members.into_iter().map(|(name, text)| (name.to_owned(), Value::String(text))).collect();
        let value = Value::Object(value);
        self.write(false, "error", |out| json::encode(&value, out), id);
    }

    fn write(
        &mut self,
        is_delimited: bool,
        kind: &str,
        write: impl FnOnce(&mut Vec<u8>),
        id: Option<&Value>,
    ) {
        if is_delimited {
            self.put(&[0xFF]);
        }
        self.put(format!("{{\"{kind}\": ").as_bytes());
        self.grow(write);
        self.end(id);
    }

    fn end(&mut self, id: Option<&Value>) {
        if let Some(id) = id {
            self.put(b", \"id\": ");
            self.grow(|out| json::encode(id, out));
        }
        self.put(b"}\n");
    }

    fn put(&mut self, bytes: &[u8]) {
        self.grow(|out| out.extend_from_slice(bytes));
    }

    /// Adds to what is sent: now, or behind the line that is begun.
    fn grow(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if self.line.is_some() {
            return write(&mut self.behind);
        }
        if self.output.back().is_none_or(|chunk| chunk.len() >= CHUNK_BYTES) {
            self.output.push_back(Vec::new());
        }
        let Some(chunk) = self.output.back_mut() else { return };
        let before = chunk.len();
        write(chunk);
        self.unsent += chunk.len() - before;
    }
}

impl Turn {
    fn bytes(&self) -> usize {
        match self {
            Turn::Begun(_, begun) => begun.bytes,
            Turn::Waiting(request) => request.bytes,
            Turn::Refused(_) => 0,
        }
    }
}

type Understood = Result<(&'static Command, BTreeMap<String, Received>), Error>;

/// Checks the shape of a request. Its id is given even where the rest is refused.
fn understand(value: Received) -> (Option<Value>, Understood) {
    let Received::Object(mut members) = value else {
        return (None, Err(Error::generic("QMP input must be a JSON object")));
    };
    let id = members.remove("id").map(Value::from);
    (id, shape(members))
}

fn shape(mut members: BTreeMap<String, Received>) -> Understood {
    let execute = match members.remove("execute") {
        None => None,
        Some(Received::String(name)) => Some(String::from(name)),
        Some(_) => return Err(Error::generic("QMP input member 'execute' must be a string")),
    };
    let arguments = match members.remove("arguments") {
        None => BTreeMap::new(),
        Some(Received::Object(arguments)) => arguments,
        Some(_) => return Err(Error::generic("QMP input member 'arguments' must be an object")),
    };
    if let Some(name) = members.keys().next() {
        return Err(Error::generic(format!("QMP input member '{}' is unexpected", crate::error::cut(name))));
    }
    let execute = execute.ok_or_else(|| Error::generic("QMP input lacks member 'execute'"))?;
    let command = Command::find(&execute).ok_or_else(|| Error::not_found(&execute))?;
    Ok((command, arguments))
}

#[cfg(test)]
mod tests;
