//! Programs that we start: found where we would find them, and gone when we are.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where we would find a program that is named without a folder. QEMU gets another `PATH` than ours, and the standard
/// library would look for its program there: another QEMU than the one that was probed and that made the overlays.
pub(crate) fn in_our_path(program: &Path) -> PathBuf {
    let named_only = program.components().count() == 1 && !program.is_absolute();
    let folders = std::env::var_os("PATH").filter(|_| named_only).unwrap_or_default();
    let found =
        std::env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| path.is_file());
    found.unwrap_or_else(|| program.to_owned())
}

/// The program does not outlive the thread that starts it, even if that is killed: nobody would know of it.
pub(crate) fn end_with_us(command: &mut Command) {
    let ask = || Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?);
    // SAFETY: between fork and exec this makes one system call and allocates nothing. Where the user was changed before,
    // which would have cleared the setting, that is over by then.
    unsafe { command.pre_exec(ask) };
}
