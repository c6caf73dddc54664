//! The commands that we call, typed.

use super::{Agent, AgentError, CALL_TIMEOUT, Line, Unless};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use guest_protocol::answers::{ExecStarted, ExecStatus, FilesystemInfo, OsInfo};
use guest_protocol::stillpoint::{
    APPLICATIONS_MAX, CheckArguments, CheckReport, FILESYSTEMS_MAX, FreezeArguments, FreezeReport,
    GuestReport, HOOKS_MAX, RenewArguments, RenewReport, StatusReport, TEXT_BYTES_MAX, ThawArguments,
};
use serde_json::{Map, Value, json};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Most output of a command in the guest that is kept, in bytes a stream. The answer's line ends at 16 MiB.
pub const EXEC_OUTPUT_BYTES_MAX: usize = 8 << 20;
const THAW: &str = "stillpoint-thaw";
/// How long the agent may take over a freeze beyond the limits that it was given.
const FREEZE_MARGIN: Duration = Duration::from_secs(10);
/// Most that an answer which is kept may hold, in bytes: it stands in every manifest. 4,096 file systems and 256
/// applications, described as Linux does, take 2 MiB.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// What a value counts beside its text and its name.
const VALUE_BYTES: usize = 8;
/// Deepest nesting of an answer of ours.
const DEPTH_MAX: usize = 16;

/// What a command in the guest did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit code, if it ended by itself.
    pub exit_code: Option<i64>,
    /// Signal, if one ended it.
    pub signal: Option<i64>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl ExecOutput {
    /// It ended by itself with 0.
    pub fn succeeded(&self) -> bool {
        self.exit_code == Some(0)
    }
}

/// How long to wait for the answer to a freeze: the guest keeps its own limits, so this is reached only if it is gone.
pub fn freeze_limit(arguments: &FreezeArguments) -> Duration {
    // Hooks quiesce before modules do, and both have the same limit.
    let quiesce_ms_max = arguments.quiesce_ms_max.saturating_mul(2);
    let guest = [arguments.prepare_ms_max, quiesce_ms_max, arguments.budget_ms];
    let sum = guest.iter().fold(0_u64, |sum, ms| sum.saturating_add(*ms)).min(24 * 3_600_000);
    Duration::from_millis(sum) + FREEZE_MARGIN
}

impl<L: Line> Agent<L> {
    /// Asks for a sign of life.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn ping(&mut self) -> Result<(), AgentError> {
        self.call::<Value>("guest-ping", None, CALL_TIMEOUT).map(drop)
    }

    /// Asks which system runs in the guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn osinfo(&mut self) -> Result<OsInfo, AgentError> {
        self.call("guest-get-osinfo", None, CALL_TIMEOUT)
    }

    /// Asks for the mounted file systems.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn fsinfo(&mut self) -> Result<Vec<FilesystemInfo>, AgentError> {
        self.call_bounded("guest-get-fsinfo", None, CALL_TIMEOUT, Unless::default())
    }

    /// Whether the agent holds file systems frozen.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn fsfreeze_is_frozen(&mut self) -> Result<bool, AgentError> {
        let status: String = self.call("guest-fsfreeze-status", None, CALL_TIMEOUT)?;
        Ok(status == "frozen")
    }

    /// Freezes with a stock agent; answers how many file systems. Whatever comes of it, thaw afterwards. `cancel` ends the wait.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn fsfreeze_freeze(&mut self, limit: Duration, cancel: &AtomicBool) -> Result<i64, AgentError> {
        self.call_unless("guest-fsfreeze-freeze", limit, cancel)
    }

    /// Thaws with any agent; answers how many file systems. Thawing what is thawed is no error.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn fsfreeze_thaw(&mut self, limit: Duration) -> Result<i64, AgentError> {
        self.call("guest-fsfreeze-thaw", None, limit)
    }

    /// Runs a program in the guest and waits for its end. A program that outlasts the limit runs on.
    ///
    /// # Errors
    /// `Timeout`, and see [`AgentError`].
    pub fn exec(
        &mut self,
        path: &str,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<ExecOutput, AgentError> {
        let deadline = self.line().now() + limit;
        let start = json!({ "path": path, "arg": arguments, "capture-output": true });
        let started: ExecStarted = self.call("guest-exec", Some(start), CALL_TIMEOUT)?;
        let mut pause = Duration::from_millis(10);
        loop {
            let ask = json!({ "pid": started.pid });
            let status: ExecStatus = self.call("guest-exec-status", Some(ask), CALL_TIMEOUT)?;
            if status.exited {
                return Ok(ExecOutput {
                    exit_code: status.exitcode,
                    signal: status.signal,
                    stdout: decode(status.out_data.as_deref())?,
                    stderr: decode(status.err_data.as_deref())?,
                });
            }
            if self.line().now() >= deadline {
                return Err(AgentError::Timeout { command: format!("guest-exec {path}"), limit });
            }
            self.line().pause(pause);
            pause = (pause * 2).min(Duration::from_millis(250));
        }
    }

    /// Rehearses a freeze: everything but locks and freeze.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn stillpoint_check(
        &mut self,
        arguments: &CheckArguments,
        limit: Duration,
    ) -> Result<CheckReport, AgentError> {
        self.call_ours("stillpoint-check", arguments, limit, Unless::default())
    }

    /// Prepares, quiesces, flushes and freezes; returns when everything that could be frozen is. Whatever comes of
    /// it, thaw afterwards. `cancel` ends the wait.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn stillpoint_freeze(
        &mut self,
        arguments: &FreezeArguments,
        cancel: &AtomicBool,
    ) -> Result<FreezeReport, AgentError> {
        let unless = Unless { cancel: Some(cancel), run: Some(&arguments.id) };
        self.call_ours("stillpoint-freeze", arguments, freeze_limit(arguments), unless)
    }

    /// Lets the guest stay frozen for longer.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn stillpoint_renew(&mut self, arguments: &RenewArguments) -> Result<RenewReport, AgentError> {
        self.call_ours("stillpoint-renew", arguments, CALL_TIMEOUT, Unless::default())
    }

    /// Thaws, resumes and checks; answers the guest's half of the receipt.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn stillpoint_thaw(
        &mut self,
        arguments: &ThawArguments,
        limit: Duration,
    ) -> Result<GuestReport, AgentError> {
        self.call_ours(THAW, arguments, limit, Unless::default())
    }

    /// Sends a thaw and waits for nothing: [`stillpoint_thaw`](Self::stillpoint_thaw), still to be called, hears the answer.
    pub fn send_thaw_ahead(&mut self, arguments: &ThawArguments) {
        if let Ok(arguments) = serde_json::to_value(arguments) {
            self.send_ahead(THAW, arguments);
        }
    }

    /// Asks where the guest stands.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn stillpoint_status(&mut self) -> Result<StatusReport, AgentError> {
        self.call_ours("stillpoint-status", &Map::<String, Value>::new(), CALL_TIMEOUT, Unless::default())
    }
}

fn decode(data: Option<&str>) -> Result<Vec<u8>, AgentError> {
    let failed = |reason: String| AgentError::Answer { command: "guest-exec-status".to_owned(), reason };
    let bytes = STANDARD.decode(data.unwrap_or_default()).map_err(|error| failed(error.to_string()))?;
    if bytes.len() > EXEC_OUTPUT_BYTES_MAX {
        return Err(failed(format!("more than {EXEC_OUTPUT_BYTES_MAX} bytes of output")));
    }
    Ok(bytes)
}

/// Keeps what a guest tells within the limits of the protocol: long texts are cut, long lists refused, and so is what is
/// too much together.
pub(super) fn bound(answer: &mut Value) -> Result<(), &'static str> {
    let mut bytes = 0;
    bound_at(answer, "", 0, &mut bytes)?;
    if bytes > ANSWER_BYTES_MAX { Err("it is too long") } else { Ok(()) }
}

/// Cuts a text of a guest to what is kept of one.
pub(super) fn cut(text: &mut String) {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX - '…'.len_utf8()));
        text.push('…');
    }
}

fn bound_at(value: &mut Value, member: &str, depth: usize, bytes: &mut usize) -> Result<(), &'static str> {
    if depth > DEPTH_MAX {
        return Err("it is nested too deeply");
    }
    *bytes += member.len() + VALUE_BYTES;
    match value {
        Value::String(text) => {
            cut(text);
            *bytes += text.len();
        }
        Value::Array(list) => {
            let max = match member {
                "applications" => APPLICATIONS_MAX,
                "hooks" => HOOKS_MAX,
                _ => FILESYSTEMS_MAX,
            };
            if list.len() > max {
                return Err("a list in it is too long");
            }
            list.iter_mut().try_for_each(|value| bound_at(value, "", depth + 1, bytes))?;
        }
        Value::Object(members) => {
            if members.len() > FILESYSTEMS_MAX {
                return Err("it has too many members");
            }
            for (name, value) in members.iter_mut() {
                bound_at(value, name, depth + 1, bytes)?;
            }
        }
        _ => (),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_from_a_guest_are_cut_and_long_lists_refused() {
        let mut answer = json!({ "id": "é".repeat(2000), "list": [{ "text": "x".repeat(1024) }] });
        bound(&mut answer).unwrap();
        let id = answer["id"].as_str().unwrap();
        assert!(id.len() <= TEXT_BYTES_MAX && id.ends_with("é…"), "{}", id.len());
        assert_eq!(answer["list"][0]["text"].as_str().unwrap().len(), 1024);
        assert!(bound(&mut json!({ "filesystems": vec![0; FILESYSTEMS_MAX] })).is_ok());
        assert!(bound(&mut json!({ "filesystems": vec![0; FILESYSTEMS_MAX + 1] })).is_err());
        assert!(bound(&mut json!({ "applications": vec![0; APPLICATIONS_MAX + 1] })).is_err());
        assert!(bound(&mut json!({ "hooks": vec![0; HOOKS_MAX + 1] })).is_err());
        let filesystem = json!({ "mountpoint": "/srv/data/volume-1234", "type": "ext4", "device": "/dev/mapper/vg-lv-1234",
            "device_number": "254:1234", "disks": [{ "name": "vda", "serial": "a-serial-number-of-20", "size_bytes": 1 }],
            "read_only": false, "state": "held", "frozen_ms": 12 });
        assert!(
            bound(&mut json!({ "filesystems": vec![filesystem; FILESYSTEMS_MAX] })).is_ok(),
            "an honest guest"
        );
        let long = vec!["x".repeat(1025); FILESYSTEMS_MAX];
        assert!(bound(&mut json!({ "filesystems": long.clone(), "reasons": long })).is_err());
        let deep = (0..40).fold(json!(1), |inner, _| json!([inner]));
        assert!(bound(&mut deep.clone()).is_err());
    }

    #[test]
    fn a_freeze_is_waited_for_longer_than_the_guest_allows_itself() {
        let arguments: FreezeArguments =
            serde_json::from_str(r#"{"id": "r", "lease_ms": 1, "prepare_ms_max": 18446744073709551615}"#)
                .unwrap();
        assert!(freeze_limit(&arguments) > Duration::from_secs(24 * 3600));
        let arguments: FreezeArguments = serde_json::from_str(r#"{"id": "r", "lease_ms": 1}"#).unwrap();
        assert_eq!(freeze_limit(&arguments), Duration::from_secs(120 + 2 * 10 + 5 + 10));
    }
}
