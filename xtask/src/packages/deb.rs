//! Debian's format, by Debian's own tool.

use super::contents::{Contents, In};
use super::{ARCHITECTURE_DEB, MAINTAINER, VERSION, Words, source};
use crate::stage::{program, root};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const SCRIPTS: [&str; 4] = ["preinst", "postinst", "prerm", "postrm"];

/// Packs the staged tree.
pub(super) fn build(contents: &Contents, staged: &Path, words: &Words) -> Result<PathBuf, String> {
    let about = staged.join("DEBIAN");
    let failed = |error: std::io::Error| format!("{}: {error}", about.display());
    fs::create_dir_all(&about).map_err(failed)?;
    fs::set_permissions(&about, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    let size_kib = program("du", &["-sk", "--apparent-size", &staged.display().to_string()]).output()?;
    let size_kib = size_kib.split_whitespace().next().unwrap_or("0").to_owned();
    let write = |name: &str, text: &str, mode: u32| {
        let path = about.join(name);
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    write("control", &control(contents, words, &size_kib), 0o644)?;
    // What lies in /etc is the administrator's to change.
    let conffiles: String = contents
        .of(In::Deb)
        .filter(|entry| entry.path.starts_with("etc/") && staged.join(entry.path).is_file())
        .map(|entry| format!("/{}\n", entry.path))
        .collect();
    if !conffiles.is_empty() {
        write("conffiles", &conffiles, 0o644)?;
    }
    for name in SCRIPTS {
        let path = format!("packaging/deb/{}/{name}", contents.name);
        if root().join(&path).exists() {
            write(name, &source(&path)?, 0o755)?;
        }
    }
    let sums = "find . -path ./DEBIAN -prune -o -type f -printf '%P\\0' | sort -z | xargs -0 md5sum";
    let sums = program("sh", &["-c", sums]).within(staged).output()?;
    write("md5sums", &sums, 0o644)?;
    let package = staged.with_file_name(format!("{}_{VERSION}_{ARCHITECTURE_DEB}.deb", contents.name));
    program("dpkg-deb", &["--root-owner-group", "--build", "-Zxz"])
        .arg(&staged.display().to_string())
        .arg(&package.display().to_string())
        .run()?;
    Ok(package)
}

fn control(contents: &Contents, words: &Words, size_kib: &str) -> String {
    let mut lines = vec![
        format!("Package: {}", contents.name),
        format!("Version: {VERSION}"),
        format!("Architecture: {ARCHITECTURE_DEB}"),
        format!("Maintainer: {MAINTAINER}"),
        format!("Installed-Size: {size_kib}"),
        "Section: admin".to_owned(),
        "Priority: optional".to_owned(),
    ];
    if words.provides_version.is_empty() {
        lines.push(format!("Depends: {}", words.depends));
        lines.push("Recommends: qemu-system-x86, qemu-utils".to_owned());
    } else {
        lines.push("Multi-Arch: foreign".to_owned());
        // Its place, and its files: apt removes the one when the other is installed, in both directions.
        lines.push(format!("Provides: qemu-guest-agent (= 1:{})", words.provides_version));
        lines.push("Conflicts: qemu-guest-agent".to_owned());
        lines.push("Replaces: qemu-guest-agent".to_owned());
    }
    lines.push(format!("Description: {}", contents.summary));
    lines.extend(contents.description.lines().map(|line| format!(" {line}")));
    lines.join("\n") + "\n"
}

/// The packages whose shared libraries a program needs.
pub(super) fn shared_libraries(of: &Path) -> Result<String, String> {
    let folder = of.with_file_name("shlibdeps");
    let control = folder.join("debian/control");
    fs::create_dir_all(folder.join("debian"))
        .and_then(|()| fs::write(&control, "Source: stillpoint\n\nPackage: stillpoint\nArchitecture: any\n"))
        .map_err(|error| format!("{}: {error}", control.display()))?;
    let found = program("dpkg-shlibdeps", &["-O"]).arg(&of.display().to_string()).within(&folder).output()?;
    fs::remove_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    found
        .lines()
        .find_map(|line| line.strip_prefix("shlibs:Depends="))
        .map(str::to_owned)
        .ok_or_else(|| format!("dpkg-shlibdeps says: {found}"))
}
