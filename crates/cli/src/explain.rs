//! Errors for a person having a bad day: the problem, the cause, what to do; and the exit codes.

use crate::escape::Plain;
use std::fmt::{self, Display};

/// What the program ends with; `docs/exit-codes.md` is their list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// The operation failed; nothing was lost.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A VM, snapshot or disk of that name is not there.
    NotFound = 3,
    /// The snapshot would have been worth less than required; none was kept.
    BelowRequired = 4,
    /// Stored data is missing or damaged.
    Damaged = 5,
    /// The passphrase or key is wrong.
    WrongKey = 6,
    /// The VM or its agent cannot be reached.
    Unreachable = 7,
    /// Another run works on the same VM.
    Busy = 8,
    /// Ctrl-C or SIGTERM; thaw was sent and what was begun undone, as far as the VM answered.
    Interrupted = 130,
}

/// One error in three lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Explanation {
    pub(crate) exit: Exit,
    pub(crate) problem: String,
    pub(crate) cause: String,
    pub(crate) to_do: String,
}

impl Explanation {
    pub(crate) fn new(
        exit: Exit,
        problem: impl Into<String>,
        cause: impl Into<String>,
        to_do: impl Into<String>,
    ) -> Self {
        Self { exit, problem: problem.into(), cause: cause.into(), to_do: to_do.into() }
    }

    /// The same for programs.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "error": { "problem": self.problem, "cause": self.cause, "to_do": self.to_do, "exit_code": self.exit as u8 }
        })
    }
}

impl Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", Plain(&self.problem))?;
        writeln!(f, "  cause: {}", Plain(&self.cause))?;
        write!(f, "  to do: {}", Plain(&self.to_do))
    }
}
