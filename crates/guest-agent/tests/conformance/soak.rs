//! Our agent alone, for long: nothing may grow, nothing may stay.

use super::client::{Inside, until};
use super::peer::Peer;
use super::streams::{self, Dice, Stream};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const REQUESTS: usize = 100_000;
const CYCLES: usize = 1_000;
/// Resident memory may grow by this much, in KiB, in the second half: the allocator gives back what it likes. One byte
/// lost a request would be more.
const GROWTH_KIB_MAX: u64 = 48;
/// Memory comes and goes with the threads of a run: the least of so many cycles is what stays.
const LEAST_OF: usize = 100;
/// What is held when nothing is going on may not differ at all: descriptors and threads.
type Held = (usize, u64);

fn held(peer: &Peer) -> Held {
    (peer.descriptors(), peer.status("Threads"))
}

/// What is there again once everything has come to an end.
fn settled(peer: &Peer, wanted: Held) {
    until(&format!("only {wanted:?} is held"), Duration::from_secs(20), || {
        let now = held(peer);
        if now != wanted {
            eprintln!("held: {now:?}");
            std::thread::sleep(Duration::from_secs(1));
        }
        now == wanted
    });
}

/// Streams of every kind, programs, and clients that come and go.
pub(crate) fn requests() {
    let mut peer = Peer::start("ours", &["/bin/stillpoint-agent".to_owned()], &[]);
    let streams: Vec<Stream> = streams::all();
    let commands = peer.commands();
    let known = |stream: &&Stream| stream.command.is_none_or(|name| commands.iter().any(|one| one == name));
    let streams: Vec<&Stream> = streams.iter().filter(known).collect();
    let mut dice = Dice(4711);
    let begun = Instant::now();
    let (mut sent, mut warm) = (0, None);
    while sent < REQUESTS {
        match dice.below(200) {
            0 => sent += program(&mut peer, &mut dice),
            1 => sent += visitor(&peer, &mut dice),
            2 => sent += file(&mut peer, &commands),
            _ => {
                let stream = streams[dice.below(streams.len())];
                // The largest are for their limits; a soak is about many.
                if stream.pieces.iter().map(Vec::len).sum::<usize>() < 10_000 {
                    // The marker is a request too.
                    sent += 1 + peer.hear(&stream.pieces, 0).len().max(1);
                }
            }
        }
        if warm.is_none() && sent > REQUESTS / 2 {
            std::thread::sleep(Duration::from_millis(500));
            warm = Some((peer.status("VmRSS"), held(&peer)));
        }
    }
    let (rss, wanted) = warm.unwrap();
    settled(&peer, wanted);
    let now = peer.status("VmRSS");
    eprintln!(
        "{sent} requests in {:?}: {rss} KiB resident after half of them, {now} KiB at the end",
        begun.elapsed()
    );
    assert!(now <= rss + GROWTH_KIB_MAX, "resident memory grew from {rss} to {now} KiB");
    assert_eq!(peer.answer("guest-ping", &json!({})), json!({"return": {}}));
    assert_eq!(peer.end(), Some(0));
}

/// A program whose end is asked for, and now and then is not.
fn program(peer: &mut Peer, dice: &mut Dice) -> usize {
    let arguments = json!({"path": "/bin/sh", "arg": ["-c", "echo x; exit 3"], "capture-output": true});
    let pid = peer.answer("guest-exec", &arguments)["return"]["pid"].clone();
    assert!(pid.is_i64(), "no program was started");
    if dice.below(10) == 0 {
        return 1;
    }
    let mut asked = 1;
    until("the program ends", Duration::from_secs(20), {
        let asked = std::cell::RefCell::new((peer, &mut asked));
        move || {
            let mut asked = asked.borrow_mut();
            *asked.1 += 1;
            let status = asked.0.answer("guest-exec-status", &json!({"pid": pid}));
            status["return"]["exited"] == true && status["return"]["exitcode"] == 3
        }
    });
    asked
}

/// Another client, which leaves with half a request said and its answers unread.
fn visitor(peer: &Peer, dice: &mut Dice) -> usize {
    use std::io::Write as _;
    let mut stream = std::os::unix::net::UnixStream::connect(peer.folder.join("socket")).unwrap();
    let pings = 1 + dice.below(20);
    let text = r#"{"execute":"guest-ping"}"#.repeat(pings) + r#"{"execute": "gue"#;
    stream.write_all(text.as_bytes()).unwrap();
    pings
}

/// A file, where the agent has the commands.
fn file(peer: &mut Peer, commands: &[String]) -> usize {
    if !commands.iter().any(|command| command == "guest-file-open") {
        return 0;
    }
    let handle = peer.answer("guest-file-open", &json!({"path": "soak", "mode": "w+"}))["return"].clone();
    for (command, arguments) in [
        ("guest-file-write", json!({"handle": handle, "buf-b64": "eHl6"})),
        ("guest-file-seek", json!({"handle": handle, "offset": 0, "whence": 0})),
        ("guest-file-read", json!({"handle": handle})),
        ("guest-file-close", json!({"handle": handle})),
    ] {
        let answer = peer.answer(command, &arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
    }
    5
}

/// Freezes of both kinds; now and then a look whether they hold.
pub(crate) fn freezes(inside: &Inside) {
    let mut peer = Peer::start("ours", &["/bin/stillpoint-agent".to_owned()], &[]);
    let begun = Instant::now();
    // Once it has answered it has taken us up, and rests.
    peer.answer("guest-ping", &json!({}));
    let idle = held(&peer);
    let mut resident = Vec::with_capacity(CYCLES);
    for cycle in 0..CYCLES {
        let frozen = if cycle % 2 == 0 {
            peer.answer("guest-fsfreeze-freeze", &json!({}))["return"].clone()
        } else {
            let arguments = json!({"id": format!("r{cycle}"), "lease_ms": 20_000, "want": "filesystem"});
            peer.answer("stillpoint-freeze", &arguments)["return"]["frozen"].clone()
        };
        assert_eq!(frozen, 3, "cycle {cycle}");
        if cycle % 100 < 2 {
            inside.expect_blocked(&["/a", "/x", "/b"]);
        }
        if cycle % 2 == 0 {
            assert_eq!(peer.answer("guest-fsfreeze-thaw", &json!({}))["return"], 3, "cycle {cycle}");
        } else {
            let report =
                peer.answer("stillpoint-thaw", &json!({"id": format!("r{cycle}")}))["return"].clone();
            let states = report["filesystems"].as_array().unwrap().iter().map(|one| &one["state"]);
            assert!(states.clone().count() == 3 && states.clone().all(|state| state == "held"), "{report}");
        }
        if cycle % 100 < 2 {
            inside.expect_writable(&["/a", "/x", "/b"]);
        }
        resident.push(peer.status("VmRSS"));
    }
    settled(&peer, idle);
    let least = |until: usize| resident[until - LEAST_OF..until].iter().copied().min().unwrap();
    let (rss, now) = (least(CYCLES / 2), least(CYCLES));
    eprintln!(
        "{CYCLES} cycles in {:?}: {rss} KiB resident after half of them, {now} KiB at the end",
        begun.elapsed()
    );
    assert!(now <= rss + GROWTH_KIB_MAX, "resident memory grew from {rss} to {now} KiB");
    assert_eq!(peer.answer("stillpoint-status", &json!({}))["return"]["state"], "thawed");
    assert!(inside.guard().is_none(), "no guard is left");
    assert!(!Path::new("/ours/qga.state.isfrozen").exists());
    let status: Value = peer.answer("guest-fsfreeze-status", &json!({}));
    assert_eq!(status["return"], "thawed");
    assert_eq!(peer.end(), Some(0));
}
