//! The format of Fedora, Red Hat and SUSE, by its own tool.

use super::contents::{Contents, From, In};
use super::{ARCHITECTURE_RPM, MAINTAINER, VERSION, Words, source};
use crate::stage::{program, root};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Packs what lies staged in `folder`.
pub(super) fn build(contents: &Contents, folder: &Path, words: &Words) -> Result<PathBuf, String> {
    let staged = folder.join("rpm").join(contents.name);
    let work = folder.join("rpmbuild");
    let spec = work.join(format!("{}.spec", contents.name));
    fs::create_dir_all(&work)
        .map_err(|error| error.to_string())
        .and_then(|()| text(contents, &staged, words))
        .and_then(|text| fs::write(&spec, text).map_err(|error| error.to_string()))
        .map_err(|error| format!("{}: {error}", spec.display()))?;
    let defined = |name: &str, value: &str| ["--define".to_owned(), format!("{name} {value}")];
    let words: Vec<String> = [
        defined("_topdir", &work.display().to_string()),
        defined("_rpmdir", &folder.join("rpm").display().to_string()),
        defined("_rpmfilename", "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm"),
        // The programs are as they are to be, and what RPM systems of today read is asked for by name.
        defined("debug_package", "%{nil}"),
        defined("__os_install_post", "%{nil}"),
        defined("_build_id_links", "none"),
        defined("_binary_payload", "w9.xzdio"),
        defined("_build_name_fmt", "%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm"),
    ]
    .concat();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let target = format!("--target={ARCHITECTURE_RPM}");
    program("rpmbuild", &[&["-bb", "--quiet", "--nodeps", &target], &words[..]].concat())
        .arg(&spec.display().to_string())
        .run()?;
    let package = folder.join("rpm").join(format!("{}-{VERSION}-1.{ARCHITECTURE_RPM}.rpm", contents.name));
    if package.exists() { Ok(package) } else { Err(format!("rpmbuild made no {}", package.display())) }
}

fn text(contents: &Contents, staged: &Path, words: &Words) -> Result<String, String> {
    let mut lines = vec![
        format!("Name: {}", contents.name),
        format!("Version: {VERSION}"),
        "Release: 1".to_owned(),
        format!("Summary: {}", contents.summary),
        "License: MIT OR Apache-2.0".to_owned(),
        format!("Packager: {MAINTAINER}"),
    ];
    if !words.provides_version.is_empty() {
        // No Obsoletes: the change is the administrator's, in both directions (`dnf swap`).
        lines.push(format!("Provides: qemu-guest-agent = {}", words.provides_version));
        lines.push("Conflicts: qemu-guest-agent".to_owned());
        // A static program.
        lines.push("AutoReqProv: no".to_owned());
        lines.push("Requires(post): /bin/sh".to_owned());
    }
    lines.push(format!("%description\n{}", contents.description));
    lines.push(format!("%install\ncp -a '{}'/. '%{{buildroot}}'", staged.display()));
    for name in ["post", "preun", "postun", "posttrans"] {
        let path = format!("packaging/rpm/{}.{name}", contents.name);
        if root().join(&path).exists() {
            lines.push(format!("%{name}\n{}", source(&path)?));
        }
    }
    lines.push("%files\n%defattr(-,root,root)".to_owned());
    lines.extend(contents.of(In::Rpm).map(|entry| match entry.from {
        From::Link(_) => format!("/{}", entry.path),
        From::Folder => format!("%dir %attr({:04o},root,root) /{}", entry.mode, entry.path),
        _ => format!("%attr({:04o},root,root) /{}", entry.mode, entry.path),
    }));
    lines.extend(own_folders(contents).into_iter().map(|path| format!("%dir %attr(0755,root,root) /{path}")));
    Ok(lines.join("\n") + "\n")
}

/// The folders that bear the package's name: RPM removes those that a package says are its own.
fn own_folders(contents: &Contents) -> BTreeSet<String> {
    let above = contents.of(In::Rpm).flat_map(|entry| Path::new(entry.path).ancestors().skip(1));
    let own = above.filter(|path| {
        path.components()
            .any(|part| part.as_os_str().to_str().is_some_and(|part| part.starts_with(contents.name)))
    });
    own.map(|path| path.display().to_string()).collect()
}
