//! A gate on a socket between the program under test and QEMU: whatever either says passes line by line, and the one
//! message that a test names is held until the test lets it go on.
//!
//! So a death can be put at any step of a run, and nothing depends on how fast the machine is.

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A message of a run, by the command's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The program has sent the request; QEMU or the guest does not know of it yet.
    Asked(&'static str),
    /// It was carried out; the program does not know of it yet.
    Answered(&'static str),
}

/// A gate, open unless it was told to hold something. What is held when it goes is dropped with its connections.
#[derive(Debug)]
pub struct Gate {
    socket: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<At>,
    held: bool,
    closed: bool,
    /// How often each event was passed on.
    told: BTreeMap<String, usize>,
    /// Both ends of every connection.
    connections: Vec<UnixStream>,
}

impl Gate {
    /// Makes a gate in front of a socket; the program is to be given [`Gate::socket`] in its place.
    ///
    /// # Errors
    /// Those of the new socket, which lies in `folder`.
    pub fn before(socket: &Path, folder: &Path) -> io::Result<Self> {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        let outer = folder.join(format!("gate-{name}"));
        let listener = UnixListener::bind(&outer)?;
        let shared = Arc::new(Shared::default());
        let (inner, theirs) = (socket.to_owned(), Arc::clone(&shared));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if theirs.lock().closed {
                    return;
                }
                // Behind it is no QEMU any more: nobody listens here either.
                let Ok(server) = UnixStream::connect(&inner) else { return };
                let _carried = carry(client, server, &theirs).is_ok(); // else both are closed
            }
        });
        Ok(Self { socket: outer, shared })
    }

    /// Where the program connects to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Holds the next message of this name.
    pub fn hold(&self, at: At) {
        let mut state = self.shared.lock();
        (state.wanted, state.held) = (Some(at), false);
    }

    /// Whether the message came and is held.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.shared.lock().held
    }

    /// Waits until it is held; false if it did not come within `limit`.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), limit, |state| !state.held);
        waited.unwrap_or_else(PoisonError::into_inner).0.held
    }

    /// Lets the held message, and all that follows, go on.
    pub fn pass(&self) {
        let mut state = self.shared.lock();
        (state.wanted, state.held) = (None, false);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Lets the held message go on, and holds the next one of this name.
    pub fn pass_to(&self, at: At) {
        self.hold(at);
        self.shared.changed.notify_all();
    }

    /// How often an event of this name was passed on.
    #[must_use]
    pub fn told(&self, event: &str) -> usize {
        self.shared.lock().told.get(event).copied().unwrap_or_default()
    }

    /// Cuts the channel: both sides see its end, and what was held is lost. The next connection is a new one.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        (state.wanted, state.held) = (None, false);
        for connection in state.connections.drain(..) {
            // One that has ended already is as good.
            let _cut = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.cut();
        // Wakes the thread that listens.
        let _woken = UnixStream::connect(&self.socket).is_ok();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns at once, unless this is the message to be held: then when it may go on.
    fn message(&self, at: &dyn Fn(At) -> bool) {
        let mut state = self.lock();
        let Some(wanted) = state.wanted.filter(|wanted| !state.held && at(*wanted)) else { return };
        state.held = true;
        self.changed.notify_all();
        let waits = |state: &mut State| state.held && state.wanted == Some(wanted);
        drop(self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Carries one conversation in two threads, until either side ends it.
fn carry(client: UnixStream, server: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let asked: Arc<Mutex<BTreeMap<String, String>>> = Arc::default();
    shared.lock().connections.extend([client.try_clone()?, server.try_clone()?]);
    let (up, down) = ((client.try_clone()?, server.try_clone()?), (server, client));
    for (is_request, (from, to)) in [(true, up), (false, down)] {
        let (shared, asked) = (Arc::clone(shared), Arc::clone(&asked));
        std::thread::spawn(move || {
            let ended = pass_lines(
                &from,
                &to,
                |line| {
                    let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                    let message = read(line)?;
                    let id = message["id"].to_string();
                    let at: Box<dyn Fn(At) -> bool> = if is_request {
                        let name = message["execute"].as_str().unwrap_or_default().to_owned();
                        asked.insert(id, name.clone());
                        Box::new(move |at| matches!(at, At::Asked(wanted) if wanted == name))
                    } else {
                        let name = asked.remove(&id).unwrap_or_default();
                        Box::new(move |at| matches!(at, At::Answered(wanted) if wanted == name))
                    };
                    drop(asked);
                    shared.message(&*at);
                    message["event"].as_str().map(str::to_owned)
                },
                |event| *shared.lock().told.entry(event).or_default() += 1,
            );
            // Either side's end is the other's. What it failed with is nobody's concern: a death is what it is about.
            let _ended = ended.is_ok();
            let _closed = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        });
    }
    Ok(())
}

/// Passes bytes on, whole lines only, each after it was shown. What it was shown as is noted once it has been passed on.
fn pass_lines(
    mut from: &UnixStream,
    mut to: &UnixStream,
    mut show: impl FnMut(&[u8]) -> Option<String>,
    note: impl Fn(String),
) -> io::Result<()> {
    let mut rest = Vec::new();
    let mut bytes = [0; 65536];
    loop {
        let count = from.read(&mut bytes)?;
        if count == 0 {
            return to.write_all(&rest);
        }
        rest.extend_from_slice(&bytes[..count]);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let shown = show(&line);
            to.write_all(&line)?;
            shown.into_iter().for_each(&note);
        }
    }
}

/// A line of either protocol; the agent's may begin with the byte that ends what was said before.
fn read(line: &[u8]) -> Option<Value> {
    let begin = line.iter().rposition(|byte| *byte == 0xFF).map_or(0, |at| at + 1);
    serde_json::from_slice(&line[begin..]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    const LIMIT: Duration = Duration::from_secs(10);

    struct Lines(BufReader<UnixStream>);

    impl Lines {
        fn say(&mut self, line: &str) {
            self.0.get_mut().write_all(format!("{line}\n").as_bytes()).expect("it listens");
        }

        fn hear(&mut self) -> String {
            let mut line = String::new();
            self.0.read_line(&mut line).expect("it speaks");
            line.trim_end().to_owned()
        }
    }

    fn pair() -> (tempfile::TempDir, Gate, Lines, Lines) {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("real")).expect("a socket");
        let gate = Gate::before(&folder.path().join("real"), folder.path()).expect("a gate");
        let lines = |stream: UnixStream| {
            stream.set_read_timeout(Some(LIMIT)).expect("a limit");
            Lines(BufReader::new(stream))
        };
        let client = lines(UnixStream::connect(gate.socket()).expect("it listens"));
        (folder, gate, client, lines(listener.accept().expect("the gate connects").0))
    }

    #[test]
    fn a_request_and_an_answer_are_held_by_name_until_they_may_pass() {
        let (_folder, gate, mut client, mut server) = pair();
        gate.hold(At::Asked("b"));
        client.say(r#"{"execute":"a","id":1}"#);
        client.say(r#"{"execute":"b","id":2}"#);
        assert_eq!(server.hear(), r#"{"execute":"a","id":1}"#);
        assert!(gate.wait(LIMIT));
        server.0.get_ref().set_read_timeout(Some(Duration::from_millis(50))).expect("a limit");
        let mut nothing = [0; 1];
        assert!(server.0.get_mut().read_exact(&mut nothing).is_err(), "it is held");
        server.0.get_ref().set_read_timeout(Some(LIMIT)).expect("a limit");
        gate.pass();
        assert_eq!(server.hear(), r#"{"execute":"b","id":2}"#);
        gate.hold(At::Answered("b"));
        server.say(r#"{"return":{},"id":1}"#);
        assert_eq!(client.hear(), r#"{"return":{},"id":1}"#);
        server.say(r#"{"return":{},"id":2}"#);
        assert!(gate.wait(LIMIT) && gate.holds());
        gate.pass();
        assert_eq!(client.hear(), r#"{"return":{},"id":2}"#);
    }

    #[test]
    fn events_are_counted_once_the_program_can_hear_them() {
        let (_folder, gate, mut client, mut server) = pair();
        assert_eq!(gate.told("STOP"), 0);
        server.say(r#"{"event":"STOP"}"#);
        server.say(r#"{"event":"RESUME"}"#);
        assert_eq!(
            (client.hear(), client.hear()),
            (r#"{"event":"STOP"}"#.into(), r#"{"event":"RESUME"}"#.into())
        );
        // Whoever hears the second was told the first, and that was noted before the second was passed on.
        assert_eq!(gate.told("STOP"), 1);
    }

    #[test]
    fn a_cut_ends_the_conversation_on_both_sides_and_what_was_held_is_lost() {
        let (_folder, gate, mut client, mut server) = pair();
        gate.hold(At::Asked("a"));
        client.say("\u{0}"); // no message, and passed on
        assert_eq!(server.hear(), "\u{0}");
        client.say(r#"{"execute":"a"}"#);
        assert!(gate.wait(LIMIT));
        gate.cut();
        assert_eq!((server.hear(), client.hear()), (String::new(), String::new()));
    }
}
