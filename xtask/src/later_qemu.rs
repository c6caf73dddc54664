//! A later QEMU than Debian 12's own, unpacked beside it: the packages of both exclude each other.

use crate::guest::cache;
use crate::stage::program;
use crate::unpack;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const SUITE: &str = "bookworm-backports";
/// What runs a guest and works on its disks. The libraries they need are those of Debian 12's QEMU, which is installed.
const PACKAGES: [&str; 5] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "qemu-utils", "seabios"];

/// The folder with the programs of the QEMU that backports has; fetched once. QEMU finds its own data beside them.
pub(crate) fn programs() -> Result<PathBuf, String> {
    let cache = place()?;
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let folder = cache.join(format!("qemu-{SUITE}"));
    let programs = folder.join("usr/bin");
    let lock = File::create(cache.join("qemu.lock")).map_err(|error| format!("the cache's lock: {error}"))?;
    lock.lock().map_err(|error| format!("the cache's lock: {error}"))?;
    if !folder.exists() {
        let unfinished = cache.join("qemu-unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(|error| format!("{}: {error}", unfinished.display()))?;
        }
        let wanted: Vec<String> = PACKAGES.iter().map(|name| format!("{name}/{SUITE}")).collect();
        unpack::fetch(&unfinished, &[SUITE], &wanted)?;
        fs::rename(unfinished.join("root"), &folder)
            .and_then(|()| fs::remove_dir_all(&unfinished))
            .map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let qemu = programs.join("qemu-system-x86_64").display().to_string();
    let version = if is_root()? {
        // A twin's user would silently get the next QEMU in PATH if this one were out of its reach.
        program("setpriv", &["--reuid=65534", "--regid=65534", "--clear-groups", &qemu, "--version"])
            .output()?
    } else {
        program(&qemu, &["--version"]).output()?
    };
    eprintln!("{} in {}", version.lines().next().unwrap_or_default(), programs.display());
    Ok(programs)
}

/// Root's home is closed to the user that its twins run as.
fn place() -> Result<PathBuf, String> {
    if is_root()? { Ok("/var/cache/stillpoint".into()) } else { cache() }
}

fn is_root() -> Result<bool, String> {
    Ok(program("id", &["-u"]).output()?.trim() == "0")
}

/// `PATH` with this folder first.
pub(crate) fn path_with(programs: &Path) -> String {
    format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default())
}
