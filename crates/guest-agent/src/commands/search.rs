//! Finding programs by name, as execvp(3) and qemu-ga do.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

/// Where exec looks if nobody says, as in qemu-ga.
const PATH_UNSET: &str = "/bin:/usr/bin:.";

/// The program, looked for in `PATH` as given, or else as the agent has it.
pub(super) fn find(name: &str, path: Option<&str>) -> io::Result<PathBuf> {
    if name.contains('/') {
        return Ok(name.into());
    }
    let own = path.map(OsString::from).or_else(|| std::env::var_os("PATH"));
    find_in(name, own.as_deref().unwrap_or(OsStr::new(PATH_UNSET)))
}

/// Looks for a name without a slash.
pub(super) fn find_in(name: &str, places: &OsStr) -> io::Result<PathBuf> {
    let mut refused = io::Error::from_raw_os_error(libc::ENOENT);
    for place in std::env::split_paths(places).filter(|_| !name.is_empty()) {
        // An empty place is the folder that the agent is in.
        let candidate = Path::new(".").join(place).join(name);
        match rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK) {
            Ok(()) if !Path::is_dir(&candidate) => return Ok(candidate),
            Ok(()) | Err(rustix::io::Errno::ACCESS) => refused = io::Error::from_raw_os_error(libc::EACCES),
            Err(_) => {}
        }
    }
    Err(refused)
}

#[cfg(test)]
mod tests {
    use super::find_in;
    use std::ffi::OsStr;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_first_that_may_be_executed_is_taken_and_a_forbidden_one_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for (name, mode) in [("a/tool", 0o644), ("b/tool", 0o755), ("c/tool", 0o755), ("a/only", 0o644)] {
            std::fs::create_dir_all(at(name).parent().expect("a folder")).expect("created");
            std::fs::write(at(name), "").expect("written");
            std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(mode)).expect("changed");
        }
        std::fs::create_dir(at("a/folder")).expect("created");
        let places = std::env::join_paths([at("a"), at("b"), at("c")]).expect("plain paths");
        let find = |name: &str| find_in(name, &places).map_err(|error| error.raw_os_error());
        assert_eq!(find("tool"), Ok(at("b/tool")));
        assert_eq!(find("only"), Err(Some(libc::EACCES)));
        assert_eq!(find("folder"), Err(Some(libc::EACCES)));
        assert_eq!(find("nope"), Err(Some(libc::ENOENT)));
        assert_eq!(find(""), Err(Some(libc::ENOENT)));
        assert_eq!(
            find_in("tool", OsStr::new("")).map_err(|error| error.raw_os_error()),
            Err(Some(libc::ENOENT))
        );
    }
}
