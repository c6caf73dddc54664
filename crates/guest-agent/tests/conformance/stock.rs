//! Stock agents: where they are found, and how they come into a private root.

use super::private_root::Build;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian 12's, where its package puts it.
const INSTALLED: &str = "/usr/sbin/qemu-ga";
/// Folders of unpacked packages, separated by `:`; `cargo xtask stock-agents` prints them.
const UNPACKED: &str = "STILLPOINT_STOCK_AGENTS";
/// Where it is in the private root, with the libraries that it was made for.
const INSIDE: &str = "/stock";

/// Brings the stock agent of this version along, e.g. `7.2` or `11.1`. Where there is none, the scene finds none.
pub(crate) fn install(build: &mut Build, version: &str) {
    build.folder(INSIDE);
    let Some((root, program)) = find(version) else { return };
    let loader = root.as_ref().map_or_else(
        || PathBuf::from("/lib64/ld-linux-x86-64.so.2"),
        |root| {
            library(root, "ld-linux-x86-64.so.2").unwrap_or_else(|| panic!("no loader in {}", root.display()))
        },
    );
    let to = build.outside(INSIDE);
    let mut list = Command::new(&loader);
    list.arg("--list");
    if let Some(root) = &root {
        list.arg("--library-path").arg(root.join("usr/lib/x86_64-linux-gnu"));
    }
    let listed = list.arg(&program).output().unwrap();
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let Some((_, found)) = line.split_once("=> ") else { continue };
        let Some(library) = found.split_whitespace().next() else { continue };
        let library = Path::new(library);
        assert!(
            root.as_ref().is_none_or(|root| library.starts_with(root)),
            "{} would be the machine's own",
            library.display()
        );
        fs::copy(library, to.join(library.file_name().unwrap())).unwrap();
    }
    fs::copy(&loader, to.join("loader")).unwrap();
    fs::copy(&program, to.join("qemu-ga")).unwrap();
}

/// How the stock agent is started in here; `None`, told to people, where it could not be brought along.
pub(crate) fn program(version: &str) -> Option<Vec<String>> {
    if !Path::new(INSIDE).join("qemu-ga").exists() {
        eprintln!(
            "SKIPPED no qemu-ga {version}: `cargo xtask stock-agents` fetches it, {UNPACKED} names its folder"
        );
        return None;
    }
    let at = |name: &str| format!("{INSIDE}/{name}");
    Some(vec![at("loader"), "--library-path".to_owned(), INSIDE.to_owned(), at("qemu-ga")])
}

/// The folder of an unpacked package, if it is one, and the program.
fn find(version: &str) -> Option<(Option<PathBuf>, PathBuf)> {
    let unpacked = std::env::var_os(UNPACKED).unwrap_or_default();
    let unpacked = std::env::split_paths(&unpacked).filter(|root| root.is_absolute());
    let places = unpacked.map(|root| (Some(root.clone()), root.join("usr/sbin/qemu-ga")));
    places.chain([(None, INSTALLED.into())]).find(|(root, program)| {
        let loader = root.as_ref().and_then(|root| library(root, "ld-linux-x86-64.so.2"));
        let mut command = Command::new(loader.as_ref().unwrap_or(program));
        if let (Some(_), Some(root)) = (&loader, root) {
            command.arg("--library-path").arg(root.join("usr/lib/x86_64-linux-gnu")).arg(program);
        }
        let output = command.arg("--version").output();
        output.is_ok_and(|output| {
            String::from_utf8_lossy(&output.stdout).contains(&format!("QEMU Guest Agent {version}."))
        })
    })
}

fn library(root: &Path, name: &str) -> Option<PathBuf> {
    let places = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64"];
    places.iter().map(|place| root.join(place).join(name)).find(|path| path.exists())
}
