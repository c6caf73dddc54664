//! The program in the guest.

use guest_agent::agent::Agent;
use guest_agent::options::{self, Options, REPORTED_VERSION, USAGE, Wish};
use guest_agent::{log, logging};
use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    // First of all: a worker and a guard are this same program, and must become nothing else.
    guest_agent::freeze::guard::main_if_guard();
    guest_agent::quiesce::worker::main_if_worker();
    let printed = match options::parse(std::env::args_os().skip(1)) {
        Ok(Wish::Run(options)) => return run(*options),
        Ok(Wish::Version) => print(&format!(
            "QEMU Guest Agent {REPORTED_VERSION} (stillpoint-agent {})\n",
            env!("CARGO_PKG_VERSION")
        )),
        Ok(Wish::Help) => print(USAGE),
        Ok(Wish::Commands) => {
            let names: Vec<_> = guest_protocol::COMMANDS.iter().map(|command| command.name).collect();
            print(&(names.join("\n") + "\n"))
        }
        Err(problem) => {
            eprintln!(
                "stillpoint-agent: {problem}\nUnknown option, try 'stillpoint-agent --help' for more information."
            );
            return ExitCode::FAILURE;
        }
    };
    if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(text: &str) -> io::Result<()> {
    io::stdout().write_all(text.as_bytes())
}

fn run(mut options: Options) -> ExitCode {
    let (logfile, verbose) = (options.logfile.take(), options.verbose);
    // Without the right to it, it is still an agent.
    let _spared = guest_agent::oom::be_spared();
    // What a dead agent left frozen is thawed before anything is opened that may lie there.
    let agent = match Agent::start(options) {
        Ok(agent) => agent,
        Err(problem) => {
            log!(Critical, "{problem}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = logging::start(logfile, verbose) {
        log!(Critical, "unable to open specified log file: {error}");
        return ExitCode::FAILURE;
    }
    match agent.serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log!(Critical, "cannot go on: {error}");
            ExitCode::FAILURE
        }
    }
}
