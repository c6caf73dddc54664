//! What the agent has for itself alone, and gives up in a forked child before that becomes another program.

use crate::{oom, open_files, signals};

/// Makes the calling process one like any other: the kernel takes it when memory runs out, signals reach it, and it may have as
/// many files open as whoever started the agent meant. Async-signal-safe.
pub fn be_like_others() {
    oom::be_taken_like_others();
    signals::let_all_through();
    open_files::restore_limit();
}
