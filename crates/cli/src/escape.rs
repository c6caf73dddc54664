//! Text from a guest, a store or a file name, made safe for a terminal.

use std::fmt::{self, Display, Write};

/// Shows a text with every control character and bidirectional override written out, so that it can neither move
/// the cursor nor pretend to be something else.
pub(crate) struct Plain<T>(pub(crate) T);

impl<T: Display> Display for Plain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = self.0.to_string().chars().fold(String::new(), |mut out, c| {
            if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            {
                // Writing to a String cannot fail.
                write!(out, "\\u{{{:x}}}", u32::from(c)).unwrap_or_default();
            } else {
                out.push(c);
            }
            out
        });
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_from_a_guest_reach_no_terminal() {
        assert_eq!(Plain("\u{1b}[2Jdb\u{202e}1\n").to_string(), "\\u{1b}[2Jdb\\u{202e}1\\u{a}");
        assert_eq!(format!("{:<6}|", Plain("née")), "née   |");
    }
}
