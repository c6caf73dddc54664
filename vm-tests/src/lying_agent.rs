//! An agent of the test's own behind a unix socket: it speaks the protocol and says whatever the test wants.

use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

/// What an agent answers to a command with its arguments: `{"return": …}` or `{"error": …}`; null: nothing at all; a text:
/// it hangs up.
pub type Answers = dyn Fn(&str, &Value) -> Value + Send + Sync;

/// Serves a socket until the test process ends. Synchronizations are answered as they must be, everything else by
/// `answers`.
///
/// # Errors
/// If the socket cannot be made.
pub fn serve(socket: &Path, answers: Arc<Answers>) -> io::Result<()> {
    let listener = UnixListener::bind(socket)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answers = Arc::clone(&answers);
            // A host that leaves ends its thread only.
            std::thread::spawn(move || converse(stream, &*answers));
        }
    });
    Ok(())
}

fn converse(stream: UnixStream, answers: &Answers) -> io::Result<()> {
    let mut out = stream.try_clone()?;
    let mut line = Vec::new();
    let mut lines = BufReader::new(stream);
    while lines.read_until(b'\n', &mut line)? > 0 {
        // 0xFF begins a conversation.
        let text: Vec<u8> = line.drain(..).filter(|byte| *byte != 0xFF).collect();
        let Ok(request) = serde_json::from_slice::<Value>(&text) else { continue };
        let command = request["execute"].as_str().unwrap_or_default();
        if command == "guest-sync-delimited" {
            out.write_all(&[0xFF])?;
            writeln!(out, "{}", json!({ "return": request["arguments"]["id"] }))?;
            continue;
        }
        let mut answer = answers(command, &request["arguments"]);
        if answer.is_string() {
            return Ok(());
        }
        if !answer.is_null() {
            answer["id"] = request["id"].clone();
            writeln!(out, "{answer}")?;
        }
    }
    Ok(())
}

/// What our agent says of itself; other commands than these are not offered.
pub fn info(version: &str, commands: &[&str]) -> Value {
    let commands =
        commands.iter().map(|name| json!({ "name": name, "enabled": true, "success-response": true }));
    json!({ "return": { "version": version, "supported_commands": commands.collect::<Vec<_>>() } })
}

/// A report that is worth *application*, of a guest with one file system on the disk with this serial number.
pub fn perfect_report(run: &str, serial: &str) -> Value {
    json!({
        "id": run, "agent_version": "0.1.0", "boot_id": "b", "lease_ms": 10_000, "thawed_by": "host",
        "prepare_ms": 1, "quiesce_ms": 1, "flush_rounds_ms": [1], "freeze_ms": 1, "frozen_ms": 2, "thaw_ms": 1,
        "filesystems": [{
            "mountpoint": "/", "type": "ext4", "device": "/dev/vda", "device_number": "254:0",
            "disks": [{ "name": "vda", "serial": serial, "size_bytes": 1 }],
            "read_only": false, "state": "held", "frozen_ms": 2, "detail": "fine",
        }],
        "applications": [{
            "kind": "postgresql", "instance": "/var/lib/pg", "version": "15.1", "policy": "preferred",
            "device_numbers": ["254:0"], "quiesced": true, "locked": false, "held": true, "crash_safe": true,
            "position": "0/1", "facts": { "fsync": "on" }, "reasons": [],
        }],
        "uncovered": [], "unknown_writers": [], "reasons": [],
    })
}
