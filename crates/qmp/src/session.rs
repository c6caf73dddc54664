//! One connection's memory: numbers requests, matches answers to them, queues events.

use crate::command::Command;
use crate::wire::{CommandError, Event, Greeting, Lines, Message, WireError, encode, parse};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Most events kept for a caller that does not look; the oldest go first.
pub const EVENTS_MAX: usize = 4096;

/// Number of a request, unique on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(u64);

/// One connection's memory. Bytes go in by [`receive`](Self::receive); answers and events are then taken out.
#[derive(Debug, Default)]
pub struct Session {
    lines: Lines,
    last_id: u64,
    pending: BTreeSet<u64>,
    answers: BTreeMap<u64, Result<Value, CommandError>>,
    events: VecDeque<Event>,
    events_dropped: u64,
    greeting: Option<Greeting>,
}

impl Session {
    /// A connection on which nothing was said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What QEMU said first, once it has.
    pub fn greeting(&self) -> Option<&Greeting> {
        self.greeting.as_ref()
    }

    /// Numbers a request; returns what to send.
    ///
    /// # Errors
    /// If the arguments cannot be written as JSON.
    pub fn request<C: Command>(&mut self, command: &C) -> Result<(RequestId, Vec<u8>), serde_json::Error> {
        Ok(self.request_raw(C::NAME, &serde_json::to_value(command)?))
    }

    /// Numbers a request given as name and arguments; returns what to send.
    pub fn request_raw(&mut self, execute: &str, arguments: &Value) -> (RequestId, Vec<u8>) {
        self.last_id += 1;
        self.pending.insert(self.last_id);
        (RequestId(self.last_id), encode(self.last_id, execute, arguments))
    }

    /// Takes what arrived.
    ///
    /// # Errors
    /// What cannot be understood; the connection is of no use afterwards.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        self.lines.push(bytes);
        while let Some(line) = self.lines.next_line()? {
            match parse(&line)? {
                Message::Greeting(greeting) => self.greeting = Some(greeting),
                Message::Event(event) => {
                    if self.events.len() == EVENTS_MAX {
                        self.events.pop_front();
                        self.events_dropped += 1;
                    }
                    self.events.push_back(event);
                }
                // An answer that nobody waits for belongs to a request given up on, or is QEMU's complaint about
                // bytes that it could not read; neither concerns the request that is now under way.
                Message::Reply { id, outcome } => {
                    if let Some(id) = id.filter(|id| self.pending.remove(id)) {
                        self.answers.insert(id, outcome);
                    }
                }
            }
        }
        Ok(())
    }

    /// The answer to a request, once it is here.
    pub fn take_answer(&mut self, id: RequestId) -> Option<Result<Value, CommandError>> {
        self.answers.remove(&id.0)
    }

    /// Gives up on a request: a late answer is dropped.
    pub fn abandon(&mut self, id: RequestId) {
        self.pending.remove(&id.0);
        self.answers.remove(&id.0);
    }

    /// The oldest event that nobody has taken.
    pub fn take_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The oldest event that fits; others stay.
    pub fn take_event_where(&mut self, fits: impl Fn(&Event) -> bool) -> Option<Event> {
        let at = self.events.iter().position(fits)?;
        self.events.remove(at)
    }

    /// How many events were dropped because nobody took them.
    pub fn events_dropped(&self) -> u64 {
        self.events_dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{QueryStatus, Stop};

    #[test]
    fn answers_find_their_requests_whatever_comes_between() {
        let mut session = Session::new();
        let (stop, bytes) = session.request(&Stop {}).unwrap();
        assert_eq!(bytes, b"{\"execute\":\"stop\",\"id\":1}\n");
        let (status, _) = session.request(&QueryStatus {}).unwrap();
        session
            .receive(b"{\"return\": {\"running\": true}, \"id\": 2}\r\n{\"event\": \"STOP\"}\r\n{\"ret")
            .unwrap();
        assert!(session.take_answer(stop).is_none());
        session.receive(b"urn\": {}, \"id\": 1}\r\n").unwrap();
        assert!(session.take_answer(stop).unwrap().is_ok());
        assert_eq!(session.take_answer(status).unwrap().unwrap()["running"], true);
        assert_eq!(session.take_event().unwrap().name, "STOP");
    }

    #[test]
    fn a_late_answer_to_an_abandoned_request_is_dropped() {
        let mut session = Session::new();
        let (first, _) = session.request(&Stop {}).unwrap();
        session.abandon(first);
        let (second, _) = session.request(&Stop {}).unwrap();
        session.receive(b"{\"return\": {}, \"id\": 1}\n").unwrap();
        assert!(session.take_answer(first).is_none() && session.take_answer(second).is_none());
    }

    #[test]
    fn events_are_bounded_and_the_oldest_go_first() {
        let mut session = Session::new();
        for number in 0..EVENTS_MAX + 2 {
            session.receive(format!("{{\"event\": \"E{number}\"}}\n").as_bytes()).unwrap();
        }
        assert_eq!(session.take_event().unwrap().name, "E2");
        assert_eq!(session.events_dropped(), 2);
    }
}
