//! The members of an object of arguments, taken one by one with the errors of qemu-ga's input visitor.

use crate::Error;
use crate::error::cut;
use crate::json::{Received, Text};
use std::collections::BTreeMap;

/// Arguments still to be taken. `finish` refuses those that nobody took.
#[derive(Debug)]
pub struct Members {
    members: BTreeMap<String, Received>,
    /// Where this object stands in the arguments, e.g. `applications[0].`; empty at the top.
    path: String,
}

impl Members {
    /// The arguments of a command.
    pub fn new<V: Into<Received>>(members: impl IntoIterator<Item = (String, V)>) -> Self {
        let members = members.into_iter().map(|(name, member)| (name, member.into())).collect();
        Self { members, path: String::new() }
    }

    /// Takes a required member.
    /// # Errors
    /// When it is missing, or `read` refuses it.
    pub fn required<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(Received, &str) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.optional(name, read)? {
            Some(value) => Ok(value),
            None => Err(Error::generic(format!("Parameter '{}{name}' is missing", self.path))),
        }
    }

    /// Takes a member that may be missing.
    /// # Errors
    /// When `read` refuses it.
    pub fn optional<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(Received, &str) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        match self.members.remove(name) {
            Some(value) => read(value, &format!("{}{name}", self.path)).map(Some),
            None => Ok(None),
        }
    }

    /// Ends the taking.
    /// # Errors
    /// When a member is left, which no command knows.
    pub fn finish(self) -> Result<(), Error> {
        match self.members.keys().next() {
            Some(name) => {
                Err(Error::generic(format!("Parameter '{}{}' is unexpected", self.path, cut(name))))
            }
            None => Ok(()),
        }
    }
}

/// A whole number. A double is none, even `1.0`.
/// # Errors
/// When it is another type or beyond 64 signed bits.
pub fn integer(value: Received, path: &str) -> Result<i64, Error> {
    value.as_i64().ok_or_else(|| wrong_type(path, "integer"))
}

/// A whole number from 0 up.
/// # Errors
/// When it is another type or negative.
pub fn unsigned(value: Received, path: &str) -> Result<u64, Error> {
    value.as_u64().ok_or_else(|| wrong_type(path, "uint64"))
}

/// A truth value.
/// # Errors
/// When it is another type.
pub fn boolean(value: Received, path: &str) -> Result<bool, Error> {
    value.as_bool().ok_or_else(|| wrong_type(path, "boolean"))
}

/// A text.
/// # Errors
/// When it is another type.
pub fn string(value: Received, path: &str) -> Result<String, Error> {
    text(value, path).map(String::from)
}

/// A text that may be long.
/// # Errors
/// When it is another type.
pub fn text(value: Received, path: &str) -> Result<Text, Error> {
    match value {
        Received::String(text) => Ok(text),
        _ => Err(wrong_type(path, "string")),
    }
}

/// A list of texts.
/// # Errors
/// When it is another type, or one of its elements is.
pub fn strings(value: Received, path: &str) -> Result<Vec<String>, Error> {
    list(value, path, string)
}

/// A list of objects, to be taken apart in turn.
/// # Errors
/// When it is another type, or one of its elements is.
pub fn objects(value: Received, path: &str) -> Result<Vec<Members>, Error> {
    list(value, path, |element, path| match element {
        Received::Object(members) => Ok(Members { members, path: format!("{path}.") }),
        _ => Err(wrong_type(path, "object")),
    })
}

fn list<T>(
    value: Received,
    path: &str,
    read: impl Fn(Received, &str) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let Received::Array(elements) = value else { return Err(wrong_type(path, "array")) };
    elements
        .into_iter()
        .enumerate()
        .map(|(index, element)| read(element, &format!("{path}[{index}]")))
        .collect()
}

/// The value is of another type than the command wants.
pub fn wrong_type(path: &str, expected: &str) -> Error {
    Error::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
}

/// The text is none of an enumeration's.
pub fn not_accepted(path: &str, text: &str) -> Error {
    Error::generic(format!("Parameter '{path}' does not accept value '{}'", cut(text)))
}
