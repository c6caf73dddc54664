//! Several clients, bad clients, and bytes that arrive as they please.

use crate::guest::{Agent, until};
use serde_json::json;
use std::time::Duration;

const PING: &str = r#"{"execute":"guest-ping"}"#;

#[test]
fn bytes_may_be_split_anywhere() {
    let agent = Agent::start();
    let mut client = agent.client();
    let request = r#"{"execute": "guest-sync", "arguments": {"id": -12}, "id": "é"}"#.as_bytes();
    for cut in 1..request.len() {
        client.send(&request[..cut]);
        if cut % 8 == 0 {
            // Sometimes long enough that the agent reads the first piece alone.
            std::thread::sleep(Duration::from_millis(2));
        }
        client.send(&request[cut..]);
        assert_eq!(client.line(), r#"{"return": -12, "id": "\u00E9"}"#, "cut at {cut}");
    }
}

#[test]
fn several_requests_at_once_are_answered_in_order() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(format!("{PING}{{\"execute\":\"guest-get-osinfo\"}}nope {PING}\n"));
    assert_eq!(client.line(), r#"{"return": {}}"#);
    assert!(client.line().contains("kernel-release"), "the slower one keeps its place");
    assert!(client.line().contains("JSON parse error, invalid keyword 'nope'"));
    assert_eq!(client.line(), r#"{"return": {}}"#);
}

#[test]
fn each_client_has_its_own_half_message_and_its_own_answers() {
    let agent = Agent::start();
    let (mut first, mut second) = (agent.client(), agent.client());
    first.send(&PING[..10]);
    assert_eq!(second.ask(r#"{"execute":"guest-sync","arguments":{"id":2}}"#), r#"{"return": 2}"#);
    first.send(&PING[10..]);
    assert_eq!(first.line(), r#"{"return": {}}"#);
}

#[test]
fn d20_a_half_message_of_a_client_that_left_harms_nobody() {
    let agent = Agent::start();
    for _ in 0..3 {
        agent.client().send(r#"{"execute": "guest-pi"#);
        assert_eq!(agent.client().ask(PING), r#"{"return": {}}"#);
    }
}

#[test]
fn d18_a_client_that_left_its_answers_unread_harms_nobody() {
    let mut agent = Agent::start();
    let mut other = agent.client();
    for _ in 0..5 {
        let mut client = agent.client();
        client.send(PING.repeat(100));
        client.wait_for_something();
        // Closed with answers in its buffer: the agent's socket sees a reset.
        drop(client);
        assert_eq!(other.ask(PING), r#"{"return": {}}"#);
    }
    assert!(agent.is_running());
}

#[test]
fn d19_a_client_that_never_reads_is_no_longer_read_from_and_costs_nothing() {
    let agent = Agent::start();
    let mut deaf = agent.client();
    let taken = deaf.stuff(r#"{"execute":"guest-info"}"#.repeat(100).as_bytes());
    assert!(taken < 4 << 20, "{taken} bytes were taken in");
    assert_eq!(agent.client().ask(PING), r#"{"return": {}}"#);
    let before = agent.ticks();
    std::thread::sleep(Duration::from_secs(1));
    assert!(agent.ticks() - before <= 2, "no busy loop while it does not read");
    // What it is owed comes when it reads after all.
    assert!(deaf.line().contains("supported_commands"));
}

#[test]
fn a_client_may_end_its_input_and_still_hear_the_answer() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(format!("{{\"execute\":\"guest-get-osinfo\"}}{PING}"));
    client.close_input();
    let rest = client.rest();
    assert_eq!(rest.lines().count(), 2, "{rest}");
    assert!(rest.ends_with("{\"return\": {}}\n"), "{rest}");
}

#[test]
fn a_flood_of_clients_dismisses_none_that_waits_for_an_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .expect("a pipe");
    let agent = Agent::start_with(&[], &[("QGA_OS_RELEASE", pipe.to_str().expect("plain"))]);
    let mut waiting = agent.client();
    // Nobody writes into the pipe yet, so the answer takes its time.
    waiting.send(r#"{"execute":"guest-get-osinfo"}"#);
    let mut flood: Vec<_> = (0..100).map(|_| agent.client()).collect();
    assert_eq!(flood.last_mut().expect("many").ask(PING), r#"{"return": {}}"#);
    // Opening it like this waits for nobody.
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
    let mut writer = None;
    until("the agent reads the pipe", || {
        writer = rustix::fs::open(&pipe, flags, rustix::fs::Mode::empty()).ok();
        writer.is_some()
    });
    rustix::io::write(writer.expect("just seen"), b"ID=pipe\n").expect("the agent reads");
    assert!(waiting.line().contains(r#""id": "pipe""#));
}

#[test]
fn more_clients_than_places_dismiss_the_idlest() {
    let agent = Agent::start();
    let mut clients: Vec<_> = (0..40).map(|_| agent.client()).collect();
    let mut last = clients.pop().expect("forty");
    assert_eq!(last.ask(PING), r#"{"return": {}}"#);
    assert_eq!(clients[0].rest(), "", "the first was dismissed");
}

#[test]
fn d28_clients_that_never_end_their_messages_do_not_eat_the_guests_memory() {
    let agent = Agent::start();
    let mut modest = agent.client();
    modest.send(r#"{"execute":"guest-"#);
    let mut greedy: Vec<_> = (0..6).map(|_| agent.client()).collect();
    let text = vec![b'x'; 60 << 20];
    let dismissed = greedy
        .iter_mut()
        .filter_map(|client| {
            let taken = client.try_send(br#"{"execute":""#) && client.try_send(&text);
            assert!(agent.resident_mib() < 300, "{} MiB", agent.resident_mib());
            (!taken).then_some(())
        })
        .count();
    println!("{dismissed} dismissed while they spoke, {} MiB resident", agent.resident_mib());
    modest.send(r#"ping"}"#);
    assert_eq!(modest.line(), r#"{"return": {}}"#, "one that harms nobody is not dismissed");
    drop(greedy);
    until("the memory is given back", || agent.resident_mib() < 40);
}

#[test]
fn d28_a_message_of_many_small_parts_counts_as_what_it_takes() {
    let agent = Agent::start();
    let mut greedy: Vec<_> = (0..16).map(|_| agent.client()).collect();
    // 2 MiB that become 32 MiB of values and more; a message of more parts is refused.
    let parts = "1,".repeat((1 << 20) - 8);
    for client in &mut greedy {
        let _taken = client.try_send(b"[") && client.try_send(parts.as_bytes());
        assert!(agent.resident_mib() < 300, "{} MiB", agent.resident_mib());
    }
    assert_eq!(agent.client().ask(PING), r#"{"return": {}}"#);
}

#[test]
fn a_host_starts_afresh_with_ff_and_a_delimited_sync() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(
        b"{\"execute\": \"guest-fi\xFF{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":9}}\n",
    );
    assert!(client.line().contains("JSON parse error, stray"));
    assert_eq!(client.line(), "\u{FFFD}{\"return\": 9}");
}

#[test]
fn started_programs_outlive_the_client_that_started_them() {
    let agent = Agent::start();
    let pid = agent.client().call("guest-exec", json!({"path": "sleep", "arg": ["0.3"]}))["pid"].clone();
    let mut other = agent.client();
    assert_eq!(other.call("guest-exec-status", json!({"pid": pid}))["exited"], false);
    until("it ends", || other.call("guest-exec-status", json!({"pid": pid}))["exited"] == true);
}

#[test]
fn garbage_is_answered_with_errors_and_forgiven() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut garbage: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    garbage.extend_from_slice(b"\n");
    client.send(&garbage);
    client.send(b"\xFF{\"execute\":\"guest-sync\",\"arguments\":{\"id\":4711}}");
    let mut errors = 0;
    while client.line() != r#"{"return": 4711}"# {
        errors += 1;
    }
    assert!(errors > 10, "{errors} errors were answered");
}
