//! The program in the guest.

use guest_agent::agent::Agent;
use guest_agent::daemon::{self, Starter};
use guest_agent::options::{self, Options, Problem, REPORTED_VERSION, USAGE, Wish};
use guest_agent::signals::Signals;
use guest_agent::{activation, log, logging, open_files};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

fn main() -> ExitCode {
    // First of all: a worker and a guard are this same program, and must become nothing else.
    guest_agent::freeze::guard::main_if_guard();
    guest_agent::quiesce::worker::main_if_worker();
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    let program = program.display();
    let printed = match options::parse(words, std::env::var_os("QGA_CONF"), options::read_file) {
        Ok(Wish::Run(options)) => return run(*options),
        Ok(Wish::Dump(options)) => print(&options::dump(&options)),
        Ok(Wish::Version) => print(&format!(
            "QEMU Guest Agent {REPORTED_VERSION}\nstillpoint-agent {}\n",
            env!("CARGO_PKG_VERSION")
        )),
        Ok(Wish::Help) => print(&format!("Usage: {program} [OPTION]...\n{USAGE}")),
        Ok(Wish::Commands) => {
            let names: Vec<_> = guest_protocol::COMMANDS.iter().map(|command| command.name).collect();
            print(&(names.join("\n") + "\n"))
        }
        Err(Problem::Flag(problem)) => {
            eprintln!("{program}: {problem}");
            // It says so on standard output, as qemu-ga does; if that is closed, the code says it.
            let _said =
                print(&format!("Unknown option, try '{program} --help' for more information.\n")).is_ok();
            return ExitCode::FAILURE;
        }
        Err(Problem::Value(problem)) => {
            log!(Critical, "{problem}");
            return ExitCode::FAILURE;
        }
    };
    if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(text: &str) -> io::Result<()> {
    io::stdout().write_all(text.as_bytes())
}

fn run(mut options: Options) -> ExitCode {
    options.make_absolute();
    open_files::raise_limit();
    // Whoever started a daemon is let go when this is dropped: after the log says why.
    let mut starter = None;
    let served = activation::take().and_then(|activated| {
        if options.daemon {
            starter = Some(daemon::fork_away().map_err(in_background)?);
        }
        serve(options, activated, &mut starter)
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            log!(Critical, "{problem}");
            ExitCode::FAILURE
        }
    }
}

fn in_background(error: io::Error) -> String {
    format!("cannot go on in the background: {error}")
}

fn serve(
    mut options: Options,
    activated: Option<OwnedFd>,
    starter: &mut Option<Starter>,
) -> Result<(), String> {
    // Without the right to it, it is still an agent.
    let _spared = guest_agent::oom::be_spared();
    // Before any thread: those that are started later divert them too.
    let signals = Signals::new().map_err(|error| format!("cannot divert signals: {error}"))?;
    let pid_file = options.pidfile.clone();
    // What a dead agent left frozen is thawed meanwhile: the file may lie there.
    let log_file = logging::start(options.logfile.take(), options.verbose)
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    let agent = Agent::start(options, signals, activated);
    log_file.wait().map_err(|error| format!("unable to open specified log file: {error}"))?;
    let mut agent = agent?;
    if starter.is_some() {
        agent.write_pid_file(pid_file)?;
    }
    if let Some(starter) = starter.take() {
        starter.started().map_err(in_background)?;
    }
    agent.serve().map_err(|error| format!("cannot go on: {error}"))
}
