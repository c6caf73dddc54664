//! `boot`: an isolated twin, which lives as long as this command.

use super::{of_register, of_repository, open_register, open_repository, read_manifest};
use crate::arguments::{BootArguments, Global};
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::{Output, tell};
use engine::boot::{BootError, TwinWish, start};
use engine::watch::Cancel;
use serde_json::json;
use std::io::Write;
use std::time::Duration;
use vm::machine::Accelerator;

/// Lines of the guest's console that are shown when it ends by itself.
const CONSOLE_LINES_SHOWN: usize = 5;

pub(crate) fn run(global: &Global, wish: &BootArguments, cancel: &Cancel) -> Result<Output, Explanation> {
    let accelerator = wish.accel.as_deref().map(accelerator).transpose()?;
    let repository = open_repository(global)?;
    let register = open_register(global)?;
    let (id, manifest) = read_manifest(&repository, &wish.id)?;
    let twin_wish = TwinWish {
        memory_bytes: wish.memory.map(|mib| mib << 20),
        cpus: wish.cpus,
        accelerator,
        folder: wish.folder.clone(),
    };
    let mut running =
        start(&register, &repository, &manifest, &twin_wish).map_err(|error| explain(&error))?;
    let files = running.files().clone();
    let sockets = json!({
        "event": "started", "snapshot": id.to_string(), "folder": files.folder(), "agent": files.agent(),
        "monitor": files.monitor(), "console": files.console(), "pid": running.twin().pid(),
        "accelerator": running.accelerator,
    });
    let text = format!(
        "a twin of {id} has started and boots, without a network ({})\n  agent    {}\n  monitor  {}\nCtrl-C ends it and discards what it wrote\n",
        running.accelerator,
        files.agent().display(),
        files.monitor().display(),
    );
    let started =
        if global.json { format!("{}\n", crate::escape::json(&sockets)) } else { crate::escape::page(&text) };
    let mut out = std::io::stdout().lock();
    // Whoever started us may not read it; the twin runs all the same.
    let _ = out.write_all(started.as_bytes()).and_then(|()| out.flush());
    drop(out);
    let mut last_words = String::new();
    let ended = loop {
        if cancel.is_set() {
            break "ended as asked";
        }
        let waited = running.twin().wait(Duration::from_millis(200));
        match waited {
            Ok(None) => {}
            Ok(Some(status)) if status.success() => {
                last_words = console(&running.twin().console_tail());
                break "shut down by itself";
            }
            Ok(Some(status)) => {
                let cause = format!("its QEMU ended with {status}");
                tell(&console(&running.twin().console_tail()));
                return Err(Explanation::new(
                    Exit::Failed,
                    "the twin failed",
                    cause,
                    "boot it again; the snapshot is unharmed",
                ));
            }
            Err(error) => {
                let cause = error.to_string();
                return Err(Explanation::new(
                    Exit::Failed,
                    "the twin cannot be watched",
                    cause,
                    "boot it again",
                ));
            }
        }
    };
    drop(running);
    Ok(Output::new(
        format!("{last_words}the twin {ended}\n"),
        json!({ "snapshot": id.to_string(), "ended": ended }),
    ))
}

/// What the guest said last: a panic looks like a shutdown from outside.
fn console(tail: &str) -> String {
    let said: Vec<&str> = tail.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = &said[said.len().saturating_sub(CONSOLE_LINES_SHOWN)..];
    let lines: String = last.iter().map(|line| format!("  {}\n", Plain(line.trim_end()))).collect();
    if lines.is_empty() { lines } else { format!("its console ends with\n{lines}") }
}

fn accelerator(name: &str) -> Result<Accelerator, Explanation> {
    match name {
        "kvm" => Ok(Accelerator::Kvm),
        "tcg" => Ok(Accelerator::Tcg),
        _ => {
            let cause = format!("'{name}' is no accelerator");
            Err(Explanation::new(Exit::Usage, "no twin was started", cause, "give kvm or tcg"))
        }
    }
}

pub(super) fn explain(error: &BootError) -> Explanation {
    let problem = "no twin was started";
    let to_do = match error {
        BootError::Repository(error) => return of_repository(problem, error),
        BootError::Register(error) => return of_register(problem, error),
        BootError::Definition(_) => "restore the disks and start the VM by other means",
        BootError::Machine(_) | BootError::NoDisk => "restore the disks and start the VM by other means",
        BootError::Missing(_) | BootError::FirmwareFormat(_) => {
            "restore the disks and boot them with a kernel or firmware of your own"
        }
        BootError::File { .. } => "give another folder with --folder, with room for what the twin writes",
        BootError::Accelerator(_) => "set STILLPOINT_ACCEL to kvm or tcg, or unset it",
        BootError::Serve(_) => "give another folder with --folder; its path must be short",
        BootError::Twin(_) => {
            "see the cause; the twin runs as an unprivileged user, so every folder above its own must let others pass \
             (choose with --folder); or try --accel tcg, less --memory"
        }
    };
    Explanation::new(Exit::Failed, problem, error.to_string(), to_do)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_shown_by_its_last_lines_and_moves_no_cursor() {
        let said: String = (1..=7).map(|number| format!("line {number}\u{1b}[2J\r\n\n")).collect();
        let shown = console(&said);
        assert!(!shown.contains('\u{1b}') && !shown.contains('\r'), "{shown:?}");
        assert_eq!(shown.lines().count(), 1 + CONSOLE_LINES_SHOWN, "{shown}");
        assert!(shown.contains("line 3\\u{1b}[2J") && !shown.contains("line 2"), "{shown}");
        assert_eq!(console("\n \n"), "");
    }
}
