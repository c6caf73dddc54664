//! The project's own commands: setup, test, demo, bench, fuzz, check.

mod beside;
mod check;
mod fuzz;
mod guest;
mod lanes;
mod later_qemu;
mod packages;
mod python;
mod setup;
mod stage;
mod stock_agents;
mod targets;
mod tidy;
mod unpack;

use stage::{Stages, cargo, program};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use targets::Targets;

const USAGE: &str = "\
cargo xtask COMMAND

  check          format, lints, dependencies, and what documents name
  tidy           only what documents name, and what no source may do
  test           check, unit tests, the guest image, tests in real guests: what CI runs
  test-long      test, and what takes longer than a change should wait for
  demo           a working guest, its snapshots, and the proof [--sabotage no-freeze|drop-frame]
  fuzz           made-up input for everything that reads bytes from outside [TARGET…] [--seconds 600]
  bench          figures: increment, full (without a name both), stall [SNAPSHOTS], agent [MIB]
  guest          builds image, agent and load if needed; prints where they are
  guest-image    builds the guest image, if this recipe's is not there yet
  later-qemu     fetches a QEMU later than Debian 12's, if it is not there yet; prints the folder of its programs
  stock-agents   fetches guest agents later than Debian 12's, if they are not there yet; prints their folders
  packages       builds the packages of agent and host, deb and rpm; prints where they are
  package-parts  builds and fetches what the tests of packages and libvirt need; prints where it is
  setup          installs the Debian packages that the tests need; the others call it";

fn main() -> ExitCode {
    // Who starts this under `nohup` or in the background ignores them, and with it all that is started from here: some
    // tests are about them.
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: this process has one thread, and no handler is set.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) =
        arguments.split_first().map_or(("help", &[][..]), |(first, rest)| (first.as_str(), rest));
    let done = match command {
        "check" => check::check(),
        "tidy" => tidy::tidy(),
        "test" => test(),
        "test-long" => test_long(),
        "demo" => demo(rest),
        "fuzz" => fuzz::fuzz(rest),
        "bench" => bench(rest),
        "guest" => setup::setup().and_then(|()| guest::parts()).map(|parts| println!("{parts}")),
        "guest-image" => {
            setup::setup().and_then(|()| guest::image()).map(|folder| println!("{}", folder.display()))
        }
        "later-qemu" => setup::setup()
            .and_then(|()| later_qemu::programs())
            .map(|folder| println!("{}", folder.display())),
        "stock-agents" => {
            setup::setup().and_then(|()| stock_agents::folders()).map(|folders| println!("{folders}"))
        }
        "packages" => setup::setup()
            .and_then(|()| packages::all())
            .map(|built| built.iter().for_each(|package| println!("{}", package.display()))),
        "package-parts" => setup::setup().and_then(|()| packages::parts()).map(|parts| println!("{parts}")),
        "setup" => setup::setup(),
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(())
        }
        unknown => Err(format!("there is no command {unknown}\n\n{USAGE}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What CI runs.
fn test() -> Result<(), String> {
    let mut stages = Stages::new();
    quick_tests(&mut stages)?;
    stages.report();
    Ok(())
}

/// What CI runs; then the tests that are marked `#[ignore = "long: …"]`, and every test of the guests on a later QEMU.
fn test_long() -> Result<(), String> {
    let mut stages = Stages::new();
    let Tested { targets, parts, packages, later } = quick_tests(&mut stages)?;
    stages.run("packages of agent and host", packages::all)?;
    stages.run("long tests", || targets.without_guests(&["--ignored"]))?;
    stages.run("simulation, 10,000 schedules", || {
        cargo(&["test", "--package", "simulation", "--test", "runs", "--", "--nocapture", "no_schedule"])
            .env("SCHEDULES", "10000")
            .run()
    })?;
    stages.run("fuzz targets compile", fuzz::check)?;
    stages.run("long tests in real guests", || {
        lanes::run(targets.in_guests(&parts, &packages, &["--ignored"], &[]))
    })?;
    stages.run("tests in real guests on the later QEMU", || {
        let path = later_qemu::path_with(&later);
        lanes::run(targets.in_guests(&parts, &packages, &["--include-ignored"], &[("PATH", &path)]))
    })?;
    stages.run("dependencies", || check::dependencies(true))?;
    stages.report();
    Ok(())
}

/// What the quick tests needed, and the long ones need again.
struct Tested {
    targets: Targets,
    parts: guest::Parts,
    packages: packages::Parts,
    /// The folder of the later QEMU.
    later: PathBuf,
}

fn quick_tests(stages: &mut Stages) -> Result<Tested, String> {
    stages.run("setup", setup::setup)?;
    stages.run("check", check::check)?;
    let stock = stages.run("stock agents", || Ok(stock_agents::what_can_be_had()))?;
    let targets = Targets::list(stock)?;
    stages.run("unit tests", || targets.without_guests(&[]))?;
    let parts = stages.run("guest image, agent and load", guest::parts)?;
    let packages = stages.run("packages, and libvirt", packages::parts)?;
    let later = stages.run("a later QEMU", later_qemu::programs)?;
    stages.run("tests in real guests, and what speaks with QEMU with the later one", || {
        targets.build_for_guests()?;
        let mut programs = targets.with_qemu_of(&later_qemu::path_with(&later), &parts);
        programs.extend(targets.in_guests(&parts, &packages, &[], &[]));
        lanes::run(programs)
    })?;
    Ok(Tested { targets, parts, packages, later })
}

/// Runs the demo: program and guest as they are delivered.
fn demo(arguments: &[String]) -> Result<(), String> {
    let mut stages = Stages::new();
    stages.run("setup", setup::setup)?;
    let parts = stages.run("guest image, agent and load", guest::parts)?;
    let demo = stages.run("build", || released("demo"))?;
    stages.run("demo", || {
        let command = program(&demo, &[]).env("STILLPOINT_GUEST", &parts.to_string());
        arguments.iter().fold(command, |command, argument| command.arg(argument)).run()
    })?;
    stages.report();
    Ok(())
}

/// Runs the bench on programs as they are delivered. Only `stall` needs a guest; `agent` compares
/// agents on this machine's own kernel.
fn bench(arguments: &[String]) -> Result<(), String> {
    let mut stages = Stages::new();
    stages.run("setup", setup::setup)?;
    let stalls = arguments.first().is_some_and(|name| name == "stall");
    let parts = stalls.then(|| stages.run("guest image, agent and load", guest::parts)).transpose()?;
    let agents = arguments.first().is_some_and(|name| name == "agent");
    let agents = agents.then(|| -> Result<_, String> {
        let ours = stages.run("agent", guest::agent)?.display().to_string();
        Ok((ours, stages.run("stock agents", || Ok(stock_agents::what_can_be_had()))?))
    });
    let agents = agents.transpose()?;
    let bench = stages.run("build", || released("bench"))?;
    let folder = if stalls { folder_in_memory()? } else { None };
    stages.run("bench", || {
        let command = arguments.iter().fold(program(&bench, &[]), |command, argument| command.arg(argument));
        let command = folder.iter().fold(command, |command, folder| command.env("TMPDIR", folder));
        let command = agents.iter().fold(command, |command, (ours, stock)| {
            command.env("STILLPOINT_AGENT", ours).env("STILLPOINT_STOCK_AGENTS", stock)
        });
        parts.iter().fold(command, |command, parts| command.env("STILLPOINT_GUEST", &parts.to_string())).run()
    })?;
    if let Some((ours, _)) = agents {
        stages.run("a run's memory", || run_memory(&ours))?;
    }
    stages.report();
    Ok(())
}

/// Where `bench stall` keeps images, scratch and repository: in memory, unless somebody named another folder or there is too little of it.
/// On a machine's disk a hypervisor was seen to hold the processors meanwhile, and then that is what is measured (`docs/performance.md`).
fn folder_in_memory() -> Result<Option<&'static str>, String> {
    const FOLDER: &str = "/dev/shm";
    /// Its files come to 7 GiB after ten snapshots, the guest has 4.
    const ROOM_MIN_KIB: u64 = 10 << 20;
    const MEMORY_MIN_KIB: u64 = 16 << 20;
    let number = |text: &str| text.split_whitespace().find_map(|word| word.parse::<u64>().ok()).unwrap_or(0);
    // Where there is no such folder, there is no room in it.
    let room = program("df", &["--block-size=1K", "--output=avail", FOLDER]).output().unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let available = memory.lines().find(|line| line.starts_with("MemAvailable:")).unwrap_or_default();
    let is_roomy = number(&room) >= ROOM_MIN_KIB && number(available) >= MEMORY_MIN_KIB;
    Ok((is_roomy && std::env::var_os("TMPDIR").is_none()).then_some(FOLDER))
}

/// What agent, guard and one worker hold during a run. Nothing can be frozen on this machine but in the private roots of
/// the freeze tests, so those measure it, with the agent as it is delivered.
fn run_memory(agent: &str) -> Result<(), String> {
    [
        ("native_freeze", "an_agent_and_its_guard_take_little_memory_while_frozen"),
        ("postgres", "worker::a_worker_has_its_applications_rights_and_only_its_own_descriptors"),
    ]
    .iter()
    .try_for_each(|(program, test)| {
        let words = [
            "test",
            "--quiet",
            "--package",
            "guest-agent",
            "--test",
            program,
            "--",
            "--nocapture",
            "--exact",
            test,
        ];
        cargo(&words).env("STILLPOINT_AGENT", agent).run()
    })
}

/// Builds `stillpoint` as it is delivered, and a program of `vm-tests` that uses it; returns the latter's path.
fn released(name: &str) -> Result<String, String> {
    cargo(&["build", "--release", "--quiet", "--workspace", "--bin", "stillpoint", "--bin", name]).run()?;
    Ok(targets::folder()?.join("release").join(name).display().to_string())
}
