//! What a host sends to the agent. However its bytes are cut, the answers are the same lines of ASCII JSON; every
//! ticket is given once; and once everything is answered, nothing is owed.
#![no_main]

use arbitrary::Arbitrary;
use guest_protocol::json::Limits;
use guest_protocol::{COMMANDS, Connection, Error};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use std::collections::HashSet;

#[derive(Arbitrary, Debug)]
enum Said {
    Raw(Vec<u8>),
    /// The byte with which a host begins afresh.
    Mark,
    Request {
        command: u8,
        id: Option<u8>,
        argument: Argument,
    },
}

#[derive(Arbitrary, Debug)]
enum Argument {
    Absent,
    Number(i64),
    RunId(u8),
    Any(String),
}

#[derive(Arbitrary, Debug)]
struct Input {
    said: Vec<Said>,
    cuts: Vec<u8>,
    /// The tickets whose answer is an error.
    refusals: u64,
}

fn bytes(said: &[Said]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for said in said {
        match said {
            Said::Raw(raw) => bytes.extend_from_slice(raw),
            Said::Mark => bytes.push(0xFF),
            Said::Request { command, id, argument } => {
                let name = COMMANDS[usize::from(*command) % COMMANDS.len()].name;
                let arguments = match argument {
                    Argument::Absent => String::new(),
                    Argument::Number(number) => format!(r#", "arguments": {{"id": {number}}}"#),
                    Argument::RunId(run) => {
                        format!(
                            r#", "arguments": {{"id": "run{run}", "lease_ms": {}}}"#,
                            u32::from(*run) * 100
                        )
                    }
                    Argument::Any(text) => format!(r#", "arguments": {}"#, text),
                };
                let id = id.map_or_else(String::new, |id| format!(r#", "id": {id}"#));
                bytes.extend_from_slice(format!(r#"{{"execute": "{name}"{arguments}{id}}}"#).as_bytes());
            }
        }
    }
    bytes
}

/// Carries out every request at once, and returns everything that was answered.
fn converse(stream: &[u8], cuts: &[u8], refusals: u64) -> Vec<u8> {
    let limits = Limits { token_bytes_max: 4096, tokens_max: 512, depth_max: 32, error_position: true };
    let mut connection = Connection::new(limits, 7);
    let mut tickets = HashSet::new();
    let mut answers = Vec::new();
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut) + 1);
    let mut rest = stream;
    while !rest.is_empty() {
        let (mut piece, after) = rest.split_at(cuts.next().unwrap_or(usize::MAX).min(rest.len()));
        rest = after;
        while let Some(dispatch) = connection.next_request(&mut piece) {
            assert!(tickets.insert(dispatch.ticket), "a ticket came twice");
            assert_eq!(Connection::number_of(dispatch.ticket), 7);
            let answer = match dispatch.command.read(dispatch.members) {
                Err(error) => Err(error),
                Ok(_) if refusals >> (dispatch.ticket & 63) & 1 == 1 => {
                    Err(Error::generic("no: \u{e9}\u{1b}"))
                }
                Ok(call) => Ok(Value::String(format!("{call:?}"))),
            };
            connection.answer(dispatch.ticket, answer);
        }
        assert!(piece.is_empty(), "bytes are left although nothing is to be done");
        assert!(!connection.owes_answers(), "everything was answered");
        while !connection.output().is_empty() {
            let sent = connection.output().len();
            answers.extend_from_slice(connection.output());
            connection.sent(sent);
        }
    }
    answers
}

fuzz_target!(|input: Input| {
    let stream = bytes(&input.said);
    let whole = converse(&stream, &[], input.refusals);
    let cut = converse(&stream, &input.cuts, input.refusals);
    assert!(whole == cut, "the answers depend on how the bytes arrive");
    for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let line = line.strip_prefix(b"\xFF").unwrap_or(line);
        assert!(line.is_ascii());
        let answer: Value = serde_json::from_slice(line).expect("every answer is JSON");
        assert!(answer.get("return").is_some() != answer.get("error").is_some());
    }
});
