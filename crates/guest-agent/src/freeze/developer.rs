//! Keeps a developer's own machine from being frozen by its own tests.
//!
//! A program that was started by cargo, or that lies in one of cargo's build folders, freezes nothing: on such a
//! machine the root file system is the one with the checkout, and freezing it would end the session. An installed
//! agent is in neither place, and the harness that builds a private root copies the program and clears the environment.

use std::path::Path;

/// Whether this process must not freeze anything.
pub fn is_developers_machine() -> bool {
    let built_here = |program: &Path| {
        program.ancestors().skip(1).take(2).any(|folder| folder.join(".fingerprint").exists())
    };
    std::env::var_os("CARGO_MANIFEST_DIR").is_some()
        || std::env::current_exe().is_ok_and(|program| built_here(&program))
}

#[cfg(test)]
mod tests {
    #[test]
    fn tests_run_by_cargo_are_recognised() {
        assert!(super::is_developers_machine());
    }
}
