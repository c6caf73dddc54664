//! The agent's half of one connection: bytes in, requests to carry out, answers in the order that hosts rely on.
//!
//! Most hosts send no ids and take the next answer as the answer to the current command. So a request without id
//! begins when the one before it is answered, and answers keep the order of requests. A sync drops what is still
//! owed and is answered at once; a thaw that waited is then carried out all the same, everything else that waited
//! is not begun. Requests with an id begin at once and may overtake.

use crate::json::{self, Item, Limits, Reader};
use crate::members::Members;
use crate::{Command, Error, command};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, VecDeque};

/// Input is left unread while more than this many bytes of answers wait for the host.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Input is left unread while more requests than this wait for their turn or their answer.
const REQUESTS_MAX: usize = 256;

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
    output: Vec<u8>,
    sent: usize,
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
}

#[derive(Debug)]
struct Request {
    command: &'static Command,
    arguments: Map<String, Value>,
    id: Option<Value>,
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
            output: Vec::new(),
            sent: 0,
        }
    }

    /// The number of the connection to which a ticket belongs.
    pub const fn number_of(ticket: u64) -> u32 {
        (ticket >> 32) as u32
    }

    /// Whether more input may be given; while not, leave it where it is.
    pub fn wants_input(&self) -> bool {
        self.output().len() <= OUTPUT_BYTES_MAX && self.queue.len() + self.begun.len() <= REQUESTS_MAX
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
                Item::Value(value) => self.request(value),
            }
            self.proceed();
        }
    }

    /// The host is gone: what it began to say and what it is owed is dropped, as by a sync.
    pub fn hang_up(&mut self) {
        self.reader.reset();
        self.output = Vec::new();
        self.sent = 0;
        self.drop_owed();
    }

    /// Whether any request is still to be answered.
    pub fn owes_answers(&self) -> bool {
        !self.queue.is_empty() || !self.begun.is_empty()
    }

    /// Takes the answer to a request; one that is no longer wanted is dropped.
    pub fn answer(&mut self, ticket: u64, answer: Result<Value, Error>) {
        let begun = match self.queue.front() {
            Some(Turn::Begun(first, _)) if *first == ticket => match self.queue.pop_front() {
                Some(Turn::Begun(_, begun)) => Some(begun),
                _ => unreachable!("the front was just seen"),
            },
            _ => self.begun.remove(&ticket),
        };
        let Some(begun) = begun else { return };
        match answer {
            Ok(value) if begun.command.answers_success => {
                if begun.command.order == (command::Order::Sync { delimited: true }) {
                    self.output.push(0xFF);
                }
                self.write("return", &value, begun.id.as_ref());
            }
            Ok(_) => {}
            Err(error) => self.write_error(&error, begun.id.as_ref()),
        }
        self.proceed();
    }

    /// What is to be sent to the host.
    pub fn output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// So many bytes of `output` were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.sent == self.output.len() {
            self.sent = 0;
            // A large answer's memory is not kept for the small ones that follow.
            if self.output.capacity() > 1 << 16 {
                self.output = Vec::new();
            }
            self.output.clear();
        } else if self.sent > OUTPUT_BYTES_MAX {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    fn request(&mut self, value: Value) {
        let (id, request) = understand(value);
        let request = match request {
            Ok((command, arguments)) => Request { command, arguments, id },
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
        (ticket, Begun { command: request.command, id: request.id })
    }

    fn write_error(&mut self, error: &Error, id: Option<&Value>) {
        let members = [("class", format!("{:?}", error.class)), ("desc", error.desc.clone())];
        let value = members.into_iter().map(|(name, text)| (name.to_owned(), Value::String(text))).collect();
        self.write("error", &Value::Object(value), id);
    }

    fn write(&mut self, kind: &str, value: &Value, id: Option<&Value>) {
        self.output.extend_from_slice(format!("{{\"{kind}\": ").as_bytes());
        json::encode(value, &mut self.output);
        if let Some(id) = id {
            self.output.extend_from_slice(b", \"id\": ");
            json::encode(id, &mut self.output);
        }
        self.output.extend_from_slice(b"}\n");
    }
}

type Understood = Result<(&'static Command, Map<String, Value>), Error>;

/// Checks the shape of a request. Its id is given even where the rest is refused.
fn understand(value: Value) -> (Option<Value>, Understood) {
    let Value::Object(mut members) = value else {
        return (None, Err(Error::generic("QMP input must be a JSON object")));
    };
    let id = members.remove("id");
    (id, shape(members))
}

fn shape(mut members: Map<String, Value>) -> Understood {
    let execute = match members.remove("execute") {
        None => None,
        Some(Value::String(name)) => Some(name),
        Some(_) => return Err(Error::generic("QMP input member 'execute' must be a string")),
    };
    let arguments = match members.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
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
