//! What a VM was made of when it was last seen running: while it is shut off nobody can be asked.

use crate::now_ms;
use crate::register::{Register, RegisterError, write_private};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::PathBuf;
use vm::disks::Drives;
use vm::machine::Definition;

/// What was seen, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Milliseconds since 1970.
    pub(crate) at_ms: u64,
    /// What the VM was made of.
    pub(crate) definition: Definition,
    /// Its disks with their images, and the other drives.
    pub(crate) drives: Drives,
}

impl Seen {
    /// As of now.
    pub(crate) fn now(definition: Definition, drives: Drives) -> Self {
        Self { at_ms: now_ms(), definition, drives }
    }

    /// What was seen of a registered VM, if it ever was.
    pub(crate) fn last(register: &Register, vm: &str) -> Result<Option<Self>, RegisterError> {
        let path = path(register, vm);
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RegisterError::Io { path, source }),
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| RegisterError::Damaged { path, cause: error.to_string() }),
        }
    }

    /// Remembers it.
    pub(crate) fn keep(&self, register: &Register, vm: &str) -> Result<(), RegisterError> {
        let path = path(register, vm);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| RegisterError::Damaged { path: path.clone(), cause: error.to_string() })?;
        write_private(&path, &text)
    }

    /// Forgets it.
    pub(crate) fn forget(register: &Register, vm: &str) -> Result<(), RegisterError> {
        let path = path(register, vm);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(RegisterError::Io { path, source: error })
            }
            _ => Ok(()),
        }
    }
}

fn path(register: &Register, vm: &str) -> PathBuf {
    register.seen().join(format!("{vm}.json"))
}
