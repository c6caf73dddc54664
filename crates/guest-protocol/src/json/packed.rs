//! Text of which base64 is the most, in three quarters of its memory: four letters are the three bytes they stand for.
//!
//! Packed or not makes no other difference: a text can always be had as it was.

use crate::base64;

/// The text of a string.
#[derive(Clone, Debug)]
pub enum Text {
    /// As it is.
    Plain(String),
    /// In part packed.
    Packed(Box<Packed>),
}

/// What whole groups of base64 letters at the beginning stand for, and the text behind them.
#[derive(Clone, Debug)]
pub struct Packed {
    bytes: Vec<u8>,
    rest: String,
}

impl Text {
    pub(crate) fn new(packed: Vec<u8>, rest: String) -> Self {
        if packed.is_empty() {
            return Self::Plain(rest);
        }
        Self::Packed(Box::new(Packed { bytes: packed, rest }))
    }

    /// How long the text is, in bytes, however it is held.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Packed(packed) => base64::letters_of(&packed.bytes) + packed.rest.len(),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the beginning stands for as base64, and the text behind that beginning.
    pub(crate) fn into_parts(self) -> (Vec<u8>, String) {
        match self {
            Self::Plain(text) => (Vec::new(), text),
            Self::Packed(packed) => (packed.bytes, packed.rest),
        }
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::Plain(text)
    }
}

impl From<Text> for String {
    fn from(text: Text) -> Self {
        match text {
            Text::Plain(text) => text,
            Text::Packed(packed) => base64::unpack(&packed.bytes) + &packed.rest,
        }
    }
}

/// Equal is what reads the same.
impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && String::from(self.clone()) == String::from(other.clone())
    }
}

impl Eq for Text {}
