//! What a twin needs besides disks: the VM's definition, kernel and initrd or firmware, read from the host's files.

use repository::{Error, Part, Role, Writer};
use snapshot::Reason;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use vm::machine::{Definition, Flash};

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
    /// The firmware's variables, which the guest may write until the point: for [`keep_variables`].
    pub(crate) variables: Vec<BootFile>,
}

/// A file that boots the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootFile {
    role: Role,
    name: String,
    path: String,
    /// As QEMU was told; only flash has one.
    format: Option<String>,
}

/// Keeps the definition and stores the files that it names, but for the firmware's variables, which are only looked at.
/// A file that cannot be read is a reason, not a failure: the disks are worth keeping without it.
pub(crate) fn keep(definition: &Definition, writer: &Writer) -> Result<Kept, Error> {
    let json = serde_json::to_value(definition).unwrap_or_default();
    let reasons = definition.boot.flash.iter().filter(|flash| !flash.is_plain()).map(not_plain).collect();
    let mut kept = Kept { parts: Vec::new(), json, reasons, variables: Vec::new() };
    for file in files(definition) {
        let read = match file.role {
            Role::FirmwareVariables => open(&file.path).map(|_| None),
            _ => read(&file.path).map(Some),
        };
        match read {
            Ok(Some(bytes)) => kept.parts.push(file.part(writer, &bytes)?),
            Ok(None) => kept.variables.push(file),
            Err(error) => kept.reasons.push(file.not_kept(&error)),
        }
    }
    Ok(kept)
}

/// Stores the firmware's variables. Called after the point, so that they are not older than the disks.
pub(crate) fn keep_variables(
    variables: &[BootFile],
    writer: &Writer,
) -> Result<(Vec<Part>, Vec<Reason>), Error> {
    let (mut parts, mut reasons) = (Vec::new(), Vec::new());
    for file in variables {
        match read(&file.path) {
            Ok(bytes) => parts.push(file.part(writer, &bytes)?),
            Err(error) => reasons.push(file.not_kept(&error)),
        }
    }
    Ok((parts, reasons))
}

fn files(definition: &Definition) -> Vec<BootFile> {
    let boot = &definition.boot;
    let plain = |role, name: &str, path: &String| BootFile {
        role,
        name: name.to_owned(),
        path: path.clone(),
        format: None,
    };
    let mut files = Vec::new();
    files.extend(boot.kernel.iter().map(|path| plain(Role::Kernel, "kernel", path)));
    files.extend(boot.initrd.iter().map(|path| plain(Role::Initrd, "initrd", path)));
    for (number, flash) in boot.flash.iter().enumerate() {
        let role = if flash.read_only { Role::Firmware } else { Role::FirmwareVariables };
        let format = Some(flash.format.clone());
        files.push(BootFile { role, name: format!("flash{number}"), path: flash.file.clone(), format });
    }
    files
}

/// The file's bytes are kept, for a person to use. A twin does not open them: an image may name other files of the host.
fn not_plain(flash: &Flash) -> Reason {
    let Flash { file, format, .. } = flash;
    let message = format!("{file} is a {format} image, and a twin can use raw firmware only");
    Reason::new("firmware_not_raw", "firmware", message)
}

impl BootFile {
    fn part(&self, writer: &Writer, bytes: &[u8]) -> Result<Part, Error> {
        let root = writer.blob(bytes)?;
        let facts = self.format.iter().map(|format| ("format".to_owned(), format.clone())).collect();
        Ok(Part { name: self.name.clone(), role: self.role, size_bytes: bytes.len() as u64, root, facts })
    }

    fn not_kept(&self, error: &io::Error) -> Reason {
        let message = format!("{} was not kept, so a twin needs another: {error}", self.path);
        Reason::new("boot_file_not_kept", &self.name, message)
    }
}

fn open(path: &str) -> io::Result<File> {
    if !Path::new(path).is_absolute() {
        return Err(io::Error::other("its path is relative to a folder of QEMU's that is not known"));
    }
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
    Ok(file)
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
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

    #[test]
    fn a_relative_path_is_not_read_from_our_own_folder() {
        // Tests run in the crate's folder, where this is.
        assert!(Path::new("Cargo.toml").is_file());
        assert!(read("Cargo.toml").unwrap_err().to_string().contains("relative"));
    }

    #[test]
    fn variables_are_kept_as_they_are_after_the_point_and_images_are_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        for name in ["code", "vars", "kernel"] {
            std::fs::write(path(name), "before").unwrap();
        }
        let secret = repository::Secret::Passphrase("correct horse battery staple".to_owned().into());
        let place = folder.path().join("repository");
        repository::Repository::init(&place, &secret).unwrap();
        let options = repository::Options { cache: Some(folder.path().join("cache")) };
        let repository = repository::Repository::open_with(&place, &secret, &options).unwrap();
        let writer = repository.begin().unwrap();
        let flash = |name: &str, format: &str, read_only| Flash {
            file: path(name),
            format: format.to_owned(),
            size_bytes: 6,
            read_only,
        };
        let mut definition = Definition::default();
        definition.boot.kernel = Some(path("kernel"));
        definition.boot.flash =
            vec![flash("code", "qcow2", true), flash("vars", "raw", false), flash("gone", "raw", false)];
        let kept = keep(&definition, &writer).unwrap();
        let codes: Vec<_> = kept.reasons.iter().map(|reason| reason.code.to_string()).collect();
        assert_eq!(codes, ["firmware_not_raw", "boot_file_not_kept"]);
        let roles = |parts: &[Part]| parts.iter().map(|part| part.role).collect::<Vec<_>>();
        assert_eq!(roles(&kept.parts), [Role::Kernel, Role::Firmware]);
        assert_eq!(kept.parts[1].facts["format"], "qcow2");

        for name in ["code", "vars", "kernel"] {
            std::fs::write(path(name), "after!").unwrap();
        }
        let (parts, reasons) = keep_variables(&kept.variables, &writer).unwrap();
        assert_eq!((roles(&parts), reasons), (vec![Role::FirmwareVariables], vec![]));
        std::fs::remove_file(path("vars")).unwrap();
        let (none, reasons) = keep_variables(&kept.variables, &writer).unwrap();
        assert!(none.is_empty() && reasons.len() == 1, "{reasons:?}");
        let manifest = repository::Manifest {
            vm: "db1".to_owned(),
            parent: None,
            created_at_ms: 0,
            description: None,
            level: "crash".to_owned(),
            parts: parts.clone(),
            definition: kept.json,
            receipt: serde_json::Value::Null,
        };
        writer.commit(manifest).unwrap();
        let mut bytes = [0; 6];
        repository.disk(&parts[0].root).read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"after!");
    }
}
