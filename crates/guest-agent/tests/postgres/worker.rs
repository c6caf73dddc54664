//! The worker process itself.

use crate::server::{Server, Version};
use crate::{codes, quiesce, report, within, workers};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn a_worker_has_its_applications_rights_and_only_its_own_descriptors() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    // Something that a careless program would leak into its children.
    let leak = std::fs::File::open("/etc/hostname").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let applications = quiesce(&[&server]);
    let workers = workers(&applications);
    let [pid] = workers.as_slice() else { panic!("{workers:?}") };
    let postgres = std::fs::metadata(server.data()).unwrap();

    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), vec![postgres.uid().to_string(); 4]);
    assert_eq!(field("Gid:"), vec![postgres.gid().to_string(); 4]);
    assert_eq!(field("Groups:"), Vec::<String>::new());
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_eq!(field("Threads:"), ["1"]);
    // `cargo xtask bench agent` shows this of the agent as it is delivered.
    let resident_kib: u64 = field("VmRSS:")[0].parse().unwrap();
    writeln!(std::io::stderr(), "resident while quiesced: a worker {resident_kib} KiB").unwrap();
    assert!(resident_kib < 12 << 10, "{resident_kib} KiB");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    // The kernel gives such files of a process to root when the process is not dumpable.
    assert_eq!(std::fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid(), 0);
    assert_eq!(std::fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(program.to_str().unwrap().starts_with("/memfd:"), "{program:?}");

    let mut kinds: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap();
        let target = target.to_str().unwrap().to_owned();
        kinds.push(target.split_once(":[").map_or(target.clone(), |(kind, _)| kind.to_owned()));
    }
    kinds.retain(|kind| !kind.starts_with("anon_inode"));
    kinds.sort();
    let place = server.sockets().join(".s.PGSQL.5432").display().to_string();
    let rest: Vec<&String> = kinds.iter().filter(|kind| **kind != place && *kind != "/dev/null").collect();
    // The channel, the session, and the pair by which its runtime wakes itself for signals, if it has one.
    assert!(rest.iter().all(|kind| *kind == "socket") && rest.len() <= 4, "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| **kind == place).count(), 1, "{kinds:?}");
    drop(leak);
}

#[test]
fn a_worker_that_is_killed_harms_nobody() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = quiesce(&[&server]);
    let pid = workers(&applications)[0];
    server.kill("KILL", &pid.to_string());
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(report.quiesced && !report.held, "{report:#?}");
    assert_eq!(codes(&report).last(), Some(&"session_lost"), "{report:#?}");
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "it was reaped");
    assert_eq!(server.sql("SELECT 1"), "1");
}

#[test]
fn a_worker_that_hangs_is_given_up_at_the_deadline_and_reaped() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = quiesce(&[&server]);
    let pid = workers(&applications)[0];
    server.kill("STOP", &pid.to_string());
    let begin = Instant::now();
    applications.resume(within(1));
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let report = report(&applications, &server);
    assert!(report.quiesced && !report.held, "{report:#?}");
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "it was reaped");
}

#[test]
fn a_worker_ends_with_the_run_that_was_dropped() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let applications = quiesce(&[&server]);
    let pid = workers(&applications)[0];
    drop(applications);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stillpoint'";
    let until = within(5);
    while server.sql(sessions) != "0" {
        assert!(Instant::now() < until, "its session stays");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_worker_ends_its_session_when_its_agent_is_gone() {
    let Some(version) = Version::debian() else { return };
    let server = let_anyone_in(version);
    let (mut agent, mut worker) = worker_of(&server);
    ask(&mut agent, r#"{"phase":"quiesce","budget_ms":20000}"#);
    let mut length = [0; 4];
    agent.read_exact(&mut length).unwrap();
    let mut answer = vec![0; u32::from_le_bytes(length) as usize];
    agent.read_exact(&mut answer).unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["failure"], serde_json::Value::Null, "{answer}");
    drop(agent);
    ends(&mut worker);
    session_ends(&server);
}

#[test]
fn a_worker_whose_agent_is_gone_waits_for_no_answer_of_its_server() {
    let Some(version) = Version::debian() else { return };
    let server = let_anyone_in(version);
    let (mut agent, mut worker) = worker_of(&server);
    // What the quiesce reads after its checkpoint is kept from it.
    let keep = "SET allow_system_table_mods = on; SET application_name = 'keeper'; BEGIN; \
        ALTER VIEW pg_prepared_xacts SET (security_barrier = true); SELECT pg_sleep(60)";
    let mut keeper = server.start_sql(keep);
    let count =
        |condition: &str| server.sql(&format!("SELECT count(*) FROM pg_stat_activity WHERE {condition}"));
    until("the keeper sleeps", || count("application_name = 'keeper' AND wait_event = 'PgSleep'") == "1");
    ask(&mut agent, r#"{"phase":"quiesce","budget_ms":60000}"#);
    until("the session waits", || {
        count("application_name = 'stillpoint' AND wait_event_type = 'Lock'") == "1"
    });
    drop(agent);
    ends(&mut worker);
    session_ends(&server);
    server.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keeper'");
    keeper.wait().unwrap();
}

fn let_anyone_in(version: &'static Version) -> Server {
    let server = Server::prepared(version, "");
    server.own_file("pg_hba.conf", "local all all trust\n");
    server.up();
    server
}

/// A worker for a server, and its agent's end of the channel.
fn worker_of(server: &Server) -> (UnixStream, std::process::Child) {
    let flags = rustix::fs::OFlags::PATH;
    let place =
        rustix::fs::open(server.sockets().join(".s.PGSQL.5432"), flags, rustix::fs::Mode::empty()).unwrap();
    let (mut agent, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(crate::agent());
    command.args(["quiesce-worker", "postgresql", &place.as_raw_fd().to_string()]);
    let worker = command.stdin(OwnedFd::from(theirs)).spawn().unwrap();
    let owner = std::fs::metadata(server.data()).unwrap().uid();
    ask(
        &mut agent,
        &format!(r#"{{"server_pid":{},"server_uid":{owner},"roles":["postgres"]}}"#, server.pid()),
    );
    (agent, worker)
}

fn ask(agent: &mut UnixStream, frame: &str) {
    let length = u32::try_from(frame.len()).unwrap();
    agent.write_all(&[&length.to_le_bytes()[..], frame.as_bytes()].concat()).unwrap();
}

fn ends(worker: &mut std::process::Child) {
    within_seconds(ENDS_MAX_S, "the worker's end", || worker.try_wait().unwrap().is_some());
}

fn session_ends(server: &Server) {
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stillpoint'";
    within_seconds(ENDS_MAX_S, "its session's end", || server.sql(sessions) == "0");
}

/// Shorter than the five seconds for which a statement of ours waits for a lock.
const ENDS_MAX_S: u64 = 3;

fn until(what: &str, holds: impl FnMut() -> bool) {
    within_seconds(30, what, holds);
}

fn within_seconds(limit_s: u64, what: &str, mut holds: impl FnMut() -> bool) {
    let until = within(limit_s);
    while !holds() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nothing_is_sent_between_quiesce_and_resume() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = quiesce(&[&server]);
    let session = report(&applications, &server).facts["session_pid"].clone();
    let last = format!("SELECT query_start, state_change, state FROM pg_stat_activity WHERE pid = {session}");
    let before = server.sql(&last);
    assert!(before.ends_with("|idle"), "{before}");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(server.sql(&last), before);
    applications.resume(within(10));
    assert!(report(&applications, &server).held);
}
