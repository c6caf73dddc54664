//! Strings so long that they are packed while they are read are no different from others.

use guest_protocol::arguments::{FileCall, FileOperation};
use guest_protocol::json::{Limits, Text};
use guest_protocol::{Call, Connection, Error, base64};
use proptest::prelude::*;
use serde_json::json;

const LETTERS: usize = 100_000;

/// What is answered to a request that arrives in pieces. A ping is carried out.
fn answer(request: &str, piece: usize) -> String {
    let mut connection = Connection::new(Limits::default(), 1);
    for mut piece in request.as_bytes().chunks(piece) {
        while let Some(dispatch) = connection.next_request(&mut piece) {
            let read = dispatch.command.read(dispatch.members);
            connection.answer(dispatch.ticket, read.map(|_| json!({})));
        }
    }
    let mut output = Vec::new();
    while !connection.output().is_empty() {
        output.extend_from_slice(connection.output());
        connection.sent(connection.output().len());
    }
    String::from_utf8(output).expect("answers are ASCII")
}

/// The text to be written that a `guest-file-write` brings.
fn written(text: &str, piece: usize) -> Text {
    let request =
        json!({"execute": "guest-file-write", "arguments": {"handle": 1, "buf-b64": text}}).to_string();
    let mut connection = Connection::new(Limits::default(), 1);
    let dispatch = request.as_bytes().chunks(piece).find_map(|mut piece| connection.next_request(&mut piece));
    let dispatch = dispatch.expect("a request");
    match dispatch.command.read(dispatch.members) {
        Ok(Call::File(FileCall { operation: FileOperation::Write { text, .. }, .. })) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_id_of_any_length_comes_back() {
    for tail in ["", "A", "=", "\\n", "\\u0041 AAAA"] {
        let long = "QUJD".repeat(LETTERS / 4);
        let id = format!("[\"{long}{tail}\", {{\"{long}\": 1}}]");
        let request = format!("{{\"execute\": \"guest-ping\", \"id\": {id}}}");
        let id = id.replace("\\u0041", "A");
        let expected = format!("{{\"return\": {{}}, \"id\": {id}}}\n");
        assert!(answer(&request, 4096) == expected, "behind the letters: {tail}");
    }
}

#[test]
fn a_long_text_in_any_other_place_is_that_text() {
    let long = "A".repeat(LETTERS);
    let (cut, error) = ("A".repeat(1024), "{\"error\": {\"class\": \"GenericError\", \"desc\": ");
    let check = |request: &str, class: &str, desc: &str| {
        let error = error.replace("GenericError", class);
        assert_eq!(answer(request, 4096), format!("{error}\"{desc}\"}}}}\n"));
    };
    let desc = format!("The command {cut} has not been found");
    check(&format!("{{\"execute\": \"{long}\"}}"), "CommandNotFound", &desc);
    let desc = format!("QMP input member '{cut}' is unexpected");
    check(&format!("{{\"execute\": \"guest-ping\", \"{long}\": 1}}"), "GenericError", &desc);
    let desc = "Invalid parameter type for 'id', expected: integer";
    let request = format!("{{\"execute\": \"guest-sync\", \"arguments\": {{\"id\": \"{long}\"}}}}");
    check(&request, "GenericError", desc);
    let desc = format!("Parameter 'capture-output' does not accept value '{cut}'");
    let arguments = format!("{{\"path\": \"{long}\", \"capture-output\": \"{long}\"}}");
    check(&format!("{{\"execute\": \"guest-exec\", \"arguments\": {arguments}}}"), "GenericError", &desc);
    let desc = format!("JSON parse error, stray '\\\"{}'", &cut[..255]);
    check(&format!("\"{long}\n"), "GenericError", &format!("1:1: {desc}"));
}

#[test]
fn most_of_a_long_base64_is_held_packed() {
    let text = written(&"QUJD".repeat(LETTERS / 4), 4096);
    assert!(matches!(text, Text::Packed(_)));
    assert_eq!((text.len(), base64::decode(text)), (LETTERS, Ok(b"ABC".repeat(LETTERS / 4))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_long_text_is_decoded_as_a_short_one_is(
        at in 0..LETTERS, what in prop::sample::select(vec!["", "=", "\n", "==\nQ", "*", "\u{e9}", "\0"]),
        length in LETTERS - 9..LETTERS, piece in 1000..70_000usize,
    ) {
        let mut text: String = "QUJDRA".chars().cycle().take(length).collect();
        text.insert_str(at.min(length), what);
        let plain: Result<Vec<u8>, Error> = base64::decode(Text::from(text.clone()));
        let held = written(&text, piece);
        prop_assert_eq!(held.len(), text.len());
        prop_assert_eq!(String::from(held.clone()), text);
        prop_assert_eq!(base64::decode(held), plain);
    }
}
