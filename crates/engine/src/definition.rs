//! What a twin needs besides disks: the VM's definition, kernel and initrd or firmware, read from the host's files.

use repository::{Error, Part, Role, Writer};
use snapshot::Reason;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use vm::machine::Definition;

/// Largest kernel, initrd or firmware that is kept, in bytes. Distributions' initrds reach 200 MiB.
pub(crate) const FILE_BYTES_MAX: u64 = 512 << 20;

/// `O_NONBLOCK`, as `custom_flags` wants it.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();

/// What was kept.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) parts: Vec<Part>,
    pub(crate) json: serde_json::Value,
    pub(crate) reasons: Vec<Reason>,
}

/// Keeps the definition and stores the files that it names. A file that cannot be read is a reason, not a failure:
/// the disks are worth keeping without it.
pub(crate) fn keep(definition: &Definition, writer: &Writer) -> Result<Kept, Error> {
    let mut kept = Kept { parts: Vec::new(), json: serde_json::Value::Null, reasons: Vec::new() };
    for (role, name, file) in files(definition) {
        match read(&file) {
            Ok(bytes) => kept.parts.push(part(writer, role, &name, &bytes)?),
            Err(error) => {
                let message = format!("{file} was not kept, so a twin needs another: {error}");
                kept.reasons.push(Reason::new("boot_file_not_kept", name, message));
            }
        }
    }
    kept.json = serde_json::to_value(definition).unwrap_or_default();
    Ok(kept)
}

fn files(definition: &Definition) -> Vec<(Role, String, String)> {
    let boot = &definition.boot;
    let mut files = Vec::new();
    files.extend(boot.kernel.iter().map(|file| (Role::Kernel, "kernel".to_owned(), file.clone())));
    files.extend(boot.initrd.iter().map(|file| (Role::Initrd, "initrd".to_owned(), file.clone())));
    for (number, flash) in boot.flash.iter().enumerate() {
        let role = if flash.read_only { Role::Firmware } else { Role::FirmwareVariables };
        files.push((role, format!("flash{number}"), flash.file.clone()));
    }
    files
}

fn part(writer: &Writer, role: Role, name: &str, bytes: &[u8]) -> Result<Part, Error> {
    let root = writer.blob(bytes)?;
    Ok(Part { name: name.to_owned(), role, size_bytes: bytes.len() as u64, root, facts: BTreeMap::new() })
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    // Not blocking, because the path may name a FIFO; what is no plain file is not read at all.
    let file = OpenOptions::new().read(true).custom_flags(NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no plain file"));
    }
    let size = metadata.len();
    if size > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it has {size} bytes")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_file_that_is_a_fifo_or_a_device_neither_blocks_nor_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("kernel");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        for path in [fifo.to_str().unwrap(), "/dev/zero", folder.path().to_str().unwrap()] {
            assert!(read(path).unwrap_err().to_string().contains("plain file"), "{path}");
        }
    }
}
