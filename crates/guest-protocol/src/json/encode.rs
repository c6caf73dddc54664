//! Values to bytes as qemu-ga writes them: ASCII only, `": "` and `", "`, doubles with 17 digits.

use super::text::character;
use serde_json::{Number, Value};

/// Appends `value` to `out`, without a newline.
pub fn encode(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => out.extend_from_slice(self::number(number).as_bytes()),
        Value::String(text) => string(text, out),
        Value::Array(elements) => {
            out.push(b'[');
            for (index, element) in elements.iter().enumerate() {
                separate(index, out);
                encode(element, out);
            }
            out.push(b']');
        }
        Value::Object(members) => {
            out.push(b'{');
            for (index, (name, member)) in members.iter().enumerate() {
                separate(index, out);
                string(name, out);
                out.extend_from_slice(b": ");
                encode(member, out);
            }
            out.push(b'}');
        }
    }
}

fn separate(index: usize, out: &mut Vec<u8>) {
    if index > 0 {
        out.extend_from_slice(b", ");
    }
}

fn string(text: &str, out: &mut Vec<u8>) {
    out.reserve(text.len() + 2);
    out.push(b'"');
    for found in text.chars() {
        match found {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            ' '..='~' => out.push(u8::try_from(found).unwrap_or(b'?')),
            _ => {
                let found = character(u32::from(found)).unwrap_or('\u{FFFD}');
                for unit in found.encode_utf16(&mut [0; 2]) {
                    out.extend_from_slice(format!("\\u{unit:04X}").as_bytes());
                }
            }
        }
    }
    out.push(b'"');
}

fn number(number: &Number) -> String {
    match number.as_f64() {
        Some(double) if number.is_f64() => general(double),
        _ => number.to_string(),
    }
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
