//! Base64 as qemu-ga takes it: its own check of the letters, then GLib's forgiving decoder.
//!
//! A group that is not complete is dropped, and a `=` counts where it stands in the third or fourth place of a group
//! only. Source: behaviour of qemu-ga 7.2 and of `g_base64_decode_step`.

use crate::Error;
use crate::json::Text;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

const NEWLINE: u8 = 64;
const PADDING: u8 = 65;
const FOREIGN: u8 = 66;

static VALUES: [u8; 256] = values();

const fn values() -> [u8; 256] {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut values = [FOREIGN; 256];
    let mut at: u8 = 0;
    while at < 64 {
        values[letters[at as usize] as usize] = at;
        at += 1;
    }
    values[b'\n' as usize] = NEWLINE;
    values[b'=' as usize] = PADDING;
    values
}

/// The bytes that a text stands for, in the text's own memory: a large one is never there twice.
/// # Errors
/// When a letter is none of base64's.
pub fn decode(text: Text) -> Result<Vec<u8>, Error> {
    let (mut bytes, rest) = text.into_parts();
    let mut rest = decode_in_place(rest.into_bytes())?;
    if bytes.is_empty() {
        return Ok(rest);
    }
    bytes.append(&mut rest);
    Ok(bytes)
}

/// Appends to `bytes` what the plain groups at the beginning of `letters` stand for, and says how many letters they are.
pub(crate) fn pack(letters: &[u8], bytes: &mut Vec<u8>) -> usize {
    let (groups, _) = letters.as_chunks();
    // Where nothing fits, nothing else is looked at: the text may be long, and this be asked again for each byte of it.
    if groups.first().and_then(plain_group).is_none() {
        return 0;
    }
    let before = bytes.len();
    bytes.resize(before + groups.len() * 3, 0);
    // All in one go is much faster, and nearly always right.
    if STANDARD_NO_PAD.decode_slice(groups.as_flattened(), &mut bytes[before..]).is_err() {
        bytes.truncate(before);
        bytes.extend(groups.iter().map_while(plain_group).flatten());
    }
    letters_of(&bytes[before..])
}

/// The letters that were packed.
pub(crate) fn unpack(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// How many letters were packed.
pub(crate) fn letters_of(bytes: &[u8]) -> usize {
    bytes.len() / 3 * 4
}

fn decode_in_place(mut bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    let (mut from, mut to) = (0, 0);
    let (mut word, mut taken, mut padding) = (0u32, 0, 0u8);
    while from < bytes.len() {
        // Plain groups are nearly all of a large text.
        if taken == 0
            && let Some(plain) = bytes[from..].first_chunk().and_then(plain_group)
        {
            bytes[to..to + 3].copy_from_slice(&plain);
            from += 4;
            to += 3;
            continue;
        }
        let value = VALUES[usize::from(bytes[from])];
        from += 1;
        match value {
            NEWLINE => continue,
            FOREIGN => return Err(Error::generic("Base64 data contains invalid characters")),
            _ => {}
        }
        let is_padding = value == PADDING;
        word = word << 6 | if is_padding { 0 } else { u32::from(value) };
        padding = padding << 1 | u8::from(is_padding);
        taken += 1;
        if taken == 4 {
            let [_, first, second, third] = word.to_be_bytes();
            for (byte, is_kept) in [(first, true), (second, padding & 2 == 0), (third, padding & 1 == 0)] {
                if is_kept {
                    bytes[to] = byte;
                    to += 1;
                }
            }
            (word, taken, padding) = (0, 0, 0);
        }
    }
    bytes.truncate(to);
    Ok(bytes)
}

fn plain_group(group: &[u8; 4]) -> Option<[u8; 3]> {
    let [a, b, c, d] = group.map(|letter| VALUES[usize::from(letter)]);
    if (a | b | c | d) & 0xC0 != 0 {
        return None;
    }
    Some([a << 2 | b >> 4, b << 4 | c >> 2, c << 6 | d])
}

#[cfg(test)]
mod tests {
    use super::{decode, pack};
    use crate::json::Text;
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    #[track_caller]
    fn check(text: &str, bytes: &[u8]) {
        assert_eq!(decode(text.to_owned().into()).expect("base64"), bytes, "{text}");
    }

    #[test]
    fn what_is_not_complete_or_padded_is_forgiven() {
        check("", b"");
        check("aGVsbG8=", b"hello");
        check("aGVs\nbG8=\n", b"hello");
        check("aGVsbG8", b"hel");
        check("aGVsbG", b"hel");
        check("aA==aA==", b"hh");
        check("=", b"");
        check("====", b"\0");
        check("aG=s", b"h,");
        check("=GVs", b"\0el");
    }

    #[test]
    fn other_letters_are_refused() {
        for text in ["aGVs bG8=", "aGV\u{e9}", "a-_b", "aGVs\0", "aGVs\r\n"] {
            let error = decode(text.to_owned().into()).expect_err(text);
            assert_eq!(error.desc, "Base64 data contains invalid characters");
        }
    }

    proptest! {
        #[test]
        fn what_was_packed_is_decoded_the_same(
            text in "([A-Za-z0-9+/]{0,30}(\n|=|==|-)?){0,4}", part in 0..100usize
        ) {
            let mut packed = Vec::new();
            let letters = pack(&text.as_bytes()[..part.min(text.len())], &mut packed);
            let held = Text::new(packed, text[letters..].to_owned());
            prop_assert_eq!(decode(held), decode(text.into()));
        }

        #[test]
        fn what_is_encoded_is_decoded(bytes in prop::collection::vec(any::<u8>(), 0..300), line in 1..80usize) {
            let text = STANDARD.encode(&bytes);
            prop_assert_eq!(&decode(text.clone().into()).unwrap(), &bytes);
            let lines: Vec<&str> =
                text.as_bytes().chunks(line).map(|part| std::str::from_utf8(part).unwrap()).collect();
            prop_assert_eq!(&decode(lines.join("\n").into()).unwrap(), &bytes);
        }
    }
}
