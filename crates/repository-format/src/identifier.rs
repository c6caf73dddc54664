//! Identifiers: 16 bytes that sort by time, and their one spelling.

use crate::FormatError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// 26 characters sort as the bytes do; no letter that is easily misread.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Characters of the text form.
const TEXT_LENGTH: usize = 26;

/// 48 bits of milliseconds since 1970 and 80 random bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identifier([u8; 16]);

impl Identifier {
    /// Joins a time (milliseconds since 1970, of which 48 bits are kept) and randomness.
    pub fn new(at_ms: u64, random: [u8; 10]) -> Identifier {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&at_ms.to_be_bytes()[2..]);
        bytes[6..].copy_from_slice(&random);
        Identifier(bytes)
    }

    /// The 16 bytes as they stand in tables and key derivations.
    pub fn from_bytes(bytes: [u8; 16]) -> Identifier {
        Identifier(bytes)
    }

    /// See [`Identifier::from_bytes`].
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Milliseconds since 1970 at which it was made, by its maker's clock.
    pub fn at_ms(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes[2..].copy_from_slice(&self.0[..6]);
        u64::from_be_bytes(bytes)
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from_be_bytes(self.0);
        let mut text = [0; TEXT_LENGTH];
        for (place, character) in text.iter_mut().rev().enumerate() {
            *character = ALPHABET[((bits >> (5 * place)) & 31) as usize];
        }
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Identifier {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Identifier, FormatError> {
        if text.len() != TEXT_LENGTH || text.as_bytes()[0] > b'7' {
            return Err(FormatError::Name);
        }
        let mut bits = 0u128;
        for character in text.bytes() {
            let value = ALPHABET.iter().position(|&c| c == character).ok_or(FormatError::Name)?;
            bits = bits << 5 | value as u128;
        }
        Ok(Identifier(bits.to_be_bytes()))
    }
}

impl Serialize for Identifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Identifier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Identifier, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Gives an identifier a meaning of its own, so that a lease is never taken for a snapshot.
macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Identifier);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = FormatError;

            fn from_str(text: &str) -> Result<$name, FormatError> {
                text.parse().map($name)
            }
        }
    };
}

identifier!(
    /// Names a snapshot: `manifests/SNAPSHOT`.
    SnapshotId
);
identifier!(
    /// Names one writer, and the folder of its packs.
    LeaseId
);
identifier!(
    /// Names a key slot: `keys/SLOT`.
    SlotId
);

/// Names a repository: 16 random bytes, as 32 lowercase hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RepositoryId(pub [u8; 16]);

impl fmt::Display for RepositoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RepositoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RepositoryId {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<RepositoryId, FormatError> {
        let lowercase_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() != 32 || !text.bytes().all(lowercase_hex) {
            return Err(FormatError::Name);
        }
        let value = u128::from_str_radix(text, 16).map_err(|_| FormatError::Name)?;
        Ok(RepositoryId(value.to_be_bytes()))
    }
}

impl Serialize for RepositoryId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RepositoryId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RepositoryId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_identifier_survives_its_text(bytes: [u8; 16]) {
            let id = Identifier::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse::<Identifier>(), Ok(id));
        }

        #[test]
        fn identifiers_sort_as_their_texts_do(a: [u8; 16], b: [u8; 16]) {
            let (a, b) = (Identifier::from_bytes(a), Identifier::from_bytes(b));
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        }
    }

    #[test]
    fn refuses_every_other_spelling() {
        let text = Identifier::new(1, [7; 10]).to_string();
        for other in
            [text.to_uppercase(), text[1..].to_string(), format!("8{}", &text[1..]), text.replace('7', "u")]
        {
            if other != text {
                assert_eq!(other.parse::<Identifier>(), Err(FormatError::Name), "{other}");
            }
        }
        assert!("00112233445566778899AABBCCDDEEFF".parse::<RepositoryId>().is_err());
    }
}
