//! `guest-shutdown`.

use super::helper;
use crate::note;
use guest_protocol::Error;
use guest_protocol::arguments::Shutdown;
use serde_json::{Value, json};

/// Runs the system's own program for it, and waits for that program, without a limit: nothing is left to be protected.
pub(super) fn shutdown(mode: Shutdown) -> Result<Value, Error> {
    let (name, program, flag) = match mode {
        Shutdown::Powerdown => ("powerdown", "/sbin/poweroff", "-P"),
        Shutdown::Halt => ("halt", "/sbin/halt", "-H"),
        Shutdown::Reboot => ("reboot", "/sbin/reboot", "-r"),
    };
    note!("guest-shutdown called, mode: {name}");
    let is_there = rustix::fs::access(program, rustix::fs::Access::EXEC_OK).is_ok();
    let general = ["/sbin/shutdown", "-h", flag, "+0", "hypervisor initiated shutdown"];
    helper::run(if is_there { std::slice::from_ref(&program) } else { &general }, None, None, "shutdown")?;
    Ok(json!({}))
}
