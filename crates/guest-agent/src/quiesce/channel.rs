//! What the agent and a worker say to each other: frames of JSON over a socket pair, one answer to every request.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// Longest frame in bytes: 128 facts and 128 notes of 1 KiB each fill it.
pub(super) const FRAME_BYTES_MAX: usize = 256 << 10;

/// What a worker shall do, and how long it may take.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) phase: Phase,
    pub(super) budget_ms: u64,
}

/// The worker's part of each phase of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// Connect and read, change nothing.
    Rehearse,
    /// Slow and harmless work.
    Prepare,
    /// Take what is held over the freeze; record positions.
    Quiesce,
    /// After the thaw: prove that nothing was lost, then let go.
    Resume,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Answer {
    /// Why the phase failed.
    pub(super) failure: Option<Note>,
    /// What people should know besides.
    pub(super) notes: Vec<Note>,
    pub(super) version: Option<String>,
    pub(super) position: Option<String>,
    pub(super) crash_safe: bool,
    pub(super) facts: BTreeMap<String, String>,
}

impl Answer {
    pub(super) fn failed(code: &str, message: impl Into<String>) -> Self {
        Self { failure: Some(Note::new(code, message)), ..Self::default() }
    }
}

/// A reason without its subject, which the agent knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) code: String,
    pub(super) message: String,
}

impl Note {
    pub(super) fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }
}

/// Writes one frame: 4 bytes of length, little-endian, then JSON.
/// # Errors
/// `InvalidData` when it is too long; else as the stream.
pub(super) fn send(mut stream: impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= FRAME_BYTES_MAX);
    let length = length.ok_or_else(too_long)?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend(body);
    stream.write_all(&frame)
}

/// Reads one frame; `None` at the end of the stream.
/// # Errors
/// `InvalidData` when it is too long or not what was expected; else as the stream.
pub(super) fn receive<M: DeserializeOwned>(mut stream: impl Read) -> io::Result<Option<M>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(too_long());
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a frame longer than the limit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was_and_the_end_is_told() {
        let mut pipe = Vec::new();
        let answer = Answer { position: Some("0/1".into()), ..Answer::failed("code", "words") };
        send(&mut pipe, &answer).unwrap();
        let mut reader = &pipe[..];
        assert_eq!(receive::<Answer>(&mut reader).unwrap(), Some(answer));
        assert_eq!(receive::<Answer>(&mut reader).unwrap(), None);
    }

    #[test]
    fn a_frame_beyond_the_limit_is_refused_before_it_is_read() {
        let length = u32::try_from(FRAME_BYTES_MAX + 1).unwrap().to_le_bytes();
        assert_eq!(receive::<Answer>(&length[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let long = Answer { version: Some("x".repeat(FRAME_BYTES_MAX)), ..Answer::default() };
        assert!(send(Vec::new(), &long).is_err());
    }
}
