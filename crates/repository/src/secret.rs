//! What opens a repository: passphrases and key files, wrapped by `age`.

use crate::Error;
use age::secrecy::{ExposeSecret, SecretString};
use age::{DecryptError, scrypt, x25519};
use repository_format::FormatError;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// 2^17 rounds: 128 MiB and under a second, as the age tool's own default is twice that.
const WORK_FACTOR: u8 = 17;
/// 1 GiB; a slot that asks for more was made to exhaust memory.
const WORK_FACTOR_MAX: u8 = 20;
const KEY_FILE_BYTES_MAX: u64 = 64 << 10;

/// What opens a repository. Never shown, never logged.
#[derive(Clone)]
pub enum Secret {
    /// Something a person knows.
    Passphrase(Zeroizing<String>),
    /// A file with an age X25519 identity, as `age-keygen` or [`create_key_file`] writes it.
    KeyFile(PathBuf),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::Passphrase(_) => f.write_str("Passphrase(…)"),
            Secret::KeyFile(path) => f.debug_tuple("KeyFile").field(path).finish(),
        }
    }
}

/// Makes a new key file with mode 0600; one that exists is left alone.
///
/// # Errors
/// `KeyFile`.
pub fn create_key_file(path: &Path) -> Result<(), Error> {
    let identity = x25519::Identity::generate();
    let text = Zeroizing::new(format!(
        "# public key: {}\n{}\n",
        identity.to_public(),
        identity.to_string().expose_secret()
    ));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|error| Error::KeyFile { path: path.to_path_buf(), cause: error.to_string() })
}

impl Secret {
    /// An age file that this secret opens.
    pub(crate) fn wrap(&self, plaintext: &[u8]) -> Result<Vec<u8>, Error> {
        let wrapped = match self {
            Secret::Passphrase(passphrase) => {
                if passphrase.is_empty() {
                    return Err(Error::EmptyPassphrase);
                }
                let mut recipient = scrypt::Recipient::new(secret_string(passphrase));
                recipient.set_work_factor(WORK_FACTOR);
                age::encrypt(&recipient, plaintext)
            }
            Secret::KeyFile(path) => age::encrypt(&read_key_file(path)?.to_public(), plaintext),
        };
        wrapped.map_err(|error| Error::NoRandomness { cause: error.to_string() })
    }

    /// Reads the secret once, so that several slots can be tried with it.
    pub(crate) fn unlock(&self) -> Result<Unlocker, Error> {
        match self {
            Secret::Passphrase(passphrase) => {
                let mut identity = scrypt::Identity::new(secret_string(passphrase));
                identity.set_max_work_factor(WORK_FACTOR_MAX);
                Ok(Unlocker::Passphrase(identity))
            }
            Secret::KeyFile(path) => read_key_file(path).map(Unlocker::KeyFile),
        }
    }
}

/// A secret that is ready to try slots.
pub(crate) enum Unlocker {
    Passphrase(scrypt::Identity),
    KeyFile(x25519::Identity),
}

impl Unlocker {
    /// The plaintext of a slot, or `None` when it is for another secret.
    ///
    /// # Errors
    /// `Authentication` for a slot that is no whole age file. A damaged one cannot always be told from another secret's.
    pub(crate) fn open(&self, slot: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, FormatError> {
        let plaintext = match self {
            Unlocker::Passphrase(identity) => age::decrypt(identity, slot),
            Unlocker::KeyFile(identity) => age::decrypt(identity, slot),
        };
        match plaintext {
            Ok(plaintext) => Ok(Some(Zeroizing::new(plaintext))),
            Err(DecryptError::NoMatchingKeys | DecryptError::KeyDecryptionFailed) => Ok(None),
            // A wrong passphrase shows as a stanza that does not decrypt.
            Err(DecryptError::DecryptionFailed) if matches!(self, Unlocker::Passphrase(_)) => Ok(None),
            Err(_) => Err(FormatError::Authentication),
        }
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Unlocker::Passphrase(_) => "passphrase",
            Unlocker::KeyFile(_) => "key file",
        }
    }
}

fn secret_string(passphrase: &Zeroizing<String>) -> SecretString {
    SecretString::from(passphrase.as_str().to_owned())
}

fn read_key_file(path: &Path) -> Result<x25519::Identity, Error> {
    let refuse = |cause: String| Error::KeyFile { path: path.to_path_buf(), cause };
    let mut text = Zeroizing::new(String::new());
    let file = std::fs::File::open(path).map_err(|error| refuse(error.to_string()))?;
    file.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| refuse(error.to_string()))?;
    let mut keys = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let (Some(key), None) = (keys.next(), keys.next()) else {
        return Err(refuse("it must hold exactly one key".into()));
    };
    // age's own message might quote what it read.
    key.parse().map_err(|_| refuse("its line is no age X25519 secret key".into()))
}
