//! What lies where in a package.

use crate::stage::{program, root};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// One package, whatever its format.
pub(super) struct Contents {
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
    pub(super) description: &'static str,
    pub(super) entries: &'static [Entry],
}

/// Which of the two formats have it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum In {
    Both,
    Deb,
    Rpm,
}

pub(super) enum From {
    /// A program that was built.
    Built(&'static str),
    /// A file of the checkout.
    Source(&'static str),
    /// A page of the manual in the checkout, compressed as pages are.
    Page(&'static str),
    /// What a symbolic link says.
    Link(&'static str),
    /// An empty folder.
    Folder,
}

pub(super) struct Entry {
    pub(super) path: &'static str,
    pub(super) from: From,
    pub(super) mode: u32,
    pub(super) of: In,
}

const fn entry(path: &'static str, from: From, mode: u32, of: In) -> Entry {
    Entry { path, from, mode, of }
}

const SERVICE: &str = "usr/lib/systemd/system/stillpoint-agent.service";
const RULES: &str = "usr/lib/udev/rules.d/60-stillpoint-agent.rules";
const SHARED: &str = "packaging/";

/// The program in the guest.
pub(super) const AGENT: Contents = Contents {
    name: "stillpoint-agent",
    summary: "guest agent for QEMU that freezes for as short as possible, and thaws by itself",
    description: "\
It takes the place of qemu-guest-agent: the same port, protocol, options, configuration file and hooks, so that hosts
(libvirt, Proxmox, KubeVirt and others) and their scripts go on as before. File systems are flushed before they are frozen,
are thawed when their lease ends or whatever the host or the agent dies of, and PostgreSQL is quiesced for snapshots by
Stillpoint. It is one static program and needs nothing else in the guest.",
    entries: &[
        entry("usr/bin/stillpoint-agent", From::Built("stillpoint-agent"), 0o755, In::Both),
        entry("usr/sbin/qemu-ga", From::Link("../bin/stillpoint-agent"), 0o777, In::Both),
        entry("usr/bin/qemu-ga", From::Link("../bin/stillpoint-agent"), 0o777, In::Rpm),
        entry(SERVICE, From::Source("systemd/stillpoint-agent.service"), 0o644, In::Both),
        entry(
            "usr/lib/systemd/system/stillpoint-agent.service.d/10-sysconfig.conf",
            From::Source("rpm/10-sysconfig.conf"),
            0o644,
            In::Rpm,
        ),
        entry(RULES, From::Source("systemd/60-stillpoint-agent.rules"), 0o644, In::Both),
        entry("etc/init.d/stillpoint-agent", From::Source("sysv/stillpoint-agent"), 0o755, In::Deb),
        entry("etc/qemu/fsfreeze-hook.d", From::Folder, 0o755, In::Both),
        entry("etc/qemu-ga/fsfreeze-hook.d", From::Folder, 0o755, In::Rpm),
        entry("usr/share/stillpoint-agent/check-hooks", From::Source("hooks/check-hooks"), 0o755, In::Both),
        entry("usr/share/stillpoint-agent/hooks/README", From::Source("hooks/README"), 0o644, In::Both),
        entry(
            "usr/share/stillpoint-agent/hooks/mariadb.sample",
            From::Source("hooks/mariadb.sample"),
            0o755,
            In::Both,
        ),
        entry(
            "usr/share/stillpoint-agent/hooks/service.sample",
            From::Source("hooks/service.sample"),
            0o755,
            In::Both,
        ),
        entry(
            "usr/share/stillpoint-agent/apparmor/stillpoint-agent",
            From::Source("apparmor/stillpoint-agent"),
            0o644,
            In::Both,
        ),
        entry(
            "usr/share/man/man8/stillpoint-agent.8.gz",
            From::Page("man/stillpoint-agent.8"),
            0o644,
            In::Both,
        ),
        entry("usr/share/man/man8/qemu-ga.8.gz", From::Link("stillpoint-agent.8.gz"), 0o777, In::Both),
        entry(
            "usr/share/man/man5/stillpoint-agent.conf.5.gz",
            From::Page("man/stillpoint-agent.conf.5"),
            0o644,
            In::Both,
        ),
        entry(
            "usr/share/man/man7/stillpoint-agent-hooks.7.gz",
            From::Page("man/stillpoint-agent-hooks.7"),
            0o644,
            In::Both,
        ),
        entry("usr/share/doc/stillpoint-agent/copyright", From::Source("copyright"), 0o644, In::Both),
        entry(
            "usr/share/doc/stillpoint-agent/examples/hardened.conf",
            From::Source("examples/hardened.conf"),
            0o644,
            In::Both,
        ),
        entry(
            "usr/share/doc/stillpoint-agent/examples/qemu-ga.conf",
            From::Source("examples/qemu-ga.conf"),
            0o644,
            In::Both,
        ),
    ],
};

/// The program on the host.
pub(super) const HOST: Contents = Contents {
    name: "stillpoint",
    summary: "snapshots of running VMs in which the applications' data is sound",
    description: "\
It quiesces applications, freezes the file systems for a fraction of a second, cuts all disks at one instant, and says
what the snapshot is worth and why. Snapshots are stored encrypted, incrementally and verified; they are restored to files
or booted as twins. The guests run stillpoint-agent, or with less to be had, qemu-guest-agent.",
    entries: &[
        entry("usr/bin/stillpoint", From::Built("stillpoint"), 0o755, In::Both),
        entry("usr/share/doc/stillpoint/copyright", From::Source("copyright"), 0o644, In::Both),
        entry("usr/share/doc/stillpoint/exit-codes.md", From::Source("../docs/exit-codes.md"), 0o644, In::Both),
        entry("usr/share/doc/stillpoint/glossary.md", From::Source("../docs/glossary.md"), 0o644, In::Both),
        entry("usr/share/doc/stillpoint/reasons.md", From::Source("../docs/reasons.md"), 0o644, In::Both),
    ],
};

impl Contents {
    /// The entries of one format.
    pub(super) fn of(&self, format: In) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.of == In::Both || entry.of == format)
    }

    /// Lays out the tree of each format below `folder`, with the programs that lie in `built`; returns Debian's.
    pub(super) fn stage(&self, folder: &Path, built: &Path) -> Result<PathBuf, String> {
        for (format, name) in [(In::Rpm, "rpm"), (In::Deb, "deb")] {
            let tree = folder.join(name).join(self.name);
            if tree.exists() {
                fs::remove_dir_all(&tree).map_err(|error| format!("{}: {error}", tree.display()))?;
            }
            for entry in self.of(format) {
                let path = tree.join(entry.path);
                entry.put(&path, built).map_err(|error| format!("{}: {error}", path.display()))?;
            }
        }
        Ok(folder.join("deb").join(self.name))
    }
}

impl Entry {
    fn put(&self, path: &Path, built: &Path) -> Result<(), String> {
        let words = |error: std::io::Error| error.to_string();
        folders(path.parent().unwrap_or(path)).map_err(words)?;
        let source = |name: &str| root().join(SHARED).join(name);
        match self.from {
            From::Built(name) => copy(&built.join(name), path)?,
            From::Source(name) => copy(&source(name), path)?,
            From::Page(name) => {
                let plain = path.with_extension("");
                copy(&source(name), &plain)?;
                program("gzip", &["-9n", &plain.display().to_string()]).run()?;
            }
            From::Link(to) => return symlink(to, path).map_err(words),
            From::Folder => folders(path).map_err(words)?,
        }
        fs::set_permissions(path, fs::Permissions::from_mode(self.mode)).map_err(words)
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to).map(drop).map_err(|error| format!("{}: {error}", from.display()))
}

/// Folders as they are on a system, whatever the umask is here.
fn folders(path: &Path) -> std::io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        folders(above)?;
    }
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}
