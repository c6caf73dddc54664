//! Text from a guest, a store or a file name, made safe for a terminal.

use std::fmt::{self, Display};

/// Shows a text with every control character and bidirectional override written out, so that it can neither move
/// the cursor nor pretend to be something else.
pub(crate) struct Plain<T>(pub(crate) T);

impl<T: Display> Display for Plain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&written_out(&self.0.to_string(), |_| false, |c| format!("\\u{{{:x}}}", u32::from(c))))
    }
}

/// A whole page or message, escaped line by line: the last gate before the screen, for what a page may have forgotten.
pub(crate) fn page(text: &str) -> String {
    written_out(text, |c| c == '\n', |c| format!("\\u{{{:x}}}", u32::from(c)))
}

/// One object on one line. JSON itself writes out only the oldest control characters; the others stand in texts, too,
/// where JSON's own escapes mean the same.
pub(crate) fn json(object: &serde_json::Value) -> String {
    written_out(
        &object.to_string(),
        |_| false,
        |c| {
            let mut units = [0; 2];
            c.encode_utf16(&mut units).iter().fold(String::new(), |out, unit| out + &format!("\\u{unit:04x}"))
        },
    )
}

fn written_out(text: &str, keeps: impl Fn(char) -> bool, write: impl Fn(char) -> String) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if acts(c) && !keeps(c) {
            out.push_str(&write(c));
        } else {
            out.push(c);
        }
        out
    })
}

/// Characters that do something to a terminal, or hide, or reorder what stands beside them.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_from_a_guest_reach_no_terminal() {
        assert_eq!(Plain("\u{1b}[2Jdb\u{202e}1\n").to_string(), "\\u{1b}[2Jdb\\u{202e}1\\u{a}");
        assert_eq!(format!("{:<6}|", Plain("née")), "née   |");
    }

    #[test]
    fn a_page_keeps_its_lines_and_an_object_stays_json() {
        let hostile = "a\u{9b}31m\u{7f}\u{202e}\u{e0041}\r\u{1b}]0;x\u{7}";
        assert!(!page(hostile).chars().any(acts));
        assert_eq!(page("one\ntwo\u{9b}"), "one\ntwo\\u{9b}");
        let object = serde_json::json!({ hostile: [hostile] });
        let printed = json(&object);
        assert!(!printed.chars().any(acts), "{printed}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&printed).unwrap(), object);
    }
}
