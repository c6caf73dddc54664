//! What the tests need from the Python registry: PostgreSQL 18, which Debian 12 does not have, and what the rescue reader
//! imports. Both lie in the cache, once for all checkouts.

use crate::guest;
use crate::stage::program;
use std::fs;

/// Pinned, so that a test that passed goes on passing.
const PACKAGES: [&str; 3] = ["cryptography==50.0.2", "zstandard==0.25.0", "blake3==1.0.11"];

/// Fetches what is not in the cache yet.
pub(crate) fn setup() -> Result<(), String> {
    program("sh", &["crates/guest-agent/tests/postgres/fetch-postgresql-18.sh"]).run()?;
    let cache = guest::cache()?;
    let place = cache.join("python");
    let mark = place.join("complete");
    let wanted = PACKAGES.join("\n");
    if fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    eprintln!("setup: {} for the rescue reader's tests, into {}", PACKAGES.join(", "), place.display());
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let folder = place.to_str().ok_or("the cache's path is not UTF-8")?;
    program("python3", &["-m", "venv", "--clear", folder]).run()?;
    let pip = format!("{folder}/bin/pip");
    let install = ["install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"];
    program(&pip, &[&install[..], &PACKAGES[..]].concat()).run()?;
    fs::write(&mark, wanted).map_err(|error| format!("{}: {error}", mark.display()))
}
