//! Keys and what each is for. Derivation contexts are those of the format document, section 3.

use crate::{Checksums, PackName};
use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use std::fmt;
use zeroize::{Zeroize, Zeroizing};

/// What a key slot wraps.
#[derive(Clone)]
pub struct MasterKey(pub Zeroizing<[u8; 32]>);

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey")
    }
}

/// All keys of a repository, derived as they are needed.
#[derive(Clone)]
pub struct Keys {
    master: MasterKey,
    /// Computes block checksums.
    pub checksums: Checksums,
    /// Authenticates the cache.
    pub index: IndexKey,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    /// Derives what follows from the master key.
    pub fn new(master: MasterKey) -> Keys {
        let checksums = Checksums::new(derive("stillpoint repository v1 block checksum", &master, &[]));
        let index = IndexKey(Zeroizing::new(derive("stillpoint repository v1 index", &master, &[])));
        Keys { master, checksums, index }
    }

    /// The master key, for wrapping it into another slot.
    pub fn master(&self) -> &MasterKey {
        &self.master
    }

    pub(crate) fn pack(&self, pack: PackName) -> LessSafeKey {
        aead_key(derive("stillpoint repository v1 pack", &self.master, &pack.to_bytes()))
    }

    pub(crate) fn object(&self, name: &str) -> LessSafeKey {
        aead_key(derive("stillpoint repository v1 object", &self.master, name.as_bytes()))
    }
}

/// The key of the deduplication cache.
#[derive(Clone)]
pub struct IndexKey(Zeroizing<[u8; 32]>);

impl IndexKey {
    /// A keyed digest of some bytes.
    pub fn digest(&self, bytes: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.0, bytes).as_bytes()
    }
}

fn derive(context: &str, master: &MasterKey, material: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(&*master.0);
    hasher.update(material);
    let key = *hasher.finalize().as_bytes();
    hasher.zeroize();
    key
}

fn aead_key(mut key: [u8; 32]) -> LessSafeKey {
    let unbound = UnboundKey::new(&AES_256_GCM, &key).expect("32 bytes are what AES-256 takes");
    key.zeroize();
    LessSafeKey::new(unbound)
}
