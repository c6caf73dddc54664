//! `restore`: disks of a snapshot to files or block devices.

use super::{of_repository, open_repository, read_manifest};
use crate::Output;
use crate::arguments::{Format, Global, RestoreArguments};
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::progress::Bar;
use crate::units::Bytes;
use engine::restore::{RestoreError, Target, to_qcow2, to_raw};
use engine::watch::{Cancel, Watch};
use repository::Role;
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;

pub(crate) fn run(global: &Global, wish: &RestoreArguments, cancel: &Cancel) -> Result<Output, Explanation> {
    let repository = open_repository(global)?;
    let (id, manifest) = read_manifest(&repository, &wish.id)?;
    let parts: Vec<_> = manifest.parts.iter().filter(|part| part.role == Role::Disk).collect();
    let mut chosen = Vec::new();
    for wanted in &wish.disks {
        // A disk that is called by its serial number may have any character in its name, '=' included.
        let target =
            |name: &str| wanted.strip_prefix(name)?.strip_prefix('=').filter(|path| !path.is_empty());
        let found = parts.iter().filter_map(|part| Some((part, PathBuf::from(target(&part.name)?))));
        let Some((part, path)) = found.max_by_key(|(part, _)| part.name.len()) else {
            let disk = wanted.split_once('=').map_or(wanted.as_str(), |(disk, _)| disk);
            let known: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
            return Err(Explanation::new(
                Exit::NotFound,
                format!("snapshot {id} holds no disk '{disk}'"),
                format!("it holds: {}", known.join(", ")),
                "give one of these names",
            ));
        };
        if chosen.iter().any(|(_, other, _)| *other == path) {
            return Err(Explanation::new(
                Exit::Usage,
                "nothing was restored",
                format!("two disks would go to {}", path.display()),
                "give each disk a path of its own",
            ));
        }
        // All of them before the first is written, and held until they are: half a restore is worse than none.
        let target = Target::claim(&path, wish.overwrite).map_err(|error| explain(&part.name, &error))?;
        chosen.push((part, path, target));
    }
    let mut text = String::new();
    let mut rows = Vec::new();
    for (part, path, target) in chosen {
        let bar = Bar::new(global.json);
        bar.step(&format!("restoring {}", Plain(&part.name)));
        let disk = repository.disk(&part.root);
        let word = if wish.format == Format::Raw { "raw" } else { "qcow2" };
        let restored = match wish.format {
            Format::Raw => to_raw(&disk, target, &bar, cancel),
            Format::Qcow2 => to_qcow2(&disk, target, &bar, cancel),
        };
        drop(bar);
        restored.map_err(|error| explain(&part.name, &error))?;
        // Writing to a String cannot fail.
        writeln!(
            text,
            "restored {} of {id} to {} ({}, {})",
            Plain(&part.name),
            Plain(path.display()),
            word,
            Bytes(part.size_bytes)
        )
        .unwrap_or_default();
        rows.push(json!({ "disk": part.name, "path": path, "format": word, "size_bytes": part.size_bytes }));
    }
    Ok(Output::new(text, json!({ "snapshot": id.to_string(), "restored": rows })))
}

pub(super) fn explain(disk: &str, error: &RestoreError) -> Explanation {
    let problem = format!("disk '{disk}' was not restored");
    let plain = |exit, to_do: &str| Explanation::new(exit, &problem, error.to_string(), to_do);
    match error {
        RestoreError::Repository(error) => of_repository(&problem, error),
        RestoreError::Exists(_) => {
            plain(Exit::Failed, "choose another path, or give --overwrite; nothing was changed")
        }
        RestoreError::NotAFile(_) => plain(Exit::Usage, "give the path of a file; nothing was changed"),
        RestoreError::NoFolder(_) => plain(Exit::Usage, "make it, or give another path; nothing was changed"),
        RestoreError::InUse(_) => plain(
            Exit::Failed,
            "shut the VM down (or unmount the device) first, or restore to another path; nothing was changed",
        ),
        RestoreError::Changed(_) => plain(
            Exit::Failed,
            "see who put another file there, and restore again, or to another path; neither file was changed",
        ),
        RestoreError::TooSmall { .. } => plain(Exit::Failed, "choose a larger device; nothing was changed"),
        RestoreError::RawOnly(_) => plain(Exit::Usage, "give --format raw; nothing was changed"),
        RestoreError::Target { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
            plain(Exit::Failed, "make room, or give a path elsewhere; a file that was there is unharmed")
        }
        RestoreError::Target { .. } => plain(
            Exit::Failed,
            "check the path and its owner; a file that was there is unharmed, a block device may be half written",
        ),
        RestoreError::Serve(_) | RestoreError::Convert { .. } => plain(
            Exit::Failed,
            "check the cause, and that qemu-img is installed; or restore with --format raw",
        ),
        RestoreError::Interrupted => plain(
            Exit::Interrupted,
            "nothing, or restore again; no partial file was left, but a block device may be half written",
        ),
    }
}
