//! `guest-shutdown`.

use crate::note;
use guest_protocol::Error;
use guest_protocol::arguments::Shutdown;
use serde_json::{Value, json};
use std::process::{Command, Stdio};

/// Most of the helper's output that an error repeats, in bytes.
const OUTPUT_BYTES_MAX: usize = 1024;

/// Runs the system's own program for it, and waits for that program.
pub(super) fn shutdown(mode: Shutdown) -> Result<Value, Error> {
    let (name, program, flag) = match mode {
        Shutdown::Powerdown => ("powerdown", "/sbin/poweroff", "-P"),
        Shutdown::Halt => ("halt", "/sbin/halt", "-H"),
        Shutdown::Reboot => ("reboot", "/sbin/reboot", "-r"),
    };
    note!("guest-shutdown called, mode: {name}");
    let mut command = if rustix::fs::access(program, rustix::fs::Access::EXEC_OK).is_ok() {
        Command::new(program)
    } else {
        let mut command = Command::new("/sbin/shutdown");
        command.args(["-h", flag, "+0", "hypervisor initiated shutdown"]);
        command
    };
    let failed = |why: &str| Error::generic(format!("child process has failed to shutdown: {why}"));
    let output = command.stdin(Stdio::null()).output().map_err(|error| failed(&error.to_string()))?;
    if output.status.success() {
        return Ok(json!({}));
    }
    let mut said = [output.stdout, output.stderr].concat();
    said.truncate(OUTPUT_BYTES_MAX);
    Err(match said.trim_ascii() {
        [] => failed(&output.status.to_string()),
        said => failed(&String::from_utf8_lossy(said)),
    })
}
