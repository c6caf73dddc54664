//! The host's half: requests out, answers matched, whatever else comes skipped.
//!
//! What comes from a guest is bounded and believed in nothing: a line that is no answer of ours is passed over and
//! counted, a line beyond the limit ends the conversation.

use crate::{Class, Error};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;

/// Longest answer, in bytes: a report of 4,096 file systems and 256 applications, with room to spare.
pub const LINE_BYTES_MAX: usize = 16 << 20;

/// What came of the bytes received.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The agent is there and its answers are ours from here on.
    Synchronized,
    /// The answer to a request.
    Answer {
        /// The number that `Client::request` gave.
        request: u64,
        /// The agent's `return` or `error`.
        result: Result<Value, Error>,
    },
}

/// The guest sent a line beyond the limit; the connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's answer is longer than {LINE_BYTES_MAX} bytes")]
pub struct LineTooLong;

/// A conversation with a guest agent, ours or a stock qemu-ga.
#[derive(Debug)]
pub struct Client {
    next: u64,
    /// The sync whose answer is awaited; lines before it are stale.
    syncing: Option<u64>,
    asked: VecDeque<u64>,
    line: Vec<u8>,
    skipped: u64,
}

impl Client {
    /// A conversation not yet begun: `resync` first. The seed (below 2^62) keeps the numbers of one host program
    /// apart from those of the one before it, whose answers may still lie in the channel.
    pub fn new(seed: u64) -> Self {
        Self { next: seed.min(1 << 62), syncing: None, asked: VecDeque::new(), line: Vec::new(), skipped: 0 }
    }

    /// Bytes that begin the conversation, or begin it afresh after a time-out: requests that wait are given up.
    pub fn resync(&mut self) -> Vec<u8> {
        self.asked.clear();
        let number = self.number();
        self.syncing = Some(number);
        // The byte that is part of no text ends whatever the agent was still reading.
        let mut bytes = vec![0xFF];
        write(&json!({"execute": "guest-sync-delimited", "arguments": {"id": number}}), &mut bytes);
        bytes
    }

    /// Whether the agent has answered the latest `resync`.
    pub fn is_synchronized(&self) -> bool {
        self.syncing.is_none()
    }

    /// Bytes of a request, and the number by which its answer is known.
    pub fn request(&mut self, command: &str, arguments: Option<Value>) -> (u64, Vec<u8>) {
        let number = self.number();
        let mut members = Map::new();
        members.insert("execute".to_owned(), command.into());
        if let Some(arguments) = arguments {
            members.insert("arguments".to_owned(), arguments);
        }
        members.insert("id".to_owned(), number.into());
        let mut bytes = Vec::new();
        write(&Value::Object(members), &mut bytes);
        self.asked.push_back(number);
        (number, bytes)
    }

    /// A request is no longer waited for; its answer will be passed over.
    pub fn give_up(&mut self, request: u64) {
        self.asked.retain(|asked| *asked != request);
    }

    /// Takes what arrived.
    /// # Errors
    /// When a line is longer than `LINE_BYTES_MAX`.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Vec<Event>, LineTooLong> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | 0xFF)) {
            self.append(&rest[..end])?;
            let line = std::mem::take(&mut self.line);
            // 0xFF begins an answer: what stood before it was never finished.
            if rest[end] == b'\n' {
                self.line(&line, &mut events);
            }
            rest = &rest[end + 1..];
        }
        self.append(rest)?;
        Ok(events)
    }

    /// How many lines were passed over: answers to what nobody asked, and what was no answer at all.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn append(&mut self, piece: &[u8]) -> Result<(), LineTooLong> {
        if self.line.len() + piece.len() > LINE_BYTES_MAX {
            return Err(LineTooLong);
        }
        self.line.extend_from_slice(piece);
        Ok(())
    }

    fn line(&mut self, line: &[u8], events: &mut Vec<Event>) {
        if line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        let event =
            serde_json::from_slice::<Map<String, Value>>(line).ok().and_then(|answer| self.event(answer));
        match event {
            Some(event) => events.push(event),
            None => self.skipped += 1,
        }
    }

    fn event(&mut self, mut answer: Map<String, Value>) -> Option<Event> {
        let result = match (answer.remove("return"), answer.remove("error")) {
            (Some(value), None) => Ok(value),
            (None, Some(error)) => Err(read_error(&error)),
            _ => return None,
        };
        if let Some(number) = self.syncing {
            if result != Ok(Value::from(number)) {
                return None;
            }
            self.syncing = None;
            return Some(Event::Synchronized);
        }
        let request = match answer.remove("id") {
            Some(id) => id.as_u64().filter(|id| self.asked.contains(id))?,
            // An agent so old that it does not return ids answers in order.
            None => *self.asked.front()?,
        };
        self.give_up(request);
        Some(Event::Answer { request, result })
    }
}

/// An error of any shape; a class that we do not know is the generic one.
fn read_error(error: &Value) -> Error {
    let text = |name: &str| error.get(name).and_then(Value::as_str);
    Error {
        class: if text("class") == Some("CommandNotFound") {
            Class::CommandNotFound
        } else {
            Class::GenericError
        },
        desc: crate::error::cut(text("desc").unwrap_or("the guest's error has no description")).to_owned(),
    }
}

fn write(value: &Value, bytes: &mut Vec<u8>) {
    crate::json::encode(value, bytes);
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::{Client, Event, LINE_BYTES_MAX, LineTooLong};
    use crate::json::Limits;
    use crate::{Connection, Error};
    use proptest::prelude::*;
    use serde_json::json;

    fn synchronized() -> Client {
        let mut client = Client::new(100);
        client.resync();
        assert_eq!(client.receive(b"\xFF{\"return\": 101}\n"), Ok(vec![Event::Synchronized]));
        client
    }

    #[test]
    fn a_conversation_begins_with_a_delimited_sync() {
        let mut client = Client::new(100);
        let bytes = client.resync();
        assert_eq!(bytes, b"\xFF{\"arguments\": {\"id\": 101}, \"execute\": \"guest-sync-delimited\"}\n");
        assert!(!client.is_synchronized());
    }

    #[test]
    fn stale_lines_before_the_sync_are_skipped() {
        let mut client = Client::new(100);
        client.resync();
        let stale = b"{\"return\": {}}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"stray\"}}\n{\"return\": 99}\ngarbage\n{\"retu\xFF{\"return\": 101}\n";
        assert_eq!(client.receive(stale), Ok(vec![Event::Synchronized]));
        assert_eq!(client.skipped(), 4);
    }

    #[test]
    fn answers_are_matched_by_id_in_any_order() {
        let mut client = synchronized();
        let (first, _) = client.request("guest-fsfreeze-freeze", None);
        let (second, _) = client.request("guest-ping", None);
        let bytes = format!("{{\"return\": {{}}, \"id\": {second}}}\n{{\"return\": 3, \"id\": {first}}}\n");
        let events = client.receive(bytes.as_bytes()).expect("short lines");
        assert_eq!(
            events,
            [
                Event::Answer { request: second, result: Ok(json!({})) },
                Event::Answer { request: first, result: Ok(json!(3)) },
            ]
        );
    }

    #[test]
    fn an_agent_without_ids_answers_in_order() {
        let mut client = synchronized();
        let (first, _) = client.request("guest-ping", None);
        let answer = b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}\n";
        let mut error = Error::generic("no");
        error.class = crate::Class::CommandNotFound;
        assert_eq!(client.receive(answer), Ok(vec![Event::Answer { request: first, result: Err(error) }]));
        assert_eq!(client.receive(b"{\"return\": {}}\n"), Ok(vec![]), "nobody asked");
    }

    #[test]
    fn an_answer_after_giving_up_is_skipped() {
        let mut client = synchronized();
        let (request, _) = client.request("guest-ping", None);
        client.give_up(request);
        assert_eq!(
            client.receive(format!("{{\"return\": {{}}, \"id\": {request}}}\n").as_bytes()),
            Ok(vec![])
        );
        assert_eq!(client.skipped(), 1);
    }

    #[test]
    fn a_line_beyond_the_limit_is_an_error() {
        let mut client = synchronized();
        let piece = vec![b'x'; LINE_BYTES_MAX / 2];
        assert_eq!(client.receive(&piece), Ok(vec![]));
        assert_eq!(client.receive(&piece), Ok(vec![]));
        assert_eq!(client.receive(b"x"), Err(LineTooLong));
    }

    #[test]
    fn both_halves_understand_each_other() {
        let mut client = Client::new(0);
        let mut agent = Connection::new(Limits::default(), 1);
        let bytes = [b"{\"execute\": \"guest-".to_vec(), client.resync()].concat();
        let sync = agent.next_request(&mut &bytes[..]).expect("the sync");
        agent.answer(sync.ticket, Ok(json!(1)));
        assert_eq!(client.receive(agent.output()), Ok(vec![Event::Synchronized]));
        agent.sent(agent.output().len());
        let (request, bytes) = client.request("stillpoint-thaw", Some(json!({"id": "a"})));
        let thaw = agent.next_request(&mut &bytes[..]).expect("the thaw");
        agent.answer(thaw.ticket, Err(Error::generic("no_such_run: é")));
        let result = Err(Error::generic("no_such_run: é"));
        assert_eq!(client.receive(agent.output()), Ok(vec![Event::Answer { request, result }]));
    }

    proptest! {
        #[test]
        fn no_bytes_from_a_guest_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let mut client = synchronized();
            client.request("guest-ping", None);
            for piece in pieces {
                client.receive(&piece).expect("short lines");
            }
        }
    }
}
