//! Which programs are the hooks.
//!
//! `-F` names one program. QEMU's packages put a script there that calls everything in `fsfreeze-hook.d`, but tells of no
//! failure, calls in the same order for freeze and thaw, and with some shells does not run at all. Where that very script
//! (or ours) is found, the agent calls the folder's programs itself; any other program is called as it is, and is all that
//! is called.

use super::{Failure, refused, trust};
use guest_protocol::stillpoint::HOOKS_MAX;
use rustix::fs::{Access, access};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What `-F` without a path means.
pub const DEFAULT_PATH: &str = "/etc/qemu/fsfreeze-hook";
/// Beside the program.
const FOLDER: &str = "fsfreeze-hook.d";
/// In our own script, so that it is known for what it is.
const OURS: &[u8] = b"stillpoint-agent calls fsfreeze-hook.d by itself";
/// Most bytes of a program that are looked at.
const SCRIPT_BYTES_MAX: u64 = 64 << 10;
/// Endings of files that editors and package managers leave. Source: QEMU, `scripts/qemu-guest-agent/fsfreeze-hook`.
const IGNORED: &[&str] = &[
    "~",
    ".bak",
    ".orig",
    ".rpmnew",
    ".rpmorig",
    ".rpmsave",
    ".sample",
    ".dpkg-old",
    ".dpkg-new",
    ".dpkg-tmp",
    ".dpkg-dist",
    ".dpkg-bak",
    ".dpkg-backup",
    ".dpkg-remove",
];
/// Fingerprints of QEMU's script in its versions (1.4; 7.0; 9.1; 10.0 with both ways to its folder; 10.2; 11.0), without
/// comments, empty lines and the log file's name.
const THEIRS: &[u64] = &[
    0x555d_ebae_cf7c_6a43,
    0xdf8e_8d6a_ed16_eeaa,
    0x54db_05de_0418_32e2,
    0x191e_94e9_66d2_8fbe,
    0x7dbc_66af_8ca6_2486,
    0x5378_002c_5639_b82e,
    0xfc68_78bd_a401_f218,
];

/// The programs to call, in the order of the freeze. Opens files: call it before the freeze.
/// # Errors
/// When the hook is not there or cannot be executed, or one must not be trusted: nothing may be frozen then.
pub fn find(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    // Commands get it as it was given; a folder beside it is found whatever the working folder will be.
    let path = std::path::absolute(path).map_err(|error| missing(path, &error))?;
    let found = match std::fs::metadata(&path) {
        Ok(found) if found.is_dir() => programs_in(&path)?,
        Ok(_) => {
            access(&path, Access::EXEC_OK).map_err(|error| missing(&path, &error.into()))?;
            if calls_the_folder(&path) { programs_in(&folder_of(&path))? } else { vec![path] }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && folder_of(&path).is_dir() => {
            programs_in(&folder_of(&path))?
        }
        Err(error) => return Err(missing(&path, &error)),
    };
    if found.len() > HOOKS_MAX {
        let message = format!("{} hooks, at most {HOOKS_MAX} are called", found.len());
        return Err(Failure { code: "hook_refused", message });
    }
    for hook in &found {
        trust::trusted(hook).map_err(|why| refused(hook, &why))?;
    }
    Ok(found)
}

fn missing(path: &Path, error: &io::Error) -> Failure {
    let words = error.to_string();
    let words = words.split(" (os error").next().unwrap_or_default();
    let message = format!("failed to exec '{}': {words}", path.display());
    Failure {
        code: "hook_failed",
        message: format!("child process has failed to execute fsfreeze hook: {message}"),
    }
}

/// A script that was linked to from elsewhere has its folder beside the link or, in later versions, beside itself.
fn folder_of(path: &Path) -> PathBuf {
    let beside = path.with_file_name(FOLDER);
    match std::fs::canonicalize(path) {
        Ok(real) if !beside.is_dir() => real.with_file_name(FOLDER),
        _ => beside,
    }
}

/// In the order of their names' bytes, as a shell lists them that knows no language.
fn programs_in(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        // QEMU's script is content without a folder.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(missing(folder, &error)),
    };
    let mut programs = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| missing(folder, &error))?.path();
        let is_program = || path.is_file() && access(&path, Access::EXEC_OK).is_ok();
        if path.file_name().is_some_and(|name| !is_ignored(name)) && is_program() {
            programs.push(path);
        }
    }
    programs.sort();
    Ok(programs)
}

fn is_ignored(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b".") || IGNORED.iter().any(|ending| name.ends_with(ending.as_bytes()))
}

fn calls_the_folder(path: &Path) -> bool {
    let Ok(script) = crate::freeze::gather::read_bounded(path, SCRIPT_BYTES_MAX) else { return false };
    script.windows(OURS.len()).any(|window| window == OURS) || THEIRS.contains(&fingerprint(&script))
}

/// FNV-1a of what a script does.
fn fingerprint(script: &[u8]) -> u64 {
    let lines = script.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let counted =
        lines.filter(|line| !line.is_empty() && !line.starts_with(b"#") && !line.starts_with(b"LOGFILE="));
    let bytes = counted.flat_map(|line| line.iter().chain(b"\n"));
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    fn program(path: &Path, text: &str, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn names(found: Result<Vec<PathBuf>, Failure>) -> Vec<String> {
        let found = found.unwrap();
        found.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_program_of_its_own_is_all_that_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let hook = folder.path().join("fsfreeze-hook");
        program(&hook, "#!/bin/sh\nexit 0\n", 0o755);
        program(&folder.path().join("fsfreeze-hook.d/10-x"), "", 0o755);
        assert_eq!(find(&hook), Ok(vec![hook]));
    }

    #[test]
    fn the_folder_is_called_in_order_without_what_editors_and_packages_leave() {
        let folder = tempfile::tempdir().unwrap();
        let hook = folder.path().join("fsfreeze-hook");
        program(&hook, "#!/bin/sh\n# stillpoint-agent calls fsfreeze-hook.d by itself\n", 0o755);
        assert_eq!(find(&hook), Ok(vec![]), "no folder is no hook");
        let there = folder.path().join(FOLDER);
        for name in ["20-b", "10-a", "B", "a~", "x.bak", "x.sample", "x.dpkg-old", ".hidden", "x.rpmsave"] {
            program(&there.join(name), "", 0o755);
        }
        program(&there.join("README"), "", 0o644);
        fs::create_dir(there.join("folder")).unwrap();
        assert_eq!(names(find(&hook)), ["10-a", "20-b", "B"]);
        assert_eq!(names(find(&there)), ["10-a", "20-b", "B"], "the folder may be named itself");
        fs::remove_file(&hook).unwrap();
        assert_eq!(names(find(&hook)), ["10-a", "20-b", "B"], "the script need not be there");
    }

    #[test]
    fn qemus_own_script_is_known_whatever_its_log_file_and_comments() {
        let later = std::env::var_os("STILLPOINT_STOCK_AGENTS").unwrap_or_default();
        let later =
            std::env::split_paths(&later).map(|folder| folder.join(DEFAULT_PATH.trim_start_matches('/')));
        let all = std::iter::once(PathBuf::from(DEFAULT_PATH)).chain(later);
        let packaged: Vec<String> = all.filter_map(|path| fs::read_to_string(path).ok()).collect();
        if packaged.is_empty() {
            // Past cargo's capture: a test that did not run is told.
            writeln!(
                io::stderr(),
                "SKIPPED {DEFAULT_PATH} is not there: Debian's qemu-guest-agent brings it"
            )
            .unwrap();
        }
        packaged.iter().for_each(|script| is_known(script));
    }

    #[track_caller]
    fn is_known(packaged: &str) {
        let folder = tempfile::tempdir().unwrap();
        let hook = folder.path().join("fsfreeze-hook");
        program(&folder.path().join("fsfreeze-hook.d/10-x"), "", 0o755);
        program(&hook, packaged, 0o755);
        assert_eq!(names(find(&hook)), ["10-x"]);
        program(&hook, &packaged.replace("/var/log/", "/srv/log/").replace("# Check", "# Look"), 0o755);
        assert_eq!(names(find(&hook)), ["10-x"]);
        program(&hook, &packaged.replace("exit 0", "systemctl stop x; exit 0"), 0o755);
        assert_eq!(names(find(&hook)), ["fsfreeze-hook"], "changed, it may do more, and is called itself");
    }

    #[test]
    fn a_hook_that_is_not_there_or_cannot_be_executed_fails_the_freeze() {
        let folder = tempfile::tempdir().unwrap();
        let hook = folder.path().join("fsfreeze-hook");
        let words = |failure: Failure| (failure.code, failure.message);
        let (code, message) = words(find(&hook).unwrap_err());
        assert_eq!(code, "hook_failed");
        assert!(message.ends_with("fsfreeze-hook': No such file or directory"), "{message}");
        program(&hook, "", 0o644);
        let (_, message) = words(find(&hook).unwrap_err());
        assert!(message.ends_with("fsfreeze-hook': Permission denied"), "{message}");
    }

    #[test]
    fn one_program_that_others_may_change_spoils_all() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join(FOLDER);
        program(&there.join("10-good"), "", 0o755);
        program(&there.join("20-bad"), "", 0o777);
        let failure = find(&there).unwrap_err();
        assert_eq!(failure.code, "hook_refused");
        assert!(failure.message.contains("20-bad"), "{}", failure.message);
    }
}
