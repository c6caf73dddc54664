//! A stand-in for the agent's main loop, until that lands.

use guest_agent::run::{Outcome, Refusal, Runs, Settings};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

static TERM: AtomicBool = AtomicBool::new(false);
extern "C" fn term(_: i32) {
    TERM.store(true, SeqCst);
}

pub(crate) fn main() {
    // SAFETY: stand-in.
    unsafe { libc::signal(libc::SIGTERM, term as *const () as libc::sighandler_t) };
    let mut settings = Settings { statedir: "/run".into(), ..Settings::default() };
    if let Ok(text) = std::fs::read_to_string("/run/compat_lease_ms") {
        settings.compat_lease = std::time::Duration::from_millis(text.trim().parse().unwrap());
    }
    let mut runs = Runs::new(settings).unwrap();
    let listener = UnixListener::bind("/run/agent.sock").unwrap();
    let mut clients: Vec<(u64, BufReader<UnixStream>)> = Vec::new();
    let mut owners: HashMap<u64, u64> = HashMap::new();
    let mut next = 0u64;
    loop {
        let ready: Vec<bool> = {
            let notifier = runs.notifier();
            let mut fds = vec![PollFd::new(&listener, PollFlags::IN), PollFd::new(&notifier, PollFlags::IN)];
            fds.extend(clients.iter().map(|(_, c)| PollFd::new(c.get_ref(), PollFlags::IN)));
            let _polled = poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).is_ok();
            fds.iter().map(|fd| !fd.revents().is_empty()).collect()
        };
        if TERM.load(SeqCst) {
            runs.thaw_now();
            std::process::exit(0);
        }
        for (ticket, result) in runs.finished() {
            let answer = match result {
                Ok(Outcome::Checked(r)) => json!({ "return": r }),
                Ok(Outcome::Frozen(r)) => json!({ "return": r }),
                Ok(Outcome::Thawed(r)) => json!({ "return": r }),
                Ok(Outcome::Count(r)) => json!({ "return": r }),
                Err(Refusal { code, message }) => json!({"error": {"desc": format!("{code}: {message}")}}),
            };
            if let Some(owner) = owners.remove(&ticket)
                && let Some((_, c)) = clients.iter_mut().find(|(id, _)| *id == owner)
            {
                let _told = c.get_mut().write_all(format!("{answer}\n").as_bytes()).is_ok();
            }
        }
        let mut gone = Vec::new();
        for (at, (id, client)) in clients.iter_mut().enumerate() {
            if !ready[at + 2] {
                continue;
            }
            let mut line = String::new();
            if client.read_line(&mut line).unwrap_or(0) == 0 {
                gone.push(*id);
                continue;
            }
            next += 1;
            let request: Value = serde_json::from_str(&line).unwrap();
            let args = request["arguments"].clone();
            let now = match request["execute"].as_str().unwrap() {
                "stillpoint-freeze" => {
                    runs.start_freeze(next, serde_json::from_value(args).unwrap());
                    None
                }
                "stillpoint-check" => {
                    runs.start_check(next, serde_json::from_value(args).unwrap());
                    None
                }
                "stillpoint-thaw" => {
                    runs.start_thaw(next, Some(serde_json::from_value(args).unwrap()));
                    None
                }
                "guest-fsfreeze-thaw" => {
                    runs.start_thaw(next, None);
                    None
                }
                "guest-fsfreeze-freeze" => {
                    runs.start_plain_freeze(next, None);
                    None
                }
                "guest-fsfreeze-freeze-list" => {
                    runs.start_plain_freeze(
                        next,
                        serde_json::from_value(args["mountpoints"].clone()).unwrap(),
                    );
                    None
                }
                "stillpoint-status" => Some(json!({ "return": runs.status() })),
                "guest-fsfreeze-status" => {
                    Some(json!({ "return": if runs.is_frozen() { "frozen" } else { "thawed" } }))
                }
                "stillpoint-renew" => Some(match runs.renew(serde_json::from_value(args).unwrap()) {
                    Ok(r) => json!({ "return": r }),
                    Err(e) => json!({"error": {"desc": e.to_string()}}),
                }),
                other => panic!("{other}"),
            };
            match now {
                Some(answer) => drop(client.get_mut().write_all(format!("{answer}\n").as_bytes())),
                None => drop(owners.insert(next, *id)),
            }
        }
        clients.retain(|(id, _)| !gone.contains(id));
        if ready[0] {
            next += 1;
            clients.push((next, BufReader::new(listener.accept().unwrap().0)));
        }
    }
}
