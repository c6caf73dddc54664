//! The error that travels on the wire: a class that programs match and a sentence for people.

use serde::{Deserialize, Serialize};

/// Error classes that a qemu-ga answers with. Hosts such as libvirt read `CommandNotFound` as "unsupported".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// Everything but a command that cannot be called.
    GenericError,
    /// Unknown, blocked, or not allowed while frozen.
    CommandNotFound,
}

/// An error answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// What programs match.
    pub class: Class,
    /// What people read. Ours begin with a stable code and a colon where a code exists.
    pub desc: String,
}

impl Error {
    /// An error of the generic class.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: Class::GenericError, desc: desc.into() }
    }

    /// The command is not known.
    pub fn not_found(command: &str) -> Self {
        Self {
            class: Class::CommandNotFound,
            desc: format!("The command {} has not been found", cut(command)),
        }
    }

    /// The command is known but blocked, not allowed, or not possible while frozen.
    pub fn disabled(command: &str) -> Self {
        Self {
            class: Class::CommandNotFound,
            desc: format!("Command {command} has been disabled: the command is not allowed"),
        }
    }
}

/// Most of a foreign text that an error repeats, in bytes.
const FOREIGN_BYTES_MAX: usize = 1024;

/// The beginning of a text that came from outside, short enough to be repeated.
pub(crate) fn cut(text: &str) -> &str {
    match text.char_indices().find(|(at, found)| at + found.len_utf8() > FOREIGN_BYTES_MAX) {
        Some((at, _)) => &text[..at],
        None => text,
    }
}
