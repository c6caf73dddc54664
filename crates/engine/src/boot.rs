//! Starts a twin: an isolated VM whose disks are a snapshot's, served from the repository under overlays.
//!
//! Nothing of the original is touched or reached: the description is typed, the files are ours, there is no network,
//! and what the twin writes goes into overlays that end with it.

use crate::definition::FILE_BYTES_MAX;
use crate::fresh_id;
use crate::register::{Register, RegisterError, make_private};
use crate::serve::SnapshotDisk;
use repository::{Manifest, Part, Repository, Role};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vm::accelerator::{self, UnknownAccelerator};
use vm::disks::Bus;
use vm::machine::{Accelerator, Definition};
use vm::nbd_server::{NbdServer, NbdServerError, ServerOptions};
use vm::twin::{Files, Machine, Twin, TwinBoot, TwinDisk, TwinError, TwinFolder, TwinSpec, User};

/// QEMU's program, looked for in the usual places.
const QEMU: &str = "qemu-system-x86_64";
/// How long a twin's QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How the twin should differ from the original.
#[derive(Clone, Debug, Default)]
pub struct TwinWish {
    /// Memory in bytes; absent: as the original.
    pub memory_bytes: Option<u64>,
    /// Virtual CPUs; absent: as the original.
    pub cpus: Option<u32>,
    /// Accelerator; absent: KVM where it really runs a guest.
    pub accelerator: Option<Accelerator>,
    /// Its folder, which must not exist; absent: one under the state folder.
    pub folder: Option<PathBuf>,
}

/// Why there is no twin.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The definition in the manifest is not understood.
    #[error("the snapshot's definition of the VM is not understood: {0}")]
    Definition(String),
    /// A twin of this machine cannot be built.
    #[error("a twin of machine type '{0}' cannot be built")]
    Machine(String),
    /// The snapshot holds no disk.
    #[error("the snapshot holds no disk")]
    NoDisk,
    /// Kernel or firmware was not kept.
    #[error("the VM's {0} was not kept with the snapshot")]
    Missing(&'static str),
    /// Firmware or variables are an image that names its own blocks, and could name other files.
    #[error("the VM's firmware is a '{0}' image, and a twin can use raw firmware only")]
    FirmwareFormat(String),
    /// A file of the twin.
    #[error("{}: {source}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The state folder.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The accelerator.
    #[error(transparent)]
    Accelerator(#[from] UnknownAccelerator),
    /// The disks could not be served.
    #[error(transparent)]
    Serve(#[from] NbdServerError),
    /// QEMU.
    #[error(transparent)]
    Twin(#[from] TwinError),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repository::Error),
}

/// A running twin with what it needs. Dropping it ends the twin and removes its folder, overlays included.
#[derive(Debug)]
#[must_use = "dropping a twin ends it"]
pub struct Running {
    // In the order of dropping: QEMU before the server it reads from, that before the folder.
    twin: Twin,
    _server: NbdServer,
    _folder: Cleared,
    /// Why this accelerator was chosen.
    pub accelerator: String,
}

impl Running {
    /// The twin.
    pub fn twin(&mut self) -> &mut Twin {
        &mut self.twin
    }

    /// Where its sockets are.
    pub fn files(&self) -> &Files {
        self.twin.files()
    }
}

/// A folder that is removed with everything in it.
#[derive(Debug)]
struct Cleared(PathBuf);

impl Drop for Cleared {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // what is left is private, and only ours to tidy up
    }
}

/// Starts a twin and waits until its QEMU runs; the guest then boots.
///
/// # Errors
/// See [`BootError`]; nothing is left behind.
pub fn start(
    register: &Register,
    repository: &Repository,
    manifest: &Manifest,
    wish: &TwinWish,
) -> Result<Running, BootError> {
    let definition: Definition = serde_json::from_value(manifest.definition.clone())
        .map_err(|error| BootError::Definition(error.to_string()))?;
    let user = User::unprivileged();
    let (accelerator, why) = match wish.accelerator {
        Some(accelerator) => (accelerator, "as asked for".to_owned()),
        None => {
            let choice = accelerator::choose(Path::new(QEMU), user)?;
            let why = match choice.accelerator {
                Accelerator::Kvm => choice.why,
                Accelerator::Tcg => format!("emulated, and so slow: {}", choice.why),
            };
            (choice.accelerator, why)
        }
    };
    let spec = spec(manifest, &definition, wish, accelerator)?;
    let path = match &wish.folder {
        Some(folder) => {
            std::path::absolute(folder).map_err(|source| BootError::File { path: folder.clone(), source })?
        }
        None => register.twins()?.join(&fresh_id()[..12]),
    };
    let folder = TwinFolder::create(&path, user)?;
    let cleared = Cleared(path);
    let files = folder.files();
    for part in &manifest.parts {
        if let Some(target) = boot_file(part, &spec.boot, files) {
            write_part(repository, part, &target)?;
        }
    }
    let exports = disks(manifest).enumerate().map(|(number, part)| {
        let disk = SnapshotDisk::new(repository.disk(&part.root));
        (export(number), Arc::new(disk) as _)
    });
    let options = ServerOptions { client_uid: user.map(|user| user.uid), ..ServerOptions::default() };
    let server = NbdServer::start(&files.nbd(), exports.collect(), options)?;
    let twin = Twin::start(Path::new(QEMU), &spec, &folder, START_TIMEOUT)?;
    Ok(Running { twin, _server: server, _folder: cleared, accelerator: why })
}

fn disks(manifest: &Manifest) -> impl Iterator<Item = &Part> {
    manifest.parts.iter().filter(|part| part.role == Role::Disk)
}

/// NBD export of a disk: a name of ours, whatever the disk is called.
fn export(number: usize) -> String {
    format!("disk{number}")
}

/// The twin's description: only typed values pass from the stored definition.
fn spec(
    manifest: &Manifest,
    definition: &Definition,
    wish: &TwinWish,
    accelerator: Accelerator,
) -> Result<TwinSpec, BootError> {
    let machine = Machine::parse(&definition.machine)
        .ok_or_else(|| BootError::Machine(definition.machine.chars().take(64).collect()))?;
    let disks: Vec<TwinDisk> = disks(manifest)
        .enumerate()
        .map(|(number, part)| TwinDisk {
            export: export(number),
            size_bytes: part.size_bytes,
            bus: bus(part),
            serial: part.facts.get("serial").cloned(),
        })
        .collect();
    if disks.is_empty() {
        return Err(BootError::NoDisk);
    }
    let kept = |role| manifest.parts.iter().any(|part| part.role == role);
    let boot = if definition.boot.kernel.is_some() {
        if !kept(Role::Kernel) {
            return Err(BootError::Missing("kernel"));
        }
        if definition.boot.initrd.is_some() && !kept(Role::Initrd) {
            return Err(BootError::Missing("initrd"));
        }
        let append = definition.boot.append.clone().unwrap_or_default();
        TwinBoot::Kernel { initrd: kept(Role::Initrd), append }
    } else if definition.boot.flash.is_empty() {
        TwinBoot::Bios
    } else if let Some(flash) = definition.boot.flash.iter().find(|flash| !flash.is_plain()) {
        return Err(BootError::FirmwareFormat(flash.format.chars().take(64).collect()));
    } else if kept(Role::Firmware) && kept(Role::FirmwareVariables) {
        TwinBoot::Firmware
    } else {
        return Err(BootError::Missing("firmware"));
    };
    Ok(TwinSpec {
        machine,
        accelerator,
        cpus: wish.cpus.unwrap_or(definition.cpus),
        memory_bytes: wish.memory_bytes.unwrap_or(definition.memory_bytes),
        boot,
        disks,
    })
}

/// A disk whose bus was not written down, or is not known, gets virtio-blk.
fn bus(part: &Part) -> Bus {
    let name = part.facts.get("bus").cloned().unwrap_or_default();
    serde_json::from_value(serde_json::Value::String(name)).unwrap_or(Bus::VirtioBlk)
}

/// Where a part that is no disk goes, if this way of booting needs it.
fn boot_file(part: &Part, boot: &TwinBoot, files: &Files) -> Option<PathBuf> {
    match (part.role, boot) {
        (Role::Kernel, TwinBoot::Kernel { .. }) => Some(files.kernel()),
        (Role::Initrd, TwinBoot::Kernel { initrd: true, .. }) => Some(files.initrd()),
        (Role::Firmware, TwinBoot::Firmware) => Some(files.firmware_code()),
        (Role::FirmwareVariables, TwinBoot::Firmware) => Some(files.firmware_variables()),
        _ => None,
    }
}

fn write_part(repository: &Repository, part: &Part, target: &Path) -> Result<(), BootError> {
    let io = |source| BootError::File { path: target.to_owned(), source };
    let disk = repository.disk(&part.root);
    if disk.size_bytes() > FILE_BYTES_MAX {
        return Err(io(io::Error::other(format!("a boot file of {} bytes", disk.size_bytes()))));
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target).map_err(io)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < disk.size_bytes() {
        let length = (disk.size_bytes() - at).min(buffer.len() as u64);
        let piece = &mut buffer[..usize::try_from(length).expect("at most 1 MiB")];
        disk.read_at(at, piece)?;
        file.write_all(piece).map_err(io)?;
        at += length;
    }
    Ok(())
}

impl Register {
    /// Folder of the twins: others may pass through it, because a twin runs as another user, but see nothing.
    fn twins(&self) -> Result<PathBuf, RegisterError> {
        use std::os::unix::fs::PermissionsExt;
        let twins = self.folder().join("twins");
        make_private(&twins)?;
        for folder in [self.folder(), &twins] {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o711))
                .map_err(|source| RegisterError::Io { path: folder.to_owned(), source })?;
        }
        Ok(twins)
    }
}
