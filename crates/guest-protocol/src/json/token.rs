//! A token as it was written, but that a long string's base64 is packed while it is read.

use super::packed::Text;
use crate::base64;

/// Strings of more bytes are packed. To this crate's own tests nearly every string is a long one.
const PACKED_FROM_BYTES: usize = if cfg!(test) { 6 } else { 16 << 10 };

/// Longer memory is not kept for the short tokens that follow.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// A token, or its beginning.
#[derive(Debug, Default)]
pub(super) struct Token {
    /// What is packed of a string. It stands behind the first byte of `text`, the quote.
    packed: Vec<u8>,
    text: Vec<u8>,
}

impl Token {
    /// How many bytes it was written with.
    pub(super) fn len(&self) -> usize {
        self.text.len() + base64::letters_of(&self.packed)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The whole token, where it is no string.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    pub(super) fn push(&mut self, byte: u8) {
        self.text.push(byte);
    }

    /// Adds plain bytes to a string.
    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
        if self.text.len() > PACKED_FROM_BYTES {
            let letters = base64::pack(&self.text[1..], &mut self.packed);
            self.text.drain(1..=letters);
        }
    }

    pub(super) fn clear(&mut self) {
        self.packed = Vec::new();
        if self.text.capacity() > KEPT_BYTES_MAX {
            self.text = Vec::new();
        }
        self.text.clear();
    }

    /// The first bytes that it was written with: so many, or all.
    pub(super) fn beginning(&self, bytes_max: usize) -> Vec<u8> {
        let Some((quote, rest)) = self.text.split_first() else { return Vec::new() };
        let packed = &self.packed[..self.packed.len().min(bytes_max.div_ceil(4) * 3)];
        let rest = &rest[..rest.len().min(bytes_max)];
        let mut written = [&[*quote], base64::unpack(packed).as_bytes(), rest].concat();
        written.truncate(bytes_max);
        written
    }

    /// Takes a string, of which `unquote` makes what its quoted text stands for. No escape reaches back into what is
    /// packed, so that needs nothing.
    pub(super) fn take_string(
        &mut self,
        unquote: impl FnOnce(&mut Vec<u8>) -> Result<String, String>,
    ) -> Result<Text, String> {
        let rest = unquote(&mut self.text)?;
        Ok(Text::new(std::mem::take(&mut self.packed), rest))
    }
}

#[cfg(test)]
mod tests {
    use super::{Text, Token};
    use crate::json::lexer::{Kind, Lexer};
    use crate::json::text;
    use proptest::prelude::*;

    /// The inside of a string: much base64, and what else may stand there.
    fn inside() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            4 => "[A-Za-z0-9+/]{0,40}".prop_map(String::into_bytes),
            1 => r#"[=\-_ !]{0,3}|\\["'nuq/\\]|\\u00[4-8][0-9a-g]|é"#.prop_map(String::into_bytes),
            1 => prop::collection::vec(0x80..=0xFDu8, 0..3),
        ];
        prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn a_packed_string_is_what_was_written(
            inside in inside(), pieces in 1..80usize, beginning in 0..300usize
        ) {
            let mut written = [b"\"", &inside[..], b"\""].concat();
            let mut lexer = Lexer::new(1 << 20);
            let kind = written.chunks(pieces).find_map(|mut piece| lexer.next(&mut piece));
            prop_assert_eq!(kind, Some(Kind::String));
            let token = lexer.token_mut();
            prop_assert_eq!(token.len(), written.len());
            prop_assert_eq!(token.beginning(beginning), &written[..beginning.min(written.len())]);
            let text = token.take_string(text::unquote);
            let bytes = text.as_ref().map(Text::len).ok();
            let text = text.map(String::from);
            prop_assert_eq!(bytes, text.as_ref().map(String::len).ok());
            prop_assert_eq!(text, text::unquote(&mut written));
        }
    }

    #[test]
    fn plain_base64_is_packed_as_it_comes() {
        let mut token = Token::default();
        token.push(b'"');
        for _ in 0..1000 {
            token.extend(b"QUJDR");
        }
        assert!(token.text.len() <= 1 + 3 + 5, "{} letters are not packed", token.text.len());
        assert!(token.packed.len() >= (5000 - 8) / 4 * 3);
    }
}
