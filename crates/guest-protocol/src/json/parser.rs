//! Tokens to values, one token at a time; the stack is on the heap, so nesting costs no recursion.

use super::lexer::Kind;
use super::received::Received;
use super::text;
use super::token::Token;
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// Just after `{`.
    KeyOrEnd,
    /// After a comma in an object.
    Key,
    Colon,
    /// Just after `[`.
    ValueOrEnd,
    /// At the top, after a colon, or after a comma in an array.
    Value,
    /// After a member or element.
    CommaOrEnd,
}

#[derive(Debug)]
enum Open {
    Object(BTreeMap<String, Received>, String),
    Array(Vec<Received>),
}

#[derive(Debug)]
pub(super) struct Parser {
    stack: Vec<Open>,
    expect: Expect,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self { stack: Vec::new(), expect: Expect::Value }
    }

    /// Takes a token, a long text out of its memory; gives the value when it is complete.
    /// # Errors
    /// The text of the parse error, as qemu-ga 11.1 words it. The parser must then be thrown away.
    pub(super) fn push(&mut self, kind: Kind, token: &mut Token) -> Result<Option<Received>, String> {
        match (self.expect, kind) {
            (Expect::KeyOrEnd, Kind::CloseBrace) | (Expect::ValueOrEnd, Kind::CloseBracket) => self.close(),
            (Expect::KeyOrEnd | Expect::Key, Kind::String) => {
                self.key(token.take_string(text::unquote)?.into())
            }
            (Expect::KeyOrEnd | Expect::Key, _) => Err("expecting key".to_owned()),
            (Expect::Colon, Kind::Colon) => self.go_on(Expect::Value),
            (Expect::Colon, _) => Err("expecting ':'".to_owned()),
            (Expect::CommaOrEnd, _) => self.separator(kind),
            (Expect::Value | Expect::ValueOrEnd, Kind::OpenBrace) => {
                self.stack.push(Open::Object(BTreeMap::new(), String::new()));
                self.go_on(Expect::KeyOrEnd)
            }
            (Expect::Value | Expect::ValueOrEnd, Kind::OpenBracket) => {
                self.stack.push(Open::Array(Vec::new()));
                self.go_on(Expect::ValueOrEnd)
            }
            (Expect::Value | Expect::ValueOrEnd, _) => scalar(kind, token).and_then(|value| self.add(value)),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "it is the tail of `push`")]
    fn go_on(&mut self, expect: Expect) -> Result<Option<Received>, String> {
        self.expect = expect;
        Ok(None)
    }

    fn key(&mut self, name: String) -> Result<Option<Received>, String> {
        match self.stack.last_mut() {
            Some(Open::Object(_, key)) => {
                *key = name;
                self.go_on(Expect::Colon)
            }
            _ => unreachable!("keys are expected in objects only"),
        }
    }

    fn separator(&mut self, kind: Kind) -> Result<Option<Received>, String> {
        let in_object = matches!(self.stack.last(), Some(Open::Object(..)));
        match (in_object, kind) {
            (true, Kind::Comma) => self.go_on(Expect::Key),
            (false, Kind::Comma) => self.go_on(Expect::Value),
            (true, Kind::CloseBrace) | (false, Kind::CloseBracket) => self.close(),
            (true, _) => Err("expected ',' or '}'".to_owned()),
            (false, _) => Err("expected ',' or ']'".to_owned()),
        }
    }

    fn close(&mut self) -> Result<Option<Received>, String> {
        let value = match self.stack.pop() {
            Some(Open::Object(members, _)) => Received::Object(members),
            Some(Open::Array(elements)) => Received::Array(elements),
            None => unreachable!("a closing token is expected inside something open only"),
        };
        self.add(value)
    }

    fn add(&mut self, value: Received) -> Result<Option<Received>, String> {
        match self.stack.last_mut() {
            None => {
                self.expect = Expect::Value;
                return Ok(Some(value));
            }
            // Seen when the value is there, as in QEMU: the error's position tells.
            Some(Open::Object(members, key)) if members.contains_key(key) => {
                return Err("duplicate key".to_owned());
            }
            Some(Open::Object(members, key)) => {
                members.insert(std::mem::take(key), value);
            }
            Some(Open::Array(elements)) => elements.push(value),
        }
        self.expect = Expect::CommaOrEnd;
        Ok(None)
    }
}

fn scalar(kind: Kind, token: &mut Token) -> Result<Received, String> {
    if kind == Kind::String {
        return token.take_string(text::unquote).map(Received::String);
    }
    let token = token.text();
    match (kind, token) {
        (Kind::Integer, _) => Ok(text::integer(token)),
        (Kind::Float, _) => Ok(text::float(token)),
        (Kind::Keyword, b"true") => Ok(Received::Bool(true)),
        (Kind::Keyword, b"false") => Ok(Received::Bool(false)),
        (Kind::Keyword, b"null") => Ok(Received::Null),
        (Kind::Keyword, _) => Err(format!("invalid keyword '{}'", text::shown(token))),
        _ => Err("expecting value".to_owned()),
    }
}
