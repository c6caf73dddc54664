//! Sealed objects: small, each under a key of its own name.

use crate::{Compressor, FormatError, Keys, OBJECT_BYTES_MAX, TAG_BYTES, decompress};
use aws_lc_rs::aead::{Aad, Nonce};

const NONCE_BYTES: usize = 12;

/// The bytes of object `name` with this plaintext. `nonce` is random.
///
/// # Errors
/// `TooLarge` above 64 MiB.
pub fn seal_object(
    keys: &Keys,
    name: &str,
    nonce: [u8; NONCE_BYTES],
    plaintext: &[u8],
) -> Result<Vec<u8>, FormatError> {
    if plaintext.len() > OBJECT_BYTES_MAX {
        return Err(FormatError::TooLarge);
    }
    let mut payload = Compressor::default().compress(plaintext).to_vec();
    let tag = keys
        .object(name)
        .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut payload)
        .expect("AES-GCM seals any payload of less than 64 GiB");
    Ok([&nonce[..], &payload, tag.as_ref()].concat())
}

/// The plaintext of object `name`.
///
/// # Errors
/// `Authentication` for bytes that were not sealed under this name.
pub fn open_object(keys: &Keys, name: &str, sealed: &[u8]) -> Result<Vec<u8>, FormatError> {
    if sealed.len() < NONCE_BYTES + TAG_BYTES {
        return Err(FormatError::Authentication);
    }
    let (nonce, sealed) = sealed.split_at(NONCE_BYTES);
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| FormatError::Authentication)?;
    let mut payload = sealed.to_vec();
    let payload = keys
        .object(name)
        .open_in_place(nonce, Aad::empty(), &mut payload)
        .map_err(|_| FormatError::Authentication)?;
    decompress(payload, OBJECT_BYTES_MAX)
}
