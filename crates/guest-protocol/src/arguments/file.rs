//! Arguments of `guest-file-*`.
//!
//! What they say is looked at when the file is, as in qemu-ga: an unknown handle is told before a wrong count.

use crate::Error;
use crate::json::{Received, Text};
use crate::members::{self, Members};

/// Arguments of `guest-file-open`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOpen {
    /// Path, from the agent's working folder if it is relative.
    pub path: String,
    /// As for fopen(3).
    pub mode: String,
}

impl FileOpen {
    pub(crate) fn read(members: &mut Members) -> Result<Self, Error> {
        Ok(Self {
            path: members.required("path", members::string)?,
            mode: members.optional("mode", members::string)?.unwrap_or_else(|| "r".to_owned()),
        })
    }
}

/// What is to be done with an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileCall {
    /// As `guest-file-open` answered it.
    pub handle: i64,
    /// What to do.
    pub operation: FileOperation,
}

/// What can be done with an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileOperation {
    /// `guest-file-close`.
    Close,
    /// `guest-file-read`, of so many bytes.
    Read(i64),
    /// `guest-file-write`.
    Write {
        /// Bytes, in base64.
        text: Text,
        /// How many of them; absent: all.
        count: Option<i64>,
    },
    /// `guest-file-seek`.
    Seek {
        /// How far.
        offset: i64,
        /// From where: the numbers of lseek(2), any others to be refused.
        whence: i64,
    },
    /// `guest-file-flush`.
    Flush,
}

/// Bytes that are read where a host does not say.
const COUNT: i64 = 4096;

impl FileCall {
    pub(crate) fn close(members: &mut Members) -> Result<Self, Error> {
        Ok(Self { handle: handle(members)?, operation: FileOperation::Close })
    }

    pub(crate) fn read(members: &mut Members) -> Result<Self, Error> {
        let handle = handle(members)?;
        let count = members.optional("count", members::integer)?.unwrap_or(COUNT);
        Ok(Self { handle, operation: FileOperation::Read(count) })
    }

    pub(crate) fn write(members: &mut Members) -> Result<Self, Error> {
        let handle = handle(members)?;
        let text = members.required("buf-b64", members::text)?;
        let count = members.optional("count", members::integer)?;
        Ok(Self { handle, operation: FileOperation::Write { text, count } })
    }

    pub(crate) fn seek(members: &mut Members) -> Result<Self, Error> {
        let handle = handle(members)?;
        let offset = members.required("offset", members::integer)?;
        let whence = members.required("whence", whence)?;
        Ok(Self { handle, operation: FileOperation::Seek { offset, whence } })
    }

    pub(crate) fn flush(members: &mut Members) -> Result<Self, Error> {
        Ok(Self { handle: handle(members)?, operation: FileOperation::Flush })
    }
}

fn handle(members: &mut Members) -> Result<i64, Error> {
    members.required("handle", members::integer)
}

fn whence(value: Received, path: &str) -> Result<i64, Error> {
    match value {
        Received::Number(_) => members::integer(value, path),
        Received::String(text) => match String::from(text).as_str() {
            "set" => Ok(0),
            "cur" => Ok(1),
            "end" => Ok(2),
            other => Err(members::not_accepted(path, other)),
        },
        _ => Err(members::wrong_type(path, "GuestFileWhence")),
    }
}
