//! `guest-fsfreeze-*` and our own commands: what runs give, as answers.

use super::answer;
use crate::run::{Outcome, Refusal, Runs};
use guest_protocol::Error;
use serde_json::Value;

pub(super) fn status(runs: &Runs) -> Value {
    Value::from(if runs.is_frozen() { "frozen" } else { "thawed" })
}

pub(super) fn outcome(outcome: Result<Outcome, Refusal>) -> Result<Value, Error> {
    match outcome {
        Ok(Outcome::Checked(report)) => answer(&report),
        Ok(Outcome::Frozen(report)) => answer(&report),
        Ok(Outcome::Thawed(report)) => answer(&report),
        Ok(Outcome::Count(count)) => Ok(Value::from(count)),
        Err(refusal) => Err(refused(&refusal)),
    }
}

/// Programs find the stable code before the colon.
pub(super) fn refused(refusal: &Refusal) -> Error {
    Error::generic(refusal.to_string())
}
