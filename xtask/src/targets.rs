//! What there is to test, and how cargo is asked to.
//!
//! Every command selects the whole workspace, and then names what it wants of it. Cargo compiles a dependency with the
//! features that the *selected* packages ask for: with another selection much would be compiled once more.

use crate::guest::Parts;
use crate::lanes;
use crate::packages;
use crate::stage::{Program, cargo};
use serde_json::Value;
use std::path::PathBuf;

/// The tests of one target come one after the other: each has a guest, and several targets run at once.
const IN_GUESTS: &[&str] = &["--test-threads=1", "--nocapture"];

/// Those that take longest, which are begun first: one of them at the end would have all lanes but its own wait.
const LONGEST: &[&str] = &["deaths", "exhausted_guest", "packages", "systemd", "snapshot"];

/// Freezes real file systems, one test after the other, and mostly waits for leases to end: the others have the processors.
const MOSTLY_WAITS: &str = "native_freeze";

/// The names of all integration tests.
pub(crate) struct Targets {
    in_guests: Vec<String>,
    of_vm: Vec<String>,
    others: Vec<String>,
    /// Folders of stock agents.
    stock: String,
}

impl Targets {
    /// Asks cargo. Cargo knows tests by name alone, so those that are run apart (in a guest, with another QEMU) must have names of their own.
    pub(crate) fn list(stock: String) -> Result<Self, String> {
        let metadata = metadata()?;
        let of = |wanted: &dyn Fn(&str) -> bool| -> Vec<String> {
            let packages = metadata["packages"].as_array().into_iter().flatten();
            let targets = packages
                .filter(|package| package["name"].as_str().is_some_and(wanted))
                .flat_map(|package| package["targets"].as_array().into_iter().flatten())
                .filter(|target| target["kind"][0] == "test");
            targets.filter_map(|target| target["name"].as_str().map(str::to_owned)).collect()
        };
        let in_guests = of(&|package| package == "vm-tests");
        let others = of(&|package| package != "vm-tests");
        let of_vm = of(&|package| package == "vm");
        let of_the_rest = of(&|package| package != "vm-tests" && package != "vm");
        let twice = in_guests.iter().find(|name| others.contains(name));
        if let Some(twice) = twice.or_else(|| of_vm.iter().find(|name| of_the_rest.contains(name))) {
            return Err(format!(
                "{twice} is a test of two packages, and one of them is run apart: rename one"
            ));
        }
        let named = LONGEST.iter().map(|name| (name, &in_guests)).chain([(&MOSTLY_WAITS, &others)]);
        if let Some((gone, _)) = named.into_iter().find(|(name, all)| !all.iter().any(|one| one == **name)) {
            return Err(format!(
                "xtask orders the test {gone} apart, which is none any more: name what it is called now"
            ));
        }
        Ok(Self { in_guests, of_vm, others, stock })
    }

    /// Everything that needs no guest.
    pub(crate) fn without_guests(&self, words: &[&str]) -> Result<(), String> {
        let words = [&["--"], words].concat();
        cargo(&[&["test", "--workspace", "--lib", "--bins"], &words[..]].concat()).run()?;
        built(&self.others)?;
        let (waiting, working): (Vec<&str>, Vec<&str>) =
            self.others.iter().map(String::as_str).partition(|name| *name == MOSTLY_WAITS);
        let of = |names: Vec<&str>| tests(&names, &words[1..]).env("STILLPOINT_STOCK_AGENTS", &self.stock);
        lanes::run([waiting, working].into_iter().filter(|names| !names.is_empty()).map(of).collect())?;
        cargo(&[&["test", "--workspace", "--doc"], &words[..]].concat()).run()
    }

    /// Builds what needs a guest, and the program, which these tests run as a user does.
    pub(crate) fn build_for_guests(&self) -> Result<(), String> {
        built(&self.in_guests)
    }

    /// What has a QEMU but no guest, and snapshots of a guest, with the QEMU that comes first in this `PATH`.
    pub(crate) fn with_qemu_of(&self, path: &str, parts: &Parts) -> Vec<Program> {
        let without_guest = tests(&self.of_vm, &[]).env("PATH", path);
        let in_guest = tests(&["snapshot"], IN_GUESTS).env("PATH", path);
        vec![in_guest.env("STILLPOINT_GUEST", &parts.to_string()), without_guest]
    }

    /// Everything that needs a guest, with more words for the tests and more in their environment; the longest first.
    ///
    /// A test that is not told of the parts asks xtask itself, and waits for cargo's locks: in each lane, once more.
    pub(crate) fn in_guests(
        &self,
        parts: &Parts,
        packages: &packages::Parts,
        words: &[&str],
        environment: &[(&str, &str)],
    ) -> Vec<Program> {
        let of = |name: &str| {
            let test = tests(&[name], &[IN_GUESTS, words].concat());
            let test = test
                .env("STILLPOINT_GUEST", &parts.to_string())
                .env("STILLPOINT_PACKAGES", &packages.to_string());
            environment.iter().fold(test, |test, (name, value)| test.env(name, value))
        };
        let mut names: Vec<&str> = self.in_guests.iter().map(String::as_str).collect();
        names.sort_by_key(|name| LONGEST.iter().position(|long| long == name).unwrap_or(LONGEST.len()));
        names.into_iter().map(of).collect()
    }
}

/// Builds these tests, and the program: without a test beside it, it would be compiled with other features, and all that it
/// is made of once more.
fn built(names: &[String]) -> Result<(), String> {
    let which: Vec<&str> = names.iter().flat_map(|name| ["--test", name.as_str()]).collect();
    cargo(&[&["build", "--workspace", "--bin", "stillpoint"], &which[..]].concat()).run()
}

/// These tests, with words for each.
fn tests(names: &[impl AsRef<str>], words: &[&str]) -> Program {
    let which = names.iter().flat_map(|name| ["--test", name.as_ref()]);
    let all: Vec<&str> =
        ["test", "--workspace"].into_iter().chain(which).chain(["--"]).chain(words.iter().copied()).collect();
    cargo(&all)
}

/// Where cargo puts what it builds.
pub(crate) fn folder() -> Result<PathBuf, String> {
    let folder = metadata()?;
    let folder = folder["target_directory"].as_str().ok_or("cargo metadata names no target_directory")?;
    Ok(PathBuf::from(folder))
}

fn metadata() -> Result<Value, String> {
    let metadata = cargo(&["metadata", "--format-version=1", "--no-deps", "--offline"]).output()?;
    serde_json::from_str(&metadata).map_err(|error| error.to_string())
}
