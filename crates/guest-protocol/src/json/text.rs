//! String and number tokens to their values.

use super::received::Received;
use serde_json::Number;

/// Most of a bad token that an error repeats, in bytes.
pub(super) const QUOTED_BYTES_MAX: usize = 256;

/// Longer tokens are not copied where they can be taken as they are.
const COPIED_BYTES_MAX: usize = 64 << 10;

/// The string that a quoted token stands for; a long one may be taken out of `token`.
/// # Errors
/// The text of the parse error.
pub(super) fn unquote(token: &mut Vec<u8>) -> Result<String, String> {
    let inside = 1..token.len() - 1;
    let is_plain = |byte: &u8| byte.is_ascii() && *byte != b'\\';
    if token.len() > COPIED_BYTES_MAX && token[inside.clone()].iter().all(is_plain) {
        let mut bytes = std::mem::take(token);
        bytes.truncate(inside.end);
        bytes.remove(0);
        return String::from_utf8(bytes).map_err(|_| "invalid UTF-8 sequence in string".to_owned());
    }
    let (mut rest, quote) = (&token[inside], token[0]);
    let mut text = String::with_capacity(rest.len());
    while !rest.is_empty() {
        let plain = rest.iter().position(|byte| matches!(byte, b'\\' | 0x80..)).unwrap_or(rest.len());
        // Plain bytes are ASCII, so this cannot fail.
        text.push_str(
            std::str::from_utf8(&rest[..plain]).map_err(|_| "invalid UTF-8 sequence in string".to_owned())?,
        );
        rest = &rest[plain..];
        match rest.first() {
            None => {}
            Some(b'\\') => text.push(escape(&mut rest, quote)?),
            Some(_) => text.push(multibyte(&mut rest)?),
        }
    }
    Ok(text)
}

fn escape(rest: &mut &[u8], quote: u8) -> Result<char, String> {
    let simple = match rest.get(1) {
        Some(b'"') => '"',
        Some(b'\'') => '\'',
        Some(b'\\') => '\\',
        Some(b'/') => '/',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(b'u') => return unicode_escape(rest, quote),
        _ => return Err("invalid escape sequence in string".to_owned()),
    };
    *rest = &rest[2..];
    Ok(simple)
}

fn unicode_escape(rest: &mut &[u8], quote: u8) -> Result<char, String> {
    let begin = *rest;
    let Some(first) = hex4(rest.get(2..6)) else {
        // Six bytes, wherever the string ends, its quote included.
        let seen: Vec<u8> = begin.iter().chain([&quote]).copied().take(6).collect();
        return Err(format!("{} is not a valid Unicode character", shown(&seen)));
    };
    *rest = &rest[6..];
    let mut code = first;
    if (0xD800..0xDC00).contains(&first)
        && rest.starts_with(b"\\u")
        && let Some(second @ 0xDC00..=0xDFFF) = hex4(rest.get(2..6))
    {
        code = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
        *rest = &rest[6..];
    }
    character(code).ok_or_else(|| {
        format!("{} is not a valid Unicode character", shown(&begin[..begin.len() - rest.len()]))
    })
}

fn hex4(digits: Option<&[u8]>) -> Option<u32> {
    digits?.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
}

fn multibyte(rest: &mut &[u8]) -> Result<char, String> {
    // QEMU's strings end at NUL, so it writes a NUL inside one as the overlong pair C0 80.
    if rest.starts_with(&[0xC0, 0x80]) {
        *rest = &rest[2..];
        return Ok('\0');
    }
    let bytes = match rest[0] {
        0xC2..=0xDF => 2,
        0xE0..=0xEF => 3,
        _ => 4,
    };
    let found = rest
        .get(..bytes)
        .and_then(|sequence| std::str::from_utf8(sequence).ok())
        .and_then(|text| text.chars().next())
        .and_then(|found| character(u32::from(found)));
    let found = found.ok_or("invalid UTF-8 sequence in string")?;
    *rest = &rest[bytes..];
    Ok(found)
}

/// Surrogates and noncharacters are refused, as QEMU refuses them.
pub(super) fn character(code: u32) -> Option<char> {
    let noncharacter = (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE;
    char::from_u32(code).filter(|_| !noncharacter)
}

/// An integer that fits 64 bits stays exact; a longer one becomes a double, as in QEMU.
pub(super) fn integer(token: &[u8]) -> Received {
    let text = String::from_utf8_lossy(token);
    match (text.parse::<i64>(), text.parse::<u64>()) {
        (Ok(signed), _) => Received::Number(signed.into()),
        (_, Ok(unsigned)) => Received::Number(unsigned.into()),
        _ => float(token),
    }
}

/// JSON has no infinity: what is too large becomes the largest double.
pub(super) fn float(token: &[u8]) -> Received {
    let number = String::from_utf8_lossy(token).parse::<f64>().unwrap_or_default();
    Number::from_f64(number.clamp(f64::MIN, f64::MAX)).map_or(Received::Null, Received::Number)
}

/// A token inside an error: up to its first NUL (QEMU prints it as a C string), cut to a bounded length.
pub(super) fn shown(token: &[u8]) -> String {
    let end = token.iter().position(|byte| *byte == 0).unwrap_or(token.len());
    String::from_utf8_lossy(&token[..end.min(QUOTED_BYTES_MAX)]).into_owned()
}
