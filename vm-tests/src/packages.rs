//! What tests of packages and of libvirt need besides a guest: made and fetched by `cargo xtask package-parts`.

use crate::image::{ask_xtask, member};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Our packages, and others' programs that are unpacked in the cache and not installed.
#[derive(Clone, Debug)]
pub struct Packages {
    deb: PathBuf,
    rpm: PathBuf,
    stock: PathBuf,
    libvirt: PathBuf,
    apparmor: PathBuf,
    mariadb: PathBuf,
}

impl Packages {
    /// What `STILLPOINT_PACKAGES` names, or else `cargo xtask package-parts`.
    ///
    /// # Panics
    /// If it can neither be found nor made; what was printed says why.
    pub fn get() -> &'static Self {
        static PACKAGES: OnceLock<Packages> = OnceLock::new();
        PACKAGES.get_or_init(|| {
            let text = std::env::var("STILLPOINT_PACKAGES").unwrap_or_else(|_| ask_xtask("package-parts"));
            let member = |name: &str| member(&text, name);
            Self {
                deb: member("deb"),
                rpm: member("rpm"),
                stock: member("stock"),
                libvirt: member("libvirt"),
                apparmor: member("apparmor"),
                mariadb: member("mariadb"),
            }
        })
    }

    /// Our agent's package for Debian.
    #[must_use]
    pub fn deb(&self) -> &Path {
        &self.deb
    }

    /// Our agent's package for RPM systems.
    #[must_use]
    pub fn rpm(&self) -> &Path {
        &self.rpm
    }

    /// Debian's package of the stock agent.
    ///
    /// # Panics
    /// If it is not where it was fetched to.
    #[must_use]
    pub fn stock_deb(&self) -> PathBuf {
        let found = std::fs::read_dir(&self.stock).expect("`cargo xtask package-parts` fetched it");
        let mut paths = found.flatten().map(|entry| entry.path());
        paths.find(|path| path.extension().is_some_and(|end| end == "deb")).expect("a package is there")
    }

    /// The folder with libvirt, and what it needs that this machine has not.
    #[must_use]
    pub fn libvirt(&self) -> &Path {
        &self.libvirt
    }

    /// The folder with AppArmor's programs and rules.
    #[must_use]
    pub fn apparmor(&self) -> &Path {
        &self.apparmor
    }

    /// The folder with MariaDB's server and client.
    #[must_use]
    pub fn mariadb(&self) -> &Path {
        &self.mariadb
    }
}

/// The same package with a higher version, for an upgrade to it; made in `folder`.
///
/// # Errors
/// If `dpkg-deb` fails.
pub fn next_version(deb: &Path, folder: &Path) -> io::Result<PathBuf> {
    let tree = folder.join("next");
    succeed(Command::new("dpkg-deb").arg("-R").arg(deb).arg(&tree))?;
    let control = tree.join("DEBIAN/control");
    let text = std::fs::read_to_string(&control)?;
    let raised: String = text
        .lines()
        .map(|line| match line.strip_prefix("Version: ") {
            Some(version) => format!("Version: {version}+next\n"),
            None => format!("{line}\n"),
        })
        .collect();
    std::fs::write(&control, raised)?;
    let next = folder.join("stillpoint-agent_next.deb");
    succeed(Command::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "-b"]).arg(&tree).arg(&next))?;
    std::fs::remove_dir_all(&tree)?;
    Ok(next)
}

/// The index of a folder of packages, as apt reads it from a repository.
///
/// # Errors
/// If `dpkg-deb` or `sha256sum` fails.
pub fn index(debs: &[PathBuf]) -> io::Result<String> {
    let mut index = String::new();
    for deb in debs {
        let control = succeed(Command::new("dpkg-deb").arg("-f").arg(deb))?;
        let sum = succeed(Command::new("sha256sum").arg(deb))?;
        let (sum, _) = sum.split_once(' ').unwrap_or((&sum, ""));
        let name = deb.file_name().unwrap_or_default().display();
        let size = deb.metadata()?.len();
        index += &format!("{}\nFilename: ./{name}\nSize: {size}\nSHA256: {sum}\n\n", control.trim_end());
    }
    Ok(index)
}

fn succeed(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{command:?}: {}: {said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
