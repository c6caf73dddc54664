//! `restore`: disks of a snapshot to files or block devices.

use super::{of_repository, open_repository, read_manifest};
use crate::Output;
use crate::arguments::{Format, Global, RestoreArguments};
use crate::explain::{Exit, Explanation};
use crate::progress::Bar;
use engine::restore::{RestoreError, to_qcow2, to_raw};
use engine::watch::{Cancel, Watch};
use repository::Role;
use serde_json::json;
use std::fmt::Write;

pub(crate) fn run(global: &Global, wish: &RestoreArguments, cancel: &Cancel) -> Result<Output, Explanation> {
    let repository = open_repository(global)?;
    let (id, manifest) = read_manifest(&repository, &wish.id)?;
    let parts: Vec<_> = manifest.parts.iter().filter(|part| part.role == Role::Disk).collect();
    let mut chosen = Vec::new();
    for (disk, path) in &wish.disks {
        let Some(part) = parts.iter().find(|part| part.name == *disk) else {
            let known: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
            return Err(Explanation::new(
                Exit::NotFound,
                format!("snapshot {id} holds no disk '{disk}'"),
                format!("it holds: {}", known.join(", ")),
                "give one of these names",
            ));
        };
        chosen.push((part, path));
    }
    let mut text = String::new();
    let mut rows = Vec::new();
    for (part, path) in chosen {
        let bar = Bar::new(global.json);
        bar.step(&format!("restoring {}", part.name));
        let disk = repository.disk(&part.root);
        let restored = match wish.format {
            Format::Raw => to_raw(&disk, path, wish.overwrite, &bar, cancel),
            Format::Qcow2 => to_qcow2(&disk, path, wish.overwrite, &bar, cancel),
        };
        drop(bar);
        restored.map_err(|error| explain(&part.name, &error))?;
        // Writing to a String cannot fail.
        writeln!(text, "restored {} to {}", part.name, path.display()).unwrap_or_default();
        rows.push(json!({ "disk": part.name, "path": path, "size_bytes": part.size_bytes }));
    }
    Ok(Output::new(text, json!({ "snapshot": id.to_string(), "restored": rows })))
}

fn explain(disk: &str, error: &RestoreError) -> Explanation {
    let problem = format!("disk '{disk}' was not restored");
    let plain = |exit, to_do: &str| Explanation::new(exit, &problem, error.to_string(), to_do);
    match error {
        RestoreError::Repository(error) => of_repository(&problem, error),
        RestoreError::Exists(_) => {
            plain(Exit::Failed, "choose another path, or give --overwrite; nothing was changed")
        }
        RestoreError::TooSmall { .. } => plain(Exit::Failed, "choose a larger device; nothing was changed"),
        RestoreError::RawOnly(_) => plain(Exit::Usage, "give --format raw; nothing was changed"),
        RestoreError::Target { .. } => {
            plain(Exit::Failed, "make room or check the path; what was there as a file is unharmed")
        }
        RestoreError::Serve(_) | RestoreError::Convert { .. } => {
            plain(Exit::Failed, "check that qemu-img is installed; or restore as raw")
        }
        RestoreError::Interrupted => {
            plain(Exit::Interrupted, "nothing, or restore again; no partial file was left")
        }
    }
}
