//! Our agent on a real virtio-serial port: hosts come and go, and nobody's words reach the next one.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vm::agent::Agent;
use vm::monitor::Monitor;
use vm_tests::Guest;

const LIMIT: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(120);

/// A host's end of the port.
struct Port(BufReader<UnixStream>);

impl Port {
    fn open(guest: &Guest) -> Port {
        let stream = UnixStream::connect(guest.agent_socket()).expect("QEMU listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        Port(BufReader::new(stream))
    }

    fn send(&mut self, bytes: &str) -> &mut Port {
        self.0.get_mut().write_all(bytes.as_bytes()).expect("QEMU reads");
        self
    }

    #[track_caller]
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the agent answers in time");
        line.trim_end().to_owned()
    }
}

fn wake_ups(guest: &Guest) -> u64 {
    let counted = guest.exec(
        "awk '/voluntary_ctxt/ {s += $2} END {print s}' /proc/$(busybox pidof stillpoint-agent)/status",
    );
    counted.success().trim().parse().expect("a number")
}

#[test]
fn d20_d21_the_agent_serves_one_host_after_the_other_and_sleeps_in_between() {
    let guest = Guest::builder().append("stillpoint.postgresql=off").start().expect("QEMU starts");
    guest.booted(LIMIT);
    println!("agent after {:.1?}", guest.agent_ready(LIMIT));
    for round in 0..10 {
        let mut port = Port::open(&guest);
        assert_eq!(port.send(r#"{"execute":"guest-ping"}"#).line(), r#"{"return": {}}"#, "round {round}");
        port.send(r#"{"execute": "guest-in"#);
        drop(port);
        // QEMU takes the next host only when it has seen the last one leave, and then tells the guest.
        std::thread::sleep(Duration::from_millis(300));
    }

    let begin = Instant::now();
    let before = wake_ups(&guest);
    std::thread::sleep(Duration::from_secs(3));
    let woken = wake_ups(&guest) - before;
    println!("{woken} wake-ups in 3 s without a host");
    assert!(woken <= 2, "{woken} wake-ups without a host");

    // A host in a hurry leaves neither time nor words: the resync finds the beginning all the same.
    for round in 0..20 {
        let mut port = Port::open(&guest);
        port.send(r#"{"execute": "guest-in"#);
        drop(port);
        let mut port = Port::open(&guest);
        let sync = format!(r#"{{"execute":"guest-sync-delimited","arguments":{{"id":{round}}}}}"#);
        port.0.get_mut().write_all(b"\xFF").expect("QEMU reads");
        port.send(&sync);
        let answer = format!("{{\"return\": {round}}}");
        while !read(&mut port).ends_with(&answer) {}
    }

    // Hosts that come and go while the VM stands still, each with words that nobody reads.
    let tell = |command: &str| {
        let mut monitor = Monitor::connect(&guest.second_qmp_socket(), LIMIT).expect("a monitor");
        monitor.run_raw(command, &serde_json::json!({}), LIMIT).expect("QEMU obeys");
    };
    tell("stop");
    for round in 100..110 {
        let mut port = Port::open(&guest);
        let sync = format!(r#"{{"execute":"guest-sync-delimited","arguments":{{"id":{round}}}}}"#);
        port.send(&sync).send(&sync).send(r#"{"execute": "guest-in"#);
        std::thread::sleep(Duration::from_millis(100));
    }
    tell("cont");
    let asked = Instant::now();
    let answered = Agent::connect(&guest.agent_socket(), LIMIT);
    println!("answered {:.1?} after a pause", asked.elapsed());
    drop(answered.expect("the first to ask is answered"));
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());

    println!("20 hurried hosts after {:.1?}", begin.elapsed());

    // A large answer in many pieces, and a request in many.
    let mut port = Port::open(&guest);
    let sync =
        r#"{"execute":"guest-sync","arguments":{"id":-1},"id":"IIII"}"#.replace("IIII", &"i".repeat(300_000));
    for piece in sync.as_bytes().chunks(7_001) {
        port.0.get_mut().write_all(piece).expect("QEMU reads");
    }
    let line = port.line();
    assert!(line.starts_with(r#"{"return": -1, "id": "iii"#) && line.len() > 300_000, "{} bytes", line.len());

    println!("300 kB to and fro after {:.1?}", begin.elapsed());

    let fsinfo = port.send(r#"{"execute":"guest-get-fsinfo"}"#).line();
    assert!(
        fsinfo.contains(r#""bus-type": "virtio""#) && fsinfo.contains(r#""mountpoint": "/""#),
        "{fsinfo}"
    );
    println!("{fsinfo}");

    // One freeze as any host does it, and a thaw by a host that has lost patience.
    let frozen = port.send(r#"{"execute":"guest-fsfreeze-freeze"}"#).line();
    println!("{frozen} after {:.1?}", begin.elapsed());
    let status = port.send(r#"{"execute":"guest-fsfreeze-status"}"#).line();
    assert_eq!(status, r#"{"return": "frozen"}"#);
    let refused = port.send(r#"{"execute":"guest-get-osinfo"}"#).line();
    assert!(refused.contains("has been disabled"), "{refused}");
    let thawed = port.send(r#"{"execute":"guest-fsfreeze-thaw"}"#).line();
    assert_eq!(thawed, frozen);
    println!("thawed after {:.1?}", begin.elapsed());
    port.send(r#"{"execute":"guest-fsfreeze-freeze"}"#);
    port.send(r#"{"execute":"guest-sync","arguments":{"id":5}}"#);
    while port.line() != r#"{"return": 5}"# {}
    let thawed = port.send(r#"{"execute":"guest-fsfreeze-thaw"}"#).line();
    assert!(thawed.starts_with(r#"{"return": "#), "{thawed}");
    assert_eq!(port.send(r#"{"execute":"guest-fsfreeze-status"}"#).line(), r#"{"return": "thawed"}"#);
    let thawed = port.send(r#"{"execute":"guest-fsfreeze-thaw"}"#).line();
    assert_eq!(thawed, r#"{"return": 0}"#);

    println!("impatient host served after {:.1?}", begin.elapsed());

    // The last command of all, by a host that does not wait for it.
    port.send(r#"{"execute":"guest-shutdown"}"#);
    drop(port);
    let begin = Instant::now();
    while std::path::Path::new(&format!("/proc/{}", guest.pid())).exists() && !ended(&guest) {
        assert!(begin.elapsed() < PATIENCE, "the guest does not power off\n{}", guest.serial_tail());
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("powered off in {:.1?}", begin.elapsed());
}

/// QEMU's process is a zombie until the harness collects it.
fn ended(guest: &Guest) -> bool {
    std::fs::read_to_string(format!("/proc/{}/stat", guest.pid())).is_ok_and(|stat| stat.contains(") Z "))
}

fn read(port: &mut Port) -> String {
    let mut line = Vec::new();
    port.0.read_until(b'\n', &mut line).expect("the agent answers in time");
    String::from_utf8_lossy(&line).trim_end().to_owned()
}
