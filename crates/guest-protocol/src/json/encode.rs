//! Values to bytes as qemu-ga writes them: ASCII only, `": "` and `", "`, doubles with 17 digits.

use super::text::character;
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use std::io::{self, Write};

/// Appends `value` to `out`, without a newline.
pub fn encode(value: &Value, out: &mut Vec<u8>) {
    if let Err(error) = value.serialize(&mut Serializer::with_formatter(out, Style)) {
        unreachable!("every value is JSON, and memory takes every byte: {error}");
    }
}

/// What `encode` would write of the value of `answer`, without making that first.
/// # Errors
/// When it is none that JSON knows: a name of a member that is no text.
pub fn written(answer: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut out = Vec::new();
    answer.serialize(&mut Serializer::with_formatter(&mut out, Style))?;
    Ok(out)
}

/// How qemu-ga writes.
struct Style;

impl Formatter for Style {
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, double: f64) -> io::Result<()> {
        out.write_all(general(double).as_bytes())
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, is_first: bool) -> io::Result<()> {
        if is_first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, is_first: bool) -> io::Result<()> {
        if is_first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        let is_plain = |byte: &u8| (b' '..=b'~').contains(byte);
        let mut rest = text;
        while !rest.is_empty() {
            let plain = rest.bytes().position(|byte| !is_plain(&byte)).unwrap_or(rest.len());
            out.write_all(&rest.as_bytes()[..plain])?;
            let mut others = rest[plain..].chars();
            if let Some(other) = others.next() {
                escape(other, out)?;
            }
            rest = others.as_str();
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(&mut self, out: &mut W, escape: CharEscape) -> io::Result<()> {
        out.write_all(match escape {
            CharEscape::Quote => b"\\\"",
            CharEscape::ReverseSolidus => b"\\\\",
            CharEscape::Solidus => b"/",
            CharEscape::Backspace => b"\\b",
            CharEscape::FormFeed => b"\\f",
            CharEscape::LineFeed => b"\\n",
            CharEscape::CarriageReturn => b"\\r",
            CharEscape::Tab => b"\\t",
            CharEscape::AsciiControl(byte) => return self::escape(char::from(byte), out),
        })
    }
}

fn escape(found: char, out: &mut (impl Write + ?Sized)) -> io::Result<()> {
    let found = character(u32::from(found)).unwrap_or('\u{FFFD}');
    found.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04X}"))
}

/// `printf("%.17g")`: 17 significant digits, trailing zeros dropped, an exponent where it is shorter.
fn general(double: f64) -> String {
    const DIGITS: i32 = 17;
    let scientific = format!("{double:.16e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..DIGITS).contains(&exponent) {
        let decimals = usize::try_from(DIGITS - 1 - exponent).unwrap_or(0);
        trimmed(&format!("{double:.decimals$}")).to_owned()
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs())
    }
}

fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    #[track_caller]
    fn check(value: &Value, expected: &str) {
        let mut out = Vec::new();
        super::encode(value, &mut out);
        assert_eq!(String::from_utf8_lossy(&out), expected);
        assert_eq!(super::written(value).expect("JSON"), out);
    }

    #[test]
    fn separators_carry_a_blank() {
        check(&json!({"a": [1, -2, {}], "b": null}), r#"{"a": [1, -2, {}], "b": null}"#);
    }

    #[test]
    fn text_leaves_as_ascii() {
        check(
            &json!("a\"\\/\u{8}\u{c}\n\r\t\u{0}\u{7f}é€😀\u{fffe}"),
            r#""a\"\\/\b\f\n\r\t\u0000\u007F\u00E9\u20AC\uD83D\uDE00\uFFFD""#,
        );
    }

    #[test]
    fn doubles_carry_seventeen_digits() {
        check(&json!(0.06), "0.059999999999999998");
        check(&json!(1.0), "1");
        check(&json!(-2.5), "-2.5");
        check(&json!(0.0001), "0.0001");
        check(&json!(0.00001), "1.0000000000000001e-05");
        check(&json!(1e17), "1e+17");
        check(&json!(1e16), "10000000000000000");
        check(&json!(f64::MAX), "1.7976931348623157e+308");
    }

    #[test]
    fn whole_numbers_stay_exact() {
        check(&json!(i64::MIN), "-9223372036854775808");
        check(&json!(u64::MAX), "18446744073709551615");
    }
}
