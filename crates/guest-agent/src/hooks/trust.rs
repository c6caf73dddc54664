//! Whether a program may be called with the agent's rights: it, and every folder on the way to it, must be root's own (or
//! the agent's user's), and nobody else may write to it.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// As many as the kernel follows. Source: `path_resolution(7)`.
const LINKS_MAX: usize = 40;

/// Walks to a file as the kernel would, looking at each step.
/// # Errors
/// Why not, in words.
pub(super) fn trusted(path: &Path) -> Result<(), String> {
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
    let mut at = PathBuf::from("/");
    let mut todo = steps(&path);
    let mut links = 0;
    look(&at, &metadata(&at)?)?;
    while let Some(step) = todo.pop() {
        if step == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&step);
        let found = metadata(&next)?;
        if found.is_symlink() {
            links += 1;
            if links > LINKS_MAX {
                return Err(format!("{} has too many symbolic links", path.display()));
            }
            // In a folder like /tmp a link may be anybody's.
            owned(&next, &found)?;
            let target = std::fs::read_link(&next).map_err(|error| told(&next, &error))?;
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            todo.extend(steps(&target));
            continue;
        }
        look(&next, &found)?;
        at = next;
    }
    Ok(())
}

/// The steps of a path, the last one first.
fn steps(path: &Path) -> Vec<OsString> {
    let named = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    let mut steps: Vec<OsString> = named.collect();
    steps.reverse();
    steps
}

fn metadata(path: &Path) -> Result<Metadata, String> {
    std::fs::symlink_metadata(path).map_err(|error| told(path, &error))
}

fn told(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

fn owned(path: &Path, found: &Metadata) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    if found.uid() == 0 || found.uid() == own {
        return Ok(());
    }
    Err(format!("{} belongs to user {}, not to root", path.display(), found.uid()))
}

fn look(path: &Path, found: &Metadata) -> Result<(), String> {
    owned(path, found)?;
    // In a folder with the sticky bit others may make files, but not exchange this one.
    let sticky = found.is_dir() && found.mode() & libc::S_ISVTX != 0;
    if found.mode() & 0o022 != 0 && !sticky {
        return Err(format!("others than its owner may write to {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn file(folder: &Path, name: &str, mode: u32) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, b"").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn what_others_may_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(trusted(&file(folder.path(), "good", 0o755)), Ok(()));
        for mode in [0o775, 0o757, 0o777] {
            let why = trusted(&file(folder.path(), "bad", mode)).unwrap_err();
            assert!(why.contains("may write to") && why.contains("bad"), "{why}");
        }
    }

    #[test]
    fn what_lies_in_a_folder_that_others_may_write_to_is_refused_however_it_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        let open = folder.path().join("open");
        fs::create_dir(&open).unwrap();
        let inside = file(&open, "hook", 0o755);
        symlink(&inside, folder.path().join("link")).unwrap();
        symlink("../link", open.join("back")).unwrap();
        symlink("open/back", folder.path().join("through")).unwrap();
        assert_eq!(trusted(&folder.path().join("through")), Ok(()));
        fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
        for name in ["open/hook", "link", "through"] {
            assert!(trusted(&folder.path().join(name)).unwrap_err().contains("may write to"), "{name}");
        }
        // As in /tmp: what is there cannot be exchanged.
        fs::set_permissions(&open, Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(trusted(&folder.path().join("through")), Ok(()));
    }

    #[test]
    fn what_belongs_to_someone_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = file(folder.path(), "theirs", 0o755);
        let Ok(()) = std::os::unix::fs::chown(&theirs, Some(1234), None) else {
            eprintln!("only root can give a file away");
            return;
        };
        assert!(trusted(&theirs).unwrap_err().contains("belongs to user 1234"));
        let link = folder.path().join("link");
        symlink(file(folder.path(), "mine", 0o755), &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(1234), None).unwrap();
        assert!(trusted(&link).unwrap_err().contains("belongs to user 1234"));
    }

    #[test]
    fn links_that_go_in_a_ring_end() {
        let folder = tempfile::tempdir().unwrap();
        symlink("b", folder.path().join("a")).unwrap();
        symlink("a", folder.path().join("b")).unwrap();
        assert!(trusted(&folder.path().join("a")).unwrap_err().contains("too many"));
    }
}
