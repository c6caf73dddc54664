//! `docs/protocol/agent.md` and the code say the same.

use guest_protocol::json::Limits;
use guest_protocol::{COMMANDS, Connection};

const DOCUMENT: &str = include_str!("../../../docs/protocol/agent.md");

#[test]
fn the_document_names_every_command() {
    for command in COMMANDS {
        assert!(DOCUMENT.contains(&format!("`{}`", command.name)), "{} is missing", command.name);
    }
}

#[test]
fn the_documents_requests_are_understood() {
    let requests: Vec<&str> = DOCUMENT.lines().filter_map(|line| line.strip_prefix("> ")).collect();
    assert!(requests.len() >= 3, "the examples are there");
    for request in requests {
        let mut connection = Connection::new(Limits::default(), 1);
        let dispatch = connection.next_request(&mut request.as_bytes());
        let dispatch = dispatch
            .unwrap_or_else(|| panic!("{request}: {:?}", String::from_utf8_lossy(connection.output())));
        dispatch.command.read(dispatch.members).unwrap_or_else(|error| panic!("{request}: {error}"));
    }
}

#[test]
fn the_documents_first_bytes_are_the_resync() {
    let line = DOCUMENT.lines().find(|line| line.starts_with("FF 7b")).expect("the example is there");
    let hex = line.split('…').next().expect("bytes before the dots");
    let bytes: Vec<u8> =
        hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).expect("two hex digits")).collect();
    let text = line.split("0xFF ").nth(1).expect("the text beside the bytes");
    assert_eq!(bytes[0], 0xFF);
    assert!(text.as_bytes().starts_with(&bytes[1..]), "{text}");
    let input = [&[0xFF], text.as_bytes()].concat();
    let mut connection = Connection::new(Limits::default(), 1);
    let sync = connection.next_request(&mut &input[..]).expect("a request");
    assert_eq!(sync.command.name, "guest-sync-delimited");
}
