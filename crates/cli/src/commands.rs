//! Each command: opens what it needs, lets `engine` work, and says what came of it.

mod boot;
mod check;
mod listing;
mod restore;
mod snapshot;
mod verify;
mod vm;

use crate::Output;
use crate::arguments::{Arguments, Command, Global};
use crate::explain::{Exit, Explanation};
use crate::secret;
use engine::register::{Register, RegisterError};
use engine::watch::Cancel;
use repository::{Error, Manifest, Repository, SnapshotId};
use serde_json::json;
use std::path::PathBuf;

/// Runs one command.
pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<Output, Explanation> {
    let global = &arguments.global;
    match &arguments.command {
        Command::Init => init(global),
        Command::Vm(command) => vm::run(global, command),
        Command::Check { name } => check::run(global, name),
        Command::Snapshot(wish) => snapshot::run(global, wish, cancel),
        Command::Snapshots { name } => listing::list(global, name.as_deref()),
        Command::Show { id } => listing::show(global, id),
        Command::Restore(wish) => restore::run(global, wish, cancel),
        Command::Boot(wish) => boot::run(global, wish, cancel),
        Command::Verify { id } => verify::run(global, id.as_deref()),
        Command::Delete { id } => delete(global, id),
    }
}

fn init(global: &Global) -> Result<Output, Explanation> {
    let folder = repository_folder(global)?;
    let secret = secret::find(global.key_file.as_deref(), global.passphrase_file.as_deref(), true)?;
    let repository =
        Repository::init(&folder, &secret).map_err(|e| of_repository("no repository was made", &e))?;
    let text = format!(
        "made repository {} in {}\nwithout its passphrase or key nothing in it can be read: keep a copy elsewhere\n",
        repository.id(),
        folder.display()
    );
    Ok(Output::new(text, json!({ "repository": repository.id().to_string(), "folder": folder })))
}

fn delete(global: &Global, id: &str) -> Result<Output, Explanation> {
    let repository = open_repository(global)?;
    // By its id only: "the newest" is another one after the next snapshot.
    let id =
        repository.find(id).map_err(|e| of_repository(&format!("snapshot '{id}' was not deleted"), &e))?;
    repository.delete(&id).map_err(|e| of_repository(&format!("snapshot {id} was not deleted"), &e))?;
    let text = format!("deleted {id}; no VM was touched\n");
    Ok(Output::new(text, json!({ "deleted": id.to_string() })))
}

fn repository_folder(global: &Global) -> Result<PathBuf, Explanation> {
    global.repo.clone().ok_or_else(|| {
        let to_do = "give --repo FOLDER, or set STILLPOINT_REPO";
        Explanation::new(
            Exit::Usage,
            "no repository was named",
            "neither --repo nor STILLPOINT_REPO is set",
            to_do,
        )
    })
}

fn open_repository(global: &Global) -> Result<Repository, Explanation> {
    let folder = repository_folder(global)?;
    let secret = secret::find(global.key_file.as_deref(), global.passphrase_file.as_deref(), false)?;
    Repository::open(&folder, &secret)
        .map_err(|e| of_repository(&format!("the repository {} cannot be opened", folder.display()), &e))
}

fn open_register(global: &Global) -> Result<Register, Explanation> {
    Register::open(&global.state_folder()?).map_err(|e| of_register("the state folder cannot be used", &e))
}

/// The snapshot whose id begins so, else the newest of the VM with that name.
fn find(repository: &Repository, wanted: &str) -> Result<SnapshotId, Explanation> {
    let failed = |e: Error| of_repository(&format!("snapshot '{wanted}' cannot be used"), &e);
    match repository.find(wanted) {
        Err(unknown @ Error::NoSuchSnapshot { .. }) => {
            let all = repository.snapshots().map_err(failed)?;
            let newest =
                all.iter().rev().find(|(_, summary)| summary.vm == wanted && summary.damage.is_none());
            newest.map(|(id, _)| *id).ok_or_else(|| {
                let cause = format!("{unknown}, and no VM of that name has one");
                Explanation::new(
                    Exit::NotFound,
                    format!("snapshot '{wanted}' cannot be used"),
                    cause,
                    unknown.to_do(),
                )
            })
        }
        other => other.map_err(failed),
    }
}

fn read_manifest(repository: &Repository, prefix: &str) -> Result<(SnapshotId, Manifest), Explanation> {
    let id = find(repository, prefix)?;
    let manifest =
        repository.manifest(&id).map_err(|e| of_repository(&format!("snapshot {id} cannot be read"), &e))?;
    Ok((id, manifest))
}

/// A failure of the repository in three lines.
fn of_repository(problem: &str, error: &Error) -> Explanation {
    let exit = match error {
        Error::WrongSecret { .. } | Error::KeyFile { .. } | Error::EmptyPassphrase => Exit::WrongKey,
        Error::NoSuchSnapshot { .. } | Error::AmbiguousSnapshot { .. } | Error::NotARepository { .. } => {
            Exit::NotFound
        }
        Error::Damaged { .. } | Error::Missing { .. } | Error::WrongBlock { .. } => Exit::Damaged,
        _ => Exit::Failed,
    };
    let to_do = match error {
        Error::AmbiguousSnapshot { matches, .. } => {
            let newest: Vec<String> = matches.iter().rev().take(4).map(ToString::to_string).collect();
            format!(
                "give more characters of the id, or the VM's name for its newest; the last are {}",
                newest.join(", ")
            )
        }
        _ => error.to_do().to_owned(),
    };
    Explanation::new(exit, problem, error.to_string(), to_do)
}

/// Advice for a monitor that cannot be reached.
fn reach_monitor(vm: &str) -> String {
    format!(
        "check that the VM runs and that nothing else holds its monitor; `stillpoint vm list` shows the sockets of {vm}, \
         `vm remove` and `vm add` change them"
    )
}

/// A failure of the register in three lines.
fn of_register(problem: &str, error: &RegisterError) -> Explanation {
    let (exit, to_do) = match error {
        RegisterError::BadName(_) => (Exit::Usage, "choose another name"),
        RegisterError::Unknown(_) => {
            (Exit::NotFound, "list them with `stillpoint vm list`, or register it with `stillpoint vm add`")
        }
        RegisterError::Exists(_) => {
            (Exit::Failed, "remove it first with `stillpoint vm remove`, or choose another name")
        }
        RegisterError::Busy(_) => (Exit::Busy, "wait until the other run has ended"),
        RegisterError::Unfinished(_) => {
            (Exit::Failed, "take a snapshot of it, which takes that out, or shut the VM off; then try again")
        }
        RegisterError::Scratch { .. } => (Exit::Failed, "see the cause, and try again"),
        RegisterError::Damaged { .. } => (Exit::Failed, "remove the file and register the VM again"),
        RegisterError::Io { .. } => {
            (Exit::Failed, "check the folder's owner and space, or give another with --state")
        }
    };
    Explanation::new(exit, problem, error.to_string(), to_do)
}

#[cfg(test)]
mod tests;
