//! Stock guest agents of other releases than Debian 12's, to compare ours with: unpacked into the cache together with the
//! libraries that they were made for, since this machine's are older. Only a private root of a test ever starts them.

use crate::guest::cache;
use crate::unpack;
use std::path::PathBuf;

/// Suites whose agents are wanted: QEMU 10.0's and 11.1's. The libraries are the release's own.
const AGENTS: [(&str, &[&str]); 2] =
    [("trixie", &["trixie"]), ("trixie-backports", &["trixie", "trixie-backports"])];
const LIBRARIES: [&str; 8] = [
    "libc6",
    "libglib2.0-0t64",
    "libpcre2-8-0",
    "libudev1",
    "libcap2",
    "liburing2",
    "libnuma1",
    "libatomic1",
];

/// Their folders, in the form of `PATH`, as `STILLPOINT_STOCK_AGENTS` takes them.
pub(crate) fn folders() -> Result<String, String> {
    let cache = cache()?.join("stock-agents");
    let mut folders = Vec::new();
    for (suite, suites) in AGENTS {
        let folder = cache.join(suite);
        let agent = format!("qemu-guest-agent/{suite}");
        let libraries = LIBRARIES.iter().map(|name| format!("{name}/trixie"));
        unpack::once(&folder, suites, &std::iter::once(agent).chain(libraries).collect::<Vec<_>>())?;
        folders.push(folder);
    }
    joined(&folders)
}

/// Those that are there or can be had; without a network the others are not compared with, and the tests say so too.
pub(crate) fn what_can_be_had() -> String {
    folders().unwrap_or_else(|error| {
        eprintln!("later stock agents are NOT compared with: {error}");
        String::new()
    })
}

fn joined(folders: &[PathBuf]) -> Result<String, String> {
    let joined = std::env::join_paths(folders).map_err(|error| error.to_string())?;
    joined.into_string().map_err(|_| "the cache's path is not UTF-8".to_owned())
}
