//! The monitor's wire: one JSON object a line in both directions.

use serde::Deserialize;
use serde_json::Value;

/// Longest line that is read, in bytes. The longest answer seen, a schema, has 240 KB; `query-block` of a VM with
/// many disks and bitmaps stays below 1 MiB.
pub const LINE_BYTES_MAX: usize = 16 << 20;

/// Why the other side is not understood. After any of these the connection is of no use.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A line is longer than [`LINE_BYTES_MAX`].
    #[error("a line of more than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// A line is not JSON.
    #[error("not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    /// A line is JSON, but neither greeting, answer nor event.
    #[error("neither greeting, answer nor event")]
    NotQmp,
}

/// What QEMU says first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Greeting {
    /// QEMU's version as `major.minor.micro`; for people and receipts, not for decisions.
    pub version: String,
    /// The packager's own words, e.g. `Debian 1:7.2+dfsg-7`.
    pub package: String,
}

/// An error that QEMU answered to a command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct CommandError {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound` …
    #[serde(default)]
    pub class: String,
    /// QEMU's sentence.
    #[serde(default)]
    pub desc: String,
}

/// Something that QEMU reported by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Name, e.g. `BLOCK_EXPORT_DELETED`.
    pub name: String,
    /// What it carries; `Null` if nothing.
    pub data: Value,
}

/// One line from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The first line.
    Greeting(Greeting),
    /// An answer; `id` is absent only if QEMU could not read the request.
    Reply {
        /// The request's id.
        id: Option<u64>,
        /// The answer.
        outcome: Result<Value, CommandError>,
    },
    /// An event.
    Event(Event),
}

/// Cuts what arrives into lines.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    searched: usize,
}

impl Lines {
    /// Takes what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line without its end; empty lines are skipped.
    ///
    /// # Errors
    /// `LineTooLong`.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        loop {
            let Some(end) = self.buffer[self.searched..].iter().position(|&b| b == b'\n') else {
                self.searched = self.buffer.len();
                return if self.buffer.len() > LINE_BYTES_MAX {
                    Err(WireError::LineTooLong)
                } else {
                    Ok(None)
                };
            };
            let end = self.searched + end;
            if end > LINE_BYTES_MAX {
                return Err(WireError::LineTooLong);
            }
            let line = self.buffer[..end].trim_ascii().to_vec();
            self.buffer.drain(..=end);
            self.searched = 0;
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

/// Reads one line. Members that we do not know are ignored.
///
/// # Errors
/// `NotJson` and `NotQmp`.
pub fn parse(line: &[u8]) -> Result<Message, WireError> {
    let mut value: Value = serde_json::from_slice(line)?;
    let members = value.as_object_mut().ok_or(WireError::NotQmp)?;
    if let Some(name) = members.get("event").and_then(Value::as_str) {
        let name = name.to_owned();
        return Ok(Message::Event(Event { name, data: members.remove("data").unwrap_or(Value::Null) }));
    }
    if let Some(greeting) = members.get("QMP") {
        let version = &greeting["version"];
        let part = |name: &str| version["qemu"][name].as_u64().unwrap_or(0);
        return Ok(Message::Greeting(Greeting {
            version: format!("{}.{}.{}", part("major"), part("minor"), part("micro")),
            package: version["package"].as_str().unwrap_or_default().to_owned(),
        }));
    }
    let id = members.get("id").and_then(Value::as_u64);
    if let Some(answer) = members.remove("return") {
        return Ok(Message::Reply { id, outcome: Ok(answer) });
    }
    if let Some(error) = members.remove("error") {
        let error = serde_json::from_value(error).unwrap_or_else(|_| CommandError::default());
        return Ok(Message::Reply { id, outcome: Err(error) });
    }
    Err(WireError::NotQmp)
}

/// Writes one request, line end included. QEMU reads its monitor byte by byte, each with a call of its own, so no arguments are not
/// written as none.
pub fn encode(id: u64, execute: &str, arguments: &Value) -> Vec<u8> {
    let mut request = serde_json::json!({ "execute": execute, "id": id });
    if arguments.as_object().is_none_or(|members| !members.is_empty()) {
        request["arguments"] = arguments.clone();
    }
    let mut line = request.to_string();
    line.push('\n');
    line.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut lines = Lines::default();
        let mut out = vec![];
        for chunk in chunks {
            lines.push(chunk);
            while let Some(line) = lines.next_line().unwrap() {
                out.push(line);
            }
        }
        out
    }

    #[test]
    fn reads_the_greeting_of_qemu_7_2() {
        let line = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        assert_eq!(
            parse(line).unwrap(),
            Message::Greeting(Greeting { version: "7.2.22".into(), package: "Debian".into() })
        );
    }

    #[test]
    fn an_event_and_members_that_nobody_knows_are_no_error() {
        let line = br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "FROM_THE_FUTURE", "data": {"a": 1}, "more": 3}"#;
        assert!(matches!(parse(line).unwrap(), Message::Event(event) if event.name == "FROM_THE_FUTURE"));
    }

    #[test]
    fn an_error_without_class_is_still_an_error() {
        let Message::Reply { id: Some(7), outcome: Err(error) } =
            parse(br#"{"id": 7, "error": {"desc": "no"}}"#).unwrap()
        else {
            panic!("not a reply")
        };
        assert_eq!(error.desc, "no");
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_limit() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; LINE_BYTES_MAX]);
        assert!(lines.next_line().unwrap().is_none());
        lines.push(b"xx");
        assert!(matches!(lines.next_line(), Err(WireError::LineTooLong)));
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_bytes_arrive(text in "[a-z\n\r]{0,200}", cut in 0_usize..200) {
            let bytes = text.as_bytes();
            let cut = cut.min(bytes.len());
            prop_assert_eq!(lines(&[bytes]), lines(&[&bytes[..cut], &bytes[cut..]]));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(&bytes).map_or_else(|_| true, |_| true));
        }
    }
}
