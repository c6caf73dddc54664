//! A reader of GLib key files, which is what qemu-ga's configuration and state files are.
//!
//! Written here and not hired: readers of INI files (`rust-ini`, `configparser`) know other escapes, quotes, comments and
//! continued lines, take keys outside of groups, and change the case of names; readers of desktop entries ask for a
//! desktop entry. What qemu-ga reads and refuses is what counts here. Source: behaviour of `GKeyFile`, GLib 2.74.

use std::collections::BTreeMap;

/// Largest file that is read: real ones have a screenful.
pub const BYTES_MAX: u64 = 1 << 20;

/// Groups of keys with their values as they stand in the file. Of a key that stands twice in a group, the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFile {
    groups: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

impl KeyFile {
    /// Reads a whole file.
    /// # Errors
    /// A sentence about the first line that is neither group, key, comment nor empty.
    pub fn parse(bytes: &[u8]) -> Result<KeyFile, String> {
        let mut file = KeyFile::default();
        let mut group: Option<String> = None;
        for line in bytes.split(|byte| *byte == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let line = line.trim_ascii_start();
            if line.is_empty() || line[0] == b'#' {
                continue;
            }
            if let Some(name) = group_name(line) {
                let valid =
                    !name.is_empty() && !name.contains(&b'[') && !name.iter().any(u8::is_ascii_control);
                let name = String::from_utf8_lossy(name).into_owned();
                if !valid {
                    return Err(format!("Invalid group name: {name}"));
                }
                file.groups.entry(name.clone()).or_default();
                group = Some(name);
                continue;
            }
            let Some(at) = line.iter().position(|byte| *byte == b'=').filter(|at| *at > 0) else {
                let line = String::from_utf8_lossy(line);
                return Err(format!(
                    "Key file contains line “{line}” which is not a key-value pair, group, or comment"
                ));
            };
            let Some(group) = &group else { return Err("Key file does not start with a group".to_owned()) };
            let name = line[..at].trim_ascii_end();
            // `name[de]` is the name for one language.
            let language =
                name.strip_suffix(b"]").and_then(|rest| rest.iter().rposition(|byte| *byte == b'['));
            let bare = &name[..language.unwrap_or(name.len())];
            let valid = !bare.is_empty() && !bare.iter().any(|byte| matches!(byte, b'[' | b']'));
            let name = String::from_utf8_lossy(name).into_owned();
            if !valid {
                return Err(format!("Invalid key name: {name}"));
            }
            let value = line[at + 1..].trim_ascii_start().to_vec();
            file.groups.entry(group.clone()).or_default().insert(name, value);
        }
        Ok(file)
    }

    /// The names of the keys of a group.
    pub fn keys<'f>(&'f self, group: &str) -> impl Iterator<Item = &'f str> {
        self.groups.get(group).into_iter().flat_map(|keys| keys.keys().map(String::as_str))
    }

    /// A value as text, its escapes undone; `None` if there is no such key.
    /// # Errors
    /// A sentence, if it is no UTF-8 or has an escape that does not exist.
    pub fn string(&self, group: &str, key: &str) -> Result<Option<String>, String> {
        let Some(bytes) = self.value(group, key) else { return Ok(None) };
        let Ok(text) = std::str::from_utf8(bytes) else {
            let value = String::from_utf8_lossy(bytes);
            return Err(format!("Key file contains key “{key}” with value “{value}” which is not UTF-8"));
        };
        unescape(text).map(Some).ok_or_else(|| uninterpretable(key))
    }

    /// A value that is yes or no; `None` if there is no such key.
    /// # Errors
    /// A sentence, if it is neither.
    pub fn boolean(&self, group: &str, key: &str) -> Result<Option<bool>, String> {
        match self.value(group, key).map(<[u8]>::trim_ascii_end) {
            None => Ok(None),
            Some(b"true" | b"1") => Ok(Some(true)),
            Some(b"false" | b"0") => Ok(Some(false)),
            Some(_) => Err(uninterpretable(key)),
        }
    }

    fn value(&self, group: &str, key: &str) -> Option<&[u8]> {
        self.groups.get(group)?.get(key).map(Vec::as_slice)
    }
}

/// `[NAME]` and nothing but blanks after it.
fn group_name(line: &[u8]) -> Option<&[u8]> {
    let rest = line.strip_prefix(b"[")?;
    let end = rest.iter().position(|byte| *byte == b']')?;
    rest[end + 1..].iter().all(|byte| matches!(byte, b' ' | b'\t')).then_some(&rest[..end])
}

fn uninterpretable(key: &str) -> String {
    format!("Key file contains key “{key}” which has a value that cannot be interpreted.")
}

/// `None` where an escape does not exist.
fn unescape(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\\' {
            plain.push(character);
            continue;
        }
        plain.push(match characters.next()? {
            's' => ' ',
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            '\\' => '\\',
            _ => return None,
        });
    }
    Some(plain)
}

/// A text as it stands in a key file. The other half of `KeyFile::string`.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    let mut at_start = true;
    for character in text.chars() {
        match character {
            ' ' if at_start => escaped.push_str("\\s"),
            '\t' if at_start => escaped.push_str("\\t"),
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\\' => escaped.push_str("\\\\"),
            other => escaped.push(other),
        }
        at_start &= matches!(character, ' ' | '\t');
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::{KeyFile, escape};

    fn parse(text: &str) -> KeyFile {
        KeyFile::parse(text.as_bytes()).expect(text)
    }

    #[test]
    fn the_last_of_equal_keys_counts_over_repeated_groups_too() {
        let file = parse("# comment\n\n[a]\nx=1\n[b]\nx=2\n[a] \n x = 3\r\n");
        assert_eq!(file.string("a", "x"), Ok(Some("3".to_owned())));
        assert_eq!(file.string("b", "x"), Ok(Some("2".to_owned())));
        assert_eq!(file.string("b", "y"), Ok(None));
        assert_eq!(file.keys("a").collect::<Vec<_>>(), ["x"]);
    }

    #[test]
    fn values_keep_their_last_blanks_and_lose_their_escapes() {
        let file = parse("[a]\nx= \\s/p\\\\q\\tr =s \ny=\n");
        assert_eq!(file.string("a", "x"), Ok(Some(" /p\\q\tr =s ".to_owned())));
        assert_eq!(file.string("a", "y"), Ok(Some(String::new())));
        for text in ["", " a", "\t \\n\n b\r", "plain", "é"] {
            let file = parse(&format!("[a]\nx={}", escape(text)));
            assert_eq!(file.string("a", "x"), Ok(Some(text.to_owned())), "{text:?}");
        }
    }

    #[test]
    fn booleans_are_these_four_words_only() {
        for (word, value) in [("true", true), ("1 ", true), ("false", false), ("0", false)] {
            assert_eq!(parse(&format!("[a]\nx={word}")).boolean("a", "x"), Ok(Some(value)), "{word}");
        }
        for word in ["yes", "True", "", "2", "true;"] {
            let words = "Key file contains key “x” which has a value that cannot be interpreted.";
            assert_eq!(parse(&format!("[a]\nx={word}")).boolean("a", "x"), Err(words.to_owned()));
        }
    }

    #[test]
    fn what_glib_refuses_is_refused() {
        for (text, words) in [
            ("x=1", "Key file does not start with a group"),
            ("[a]\nfoo", "Key file contains line “foo” which is not a key-value pair, group, or comment"),
            ("[a]\n=x", "Key file contains line “=x” which is not a key-value pair, group, or comment"),
            ("[a]\n;x", "Key file contains line “;x” which is not a key-value pair, group, or comment"),
            ("[a", "Key file contains line “[a” which is not a key-value pair, group, or comment"),
            ("[a]b", "Key file contains line “[a]b” which is not a key-value pair, group, or comment"),
            ("[]", "Invalid group name: "),
            ("[a[b]", "Invalid group name: a[b"),
            ("[a]\nb]c=d", "Invalid key name: b]c"),
        ] {
            assert_eq!(KeyFile::parse(text.as_bytes()), Err(words.to_owned()), "{text}");
        }
        assert_eq!(parse("[a]\nx[de]=1").keys("a").collect::<Vec<_>>(), ["x[de]"], "for one language");
        assert!(parse("[a]\nx=\\q").string("a", "x").is_err());
        assert!(parse("[a]\nx=a\\").string("a", "x").is_err());
        let not_utf8 = KeyFile::parse(b"[a]\nx=\xFF").expect("only the value is wrong");
        assert!(not_utf8.string("a", "x").is_err_and(|words| words.ends_with("which is not UTF-8")));
    }
}
