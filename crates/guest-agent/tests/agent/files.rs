//! `guest-file-*`.

use crate::guest::{Agent, Client, until};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A folder of files for one test.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("written");
        path
    }
}

#[track_caller]
fn open(client: &mut Client, path: &Path, mode: &str) -> i64 {
    let handle = client.call("guest-file-open", json!({"path": path, "mode": mode}));
    handle.as_i64().expect("a number")
}

#[track_caller]
fn read(client: &mut Client, handle: i64, count: u64) -> (Vec<u8>, bool) {
    let answer = client.call("guest-file-read", json!({"handle": handle, "count": count}));
    let bytes = STANDARD.decode(answer["buf-b64"].as_str().expect("a text")).expect("base64");
    assert_eq!(answer["count"], bytes.len());
    assert_eq!(answer.as_object().map(serde_json::Map::len), Some(3));
    (bytes, answer["eof"].as_bool().expect("a truth value"))
}

#[track_caller]
fn write(client: &mut Client, handle: i64, bytes: &[u8]) {
    let arguments = json!({"handle": handle, "buf-b64": STANDARD.encode(bytes)});
    let answer = client.call("guest-file-write", arguments);
    assert_eq!(answer, json!({"count": bytes.len(), "eof": false}));
}

#[track_caller]
fn close(client: &mut Client, handle: i64) {
    assert_eq!(client.call("guest-file-close", json!({"handle": handle})), json!({}));
}

/// Bytes that show where they belong.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from((at ^ at >> 8 ^ at >> 16) & 0xFF).expect("a byte")).collect()
}

#[test]
fn a_file_is_written_sought_and_read_back() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let path = place.path("new");
    let handle = open(&mut client, &path, "w+");
    assert_eq!(handle, 1000, "the first handle is qemu-ga's");
    write(&mut client, handle, b"hello, world");
    assert_eq!(fs::read(&path).expect("there"), b"hello, world");
    let sought = client.call("guest-file-seek", json!({"handle": handle, "offset": 7, "whence": 0}));
    assert_eq!(sought, json!({"position": 7, "eof": false}));
    assert_eq!(read(&mut client, handle, 3), (b"wor".to_vec(), false));
    let sought = client.call("guest-file-seek", json!({"handle": handle, "offset": -2, "whence": "cur"}));
    assert_eq!(sought["position"], 8);
    assert_eq!(read(&mut client, handle, 4), (b"orld".to_vec(), false), "the end is not met yet");
    assert_eq!(read(&mut client, handle, 4), (Vec::new(), true));
    let sought = client.call("guest-file-seek", json!({"handle": handle, "offset": 0, "whence": "end"}));
    assert_eq!(sought["position"], 12);
    assert_eq!(client.call("guest-file-flush", json!({"handle": handle})), json!({}));
    close(&mut client, handle);
    let gone = client.error("guest-file-read", json!({"handle": handle}));
    assert_eq!(gone, format!("handle '{handle}' has not been found"));
    let log = agent.log();
    assert!(
        log.contains(&format!("guest-file-open called, filepath: {}, mode: w+", path.display())),
        "{log}"
    );
    assert!(log.contains("guest-file-open, handle: 1000"), "{log}");
    assert!(log.contains("guest-file-close called, handle: 1000"), "{log}");
}

#[test]
fn answers_have_the_bytes_of_qemu_gas() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let handle = open(&mut client, &place.file("f", "abc"), "r");
    let request = |name: &str, more: &str| {
        format!("{{\"execute\":\"{name}\",\"arguments\":{{\"handle\":{handle}{more}}}}}")
    };
    assert_eq!(
        client.ask(&request("guest-file-read", "")),
        r#"{"return": {"buf-b64": "YWJj", "count": 3, "eof": true}}"#
    );
    assert_eq!(
        client.ask(&request("guest-file-read", ",\"count\":0")),
        r#"{"return": {"buf-b64": "", "count": 0, "eof": false}}"#
    );
    let with_id = request("guest-file-read", "").replace("{\"execute\"", "{\"id\":[7],\"execute\"");
    assert_eq!(client.ask(&with_id), r#"{"return": {"buf-b64": "", "count": 0, "eof": true}, "id": [7]}"#);
}

#[test]
fn wrong_calls_are_refused_in_the_words_of_qemu_ga() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let file = place.file("f", "abc");
    let file = file.to_str().expect("a plain path");
    let handle = open(&mut client, Path::new(file), "r");
    let mut refuses = |command: &str, arguments: Value, words: &str| {
        assert_eq!(client.error(command, arguments), words);
    };
    refuses(
        "guest-file-open",
        json!({"path": "/nonexistent"}),
        "failed to open file '/nonexistent' (mode: 'r'): No such file or directory",
    );
    refuses("guest-file-open", json!({"path": file, "mode": "zz"}), "invalid file open mode 'zz'");
    refuses("guest-file-open", json!({"path": file, "mode": "rw"}), "invalid file open mode 'rw'");
    refuses("guest-file-open", json!({"path": file, "mode": ""}), "invalid file open mode ''");
    refuses("guest-file-open", json!({}), "Parameter 'path' is missing");
    refuses(
        "guest-file-open",
        json!({"path": "a\u{0}b"}),
        "failed to open file 'a\u{0}b' (mode: 'r'): No such file or directory",
    );
    refuses(
        "guest-file-open",
        json!({"path": "/", "mode": "w"}),
        "failed to open file '/' (mode: 'w'): Is a directory",
    );
    for command in ["guest-file-close", "guest-file-read", "guest-file-flush"] {
        refuses(command, json!({"handle": 77}), "handle '77' has not been found");
        refuses(command, json!({"handle": "x"}), "Invalid parameter type for 'handle', expected: integer");
        refuses(command, json!({}), "Parameter 'handle' is missing");
    }
    let (minus, huge) =
        (json!({"handle": handle, "count": -1}), json!({"handle": handle, "count": 50_331_649}));
    refuses("guest-file-read", minus, "value '-1' is invalid for argument count");
    refuses("guest-file-read", huge, "value '50331649' is invalid for argument count");
    refuses("guest-file-read", json!({"handle": 77, "count": -1}), "handle '77' has not been found");
    let write = |text: &str| json!({"handle": handle, "buf-b64": text});
    refuses("guest-file-write", write("!"), "Base64 data contains invalid characters");
    refuses("guest-file-write", write("YWJj"), "failed to write to file: Bad file descriptor");
    let mut long = write("YWJj");
    long["count"] = json!(4);
    refuses("guest-file-write", long.clone(), "value '4' is invalid for argument count");
    long["count"] = json!(-1);
    refuses("guest-file-write", long, "value '-1' is invalid for argument count");
    let seek = |whence: Value, offset: i64| json!({"handle": handle, "offset": offset, "whence": whence});
    refuses("guest-file-seek", seek(json!(3), 0), "invalid whence code 3");
    refuses("guest-file-seek", seek(json!(0), -1), "failed to seek file: Invalid argument");
    refuses("guest-file-seek", seek(json!("x"), 0), "Parameter 'whence' does not accept value 'x'");
    let wrong = "Invalid parameter type for 'whence', expected: GuestFileWhence";
    refuses("guest-file-seek", seek(json!(true), 0), wrong);
    let folder = open(&mut agent.client(), place.0.path(), "r");
    refuses("guest-file-read", json!({"handle": folder}), "failed to read file: Is a directory");
}

#[test]
fn modes_are_those_of_fopen_and_new_files_are_open_to_all() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let old = place.file("old", "0123456789");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o600)).expect("ours");
    for (mode, expected) in [
        ("r+", "xx23456789"),
        ("rb+", "xx23456789"),
        ("r+b", "xx23456789"),
        ("a", "0123456789xx"),
        ("ab", "0123456789xx"),
        ("a+", "0123456789xx"),
        ("ab+", "0123456789xx"),
        ("a+b", "0123456789xx"),
        ("w", "xx"),
        ("wb", "xx"),
        ("w+", "xx"),
        ("wb+", "xx"),
        ("w+b", "xx"),
    ] {
        fs::write(&old, "0123456789").expect("written");
        let handle = open(&mut client, &old, mode);
        write(&mut client, handle, b"xx");
        close(&mut client, handle);
        assert_eq!(fs::read_to_string(&old).expect("there"), expected, "{mode}");
        if !mode.starts_with('r') {
            let new = place.path(&format!("new-{mode}"));
            let handle = open(&mut client, &new, mode);
            close(&mut client, handle);
            let mode = fs::metadata(&new).expect("made").permissions().mode();
            assert_eq!(mode & 0o777, 0o666, "whatever the umask");
        }
    }
    assert_eq!(fs::metadata(&old).expect("there").permissions().mode() & 0o777, 0o600, "kept");
    let handle = open(&mut client, &old, "rb");
    assert_eq!(read(&mut client, handle, 4096), (b"xx".to_vec(), true));
    let where_it_stands = |client: &mut Client, mode: &str| {
        let handle = open(client, &old, mode);
        client.call("guest-file-seek", json!({"handle": handle, "offset": 0, "whence": 1}))["position"]
            .clone()
    };
    assert_eq!(where_it_stands(&mut client, "a"), 2);
    assert_eq!(where_it_stands(&mut client, "a+"), 0);
    // A link that leads nowhere is not followed to make a file.
    std::os::unix::fs::symlink(place.path("nowhere"), place.path("link")).expect("linked");
    let error = client.error("guest-file-open", json!({"path": place.path("link"), "mode": "w"}));
    assert!(error.ends_with("(mode: 'w'): No such file or directory"), "{error}");
    assert!(!place.path("nowhere").exists());
}

#[test]
fn counts_cut_what_is_written_and_newlines_in_base64_are_passed_over() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let path = place.path("f");
    let handle = open(&mut client, &path, "w");
    let mut put = |text: &str, count: Value| {
        let mut arguments = json!({"handle": handle, "buf-b64": text});
        if !count.is_null() {
            arguments["count"] = count;
        }
        client.call("guest-file-write", arguments)["count"].clone()
    };
    assert_eq!(put("aGVsbG8=", json!(4)), 4);
    assert_eq!(put("aGVs\nbG8=\n", Value::Null), 5);
    assert_eq!(put("", Value::Null), 0);
    assert_eq!(put("aGVsbG8=", json!(0)), 0);
    assert_eq!(put("aGVsbG8", Value::Null), 3, "an incomplete group is dropped");
    assert_eq!(fs::read(&path).expect("there"), b"hellhellohel");
}

#[test]
fn large_files_come_and_go_in_one_piece() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let bytes = pattern((9 << 20) + 1);
    let handle = open(&mut client, &place.file("big", &bytes), "r");
    assert_eq!(read(&mut client, handle, (9 << 20) + 1), (bytes.clone(), false));
    assert_eq!(read(&mut client, handle, 1), (Vec::new(), true));
    client.call("guest-file-seek", json!({"handle": handle, "offset": 1, "whence": 0}));
    let (all, eof) = read(&mut client, handle, 48 << 20);
    assert!(eof && all == bytes[1..]);
    let copy = place.path("copy");
    let handle = open(&mut client, &copy, "w");
    write(&mut client, handle, &bytes);
    assert!(fs::read(&copy).expect("there") == bytes);
}

#[test]
fn d25_a_large_transfer_takes_little_memory_and_holds_up_nobody() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let bytes = pattern(40 << 20);
    let handle = open(&mut client, &place.file("big", &bytes), "r");
    let before = agent.memory("VmHWM");
    let mut slow = agent.client();
    slow.send(
        json!({"execute": "guest-file-read", "arguments": {"handle": handle, "count": 40 << 20}}).to_string(),
    );
    // While the answer lies there unread, others are served.
    for _ in 0..20 {
        assert_eq!(client.call("guest-ping", json!({})), json!({}));
    }
    let line = slow.line();
    assert!(line.len() > (40 << 20) / 3 * 4);
    let after = agent.memory("VmHWM");
    assert!(after - before < 4 << 20, "from {before} to {after} bytes for an answer of 53 MiB");
    let answer: Value = serde_json::from_str(&line).expect("JSON");
    assert!(STANDARD.decode(answer["return"]["buf-b64"].as_str().expect("a text")).expect("base64") == bytes);
    assert_eq!(answer["return"]["count"], 40 << 20);
    // The way in: what the request brings, once, and not its base64.
    let handle = open(&mut client, &place.path("copy"), "w");
    write(&mut client, handle, &bytes);
    let peak = agent.memory("VmHWM") - before;
    assert!(peak < 44 << 20, "{peak} bytes for a request that brings 40 MiB");
    assert!(agent.memory("VmRSS") < before + (4 << 20), "the memory is given back");
}

#[test]
fn d26_the_largest_write_is_possible_and_one_beyond_every_limit_is_answered_once() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let path = place.path("f");
    let handle = open(&mut client, &path, "w");
    let bytes = pattern(48 << 20);
    write(&mut client, handle, &bytes);
    assert!(fs::read(&path).expect("there") == bytes);
    let text = "A".repeat(70 << 20);
    let error = client.error("guest-file-write", json!({"handle": handle, "buf-b64": text}));
    assert_eq!(error, "JSON token size limit exceeded");
    assert_eq!(client.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#, "nothing is left behind");
}

#[test]
fn handles_outlive_their_clients_and_never_come_twice() {
    let place = Place::new();
    let file = place.file("f", "abcdef");
    let mut agent = Agent::start();
    let handle = open(&mut agent.client(), &file, "r");
    assert_eq!(read(&mut agent.client(), handle, 3).0, b"abc");
    assert_eq!(read(&mut agent.client(), handle, 3).0, b"def");
    agent.restart();
    let mut client = agent.client();
    let error = client.error("guest-file-read", json!({"handle": handle}));
    assert_eq!(error, format!("handle '{handle}' has not been found"));
    assert!(open(&mut client, &file, "r") > handle);
}

#[test]
fn d27_what_is_flushed_is_on_the_disk_and_the_state_file_is_not_written_for_each_handle() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let state = agent.folder().join("qga.state");
    assert_eq!(fs::read_to_string(&state).expect("made at the start"), "[global]\nfd_counter=1000\n");
    let path = place.path("f");
    let mut states = std::collections::BTreeSet::new();
    for nth in 0..65 {
        let handle = open(&mut client, &path, "w");
        states.insert(fs::read_to_string(&state).expect("there"));
        assert_eq!(handle, 1000 + nth);
        write(&mut client, handle, b"x");
        assert_eq!(client.call("guest-file-flush", json!({"handle": handle})), json!({}));
        close(&mut client, handle);
    }
    let states: Vec<_> = states.into_iter().collect();
    assert_eq!(states, ["[global]\nfd_counter=1064\n", "[global]\nfd_counter=1128\n"]);
}

#[test]
fn d27_handles_that_dead_clients_left_make_room_for_new_ones() {
    let (agent, place) = (Agent::start(), Place::new());
    let file = place.file("f", "abc");
    let (first, second) = {
        let mut client = agent.client();
        (open(&mut client, &file, "r"), open(&mut client, &file, "r"))
    };
    let mut client = agent.client();
    let mut latest = 0;
    for _ in 0..300 {
        // What is used stays.
        client.call("guest-file-seek", json!({"handle": first, "offset": 0, "whence": 0}));
        latest = open(&mut client, &file, "r");
    }
    assert_eq!(read(&mut client, first, 3).0, b"abc");
    assert_eq!(read(&mut client, latest, 3).0, b"abc");
    let error = client.error("guest-file-read", json!({"handle": second}));
    assert_eq!(error, format!("handle '{second}' has not been found"));
    // They are closed beside the agent's work, which on a busy machine is a moment later.
    let open_files = || fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("it runs").count();
    until("the others are closed", || open_files() < 300);
}

#[test]
fn requests_for_one_file_take_effect_in_order_even_if_they_may_overtake() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let bytes = pattern(2 << 20);
    let handle = open(&mut client, &place.file("f", &bytes), "r");
    let part = bytes.len() / 8;
    let request = |id: usize| {
        json!({"execute": "guest-file-read", "arguments": {"handle": handle, "count": part}, "id": id})
            .to_string()
    };
    client.send((0..8).map(request).collect::<String>());
    for _ in 0..8 {
        let answer: Value = serde_json::from_str(&client.line()).expect("JSON");
        let nth = usize::try_from(answer["id"].as_u64().expect("an id")).expect("small");
        let read = STANDARD.decode(answer["return"]["buf-b64"].as_str().expect("a text")).expect("base64");
        assert!(read == bytes[nth * part..][..part], "part {nth}");
    }
}

#[test]
fn a_sync_ends_a_transfer_that_the_host_gave_up_and_the_handle_goes_on() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let bytes = pattern(8 << 20);
    let handle = open(&mut client, &place.file("f", &bytes), "r");
    client.send(
        json!({"execute": "guest-file-read", "arguments": {"handle": handle, "count": 8 << 20}}).to_string(),
    );
    // Some of the answer is there; the rest waits for the host to read.
    client.wait_readable();
    client.send(r#"{"execute":"guest-sync","arguments":{"id":4711}}"#);
    let cut: Value = serde_json::from_str(&client.line()).expect("a whole line");
    let count = usize::try_from(cut["return"]["count"].as_u64().expect("a number")).expect("small");
    let part = STANDARD.decode(cut["return"]["buf-b64"].as_str().expect("a text")).expect("base64");
    assert!(count < bytes.len() && part == bytes[..count], "a shorter answer, and a true one");
    assert_eq!(cut["return"]["eof"], false);
    assert_eq!(client.line(), r#"{"return": 4711}"#);
    client.call("guest-file-seek", json!({"handle": handle, "offset": 0, "whence": 0}));
    assert!(read(&mut client, handle, 8 << 20).0 == bytes);
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_transfer_leaves_the_handle_usable() {
    let (agent, place) = (Agent::start(), Place::new());
    let bytes = pattern(8 << 20);
    let handle = open(&mut agent.client(), &place.file("f", &bytes), "r");
    let mut leaver = agent.client();
    leaver.send(
        json!({"execute": "guest-file-read", "arguments": {"handle": handle, "count": 8 << 20}}).to_string(),
    );
    leaver.wait_readable();
    drop(leaver);
    let mut client = agent.client();
    client.call("guest-file-seek", json!({"handle": handle, "offset": 0, "whence": 0}));
    assert!(read(&mut client, handle, 8 << 20).0 == bytes);
}

#[test]
fn pipes_are_not_waited_for_and_what_they_hold_is_told() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let pipe = place.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .expect("a pipe");
    let error = client.error("guest-file-open", json!({"path": pipe, "mode": "w"}));
    assert!(error.ends_with("(mode: 'w'): No such device or address"), "{error}");
    let reader = open(&mut client, &pipe, "r");
    let writer = open(&mut client, &pipe, "w");
    let error = client.error("guest-file-read", json!({"handle": reader, "count": 10}));
    assert_eq!(error, "failed to read file: Resource temporarily unavailable");
    write(&mut client, writer, b"abcd");
    // qemu-ga would answer the error and drop the four bytes.
    assert_eq!(read(&mut client, reader, 10), (b"abcd".to_vec(), false));
    let error = client.error("guest-file-seek", json!({"handle": reader, "offset": 0, "whence": 0}));
    assert_eq!(error, "failed to seek file: Illegal seek");
    assert_eq!(client.call("guest-file-flush", json!({"handle": writer})), json!({}));
    close(&mut client, writer);
    assert_eq!(read(&mut client, reader, 10), (Vec::new(), true));
}

#[test]
fn d31_a_failed_read_is_logged_as_one() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let handle = open(&mut client, place.0.path(), "r");
    client.error("guest-file-read", json!({"handle": handle}));
    let log = agent.log();
    assert!(log.contains(&format!("guest-file-read failed, handle: {handle}")), "{log}");
}

#[test]
fn a_state_file_that_cannot_be_understood_is_fatal() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("qga.state"), "garbage\n").expect("written");
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_stillpoint-agent"));
    agent.args(["-m", "unix-listen", "-p"]).arg(folder.path().join("s")).arg("-t").arg(folder.path());
    let output = agent.output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("qga.state"), "{said}");
}

#[test]
fn a_host_may_ask_for_more_at_once_than_is_done_at_once() {
    let (agent, place) = (Agent::start(), Place::new());
    let mut client = agent.client();
    let handles: Vec<i64> =
        (0..40).map(|nth| open(&mut client, &place.file(&nth.to_string(), nth.to_string()), "r")).collect();
    let read = |(nth, handle): (usize, &i64)| {
        json!({"execute": "guest-file-read", "arguments": {"handle": handle}, "id": nth}).to_string()
    };
    let others = (0..100).map(|_| r#"{"execute":"guest-get-vcpus","id":"x"}"#.to_owned());
    client.send(handles.iter().enumerate().map(read).chain(others).collect::<String>());
    let mut read = 0;
    for _ in 0..140 {
        let answer: Value = serde_json::from_str(&client.line()).expect("JSON");
        let Some(nth) = answer["id"].as_u64() else {
            assert!(answer["return"].is_array(), "{answer}");
            continue;
        };
        let text = STANDARD.decode(answer["return"]["buf-b64"].as_str().expect("a text")).expect("base64");
        assert_eq!(text, nth.to_string().as_bytes());
        read += 1;
    }
    assert_eq!(read, 40);
}
