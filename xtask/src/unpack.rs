//! Debian packages of any suite, unpacked into a folder: nothing is installed, and the machine's apt is told of nothing.

use crate::stage::program;
use std::fs;
use std::path::Path;

/// Downloads and unpacks into `folder/root`, by lists of its own.
pub(crate) fn fetch(folder: &Path, suites: &[&str], packages: &[String]) -> Result<(), String> {
    let at = |name: &str| folder.join(name).display().to_string();
    for name in ["lists/partial", "archives/partial", "root"] {
        fs::create_dir_all(folder.join(name)).map_err(|error| format!("{}: {error}", at(name)))?;
    }
    let source = |suite: &&str| {
        format!(
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {suite} main\n"
        )
    };
    let sources: String = suites.iter().map(source).collect();
    fs::write(folder.join("sources.list"), sources).map_err(|error| error.to_string())?;
    let options = [
        format!("Dir::Etc::SourceList={}", at("sources.list")),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        format!("Dir::State::Lists={}", at("lists")),
        format!("Dir::Cache={}", folder.display()),
        // Its own user could not write into a private folder.
        "APT::Sandbox::User=root".to_owned(),
    ];
    let options: Vec<&str> = options.iter().flat_map(|option| ["-o", option.as_str()]).collect();
    program("apt-get", &[&options[..], &["update", "--quiet=2"]].concat()).run()?;
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    program("apt-get", &[&options[..], &["download", "--quiet=2"], &packages].concat())
        .within(folder)
        .run()?;
    let unpack = "for package in *.deb; do dpkg-deb --extract \"$package\" root || exit; done";
    program("sh", &["-c", unpack]).within(folder).run()
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
