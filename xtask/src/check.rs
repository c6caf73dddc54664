//! What can be said about the sources without running them.

use crate::stage::{cargo, program};
use crate::tidy;

/// Format, lints, documents, dependencies.
pub(crate) fn check() -> Result<(), String> {
    cargo(&["fmt", "--all", "--check"]).run()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "--deny", "warnings"]).run()?;
    tidy::tidy()?;
    dependencies(false)
}

/// Licences, advisories and sources of the dependencies, by cargo-deny.
///
/// It takes minutes to build: where it is not installed, `check` says so and goes on, and `test-long` installs it.
pub(crate) fn dependencies(install: bool) -> Result<(), String> {
    if program("cargo-deny", &["--version"]).output().is_err() {
        if !install {
            eprintln!(
                "check: cargo-deny is not installed, dependencies are NOT checked (`cargo xtask test-long` installs it)"
            );
            return Ok(());
        }
        cargo(&["install", "cargo-deny", "--locked", "--quiet"]).run()?;
    }
    cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"]).run()?;
    // Advisories change without us and need the network: they are part of the long run, and say so where there is none.
    if install {
        match cargo(&["deny", "fetch", "db"]).run() {
            Ok(()) => cargo(&["deny", "--offline", "check", "advisories"]).run()?,
            Err(error) => {
                eprintln!("check: advisories are NOT checked, their database cannot be fetched: {error}")
            }
        }
    }
    Ok(())
}
