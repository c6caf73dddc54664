//! Bytes to tokens, with qemu-ga's recovery after a byte that fits nowhere.
//!
//! Source: behaviour of qemu-ga 7.2 to 11.1; the table below is RFC 8259 plus single-quoted strings.

use super::token::Token;

/// What a token is. Its text is read from the lexer while the token is the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Colon,
    Comma,
    String,
    Integer,
    Float,
    Keyword,
    /// A byte that no token can continue with; the text ends with it. Recovery begins after it.
    Stray,
    /// The token grew past the limit; the rest of a string is passed over.
    TooLong,
}

/// Where a token began, counted from 1 over the whole life of the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) line: u64,
    pub(super) column: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    Recovery,
    String(u8),
    Escape(u8),
    /// In the rest of a string that is too long.
    Overlong(u8),
    OverlongEscape(u8),
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    E,
    ExponentSign,
    Exponent,
    Keyword,
}

enum Step {
    /// The byte belongs to the token.
    Take(State),
    /// The byte belongs to nothing.
    Skip,
    /// The byte belongs to what is passed over.
    Pass(State),
    /// The byte completes the token.
    Last(Kind),
    /// The token ended before this byte.
    Before(Kind),
    /// Recovery ends before this byte.
    Resume,
    Stray,
}

#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    token: Token,
    /// The token in `token` was handed out and goes at the next call.
    handed_out: bool,
    token_bytes_max: usize,
    here: Position,
    began: Position,
}

impl Lexer {
    pub(super) fn new(token_bytes_max: usize) -> Self {
        let first = Position { line: 1, column: 1 };
        Self {
            state: State::Start,
            token: Token::default(),
            handed_out: false,
            token_bytes_max,
            here: first,
            began: first,
        }
    }

    /// Forgets an unfinished token, as when its sender is gone.
    pub(super) fn reset(&mut self) {
        self.state = State::Start;
        self.token = Token::default();
        self.handed_out = false;
    }

    /// The latest token as it was written, quotes and escapes included.
    pub(super) fn token(&self) -> &Token {
        &self.token
    }

    /// The latest token, to be kept without a copy.
    pub(super) fn token_mut(&mut self) -> &mut Token {
        &mut self.token
    }

    /// Where the latest token began.
    pub(super) fn began(&self) -> Position {
        self.began
    }

    /// Takes bytes from `input` up to the end of the next token; `None` when they are used up before.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Option<Kind> {
        if self.handed_out {
            self.handed_out = false;
            self.token.clear();
        }
        while let Some(&byte) = input.first() {
            if let State::String(quote) = self.state
                && self.take_plain_run(quote, input)
            {
                if self.token.len() > self.token_bytes_max {
                    return Some(self.too_long());
                }
                continue;
            }
            if self.token.is_empty() {
                self.began = self.here;
            }
            match step(self.state, byte) {
                Step::Take(state) => {
                    self.take(input);
                    self.state = state;
                }
                Step::Skip => self.pass(input),
                Step::Pass(state) => {
                    self.pass(input);
                    self.state = state;
                }
                Step::Last(kind) => {
                    self.take(input);
                    return Some(self.hand_out(kind, State::Start));
                }
                Step::Before(kind) => return Some(self.hand_out(kind, State::Start)),
                Step::Resume => self.state = State::Start,
                Step::Stray => {
                    self.take(input);
                    return Some(self.hand_out(Kind::Stray, State::Recovery));
                }
            }
            if self.token.len() > self.token_bytes_max {
                return Some(self.too_long());
            }
        }
        None
    }

    fn too_long(&mut self) -> Kind {
        let next = match self.state {
            State::String(quote) => State::Overlong(quote),
            State::Escape(quote) => State::OverlongEscape(quote),
            _ => State::Start,
        };
        self.hand_out(Kind::TooLong, next)
    }

    fn hand_out(&mut self, kind: Kind, next: State) -> Kind {
        self.state = next;
        self.handed_out = true;
        kind
    }

    /// Strings are nearly all of a large message, so their plain bytes are taken in one piece.
    fn take_plain_run(&mut self, quote: u8, input: &mut &[u8]) -> bool {
        let room = (self.token_bytes_max + 1).saturating_sub(self.token.len()).min(input.len());
        let plain = |byte: &u8| (0x20..=0xFD).contains(byte) && *byte != quote && *byte != b'\\';
        let run = input[..room].iter().position(|byte| !plain(byte)).unwrap_or(room);
        self.token.extend(&input[..run]);
        self.here.column += run as u64;
        *input = &input[run..];
        run > 0
    }

    fn take(&mut self, input: &mut &[u8]) {
        self.token.push(input[0]);
        self.pass(input);
    }

    fn pass(&mut self, input: &mut &[u8]) {
        if input[0] == b'\n' {
            self.here = Position { line: self.here.line + 1, column: 1 };
        } else {
            self.here.column += 1;
        }
        *input = &input[1..];
    }
}

fn step(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Recovery, b'\t') => Step::Skip,
        (State::Recovery, 0..=0x1F | 0xFE | 0xFF | b'[' | b']' | b'{' | b'}' | b':' | b',') => Step::Resume,
        (State::Recovery, _) => Step::Skip,

        (State::String(quote), _) if byte == quote => Step::Last(Kind::String),
        (State::String(quote), b'\\') => Step::Take(State::Escape(quote)),
        (State::String(quote) | State::Escape(quote), 0x20..=0xFD) => Step::Take(State::String(quote)),

        (State::Overlong(_) | State::OverlongEscape(_), 0..=0x1F | 0xFE | 0xFF) => Step::Resume,
        (State::Overlong(quote), _) if byte == quote => Step::Pass(State::Start),
        (State::Overlong(quote), b'\\') => Step::Pass(State::OverlongEscape(quote)),
        (State::Overlong(quote) | State::OverlongEscape(quote), _) => Step::Pass(State::Overlong(quote)),

        (State::Minus, b'0') => Step::Take(State::Zero),
        (State::Minus, b'1'..=b'9') => Step::Take(State::Digits),
        (State::Digits, b'0'..=b'9') => Step::Take(State::Digits),
        (State::Zero | State::Digits, b'.') => Step::Take(State::Point),
        // After a lone zero QEMU wants a point: of `0e1` it makes a number and a keyword.
        (State::Digits | State::Fraction, b'e' | b'E') => Step::Take(State::E),
        (State::Zero, b'0'..=b'9') => Step::Stray,
        (State::Zero | State::Digits, _) => Step::Before(Kind::Integer),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::Take(State::Fraction),
        (State::E, b'+' | b'-') => Step::Take(State::ExponentSign),
        (State::E | State::ExponentSign | State::Exponent, b'0'..=b'9') => Step::Take(State::Exponent),
        (State::Fraction | State::Exponent, _) => Step::Before(Kind::Float),

        (State::Keyword, b'a'..=b'z') => Step::Take(State::Keyword),
        (State::Keyword, _) => Step::Before(Kind::Keyword),

        (State::Start, b' ' | b'\t' | b'\r' | b'\n') => Step::Skip,
        (State::Start, b'{') => Step::Last(Kind::OpenBrace),
        (State::Start, b'}') => Step::Last(Kind::CloseBrace),
        (State::Start, b'[') => Step::Last(Kind::OpenBracket),
        (State::Start, b']') => Step::Last(Kind::CloseBracket),
        (State::Start, b':') => Step::Last(Kind::Colon),
        (State::Start, b',') => Step::Last(Kind::Comma),
        (State::Start, b'"' | b'\'') => Step::Take(State::String(byte)),
        (State::Start, b'-') => Step::Take(State::Minus),
        (State::Start, b'0') => Step::Take(State::Zero),
        (State::Start, b'1'..=b'9') => Step::Take(State::Digits),
        (State::Start, b'a'..=b'z') => Step::Take(State::Keyword),
        _ => Step::Stray,
    }
}
