//! The members of an object of arguments, taken one by one with the errors of qemu-ga's input visitor.

use crate::Error;
use crate::error::cut;
use serde_json::{Map, Value};

/// Arguments still to be taken. `finish` refuses those that nobody took.
#[derive(Debug)]
pub struct Members {
    members: Map<String, Value>,
    /// Where this object stands in the arguments, e.g. `applications[0].`; empty at the top.
    path: String,
}

impl Members {
    /// The arguments of a command.
    pub fn new(members: Map<String, Value>) -> Self {
        Self { members, path: String::new() }
    }

    /// Takes a member as it is, if it is there.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name)
    }

    /// Takes a required member.
    /// # Errors
    /// When it is missing, or `read` refuses it.
    pub fn required<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(Value, &str) -> Result<T, Error>,
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
        read: impl FnOnce(Value, &str) -> Result<T, Error>,
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
pub fn integer(value: Value, path: &str) -> Result<i64, Error> {
    value.as_i64().ok_or_else(|| wrong_type(path, "integer"))
}

/// A whole number from 0 up.
/// # Errors
/// When it is another type or negative.
pub fn unsigned(value: Value, path: &str) -> Result<u64, Error> {
    value.as_u64().ok_or_else(|| wrong_type(path, "uint64"))
}

/// A truth value.
/// # Errors
/// When it is another type.
pub fn boolean(value: Value, path: &str) -> Result<bool, Error> {
    value.as_bool().ok_or_else(|| wrong_type(path, "boolean"))
}

/// A text.
/// # Errors
/// When it is another type.
pub fn string(value: Value, path: &str) -> Result<String, Error> {
    match value {
        Value::String(text) => Ok(text),
        _ => Err(wrong_type(path, "string")),
    }
}

/// A list of texts.
/// # Errors
/// When it is another type, or one of its elements is.
pub fn strings(value: Value, path: &str) -> Result<Vec<String>, Error> {
    list(value, path, string)
}

/// A list of objects, to be taken apart in turn.
/// # Errors
/// When it is another type, or one of its elements is.
pub fn objects(value: Value, path: &str) -> Result<Vec<Members>, Error> {
    list(value, path, |element, path| match element {
        Value::Object(members) => Ok(Members { members, path: format!("{path}.") }),
        _ => Err(wrong_type(path, "object")),
    })
}

fn list<T>(
    value: Value,
    path: &str,
    read: impl Fn(Value, &str) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let Value::Array(elements) = value else { return Err(wrong_type(path, "array")) };
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
