//! The command line: `stillpoint`.

mod arguments;
mod commands;
mod escape;
mod explain;
mod progress;
mod receipt;
mod secret;
mod units;

use arguments::{Arguments, Global};
use clap::Parser;
use engine::watch::Cancel;
use explain::{Exit, Explanation};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(wrong) => return usage(&wrong),
    };
    let cancel = Cancel::default();
    let listening = if arguments.command.cleans_up() { listen(&cancel) } else { Ok(()) };
    let outcome = listening.and_then(|()| commands::run(&arguments, &cancel));
    let json = arguments.global.json;
    match outcome {
        Ok(output) => {
            let text =
                if json { format!("{}\n", escape::json(&output.json)) } else { escape::page(&output.text) };
            answer(&text);
            ExitCode::from(output.exit)
        }
        Err(explanation) => {
            tell(&format!("{explanation}\n"));
            if json {
                answer(&format!("{}\n", escape::json(&explanation.json())));
            }
            ExitCode::from(explanation.exit as u8)
        }
    }
}

/// Prints to standard output. Where nobody reads us any more (`| head`) there is nobody to tell either: the exit code stays what
/// it is, while `println!` would panic.
fn answer(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes()); // nobody reads it
}

/// The same to standard error.
pub(crate) fn tell(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes()); // nobody reads it
}

/// Help, the version, or what is wrong with the command line; the latter for programs too, if they asked for that.
fn usage(wrong: &clap::Error) -> ExitCode {
    let code = if wrong.use_stderr() { Exit::Usage as u8 } else { 0 };
    // Nobody reads us any more: there is nobody to tell either.
    let _ = wrong.print();
    if code != 0 && std::env::args_os().any(|word| word == "--json") {
        let text = wrong.to_string();
        let first = text.lines().next().unwrap_or_default();
        let cause = first.strip_prefix("error: ").unwrap_or(first);
        let explanation =
            Explanation::new(Exit::Usage, "the command line is wrong", cause, "see the command's --help");
        answer(&format!("{}\n", escape::json(&explanation.json())));
    }
    ExitCode::from(code)
}

/// The first Ctrl-C, SIGTERM or SIGHUP asks the operation to end; a third Ctrl-C ends the program as it stands, which loses
/// nothing either: the guest thaws by itself and the next run cleans up.
fn listen(cancel: &Cancel) -> Result<(), Explanation> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let failed = |e: std::io::Error| {
        Explanation::new(Exit::Failed, "signals cannot be handled", e.to_string(), "report this as a bug")
    };
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, cancel.flag()).map_err(failed)?;
    }
    let presses = std::sync::atomic::AtomicUsize::new(0);
    let third = move || {
        if presses.fetch_add(1, std::sync::atomic::Ordering::SeqCst) >= 2 {
            signal_hook::low_level::exit(i32::from(Exit::Interrupted as u8));
        }
    };
    // SAFETY: the handler touches an atomic and may call `_exit`; both are async-signal-safe.
    unsafe { signal_hook::low_level::register(SIGINT, third) }.map_err(failed)?;
    Ok(())
}

/// What a command prints at its end: text for people, one object for programs.
pub(crate) struct Output {
    pub(crate) text: String,
    pub(crate) json: serde_json::Value,
    pub(crate) exit: u8,
}

impl Output {
    pub(crate) fn new(text: impl Into<String>, json: serde_json::Value) -> Self {
        Self { text: text.into(), json, exit: 0 }
    }
}

impl Global {
    /// The state folder: as given, else `/var/lib/stillpoint` for root, else the user's own.
    pub(crate) fn state_folder(&self) -> Result<std::path::PathBuf, Explanation> {
        if let Some(folder) = &self.state {
            return std::path::absolute(folder).map_err(|e| {
                Explanation::new(Exit::Usage, "the state folder has no path", e.to_string(), "give --state")
            });
        }
        if rustix::process::geteuid().is_root() {
            return Ok("/var/lib/stillpoint".into());
        }
        let from = |name: &str| {
            std::env::var_os(name).map(std::path::PathBuf::from).filter(|path| path.is_absolute())
        };
        from("XDG_STATE_HOME")
            .or_else(|| from("HOME").map(|home| home.join(".local/state")))
            .map(|f| f.join("stillpoint"))
            .ok_or_else(|| {
                Explanation::new(
                    Exit::Usage,
                    "there is no state folder",
                    "neither XDG_STATE_HOME nor HOME is set",
                    "give --state",
                )
            })
    }
}
