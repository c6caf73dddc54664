//! The PostgreSQL module against real servers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod failures;
mod look_alikes;
mod places;
mod quiescing;
mod server;
mod settings;
mod worker;

use guest_agent::quiesce::Applications;
use guest_protocol::stillpoint::{ApplicationPolicy, ApplicationReport, Policy};
use server::Server;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Says why a test does not run. The test program captures `eprintln`, and shows nothing of a test that ends well.
fn skipped(reason: &str) {
    writeln!(std::io::stderr(), "skipped: {reason}").expect("it is open");
}

fn within(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

fn policy(instance: Option<String>, policy: Policy) -> ApplicationPolicy {
    ApplicationPolicy { kind: "postgresql".to_owned(), instance, policy }
}

/// The agent: `STILLPOINT_AGENT` (such as a static build), or the one built beside these tests.
fn agent() -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_BIN_EXE_stillpoint-agent"));
    std::env::var_os("STILLPOINT_AGENT").map_or_else(built, PathBuf::from)
}

fn discover(policies: &[ApplicationPolicy]) -> Applications {
    Applications::discover_with(&agent(), policies, within(10))
}

/// Finds these servers; every other one on the machine is none of our business.
fn find(servers: &[&Server], wanted: Policy) -> Applications {
    let mut policies = vec![policy(None, Policy::Off)];
    policies.extend(servers.iter().map(|server| policy(Some(server.instance()), wanted)));
    discover(&policies)
}

/// Finds them and goes through prepare and quiesce.
fn quiesce(servers: &[&Server]) -> Applications {
    let mut applications = find(servers, Policy::Preferred);
    applications.prepare(within(60));
    applications.quiesce(Duration::from_secs(30), within(60));
    applications
}

fn report(applications: &Applications, server: &Server) -> ApplicationReport {
    let all = applications.reports();
    let own = all.iter().find(|report| report.instance == server.instance());
    own.unwrap_or_else(|| panic!("{} is not among {all:#?}", server.instance())).clone()
}

fn codes(report: &ApplicationReport) -> Vec<&str> {
    report.reasons.iter().map(|reason| reason.code.as_str()).collect()
}

/// The process ids of the workers that serve these applications.
fn workers(applications: &Applications) -> Vec<u32> {
    let name = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    applications.pids().into_iter().filter(|pid| name(pid).trim() == "stillpoint-work").collect()
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    (u64::from_str_radix(high, 16).unwrap() << 32) | u64::from_str_radix(low, 16).unwrap()
}
