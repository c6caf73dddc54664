//! A stream of JSON values out of whatever pieces the bytes arrive in, with limits and recovery.

use super::lexer::{Kind, Lexer, Position};
use super::parser::Parser;
use super::received::Received;
use super::text;
use crate::Error;

/// What one message may cost. The defaults are qemu-ga's, with room for the largest file write that it describes.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest token, and longest sum of tokens, in bytes.
    pub token_bytes_max: usize,
    /// Most tokens.
    pub tokens_max: usize,
    /// Deepest nesting.
    pub depth_max: usize,
    /// Parse errors begin with `LINE:COL: `, as from qemu-ga 11.1 on.
    pub error_position: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            token_bytes_max: (64 << 20) + (64 << 10),
            tokens_max: 2 << 20,
            depth_max: 1024,
            error_position: true,
        }
    }
}

/// What a stream is made of.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A complete value.
    Value(Received),
    /// What was no value, in the words of the answer to it.
    Error(Error),
}

/// Reads values, and answers what is none with the errors of qemu-ga.
#[derive(Debug)]
pub struct Reader {
    limits: Limits,
    lexer: Lexer,
    message: Message,
    /// The latest error was a limit's: the 0xFF with which a host then starts afresh is not answered.
    after_limit: bool,
    /// Bytes of the tokens of the latest value.
    value_bytes: usize,
}

/// The message being read.
#[derive(Debug)]
struct Message {
    parser: Parser,
    /// The grammar was broken, or a limit passed, and that was answered; the rest of the message is passed over.
    failed: bool,
    braces: i64,
    brackets: i64,
    bytes: usize,
    tokens: usize,
}

impl Message {
    fn new() -> Self {
        Self { parser: Parser::new(), failed: false, braces: 0, brackets: 0, bytes: 0, tokens: 0 }
    }

    /// What was read of it is of no more use.
    fn fail(&mut self) {
        self.failed = true;
        self.parser = Parser::new();
    }

    fn cost(&self) -> usize {
        self.bytes + self.tokens * size_of::<Received>()
    }

    /// Closing more than was opened ends a message too, as a broken one.
    fn is_open(&self) -> bool {
        (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0
    }
}

impl Reader {
    /// A reader at the start of a stream.
    pub fn new(limits: Limits) -> Self {
        let lexer = Lexer::new(limits.token_bytes_max);
        Self { limits, lexer, message: Message::new(), after_limit: false, value_bytes: 0 }
    }

    /// Drops an unfinished message, as when its sender is gone.
    pub fn reset(&mut self) {
        self.lexer.reset();
        self.message = Message::new();
        self.after_limit = false;
    }

    /// What the latest value takes in memory, about: its text and its parts.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// What is kept of an unfinished message, about.
    pub fn pending_bytes(&self) -> usize {
        self.message.cost() + self.lexer.token().len()
    }

    /// Takes bytes from `input` up to the end of the next item; `None` when they are used up before.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Item> {
        loop {
            let kind = self.lexer.next(input)?;
            if let Some(item) = self.token(kind) {
                return Some(item);
            }
        }
    }

    fn token(&mut self, kind: Kind) -> Option<Item> {
        let began = self.lexer.began();
        let bytes = self.lexer.token().len();
        if kind == Kind::Stray {
            // A message that was answered already ends here, and nothing more is said about it. One that was nothing
            // but a token beyond the limit has ended before.
            let after_limit = std::mem::take(&mut self.after_limit) && self.lexer.token().text() == [0xFF];
            let was_answered = std::mem::replace(&mut self.message, Message::new()).failed || after_limit;
            let stray =
                format!("stray '{}'", text::shown(&self.lexer.token().beginning(text::QUOTED_BYTES_MAX)));
            return (!was_answered).then(|| Item::Error(self.parse_error(began, &stray)));
        }
        self.count(kind);
        self.after_limit = false;
        if self.message.failed {
            self.end_message();
            return None;
        }
        let item = self.take(kind, began, bytes);
        self.end_message();
        item
    }

    /// Takes a token of a message that is sound so far.
    fn take(&mut self, kind: Kind, began: Position, bytes: usize) -> Option<Item> {
        if let Some(limit) = self.broken_limit(kind, bytes) {
            self.message.fail();
            self.after_limit = true;
            return Some(Item::Error(Error::generic(limit)));
        }
        self.message.bytes += bytes;
        self.message.tokens += 1;
        match self.message.parser.push(kind, self.lexer.token_mut()) {
            Ok(value) => value.map(Item::Value),
            Err(text) => {
                self.message.fail();
                Some(Item::Error(self.parse_error(began, &text)))
            }
        }
    }

    fn end_message(&mut self) {
        if !self.message.is_open() {
            self.value_bytes = self.message.cost();
            self.message = Message::new();
        }
    }

    fn broken_limit(&self, kind: Kind, bytes: usize) -> Option<&'static str> {
        let depth = self.message.braces + self.message.brackets;
        if kind == Kind::TooLong || self.message.bytes + bytes + 1 > self.limits.token_bytes_max {
            Some("JSON token size limit exceeded")
        } else if self.message.tokens + 1 > self.limits.tokens_max {
            Some("JSON token count limit exceeded")
        } else if depth > i64::try_from(self.limits.depth_max).unwrap_or(i64::MAX) {
            Some("JSON nesting depth limit exceeded")
        } else {
            None
        }
    }

    fn count(&mut self, kind: Kind) {
        match kind {
            Kind::OpenBrace => self.message.braces += 1,
            Kind::CloseBrace => self.message.braces -= 1,
            Kind::OpenBracket => self.message.brackets += 1,
            Kind::CloseBracket => self.message.brackets -= 1,
            _ => {}
        }
    }

    fn parse_error(&self, at: Position, text: &str) -> Error {
        let prefix =
            if self.limits.error_position { format!("{}:{}: ", at.line, at.column) } else { String::new() };
        Error::generic(format!("{prefix}JSON parse error, {text}"))
    }
}

#[cfg(test)]
mod tests;
