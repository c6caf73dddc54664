//! `guest-fsfreeze-*` and our own commands: what runs give, as answers.

use super::answer;
use crate::run::{Outcome, Refusal, Runs};
use guest_protocol::Error;
use serde_json::Value;

pub(super) fn status(runs: &Runs) -> Value {
    Value::from(if runs.is_frozen() { "frozen" } else { "thawed" })
}

/// `is_plain`: of qemu-ga's own freeze, whose failures have that one's words, and no code before them.
pub(super) fn outcome(outcome: Result<Outcome, Refusal>, is_plain: bool) -> Result<Value, Error> {
    match outcome {
        Ok(Outcome::Checked(report)) => answer(&report),
        Ok(Outcome::Frozen(report)) => answer(&report),
        Ok(Outcome::Thawed(report)) => answer(&report),
        Ok(Outcome::Count(count)) => Ok(Value::from(count)),
        Err(refusal) if is_plain && matches!(refusal.code, "freeze_failed" | "hook_failed") => {
            Err(Error::generic(refusal.message))
        }
        Err(refusal) => Err(refused(&refusal)),
    }
}

/// Programs find the stable code before the colon.
pub(super) fn refused(refusal: &Refusal) -> Error {
    Error::generic(refusal.to_string())
}
