//! QEMU's end of a monitor's connection, for tests: it says what they want.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::net::{UnixListener, UnixStream};

pub(super) struct Scripted {
    stream: UnixStream,
    commands: Lines<BufReader<UnixStream>>,
}

impl Scripted {
    /// Waits for a client and ends the negotiation, with these events before its answer.
    pub(super) fn serve(listener: &UnixListener, events: &[&str]) -> Self {
        let (stream, _) = listener.accept().unwrap();
        let commands = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut qemu = Self { stream, commands };
        let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 }, "package": "" });
        qemu.say(&format!("{}\n", json!({ "QMP": { "version": version, "capabilities": [] } })));
        let negotiation = qemu.hear();
        qemu.say(&format!("{}{}", told(events), answer(&negotiation, json!({ "return": {} }))));
        qemu
    }

    /// The client's next command.
    pub(super) fn hear(&mut self) -> Value {
        serde_json::from_str(&self.commands.next().unwrap().unwrap()).unwrap()
    }

    /// Says it in one piece.
    pub(super) fn say(&mut self, lines: &str) {
        self.stream.write_all(lines.as_bytes()).unwrap();
    }

    /// Waits for the client's next command, or its end.
    pub(super) fn wait(mut self) {
        let _next = self.commands.next();
    }
}

/// The line that answers a command: `return` or `error`.
pub(super) fn answer(command: &Value, mut answer: Value) -> String {
    answer["id"] = command["id"].clone();
    format!("{answer}\n")
}

/// Lines that tell of events.
pub(super) fn told(events: &[&str]) -> String {
    events.iter().map(|event| format!("{}\n", json!({ "event": event }))).collect()
}
