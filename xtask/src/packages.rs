//! The packages of agent and host, for Debian and for RPM systems.

mod contents;
mod deb;
mod rpm;

use crate::beside::{Beside, DEBIAN_12};
use crate::guest::{self, cache};
use crate::stage::{cargo, program, root};
use crate::targets;
use contents::{AGENT, HOST};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What a package system calls what we build on and for.
const ARCHITECTURE_DEB: &str = "amd64";
const ARCHITECTURE_RPM: &str = "x86_64";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const MAINTAINER: &str = "Stillpoint <maintainers@stillpoint.invalid>";

/// Builds all of them; returns their paths.
pub(crate) fn all() -> Result<Vec<PathBuf>, String> {
    let agent = agent()?;
    cargo(&["build", "--release", "--quiet", "--workspace", "--bin", "stillpoint"]).run()?;
    let host = HOST.stage(&folder()?, &targets::folder()?.join("release"))?;
    let depends = deb::shared_libraries(&host.join("usr/bin/stillpoint"))?;
    let words = Words { depends: &depends, provides_version: "" };
    Ok(vec![agent.deb, agent.rpm, deb::build(&HOST, &host, &words)?, rpm::build(&HOST, &folder()?, &words)?])
}

/// The agent's two packages.
struct Agent {
    deb: PathBuf,
    rpm: PathBuf,
}

fn agent() -> Result<Agent, String> {
    let programs = guest::programs()?;
    let version = reported_version(&programs.join("stillpoint-agent"))?;
    let words = Words { depends: "", provides_version: &version };
    let staged = AGENT.stage(&folder()?, &programs)?;
    Ok(Agent { deb: deb::build(&AGENT, &staged, &words)?, rpm: rpm::build(&AGENT, &folder()?, &words)? })
}

/// What a package's description needs besides its contents.
struct Words<'w> {
    /// Debian's relation to shared libraries; RPM finds its own.
    depends: &'w str,
    /// The version of the other agent that this one stands for.
    provides_version: &'w str,
}

/// The version as which the agent presents itself, the fourth word of `QEMU Guest Agent 11.1.3`.
fn reported_version(agent: &Path) -> Result<String, String> {
    let line = program(&agent.display().to_string(), &["--version"]).output()?;
    line.split_whitespace()
        .nth(3)
        .map(str::to_owned)
        .ok_or_else(|| format!("the agent's --version is no version: {line}"))
}

fn folder() -> Result<PathBuf, String> {
    Ok(targets::folder()?.join("packages"))
}

/// What the tests of packages and libvirt need. Its text is what `vm-tests` reads from `STILLPOINT_PACKAGES`.
pub(crate) struct Parts {
    agent: Agent,
    others: PathBuf,
}

impl fmt::Display for Parts {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { agent, others } = self;
        writeln!(to, "deb={}\nrpm={}", agent.deb.display(), agent.rpm.display())?;
        let place = |name: &str| others.join(name).display().to_string();
        write!(
            to,
            "stock={}\nlibvirt={}\napparmor={}\nmariadb={}",
            place("stock"),
            place("libvirt/root"),
            place("apparmor/root"),
            place("mariadb/root")
        )
    }
}

/// Builds the agent's packages; fetches Debian's own agent, libvirt and the rest once.
pub(crate) fn parts() -> Result<Parts, String> {
    let cache = cache()?;
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let others = cache.join("packages-2");
    let lock =
        File::create(cache.join("packages.lock")).map_err(|error| format!("the cache's lock: {error}"))?;
    lock.lock().map_err(|error| format!("the cache's lock: {error}"))?;
    if !others.exists() {
        let unfinished = cache.join("packages-unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(|error| format!("{}: {error}", unfinished.display()))?;
        }
        fs::create_dir_all(&unfinished).map_err(|error| format!("{}: {error}", unfinished.display()))?;
        let beside = Beside::of(&unfinished, DEBIAN_12)?;
        beside.download("stock", &["qemu-guest-agent"])?;
        beside.download("apparmor", &["apparmor"])?;
        beside.unpack("apparmor")?;
        beside.download_with_missing("libvirt", &LIBVIRT)?;
        beside.unpack("libvirt")?;
        beside.download_with_missing("mariadb", &["mariadb-server-core", "mariadb-client-core"])?;
        beside.unpack("mariadb")?;
        fs::rename(&unfinished, &others).map_err(|error| format!("{}: {error}", others.display()))?;
    }
    Ok(Parts { agent: agent()?, others })
}

/// A libvirt that runs QEMU, without its services, users and networks.
const LIBVIRT: [&str; 3] = ["libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients"];

/// A file of the checkout, as text.
fn source(path: &str) -> Result<String, String> {
    fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
}
