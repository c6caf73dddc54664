//! Debian packages of any suite, unpacked into a folder: nothing is installed, and the machine's apt is told of nothing.

use crate::beside::Beside;
use std::fs;
use std::path::Path;

/// Downloads and unpacks into `folder/root`, by lists of its own.
pub(crate) fn fetch(folder: &Path, suites: &[&str], packages: &[String]) -> Result<(), String> {
    let suites: Vec<String> = suites.iter().map(|suite| format!("debian {suite}")).collect();
    let suites: Vec<&str> = suites.iter().map(String::as_str).collect();
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    let beside = Beside::of(folder, &suites)?;
    beside.download(".", &packages)?;
    beside.unpack(".")
}

/// Fetches into `folder` unless it is there: complete or not at all, once for all who want it at the same time.
pub(crate) fn once(folder: &Path, suites: &[&str], packages: &[String]) -> Result<(), String> {
    let cache = folder.parent().ok_or("the cache has no folder")?;
    fs::create_dir_all(cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let lock = fs::File::create(cache.join("lock")).map_err(|error| format!("the cache's lock: {error}"))?;
    lock.lock().map_err(|error| format!("the cache's lock: {error}"))?;
    if folder.exists() {
        return Ok(());
    }
    let unfinished = cache.join("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(|error| format!("{}: {error}", unfinished.display()))?;
    }
    fetch(&unfinished, suites, packages)?;
    fs::rename(unfinished.join("root"), folder)
        .and_then(|()| fs::remove_dir_all(&unfinished))
        .map_err(|error| format!("{}: {error}", folder.display()))
}
