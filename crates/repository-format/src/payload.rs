//! Payloads: one byte that says how, then the body.

use crate::FormatError;
use std::cell::RefCell;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;
/// Fast, and on disk images as small as level 3: `docs/format/repository.md` names the sizes.
const LEVEL: i32 = 1;

/// Compresses payloads, one after the other, with one reused context.
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    payload: Vec<u8>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl Default for Compressor {
    fn default() -> Compressor {
        let zstd = zstd::bulk::Compressor::new(LEVEL).expect("zstd knows its own level 1");
        Compressor { zstd, payload: Vec::new() }
    }
}

impl Compressor {
    /// The payload of `plaintext`: compressed if that is smaller. Valid until the next call.
    pub fn compress(&mut self, plaintext: &[u8]) -> &[u8] {
        // Only ever grows, so that a long run neither allocates nor clears memory for each frame.
        if self.payload.len() < 1 + plaintext.len() {
            self.payload.resize(1 + plaintext.len(), 0);
        }
        let (how, body) = self.payload[..1 + plaintext.len()].split_at_mut(1);
        // A target no larger than the plaintext makes zstd give up where it would gain nothing.
        let length = match self.zstd.compress_to_buffer(plaintext, body) {
            Ok(length) if length < plaintext.len() => {
                how[0] = ZSTD;
                length
            }
            _ => {
                how[0] = PLAIN;
                body.copy_from_slice(plaintext);
                plaintext.len()
            }
        };
        &self.payload[..1 + length]
    }
}

thread_local! {
    /// One context for each thread, as making one costs as much as decompressing a small frame. It carries nothing
    /// from one body to the next: zstd begins every frame anew, after an error too.
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> = RefCell::default();
}

/// The plaintext of a payload, of at most `limit` bytes.
///
/// # Errors
/// `TooLarge` beyond the limit, `Compression` for a body that is no single zstd frame.
pub fn decompress(payload: &[u8], limit: usize) -> Result<Vec<u8>, FormatError> {
    match payload.split_first() {
        Some((&PLAIN, body)) if body.len() > limit => Err(FormatError::TooLarge),
        Some((&PLAIN, body)) => Ok(body.to_vec()),
        Some((&ZSTD, body)) => {
            let promised = zstd::bulk::Decompressor::upper_bound(body).ok_or(FormatError::Compression)?;
            if promised > limit {
                return Err(FormatError::TooLarge);
            }
            DECOMPRESSOR
                .with_borrow_mut(|zstd| zstd.decompress(body, promised))
                .map_err(|_| FormatError::Compression)
        }
        _ => Err(FormatError::Compression),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn plaintext_survives(plaintext in proptest::collection::vec(0u8..4, 0..5000)) {
            let mut compressor = Compressor::default();
            let payload = compressor.compress(&plaintext);
            prop_assert!(payload.len() <= plaintext.len() + 1);
            prop_assert_eq!(decompress(payload, 5000), Ok(plaintext));
        }

        #[test]
        fn no_bytes_make_it_panic_or_exceed_its_limit(payload: Vec<u8>) {
            if let Ok(plaintext) = decompress(&payload, 100) {
                prop_assert!(plaintext.len() <= 100);
            }
        }
    }

    #[test]
    fn refuses_a_body_that_promises_more_than_the_limit() {
        let mut compressor = Compressor::default();
        assert_eq!(decompress(compressor.compress(&[0; 10_000]), 9_999), Err(FormatError::TooLarge));
    }
}
