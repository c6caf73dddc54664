//! The host's note of what a run puts into QEMU, written before it does.
//!
//! One file a VM, since one run at a time works on it. Whoever next claims the VM undoes what the note names.

use crate::register::{Register, RegisterError, write_private};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::PathBuf;
use vm::point::plan::TAG_BYTES;
use vm::point::{Outcome, Plan};

/// What a run owes to the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The run's id.
    pub run: String,
    /// Every name that the run uses in QEMU; absent while it has no more than its claim.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// What becomes of the bitmaps: kept once the snapshot is sealed.
    pub outcome: Outcome,
}

impl Note {
    /// What tells the run from others in QEMU.
    pub fn tag(&self) -> &str {
        tag(&self.run)
    }
}

/// What tells a run from others in QEMU: the beginning of its id.
pub(crate) fn tag(run: &str) -> &str {
    run.get(..TAG_BYTES).unwrap_or(run)
}

/// The journal of one VM.
#[derive(Clone, Debug)]
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    /// The journal of a registered VM.
    pub fn of(register: &Register, vm: &str) -> Self {
        Self { path: register.journals().join(format!("{vm}.json")) }
    }

    /// The name whose journal holds the note of the run with this tag, if any in this state folder does.
    ///
    /// # Errors
    /// `Io`. A journal that cannot be read is passed over: it is its own VM's trouble.
    pub(crate) fn find(register: &Register, tag: &str) -> Result<Option<String>, RegisterError> {
        let folder = register.journals();
        let io = |source| RegisterError::Io { path: folder.clone(), source };
        for file in fs::read_dir(&folder).map_err(io)? {
            let file = file.map_err(io)?.file_name();
            let Some(name) = file.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            if let Ok(Some(note)) = Self::of(register, name).read()
                && note.tag() == tag
            {
                return Ok(Some(name.to_owned()));
            }
        }
        Ok(None)
    }

    /// What a run that did not end owes, if any.
    ///
    /// # Errors
    /// `Damaged`, `Io`.
    pub fn read(&self) -> Result<Option<Note>, RegisterError> {
        match fs::read(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RegisterError::Io { path: self.path.clone(), source }),
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|e| RegisterError::Damaged { path: self.path.clone(), cause: e.to_string() }),
        }
    }

    /// Writes the note, durably, before what it names is done.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, note: &Note) -> Result<(), RegisterError> {
        let text = serde_json::to_vec_pretty(note)
            .map_err(|e| RegisterError::Damaged { path: self.path.clone(), cause: e.to_string() })?;
        write_private(&self.path, &text)
    }

    /// Removes the note: nothing is owed any more.
    ///
    /// # Errors
    /// `Io`.
    pub fn clear(&self) -> Result<(), RegisterError> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(RegisterError::Io { path: self.path.clone(), source: e })
            }
            _ => Ok(()),
        }
    }
}
