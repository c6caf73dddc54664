//! Arguments of `guest-exec` and `guest-exec-status`: qemu-ga's own, and ours beside them.

use crate::json::Received;
use crate::members::{self, Members};
use crate::{Error, base64};
use std::time::Duration;

/// Most output kept of one stream of a program, in bytes, as in qemu-ga; also the default.
pub const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// Longest time limit of a program, in milliseconds: a week. Who wants longer wants none.
pub const TIME_LIMIT_MS_MAX: u64 = 7 * 24 * 60 * 60 * 1000;

/// Which output of a process is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Capture {
    /// None.
    #[default]
    None,
    /// Standard output; standard error is thrown away.
    Stdout,
    /// Standard error; standard output is thrown away.
    Stderr,
    /// Both, apart.
    Separated,
    /// Both, as one.
    Merged,
}

/// Arguments of `guest-exec`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    /// Program, searched in `PATH` if it has no slash.
    pub path: String,
    /// Arguments after the program's name.
    pub arg: Vec<String>,
    /// The whole environment, `NAME=VALUE`; absent: the agent's own.
    pub env: Option<Vec<String>>,
    /// What the program reads, decoded.
    pub input: Option<Vec<u8>>,
    /// What is kept of what it writes.
    pub capture: Capture,
    /// `stillpoint-time-limit-ms`, ours: after this time the program and its process group are killed.
    pub time_limit: Option<Duration>,
    /// `stillpoint-output-bytes-max`, ours: what is kept of each stream at most.
    pub output_bytes_max: usize,
}

impl Exec {
    pub(crate) fn read(members: &mut Members) -> Result<Self, Error> {
        let path = members.required("path", members::string)?;
        let arg = members.optional("arg", members::strings)?.unwrap_or_default();
        let env = members.optional("env", members::strings)?;
        let input = members.optional("input-data", members::text)?;
        let capture = members.optional("capture-output", capture)?.unwrap_or_default();
        let time_limit = members.optional("stillpoint-time-limit-ms", time_limit)?;
        let output_bytes_max = members.optional("stillpoint-output-bytes-max", output_bytes_max)?;
        let output_bytes_max = output_bytes_max.unwrap_or(OUTPUT_BYTES_MAX);
        // Decoded last, as in qemu-ga: of two mistakes the type of an argument is told.
        let input = input.map(base64::decode).transpose()?;
        Ok(Self { path, arg, env, input, capture, time_limit, output_bytes_max })
    }
}

/// What a host sends to a program and all of its process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kill {
    /// SIGTERM: it may tidy up, or not listen.
    Term,
    /// SIGKILL.
    Kill,
}

/// Arguments of `guest-exec-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecStatus {
    /// Process id that `guest-exec` answered.
    pub pid: i64,
    /// `stillpoint-kill`, ours: sent before the status is told.
    pub kill: Option<Kill>,
    /// `stillpoint-stream`, ours: what a running program has written so far is told, too, and then forgotten.
    pub stream: bool,
}

impl ExecStatus {
    pub(crate) fn read(members: &mut Members) -> Result<Self, Error> {
        Ok(Self {
            pid: members.required("pid", members::integer)?,
            kill: members.optional("stillpoint-kill", kill)?,
            stream: members.optional("stillpoint-stream", members::boolean)?.unwrap_or(false),
        })
    }
}

fn capture(value: Received, path: &str) -> Result<Capture, Error> {
    match value {
        Received::Bool(true) => Ok(Capture::Separated),
        Received::Bool(false) => Ok(Capture::None),
        Received::String(text) => match String::from(text).as_str() {
            "none" => Ok(Capture::None),
            "stdout" => Ok(Capture::Stdout),
            "stderr" => Ok(Capture::Stderr),
            "separated" => Ok(Capture::Separated),
            "merged" => Ok(Capture::Merged),
            other => Err(members::not_accepted(path, other)),
        },
        _ => Err(members::wrong_type(path, "GuestExecCaptureOutput")),
    }
}

fn time_limit(value: Received, path: &str) -> Result<Duration, Error> {
    let limit_ms = members::unsigned(value, path)?;
    match limit_ms {
        1..=TIME_LIMIT_MS_MAX => Ok(Duration::from_millis(limit_ms)),
        _ => Err(members::not_accepted(path, &limit_ms.to_string())),
    }
}

fn output_bytes_max(value: Received, path: &str) -> Result<usize, Error> {
    let bytes = members::unsigned(value, path)?;
    let fitting = usize::try_from(bytes).ok().filter(|bytes| *bytes <= OUTPUT_BYTES_MAX);
    fitting.ok_or_else(|| members::not_accepted(path, &bytes.to_string()))
}

fn kill(value: Received, path: &str) -> Result<Kill, Error> {
    match members::string(value, path)?.as_str() {
        "term" => Ok(Kill::Term),
        "kill" => Ok(Kill::Kill),
        other => Err(members::not_accepted(path, other)),
    }
}

#[cfg(test)]
mod tests {
    use super::{Exec, ExecStatus, Kill, OUTPUT_BYTES_MAX};
    use crate::members::Members;
    use serde_json::{Value, json};
    use std::time::Duration;

    fn members(arguments: Value) -> Members {
        let Value::Object(members) = arguments else { panic!("arguments are an object") };
        Members::new(members)
    }

    #[test]
    fn our_arguments_of_exec_are_optional_and_have_limits() {
        let read = |arguments| Exec::read(&mut members(arguments)).map_err(|error| error.desc);
        let plain = read(json!({"path": "a"})).expect("good arguments");
        assert_eq!((plain.time_limit, plain.output_bytes_max), (None, OUTPUT_BYTES_MAX));
        let ours = json!({"path": "a", "stillpoint-time-limit-ms": 1500, "stillpoint-output-bytes-max": 0});
        let ours = read(ours).expect("good arguments");
        assert_eq!((ours.time_limit, ours.output_bytes_max), (Some(Duration::from_millis(1500)), 0));
        for (name, value) in [
            ("stillpoint-time-limit-ms", 0),
            ("stillpoint-time-limit-ms", 604_800_001),
            ("stillpoint-output-bytes-max", 16_777_217),
        ] {
            let refused = format!("Parameter '{name}' does not accept value '{value}'");
            assert_eq!(read(json!({"path": "a", name: value})), Err(refused));
        }
    }

    #[test]
    fn our_arguments_of_exec_status_are_optional() {
        let read = |arguments| ExecStatus::read(&mut members(arguments)).map_err(|error| error.desc);
        assert_eq!(read(json!({"pid": 7})), Ok(ExecStatus { pid: 7, kill: None, stream: false }));
        assert_eq!(
            read(json!({"pid": 7, "stillpoint-kill": "term", "stillpoint-stream": true})),
            Ok(ExecStatus { pid: 7, kill: Some(Kill::Term), stream: true })
        );
        assert_eq!(
            read(json!({"pid": 7, "stillpoint-kill": "hup"})),
            Err("Parameter 'stillpoint-kill' does not accept value 'hup'".to_owned())
        );
    }
}
