//! Frames: sealed payloads, bound to their pack and their place in it.

use crate::{FormatError, FrameAddress, Keys, PackName, TAG_BYTES};
use aws_lc_rs::aead::{Aad, Nonce};

/// What a frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrameKind {
    /// Blocks of a disk.
    Data,
    /// Tree nodes.
    Nodes,
}

impl FrameKind {
    fn associated(self) -> Aad<[u8; 1]> {
        Aad::from([match self {
            FrameKind::Data => 0,
            FrameKind::Nodes => 1,
        }])
    }
}

/// Seals a payload at the end of a pack's bytes and returns where it is.
///
/// The nonce is the offset: a pack's bytes must only ever grow, and a pack's name never be used twice.
pub fn seal_frame(
    keys: &Keys,
    pack: PackName,
    pack_bytes: &mut Vec<u8>,
    kind: FrameKind,
    payload: &[u8],
) -> FrameAddress {
    let start = pack_bytes.len();
    let offset = u32::try_from(start).expect("writers close packs long before 4 GiB");
    pack_bytes.extend_from_slice(payload);
    let tag = keys
        .pack(pack)
        .seal_in_place_separate_tag(nonce(offset), kind.associated(), &mut pack_bytes[start..])
        .expect("AES-GCM seals any payload of less than 64 GiB");
    pack_bytes.extend_from_slice(tag.as_ref());
    let length = u32::try_from(pack_bytes.len() - start).expect("a frame has at most 256 KiB");
    FrameAddress { pack, offset, length }
}

/// The payload of a frame, decrypted in place.
///
/// # Errors
/// `Authentication` when these bytes are not what was sealed at this address.
pub fn open_frame<'a>(
    keys: &Keys,
    address: &FrameAddress,
    kind: FrameKind,
    sealed: &'a mut [u8],
) -> Result<&'a [u8], FormatError> {
    if sealed.len() != address.length as usize || sealed.len() < TAG_BYTES {
        return Err(FormatError::Authentication);
    }
    keys.pack(address.pack)
        .open_in_place(nonce(address.offset), kind.associated(), sealed)
        .map(|payload| &*payload)
        .map_err(|_| FormatError::Authentication)
}

fn nonce(offset: u32) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&u64::from(offset).to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Identifier, LeaseId, MasterKey};

    fn keys() -> Keys {
        Keys::new(MasterKey(zeroize::Zeroizing::new([1; 32])))
    }

    fn pack(sequence: u32) -> PackName {
        PackName { lease: LeaseId(Identifier::from_bytes([2; 16])), sequence }
    }

    #[test]
    fn a_frame_opens_only_where_and_as_what_it_was_sealed() {
        let keys = keys();
        let mut bytes = Vec::new();
        let first = seal_frame(&keys, pack(0), &mut bytes, FrameKind::Data, b"payload");
        let second = seal_frame(&keys, pack(0), &mut bytes, FrameKind::Data, b"payload");
        let sealed = |a: &FrameAddress| bytes[a.offset as usize..][..a.length as usize].to_vec();

        assert_eq!(open_frame(&keys, &first, FrameKind::Data, &mut sealed(&first)), Ok(&b"payload"[..]));
        assert_eq!(open_frame(&keys, &second, FrameKind::Data, &mut sealed(&second)), Ok(&b"payload"[..]));
        let refused = Err(FormatError::Authentication);
        assert_eq!(open_frame(&keys, &first, FrameKind::Data, &mut sealed(&second)), refused);
        assert_eq!(open_frame(&keys, &first, FrameKind::Nodes, &mut sealed(&first)), refused);
        let elsewhere = FrameAddress { pack: pack(1), ..first };
        assert_eq!(open_frame(&keys, &elsewhere, FrameKind::Data, &mut sealed(&first)), refused);
        for bit in 0..sealed(&first).len() * 8 {
            let mut flipped = sealed(&first);
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open_frame(&keys, &first, FrameKind::Data, &mut flipped), refused, "bit {bit}");
        }
    }
}
