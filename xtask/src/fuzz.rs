//! Runs the fuzz targets, each for a while, beginning with the seeds in `fuzz/corpus`.

use crate::stage::{Program, Stages, cargo, program, root};
use std::fs;
use std::path::PathBuf;

/// How long each target runs unless told otherwise, in seconds.
const SECONDS: u64 = 600;
/// Longest input: enough for every structure, and short enough to be quick.
const INPUT_BYTES_MAX: usize = 8192;
/// Most memory of one target, in MiB; more is a limit that does not hold.
const MEMORY_MIB_MAX: usize = 2048;

/// `fuzz [TARGET…] [--seconds N]`: those targets, or all, one after the other.
pub(crate) fn fuzz(arguments: &[String]) -> Result<(), String> {
    let (mut wanted, mut seconds) = (Vec::new(), SECONDS);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--seconds" {
            let given = arguments.next().and_then(|text| text.parse().ok());
            seconds = given.ok_or("--seconds takes a number")?;
        } else {
            wanted.push(argument.clone());
        }
    }
    let all = targets()?;
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        return Err(format!("there is no target {unknown}; there are: {}", all.join(", ")));
    }
    let mut stages = Stages::new();
    stages.run("cargo-fuzz", install)?;
    for target in if wanted.is_empty() { all } else { wanted } {
        stages.run(&target, || run(&target, seconds))?;
    }
    stages.report();
    Ok(())
}

/// Whether all targets have seeds and still compile; with the features of a plain build, so in seconds where little has changed.
pub(crate) fn check() -> Result<(), String> {
    if let Some(bare) = targets()?.iter().find(|target| !seeds(target).is_dir()) {
        return Err(format!("fuzz target {bare} has no seeds: {} is missing", seeds(bare).display()));
    }
    cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]).run()?;
    cargo(&["check", "--quiet", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target-dir"])
        .arg(&build_folder()?.join("check").to_string_lossy())
        .run()
}

/// Names of the targets: the files in `fuzz/fuzz_targets`.
pub(crate) fn targets() -> Result<Vec<String>, String> {
    let folder = root().join("fuzz/fuzz_targets");
    let files = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let names = files.flatten().filter_map(|file| file.file_name().into_string().ok());
    let mut targets: Vec<String> =
        names.filter_map(|name| Some(name.strip_suffix(".rs")?.to_owned())).collect();
    targets.sort();
    Ok(targets)
}

fn seeds(target: &str) -> PathBuf {
    root().join("fuzz/corpus").join(target)
}

fn install() -> Result<(), String> {
    if program("cargo-fuzz", &["--version"]).output().is_ok() {
        return Ok(());
    }
    cargo(&["install", "cargo-fuzz", "--locked", "--quiet"]).run()
}

fn run(target: &str, seconds: u64) -> Result<(), String> {
    let folder = build_folder()?;
    // What is found goes here: the seeds in the checkout stay few and small.
    let found = folder.join("corpus").join(target);
    let crashes = folder.join("crashes").join(target);
    for folder in [&found, &crashes] {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    sanitized(&["fuzz", "run", target, "--target-dir"])
        .arg(&folder.to_string_lossy())
        .arg(&found.to_string_lossy())
        .arg(&seeds(target).to_string_lossy())
        .arg("--")
        .arg(&format!("-artifact_prefix={}/", crashes.display()))
        .arg(&format!("-max_total_time={seconds}"))
        .arg(&format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(&format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg("-print_final_stats=1")
        .run()
}

/// The pinned toolchain builds with a sanitizer too, if it is told that it may.
fn sanitized(arguments: &[&str]) -> Program {
    cargo(arguments).env("RUSTC_BOOTSTRAP", "1")
}

/// Apart from other builds: everything is built a second time with the sanitizer.
fn build_folder() -> Result<PathBuf, String> {
    let metadata = cargo(&["metadata", "--no-deps", "--offline", "--format-version", "1"]).output()?;
    let metadata: serde_json::Value =
        serde_json::from_str(&metadata).map_err(|error| format!("cargo metadata: {error}"))?;
    let target = metadata["target_directory"].as_str().ok_or("cargo metadata names no target folder")?;
    Ok(PathBuf::from(target).join("fuzz"))
}
