//! Debian packages that are fetched beside the machine's own, by lists of their own, and not installed.

use crate::stage::program;
use std::fs;
use std::path::Path;

/// The release that tests run on, with its security updates.
pub(crate) const DEBIAN_12: &[&str] = &["debian bookworm", "debian-security bookworm-security"];

/// A folder to fetch into, and apt's view of the world from there.
pub(crate) struct Beside<'f> {
    folder: &'f Path,
    options: Vec<String>,
}

impl<'f> Beside<'f> {
    /// Reads the lists of these suites, and of no others. The machine's apt is not told of them.
    pub(crate) fn of(folder: &'f Path, suites: &[&str]) -> Result<Self, String> {
        let at = |name: &str| folder.join(name).display().to_string();
        for name in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(name)).map_err(|error| format!("{}: {error}", at(name)))?;
        }
        let key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        let sources: String =
            suites.iter().map(|suite| format!("deb {key} http://deb.debian.org/{suite} main\n")).collect();
        fs::write(folder.join("sources.list"), sources).map_err(|error| error.to_string())?;
        let options = [
            format!("Dir::Etc::SourceList={}", at("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::Cache={}", folder.display()),
            // Its own user could not write into a private folder.
            "APT::Sandbox::User=root".to_owned(),
            // Nothing of the machine is touched, so nobody there is waited for.
            "Debug::NoLocking=true".to_owned(),
        ];
        let options = options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect();
        let beside = Self { folder, options };
        beside.apt(&["update", "--quiet=2"], &[])?;
        Ok(beside)
    }

    /// Downloads these packages into `NAME`, and nothing that they need.
    pub(crate) fn download(&self, name: &str, packages: &[&str]) -> Result<(), String> {
        let into = self.folder.join(name);
        fs::create_dir_all(&into).map_err(|error| format!("{}: {error}", into.display()))?;
        let words = [&self.words()[..], &["download", "--quiet=2"], packages].concat();
        program("apt-get", &words).within(&into).run()
    }

    /// Downloads what an installation of these packages would bring to this machine, into `NAME`.
    pub(crate) fn download_with_missing(&self, name: &str, packages: &[&str]) -> Result<(), String> {
        self.apt(&["install", "--yes", "--quiet=2", "--download-only", "--no-install-recommends"], packages)?;
        fs::create_dir_all(self.folder.join(name))
            .and_then(|()| fs::rename(self.folder.join("archives"), self.folder.join(name)))
            .and_then(|()| fs::create_dir_all(self.folder.join("archives/partial")))
            .map_err(|error| format!("{}: {error}", self.folder.join(name).display()))
    }

    /// Unpacks what was downloaded into `NAME`, to `NAME/root`.
    pub(crate) fn unpack(&self, name: &str) -> Result<(), String> {
        let unpack =
            "mkdir root && for package in *.deb; do dpkg-deb --extract \"$package\" root || exit; done";
        program("sh", &["-c", unpack]).within(&self.folder.join(name)).run()
    }

    fn words(&self) -> Vec<&str> {
        self.options.iter().map(String::as_str).collect()
    }

    fn apt(&self, words: &[&str], packages: &[&str]) -> Result<(), String> {
        program("apt-get", &[&self.words()[..], words, packages].concat())
            .env("DEBIAN_FRONTEND", "noninteractive")
            .run()
    }
}
