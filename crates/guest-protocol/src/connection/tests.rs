use super::{Connection, Dispatch, Piece};
use crate::json::Limits;
use crate::{Call, Error};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A connection on which pings are answered at once and freezes when the test says so.
struct Host {
    connection: Connection,
    freezes: Vec<u64>,
    /// Reads of files that have begun.
    reads: Vec<u64>,
    log: Vec<String>,
}

impl Host {
    fn new() -> Self {
        let limits = Limits { error_position: false, ..Limits::default() };
        Self {
            connection: Connection::new(limits, 7),
            freezes: Vec::new(),
            reads: Vec::new(),
            log: Vec::new(),
        }
    }

    fn says(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.work(bytes.as_ref());
        self
    }

    fn work(&mut self, mut input: &[u8]) {
        while let Some(Dispatch { ticket, command, members }) = self.connection.next_request(&mut input) {
            assert_eq!(Connection::number_of(ticket), 7);
            self.log.push(command.name.to_owned());
            match command.read(members) {
                Err(error) => self.connection.answer(ticket, Err(error)),
                Ok(Call::Sync(id)) => self.connection.answer(ticket, Ok(json!(id))),
                Ok(Call::FsfreezeFreeze(_)) => self.freezes.push(ticket),
                Ok(Call::File(_)) => self.reads.push(ticket),
                Ok(_) => self.connection.answer(ticket, Ok(json!({}))),
            }
        }
    }

    fn freeze_ends(&mut self, answer: Result<Value, Error>) -> &mut Self {
        let ticket = self.freezes.remove(0);
        self.connection.answer(ticket, answer);
        self.work(b"");
        self
    }

    #[track_caller]
    fn hears(&mut self, expected: &str) -> &mut Self {
        let mut output = Vec::new();
        while !self.connection.output().is_empty() {
            output.extend_from_slice(self.connection.output());
            self.connection.sent(self.connection.output().len());
        }
        assert_eq!(String::from_utf8_lossy(&output), expected);
        self
    }

    #[track_caller]
    fn began(&mut self, expected: &str) -> &mut Self {
        assert_eq!(self.log.join(" "), expected);
        self.log.clear();
        self
    }
}

const FREEZE: &str = r#"{"execute":"guest-fsfreeze-freeze"}"#;
const THAW: &str = r#"{"execute":"guest-fsfreeze-thaw"}"#;
const PING: &str = r#"{"execute":"guest-ping"}"#;
const SYNC: &str = r#"{"execute":"guest-sync","arguments":{"id":5}}"#;

fn with_id(request: &str, id: &str) -> String {
    format!("{},\"id\":{id}}}", request.strip_suffix('}').expect("a request"))
}

#[test]
fn an_answer_is_one_line_with_the_id_that_was_sent() {
    Host::new().says(PING).hears("{\"return\": {}}\n");
    Host::new().says(with_id(PING, "1")).hears("{\"return\": {}, \"id\": 1}\n");
    Host::new().says(with_id(PING, "null")).hears("{\"return\": {}, \"id\": null}\n");
    Host::new()
        .says(with_id(PING, "{'a':[1,\"x\"]}"))
        .hears("{\"return\": {}, \"id\": {\"a\": [1, \"x\"]}}\n");
    Host::new()
        .says(with_id(PING, "18446744073709551615"))
        .hears("{\"return\": {}, \"id\": 18446744073709551615}\n");
}

#[test]
fn a_wrong_request_is_refused_in_the_words_of_qemu_ga() {
    #[track_caller]
    fn check(request: &str, class: &str, desc: &str) {
        let expected = format!("{{\"error\": {{\"class\": \"{class}\", \"desc\": \"{desc}\"}}}}\n");
        Host::new().says(format!("{request}\n")).hears(&expected);
    }
    check("5", "GenericError", "QMP input must be a JSON object");
    check("{}", "GenericError", "QMP input lacks member 'execute'");
    check(r#"{"execute":1}"#, "GenericError", "QMP input member 'execute' must be a string");
    check(
        r#"{"execute":"guest-ping","arguments":[]}"#,
        "GenericError",
        "QMP input member 'arguments' must be an object",
    );
    check(r#"{"exec-oob":"guest-ping"}"#, "GenericError", "QMP input member 'exec-oob' is unexpected");
    check(r#"{"execute":"nope"}"#, "CommandNotFound", "The command nope has not been found");
    check(r#"{"execute":"guest-sync"}"#, "GenericError", "Parameter 'id' is missing");
    check("nope", "GenericError", "JSON parse error, invalid keyword 'nope'");
}

#[test]
fn an_error_carries_the_id_too() {
    Host::new()
        .says(r#"{"execute":"nope","id":3}"#)
        .hears("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command nope has not been found\"}, \"id\": 3}\n");
}

const READ: &str = r#"{"execute":"guest-file-read","arguments":{"handle":1}}"#;

fn piece(text: &str, tail: &str, is_last: bool) -> Piece {
    Piece { text: text.into(), tail: tail.to_owned(), is_last }
}

#[test]
fn an_answer_in_pieces_is_one_line_and_others_wait_behind_it() {
    let mut host = Host::new();
    host.says(with_id(READ, "1")).says(with_id(READ, "2")).says(PING);
    host.hears("{\"return\": {}}\n");
    let [first, second] = host.reads[..] else { panic!("two reads have begun") };
    assert!(host.connection.piece(first, piece("[1", "]", false)));
    host.hears("{\"return\": [1");
    assert_eq!(host.connection.wants_piece(), Some(first));
    assert!(host.connection.piece(second, piece("[7", "]", false)), "held");
    host.says(PING).hears("");
    assert_eq!(host.connection.wants_piece(), Some(first));
    assert!(host.connection.piece(first, piece(", 2", ", 3]", true)));
    host.hears(", 2, 3], \"id\": 1}\n{\"return\": {}}\n{\"return\": [7");
    assert_eq!(host.connection.wants_piece(), Some(second));
    assert!(!host.connection.piece(first, piece("", "", false)), "it has ended");
    host.connection.cut(second);
    host.hears("], \"id\": 2}\n");
    assert!(!host.connection.owes_answers());
}

#[test]
fn a_request_without_id_waits_for_an_answer_in_pieces() {
    let mut host = Host::new();
    host.says(READ).says(PING).hears("");
    let read = host.reads[0];
    assert!(host.connection.piece(read, piece("[1", "]", false)));
    host.hears("{\"return\": [1");
    assert!(host.connection.piece(read, piece(", 2", "]", true)));
    host.says("").hears(", 2]}\n{\"return\": {}}\n");
}

#[test]
fn a_sync_ends_an_answer_in_pieces_as_a_shorter_one_that_is_whole() {
    let mut host = Host::new();
    host.says(READ).says(with_id(READ, "2"));
    let [first, second] = host.reads[..] else { panic!("two reads have begun") };
    assert!(host.connection.piece(first, piece("[1", "]", false)));
    assert!(host.connection.piece(second, piece("[7", "]", false)), "held");
    host.says(SYNC).hears("{\"return\": [1]}\n{\"return\": 5}\n");
    assert!(!host.connection.is_wanted(first) && !host.connection.is_wanted(second));
    assert!(!host.connection.piece(first, piece(", 2", "]", true)));
    host.hears("");
}

#[test]
fn a_host_that_leaves_takes_an_answer_in_pieces_with_it() {
    let mut host = Host::new();
    host.says(READ);
    let read = host.reads[0];
    assert!(host.connection.piece(read, piece("[1", "]", false)));
    host.connection.hang_up();
    assert!(!host.connection.piece(read, piece(", 2", "]", true)));
    host.says(PING).hears("{\"return\": {}}\n");
}

#[test]
fn the_next_piece_is_asked_for_when_little_is_left_to_be_sent_and_its_memory_comes_back() {
    let mut host = Host::new();
    host.says(READ);
    let read = host.reads[0];
    let large = "x".repeat(100_000);
    assert!(host.connection.piece(read, piece(&large, "", false)));
    assert_eq!(host.connection.wants_piece(), None);
    let head = host.connection.output().len();
    host.connection.sent(head);
    host.connection.sent(40_000);
    assert_eq!(host.connection.wants_piece(), Some(read));
    assert!(host.connection.take_spare().is_empty());
    host.connection.sent(60_000);
    assert_eq!(host.connection.take_spare().len(), 100_000);
    host.connection.cut(read);
    host.hears("}\n");
}

#[test]
fn only_the_delimited_sync_is_preceded_by_ff() {
    Host::new().says(SYNC).hears("{\"return\": 5}\n");
    let delimited = SYNC.replace("guest-sync", "guest-sync-delimited");
    let mut host = Host::new();
    host.says(&delimited);
    assert_eq!(host.connection.output(), b"\xFF{\"return\": 5}\n");
}

#[test]
fn a_host_starts_afresh_with_ff_and_sync() {
    let mut host = Host::new();
    host.says(br#"{"execute": "guest-p"#).says([b"\xFF", SYNC.as_bytes()].concat());
    let stray = r#"JSON parse error, stray '\"guest-p\uFFFD'"#;
    host.hears(&format!(
        "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"{stray}\"}}}}\n{{\"return\": 5}}\n"
    ));
}

#[test]
fn requests_without_id_wait_for_the_one_before() {
    Host::new()
        .says([FREEZE, PING, "nope ", THAW].concat())
        .began("guest-fsfreeze-freeze")
        .hears("")
        .freeze_ends(Ok(json!(2)))
        .began("guest-ping guest-fsfreeze-thaw")
        .hears(concat!(
            "{\"return\": 2}\n{\"return\": {}}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error, invalid keyword 'nope'\"}}\n",
            "{\"return\": {}}\n"
        ));
}

#[test]
fn requests_with_an_id_overtake_a_freeze() {
    Host::new()
        .says(FREEZE)
        .says(with_id(PING, "1"))
        .says(with_id(THAW, "2"))
        .hears("{\"return\": {}, \"id\": 1}\n{\"return\": {}, \"id\": 2}\n")
        .freeze_ends(Err(Error::generic("aborted")))
        .hears("{\"error\": {\"class\": \"GenericError\", \"desc\": \"aborted\"}}\n");
}

#[test]
fn a_freeze_with_an_id_holds_up_nothing() {
    Host::new()
        .says(with_id(FREEZE, "1"))
        .says(PING)
        .hears("{\"return\": {}}\n")
        .freeze_ends(Ok(json!(1)))
        .hears("{\"return\": 1, \"id\": 1}\n");
}

#[test]
fn a_sync_is_answered_at_once_and_drops_what_is_owed() {
    Host::new()
        .says(FREEZE)
        .says(PING)
        .says(SYNC)
        .hears("{\"return\": 5}\n")
        .began("guest-fsfreeze-freeze guest-sync")
        .freeze_ends(Ok(json!(2)))
        .hears("")
        .began("");
}

#[test]
fn a_thaw_after_a_sync_does_not_wait_for_the_freeze() {
    Host::new()
        .says(FREEZE)
        .says(SYNC)
        .says(THAW)
        .began("guest-fsfreeze-freeze guest-sync guest-fsfreeze-thaw")
        .hears("{\"return\": 5}\n{\"return\": {}}\n");
}

#[test]
fn a_waiting_thaw_is_carried_out_even_where_its_answer_is_dropped() {
    Host::new()
        .says([FREEZE, PING, THAW, SYNC].concat())
        .began("guest-fsfreeze-freeze guest-fsfreeze-thaw guest-sync")
        .hears("{\"return\": 5}\n");
    let mut host = Host::new();
    host.says([FREEZE, PING, THAW].concat()).began("guest-fsfreeze-freeze");
    host.connection.hang_up();
    host.work(b"");
    host.began("guest-fsfreeze-thaw").hears("");
}

#[test]
fn a_sync_with_bad_arguments_drops_nothing() {
    Host::new()
        .says(FREEZE)
        .says(r#"{"execute":"guest-sync"}"#)
        .hears("")
        .freeze_ends(Ok(json!(1)))
        .hears("{\"return\": 1}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"Parameter 'id' is missing\"}}\n");
}

#[test]
fn success_of_a_shutdown_is_not_answered_but_its_error_is() {
    Host::new().says(r#"{"execute":"guest-shutdown"}"#).says(PING).hears("{\"return\": {}}\n");
    Host::new().says(r#"{"execute":"guest-shutdown","arguments":{"mode":"x"},"id":1}"#).hears(
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"mode is invalid (valid values are: halt|powerdown|reboot\"}, \"id\": 1}\n",
    );
}

#[test]
fn a_new_host_hears_nothing_of_the_one_that_hung_up() {
    let mut host = Host::new();
    host.says(PING).says(FREEZE).says(r#"{"execute": "gue"#);
    host.connection.hang_up();
    host.says(PING).hears("{\"return\": {}}\n").freeze_ends(Ok(json!(1))).hears("");
}

#[test]
fn a_host_that_does_not_read_is_not_read_from() {
    let mut host = Host::new();
    for _ in 0..100_000 {
        if !host.connection.wants_input() {
            break;
        }
        host.says(PING);
    }
    assert!(!host.connection.wants_input());
    assert!(host.connection.output().len() < 2 << 20);
    let half = host.connection.output().len() / 2;
    host.connection.sent(half);
    assert!(host.connection.wants_input(), "and is again when it reads");
}

#[test]
fn requests_that_wait_are_bounded() {
    let mut host = Host::new();
    host.says(FREEZE);
    for _ in 0..1000 {
        if host.connection.wants_input() {
            host.says(PING);
        }
    }
    assert!(!host.connection.wants_input());
    host.freeze_ends(Ok(json!(0)));
    assert!(host.connection.wants_input());
}

proptest! {
    #[test]
    fn pieces_do_not_change_the_answers(
        words in prop::collection::vec(prop::sample::select(vec![
            PING, SYNC, "{\"execute\":\"nope\"}", "\n", "{]", "5 ", "{\"execute\":\"guest-ping\",\"id\":1}",
            "{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":-1}}", "\"x\ny\"",
        ]), 0..12),
        cut in any::<prop::sample::Index>(),
    ) {
        let input = words.concat().into_bytes();
        let mut whole = Host::new();
        whole.says(&input);
        let at = cut.index(input.len() + 1);
        let mut halves = Host::new();
        halves.says(&input[..at]).says(&input[at..]);
        prop_assert_eq!(halves.connection.output(), whole.connection.output());
        let mut bytes = Host::new();
        for byte in &input {
            bytes.says([*byte]);
        }
        prop_assert_eq!(bytes.connection.output(), whole.connection.output());
    }
}
