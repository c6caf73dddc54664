//! What a guest sends to the host. However its bytes are cut, the same answers come out; only what was asked is
//! answered, once each, and nothing before the synchronization.
#![no_main]

use arbitrary::Arbitrary;
use guest_protocol::Client;
use guest_protocol::client::Event;
use guest_protocol::stillpoint::{CheckReport, FreezeReport, GuestReport, StatusReport};
use libfuzzer_sys::fuzz_target;
use std::collections::HashSet;

#[derive(Arbitrary, Debug)]
enum Sent {
    Raw(Vec<u8>),
    Sync { number: u8, delimited: bool },
    Return { id: Option<u8>, value: String },
    Error { id: Option<u8>, class: bool, desc: String },
}

#[derive(Arbitrary, Debug)]
struct Input {
    sent: Vec<Sent>,
    cuts: Vec<u8>,
    requests: u8,
}

const SEED: u64 = 100;

fn bytes(sent: &[Sent]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let near = |number: &u8| SEED + u64::from(number % 16);
    for sent in sent {
        let id = |id: &Option<u8>| id.map_or_else(String::new, |id| format!(", \"id\": {}", near(&id)));
        match sent {
            Sent::Raw(raw) => bytes.extend_from_slice(raw),
            Sent::Sync { number, delimited } => {
                bytes.extend(delimited.then_some(0xFF));
                bytes.extend(format!("{{\"return\": {}}}\n", near(number)).bytes());
            }
            Sent::Return { id: of, value } => {
                bytes.extend(format!("{{\"return\": {value}{}}}\n", id(of)).bytes());
            }
            Sent::Error { id: of, class, desc } => {
                let class = if *class { "CommandNotFound" } else { "GenericError" };
                let desc = serde_json::to_string(desc).expect("a text is JSON");
                let error =
                    format!("{{\"error\": {{\"class\": \"{class}\", \"desc\": {desc}}}{}}}\n", id(of));
                bytes.extend(error.bytes());
            }
        }
    }
    bytes
}

fn converse(stream: &[u8], cuts: &[u8], requests: u8) -> (Vec<Event>, u64) {
    let mut client = Client::new(SEED);
    client.resync();
    let mut asked: HashSet<u64> = (0..requests % 8).map(|_| client.request("guest-ping", None).0).collect();
    let mut synchronized = false;
    let mut events = Vec::new();
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut) + 1);
    let mut rest = stream;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(cuts.next().unwrap_or(usize::MAX).min(rest.len()));
        rest = after;
        // No fuzzer's input reaches the limit of a line.
        for event in client.receive(piece).expect("a short line") {
            match &event {
                Event::Synchronized => assert!(!std::mem::replace(&mut synchronized, true)),
                Event::Answer { request, .. } => {
                    assert!(synchronized, "an answer before the synchronization");
                    assert!(asked.remove(request), "an answer to nothing, or a second one");
                }
            }
            events.push(event);
        }
    }
    assert_eq!(client.is_synchronized(), synchronized);
    (events, client.skipped())
}

fuzz_target!(|input: Input| {
    let stream = bytes(&input.sent);
    let whole = converse(&stream, &[], input.requests);
    assert_eq!(whole, converse(&stream, &input.cuts, input.requests), "it depends on how the bytes arrive");
    for event in whole.0 {
        if let Event::Answer { result: Ok(value), .. } = event {
            // Whether it has one of these shapes or not: reading it must not panic.
            let _read = (
                serde_json::from_value::<GuestReport>(value.clone()).is_ok(),
                serde_json::from_value::<FreezeReport>(value.clone()).is_ok(),
                serde_json::from_value::<CheckReport>(value.clone()).is_ok(),
                serde_json::from_value::<StatusReport>(value).is_ok(),
            );
        }
    }
});
