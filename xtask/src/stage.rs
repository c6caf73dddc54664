//! Runs other programs, and tells how long each part of a command took.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The stages of one command, with their times.
pub(crate) struct Stages {
    started: Instant,
    done: Vec<(String, Duration)>,
}

impl Stages {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), done: Vec::new() }
    }

    /// Runs one stage; on failure the times so far are printed, and the error says which stage it was.
    pub(crate) fn run<T>(
        &mut self,
        name: &str,
        stage: impl FnOnce() -> Result<T, String>,
    ) -> Result<T, String> {
        eprintln!("\n== {name}");
        let started = Instant::now();
        let result = stage();
        self.done.push((name.to_owned(), started.elapsed()));
        result.map_err(|error| {
            self.report();
            format!("{name}: {error}")
        })
    }

    /// Prints a line a stage.
    pub(crate) fn report(&self) {
        eprintln!();
        for (name, time) in &self.done {
            eprintln!("{:7.1} s  {name}", time.as_secs_f64());
        }
        eprintln!("{:7.1} s  in all", self.started.elapsed().as_secs_f64());
    }
}

/// A program to be run in the checkout's root.
pub(crate) struct Program {
    name: String,
    command: Command,
}

/// The cargo that runs this program.
pub(crate) fn cargo(arguments: &[&str]) -> Program {
    program(&std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()), arguments)
}

/// Any program.
pub(crate) fn program(name: &str, arguments: &[&str]) -> Program {
    let mut command = Command::new(name);
    command.args(arguments).current_dir(root()).stdin(Stdio::null());
    Program { name: format!("{name} {}", arguments.join(" ")), command }
}

impl Program {
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it in this folder instead.
    pub(crate) fn within(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    pub(crate) fn arg(mut self, argument: &str) -> Self {
        self.name = format!("{} {argument}", self.name);
        self.command.arg(argument);
        self
    }

    /// Runs it with its output shown; an error if it fails.
    pub(crate) fn run(mut self) -> Result<(), String> {
        // What xtask prints on stdout is for programs: everything else goes to stderr.
        let status = self.command.stdout(std::io::stderr()).status();
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("`{}` failed: {status}", self.name)),
            Err(error) => Err(format!("`{}` does not start: {error}", self.name)),
        }
    }

    /// Runs it and returns all that it printed, in order, and how it ended.
    pub(crate) fn together(mut self) -> (Vec<u8>, Result<(), String>) {
        let failed = |error: io::Error| format!("`{}` does not start: {error}", self.name);
        let (mut reader, writer) = match io::pipe() {
            Ok(pipe) => pipe,
            Err(error) => return (Vec::new(), Err(failed(error))),
        };
        let spawned = writer.try_clone().and_then(|second| {
            let child = self.command.stdout(writer).stderr(second).spawn();
            // They hold the pipe's other end, which is at its end only when nobody does.
            self.command.stdout(Stdio::null()).stderr(Stdio::null());
            child
        });
        let mut shown = Vec::new();
        let ended = spawned.and_then(|mut child| {
            reader.read_to_end(&mut shown)?;
            child.wait()
        });
        let ended = match ended {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("`{}` failed: {status}", self.name)),
            Err(error) => Err(failed(error)),
        };
        (shown, ended)
    }

    /// Runs it and returns what it printed; an error, with that, if it fails.
    pub(crate) fn output(mut self) -> Result<String, String> {
        match self.command.output() {
            Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            Ok(output) => Err(format!(
                "`{}` failed: {}{}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )),
            Err(error) => Err(format!("`{}` does not start: {error}", self.name)),
        }
    }
}

/// The checkout that cargo runs this for. Asked now and not when it was built: checkouts share the target folder, and
/// this program may have been built from another.
pub(crate) fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR");
    let mut root = manifest.map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    root.pop();
    root
}
