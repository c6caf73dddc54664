//! The Debian packages that the tests need, installed once, by name and reason.

use crate::python;
use crate::stage::program;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Package, and what of ours needs it. Debian 12 names.
const PACKAGES: [(&str, &str); 21] = [
    ("build-essential", "the compiler and linker for crates with C inside"),
    ("ca-certificates", "downloads of packages and crates"),
    ("qemu-system-x86", "runs the guests"),
    ("qemu-utils", "qemu-img: the disks of guests"),
    ("qemu-guest-agent", "a stock agent on a socket, for tests of the host's side; it is not started"),
    ("mmdebstrap", "makes the guest image"),
    ("cpio", "packs the guest's initrd"),
    ("libnbd-bin", "nbdcopy and nbdinfo, to compare with"),
    ("xfsprogs", "mkfs.xfs, for guests and freeze tests"),
    ("btrfs-progs", "mkfs.btrfs, for freeze tests"),
    ("e2fsprogs", "mke2fs, for guests and freeze tests"),
    ("dosfstools", "mkfs.vfat: a file system that cannot freeze"),
    ("squashfs-tools", "mksquashfs: another that cannot freeze"),
    ("strace", "shows that the agent opens nothing while frozen"),
    ("python3-pip", "fetches PostgreSQL 18 for the agent's tests"),
    ("python3-venv", "holds what the rescue reader imports"),
    ("groff-base", "reads the manual's pages"),
    ("rpm", "builds the RPM packages"),
    ("util-linux", "setpriv, unshare, losetup"),
    ("mount", "mounts in freeze tests' own namespaces"),
    ("postgresql-15", "a real server for the agent's PostgreSQL tests; it is not started"),
];

/// Installed packages: name to version and source package.
type Installed = BTreeMap<String, (String, String)>;

/// Installs what is missing, after saying what and why.
///
/// What is installed already is dpkg's own knowledge: a second call costs one query.
pub(crate) fn setup() -> Result<(), String> {
    packages()?;
    python::setup()
}

fn packages() -> Result<(), String> {
    if !Path::new("/etc/debian_version").exists() {
        let names: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).collect();
        eprintln!("setup: not Debian: the tests need what these of its packages hold: {}", names.join(" "));
        return Ok(());
    }
    let installed = installed()?;
    let missing: Vec<&(&str, &str)> =
        PACKAGES.iter().filter(|(name, _)| !installed.contains_key(*name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!(
        "setup: these Debian packages are missing and will be installed, without starting any service:"
    );
    for (name, reason) in &missing {
        eprintln!("  {name:18} {reason}");
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    if program("id", &["-u"]).output()?.trim() != "0" {
        return Err(format!(
            "only root can install: sudo apt-get install --no-install-recommends {}",
            names.join(" ")
        ));
    }
    apt(&["update", "--quiet=2"])?;
    let mut wanted: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    if names.contains(&"qemu-system-x86") {
        let candidate = candidate("qemu-system-x86")?;
        wanted.retain(|name| !matches!(name.as_str(), "qemu-system-x86" | "qemu-utils"));
        wanted.extend(qemu_in_one_version(&candidate, &installed, versions)?);
    }
    let services = NoServices::arrange()?;
    let mut install = vec!["install", "--yes", "--quiet=1", "--no-install-recommends", "--allow-downgrades"];
    // Our createcluster.conf is there before the package's own: keep it, and ask nobody.
    install.extend(["--option=Dpkg::Options::=--force-confold"]);
    install.extend(wanted.iter().map(String::as_str));
    let done = apt(&install);
    services.restore()?;
    done
}

/// `NAME=VERSION` for QEMU's packages, all of the version of which `qemu-system-x86` is to be had.
///
/// A `qemu-utils` from backports breaks the release's `qemu-system-common`, and apt does not downgrade what it was not asked
/// for: so every installed package of QEMU's source is asked for in that version.
fn qemu_in_one_version(
    candidate: &str,
    installed: &Installed,
    versions: impl Fn(&str) -> Result<Vec<String>, String>,
) -> Result<Vec<String>, String> {
    let of_qemu = installed.iter().filter(|(_, (_, source))| source == "qemu").map(|(name, _)| name.as_str());
    let mut names: Vec<&str> = of_qemu.chain(["qemu-system-x86", "qemu-utils"]).collect();
    names.sort_unstable();
    names.dedup();
    let mut wanted = Vec::new();
    for name in names {
        let Some(same) =
            versions(name)?.into_iter().find(|version| source_version(version) == source_version(candidate))
        else {
            return Err(format!(
                "{name} is installed, but apt has none of version {candidate}, the only one of qemu-system-x86"
            ));
        };
        if let Some((now, _)) = installed.get(name)
            && *now != same
        {
            eprintln!("  {name} {now} becomes {same}: QEMU's packages must be of one version");
        }
        wanted.push(format!("{name}={same}"));
    }
    Ok(wanted)
}

/// Without the `+b3` of a rebuild, which packages of one source may differ in.
fn source_version(version: &str) -> &str {
    match version.rsplit_once("+b") {
        Some((source, rebuild)) if rebuild.bytes().all(|byte| byte.is_ascii_digit()) => source,
        _ => version,
    }
}

fn installed() -> Result<Installed, String> {
    let format = "-f=${db:Status-Status} ${Package} ${Version} ${source:Package}\\n";
    let listed = program("dpkg-query", &["-W", format]).output()?;
    Ok(listed
        .lines()
        .filter_map(|line| {
            let mut words = line.strip_prefix("installed ")?.split(' ');
            Some((words.next()?.to_owned(), (words.next()?.to_owned(), words.next()?.to_owned())))
        })
        .collect())
}

fn candidate(name: &str) -> Result<String, String> {
    let policy = program("apt-cache", &["policy", name]).env("LC_ALL", "C").output()?;
    let line = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    line.map(str::to_owned).ok_or_else(|| format!("apt knows no {name}"))
}

fn versions(name: &str) -> Result<Vec<String>, String> {
    let table = program("apt-cache", &["madison", name]).output()?;
    Ok(table
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(|version| version.trim().to_owned())
        .collect())
}

fn apt(arguments: &[&str]) -> Result<(), String> {
    program("apt-get", arguments).env("DEBIAN_FRONTEND", "noninteractive").run()
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
const CLUSTER: &str = "/etc/postgresql-common/createcluster.conf";

/// For the time of an installation: no service starts, and PostgreSQL makes no cluster. Undone when dropped, too.
struct NoServices {
    policy_before: Option<Vec<u8>>,
    cluster_is_ours: bool,
}

impl NoServices {
    fn arrange() -> Result<Self, String> {
        let failed = |path: &'static str| move |error: std::io::Error| format!("{path}: {error}");
        let arranged =
            Self { policy_before: fs::read(POLICY).ok(), cluster_is_ours: !Path::new(CLUSTER).exists() };
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").map_err(failed(POLICY))?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)).map_err(failed(POLICY))?;
        if arranged.cluster_is_ours {
            fs::create_dir_all("/etc/postgresql-common").map_err(failed(CLUSTER))?;
            fs::write(CLUSTER, "create_main_cluster = false\n").map_err(failed(CLUSTER))?;
        }
        Ok(arranged)
    }

    fn restore(mut self) -> Result<(), String> {
        self.undo().map_err(|error| format!("{POLICY} or {CLUSTER} could not be restored: {error}"))
    }

    /// Does nothing the second time.
    fn undo(&mut self) -> std::io::Result<()> {
        match self.policy_before.take() {
            Some(before) => fs::write(POLICY, before)?,
            None => match fs::read(POLICY) {
                Ok(now) if now == b"#!/bin/sh\nexit 101\n" => fs::remove_file(POLICY)?,
                _ => {}
            },
        }
        if std::mem::take(&mut self.cluster_is_ours) {
            fs::remove_file(CLUSTER)?;
            // ucf kept ours and laid the package's own beside it.
            let packaged = format!("{CLUSTER}.ucf-dist");
            if Path::new(&packaged).exists() {
                fs::rename(packaged, CLUSTER)?;
            }
        }
        Ok(())
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            eprintln!("setup: {POLICY} or {CLUSTER} could not be restored: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_utils_from_backports_is_brought_to_the_version_of_qemu_system() {
        let mut installed = Installed::new();
        let of_qemu = |version: &str| (version.to_owned(), "qemu".to_owned());
        installed.insert("qemu-utils".to_owned(), of_qemu("1:10.0.2+ds-2~bpo12+1"));
        installed.insert("qemu-block-extra".to_owned(), of_qemu("1:10.0.2+ds-2~bpo12+1"));
        installed.insert("bash".to_owned(), ("5".to_owned(), "bash".to_owned()));
        let versions = |name: &str| {
            let rebuild = if name == "qemu-utils" { "" } else { "+b3" };
            Ok(vec!["1:10.0.2+ds-2~bpo12+1".to_owned(), format!("1:7.2+dfsg-7+deb12u18{rebuild}")])
        };
        assert_eq!(
            qemu_in_one_version("1:7.2+dfsg-7+deb12u18+b3", &installed, versions),
            Ok(vec![
                "qemu-block-extra=1:7.2+dfsg-7+deb12u18+b3".to_owned(),
                "qemu-system-x86=1:7.2+dfsg-7+deb12u18+b3".to_owned(),
                "qemu-utils=1:7.2+dfsg-7+deb12u18".to_owned(),
            ])
        );
    }
}
