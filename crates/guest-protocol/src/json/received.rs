//! A value that came from outside: any JSON value, whose long texts may be packed.

use super::packed::Text;
use serde_json::{Number, Value};
use std::collections::BTreeMap;

/// A value as it was read.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(Number),
    /// A text.
    String(Text),
    /// A list.
    Array(Vec<Received>),
    /// Members by name.
    Object(BTreeMap<String, Received>),
}

impl Received {
    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(truth) = self { Some(*truth) } else { None }
    }

    /// A whole number within 64 signed bits.
    pub fn as_i64(&self) -> Option<i64> {
        if let Self::Number(number) = self { number.as_i64() } else { None }
    }

    /// A whole number within 64 bits without sign.
    pub fn as_u64(&self) -> Option<u64> {
        if let Self::Number(number) = self { number.as_u64() } else { None }
    }
}

impl From<Received> for Value {
    fn from(received: Received) -> Self {
        match received {
            Received::Null => Self::Null,
            Received::Bool(truth) => Self::Bool(truth),
            Received::Number(number) => Self::Number(number),
            Received::String(text) => Self::String(text.into()),
            Received::Array(elements) => elements.into_iter().map(Self::from).collect(),
            Received::Object(members) => {
                members.into_iter().map(|(name, member)| (name, Self::from(member))).collect()
            }
        }
    }
}

impl From<Value> for Received {
    fn from(value: Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(truth) => Self::Bool(truth),
            Value::Number(number) => Self::Number(number),
            Value::String(text) => Self::String(text.into()),
            Value::Array(elements) => Self::Array(elements.into_iter().map(Self::from).collect()),
            Value::Object(members) => {
                Self::Object(members.into_iter().map(|(name, member)| (name, member.into())).collect())
            }
        }
    }
}
