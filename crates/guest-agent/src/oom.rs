//! Whom the kernel's out-of-memory killer takes: the agent and its guard last, what they start like any other.
//!
//! A guest runs out of memory at any time, also while it is frozen, and whoever thaws it must be alive then. A unit may
//! have said so already (`OOMScoreAdjust=-1000`); under other inits nobody has.

use std::ffi::CStr;

/// Source: `proc_pid_oom_score_adj(5)`: -1000 is never taken, 0 is the default.
const PLACE: &CStr = c"/proc/self/oom_score_adj";

/// Asks for this process to be spared. Answers whether it is, which takes `CAP_SYS_RESOURCE`.
pub fn be_spared() -> bool {
    say(c"-1000")
}

/// Gives the privilege up, in a forked child before it becomes another program: one that takes all memory must be the one
/// that is killed. Async-signal-safe.
pub fn be_taken_like_others() {
    // Raising needs no right; where there is no `/proc`, there was no privilege.
    let _raised = say(c"0");
}

fn say(score: &CStr) -> bool {
    // SAFETY: plain system calls on constant strings; each is async-signal-safe.
    unsafe {
        let file = libc::open(PLACE.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file < 0 {
            return false;
        }
        let bytes = score.to_bytes();
        let written = libc::write(file, bytes.as_ptr().cast(), bytes.len());
        libc::close(file);
        usize::try_from(written).is_ok_and(|written| written == bytes.len())
    }
}
