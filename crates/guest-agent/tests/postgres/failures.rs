//! What goes wrong, and what is said about it.

use crate::server::{Server, Version};
use crate::{codes, find, quiesce, report, within, workers};
use guest_protocol::stillpoint::Policy;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[test]
fn a_session_killed_while_it_was_held_is_told() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = quiesce(&[&server]);
    let session = &report(&applications, &server).facts["session_pid"];
    assert_eq!(server.sql(&format!("SELECT pg_terminate_backend({session}, 5000)")), "t");
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(report.quiesced && !report.held, "{report:#?}");
    assert_eq!(codes(&report).last(), Some(&"session_lost"), "{report:#?}");
}

#[test]
fn a_server_restarted_while_it_was_held_is_told() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = quiesce(&[&server]);
    server.down("INT");
    server.up();
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(report.quiesced && !report.held, "{report:#?}");
    assert_eq!(codes(&report).last(), Some(&"session_lost"), "{report:#?}");
}

#[test]
fn a_server_whose_backends_crashed_while_it_was_held_is_told() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = quiesce(&[&server]);
    let other = server.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'background writer'");
    server.kill("KILL", &other);
    // The postmaster stays, and starts everything anew: same pid, same start, another session.
    std::thread::sleep(Duration::from_secs(2));
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(!report.held, "{report:#?}");
    assert_eq!(codes(&report).last(), Some(&"session_lost"), "{report:#?}");
}

#[test]
fn a_server_that_does_not_answer_is_let_go_of_at_the_deadline() {
    let Some(version) = Version::debian() else { return };
    let (stuck, well) = (Server::start(version, ""), Server::start(version, ""));
    let mut applications = find(&[&stuck, &well], Policy::Preferred);
    applications.prepare(within(60));
    let session = report(&applications, &stuck);
    assert_eq!(codes(&session), Vec::<&str>::new(), "{session:#?}");
    // The checkpointer does the work of a CHECKPOINT.
    let checkpointer = stuck.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'");
    stuck.kill("STOP", &checkpointer);
    stuck.signal("STOP");
    let begin = Instant::now();
    applications.quiesce(Duration::from_secs(3), within(10));
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let failed = report(&applications, &stuck);
    assert!(!failed.quiesced && !failed.crash_safe && failed.position.is_none(), "{failed:#?}");
    assert_eq!(codes(&failed).last(), Some(&"quiesce_timeout"), "{failed:#?}");
    assert!(report(&applications, &well).quiesced);
    assert_eq!(workers(&applications).len(), 1);
    stuck.kill("CONT", &checkpointer);
    stuck.signal("CONT");
    applications.resume(within(10));
    assert!(report(&applications, &well).held && !report(&applications, &stuck).held);
    assert_eq!(stuck.sql("SELECT 1"), "1");
}

#[test]
fn a_server_that_lets_nobody_in_in_time_is_let_go_of_at_the_deadline() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    server.signal("STOP");
    let mut applications = find(&[&server], Policy::Required);
    let begin = Instant::now();
    applications.prepare(within(2));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert_eq!(codes(&report(&applications, &server)), ["prepare_timeout"]);
    assert_eq!(applications.required_failure().unwrap().code, "prepare_timeout");
    server.signal("CONT");
}

#[test]
fn a_server_that_refuses_its_owner_is_auth_failed() {
    let Some(version) = Version::debian() else { return };
    for rule in ["local all all reject\n", "local all all scram-sha-256\n"] {
        let server = Server::prepared(version, "");
        server.own_file("pg_hba.conf", rule);
        server.up();
        let mut applications = find(&[&server], Policy::Required);
        applications.prepare(within(20));
        applications.quiesce(Duration::from_secs(10), within(20));
        let failure = applications.required_failure().unwrap();
        assert_eq!(failure.code, "auth_failed", "{rule}: {failure:?}");
        applications.resume(within(10));
        let report = report(&applications, &server);
        assert!(!report.quiesced && !report.held, "{report:#?}");
    }
}

#[test]
fn a_server_without_a_unix_socket_cannot_be_reached() {
    let Some(version) = Version::debian() else { return };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = format!("unix_socket_directories = ''\nlisten_addresses = '127.0.0.1'\nport = {free}");
    let server = Server::start(version, &settings);
    let applications = find(&[&server], Policy::Required);
    assert_eq!(applications.required_failure().unwrap().code, "socket_unreachable");
}

#[test]
fn an_aborted_run_does_not_wait_for_its_applications() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    server.signal("STOP");
    let mut applications = find(&[&server], Policy::Preferred);
    let abort = applications.abort_flag();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            abort.store(true, Ordering::Relaxed);
        });
        applications.prepare(within(60));
    });
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert_eq!(codes(&report(&applications, &server)), ["aborted"]);
    server.signal("CONT");
}
