//! What goes well.

use crate::server::{Server, Version};
use crate::{codes, discover, find, lsn, policy, quiesce, report, within, workers};
use guest_protocol::stillpoint::Policy;
use std::time::Duration;

#[test]
fn two_clusters_are_found_quiesced_and_held_with_their_positions() {
    let Some(version) = Version::debian() else { return };
    let servers = [Server::start(version, ""), Server::start(version, "")];
    servers[1].sql("CREATE TABLE t AS SELECT generate_series(1, 20000) AS n");
    let mut applications = quiesce(&[&servers[0], &servers[1]]);
    for server in &servers {
        let report = report(&applications, server);
        assert!(report.quiesced && report.crash_safe && !report.held, "{report:#?}");
        let position = lsn(report.position.as_deref().unwrap());
        assert!(position <= lsn(&server.sql("SELECT pg_current_wal_flush_lsn()")), "{report:#?}");
        assert!(position >= lsn(&report.facts["checkpoint_lsn"]), "{report:#?}");
        assert!(lsn(&report.facts["redo_lsn"]) <= lsn(&report.facts["checkpoint_lsn"]), "{report:#?}");
        assert!(report.version.unwrap().starts_with("15."));
        assert_eq!(report.facts["data_directory"], server.instance());
        assert_eq!(report.facts["postmaster_pid"], server.pid().to_string());
    }
    let positions = servers.each_ref().map(|server| report(&applications, server).position.unwrap());
    assert!(lsn(&positions[1]) > lsn(&positions[0]));
    assert_eq!(applications.budget_ms(), 5_000);
    applications.resume(within(10));
    for server in &servers {
        let report = report(&applications, server);
        assert!(report.held, "{report:#?}");
        assert_eq!(codes(&report), ["session_settings_unseen"]);
    }
    assert_eq!(applications.required_failure(), None);
    assert_eq!(workers(&applications), Vec::<u32>::new());
}

#[test]
fn postgresql_18_is_quiesced_and_held() {
    let Some(version) = Version::eighteen() else { return };
    let server = Server::start(version, "idle_session_timeout = '200ms'");
    let mut applications = quiesce(&[&server]);
    std::thread::sleep(Duration::from_millis(600));
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(report.quiesced && report.crash_safe && report.held, "{report:#?}");
    assert!(report.version.as_deref().unwrap().starts_with("18."), "{report:#?}");
}

#[test]
fn the_second_checkpoint_makes_asynchronous_commits_durable_before_the_position_is_read() {
    let Some(version) = Version::debian() else { return };
    // Slow enough that nobody but a checkpoint flushes the log.
    let server = Server::start(version, "synchronous_commit = off\nwal_writer_delay = '10s'");
    server.sql("CREATE TABLE t (n int)");
    let mut applications = find(&[&server], Policy::Preferred);
    applications.prepare(within(60));
    let inserted = server.sql("INSERT INTO t VALUES (1); SELECT pg_current_wal_insert_lsn()");
    applications.quiesce(Duration::from_secs(30), within(60));
    let report = report(&applications, &server);
    assert!(lsn(report.position.as_deref().unwrap()) >= lsn(&inserted), "{inserted} {report:#?}");
    assert!(lsn(&report.facts["checkpoint_lsn"]) >= lsn(&inserted), "{inserted} {report:#?}");
}

#[test]
fn a_standby_tells_how_far_it_has_replayed() {
    let Some(version) = Version::debian() else { return };
    let server = Server::prepared(version, "primary_conninfo = 'host=/nonexistent'");
    server.own_file("standby.signal", "");
    server.up();
    let mut applications = quiesce(&[&server]);
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(report.quiesced && report.held, "{report:#?}");
    assert_eq!(report.facts["in_recovery"], "true");
    assert_eq!(report.position.as_ref(), Some(&report.facts["replay_lsn"]));
}

#[test]
fn a_rehearsal_connects_and_reads_but_writes_no_checkpoint() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let checkpoint = "SELECT checkpoint_lsn FROM pg_control_checkpoint()";
    server.sql("CREATE TABLE t (n int)");
    let before = server.sql(checkpoint);
    let mut applications = find(&[&server], Policy::Required);
    applications.rehearse(within(20));
    let report = report(&applications, &server);
    assert!(!report.quiesced && !report.held && report.position.is_none(), "{report:#?}");
    assert_eq!(report.facts["fsync"], "on");
    assert_eq!(codes(&report), ["session_settings_unseen"]);
    assert_eq!(applications.required_failure(), None);
    assert_eq!(server.sql(checkpoint), before);
    assert_eq!(workers(&applications), Vec::<u32>::new());
}

#[test]
fn a_rehearsal_tells_that_the_role_may_not_checkpoint() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    // The server lets nobody take this right from the role that made the cluster, so it gets another owner name.
    server.sql("CREATE ROLE boss SUPERUSER LOGIN");
    server.own_file("pg_hba.conf", "local all boss trust\nlocal all all peer\n");
    server.sql("SELECT pg_reload_conf()");
    server.sql_as("boss", "UPDATE pg_authid SET rolsuper = false WHERE rolname = 'postgres'");
    let may = |server: &Server| {
        let mut applications = find(&[server], Policy::Required);
        applications.rehearse(within(20));
        applications.required_failure().map(|reason| reason.code)
    };
    assert_eq!(may(&server).as_deref(), Some("not_permitted"));
    server.sql_as("boss", "GRANT pg_checkpoint TO postgres");
    assert_eq!(may(&server), None);
    let mut applications = find(&[&server], Policy::Required);
    applications.prepare(within(60));
    applications.quiesce(Duration::from_secs(30), within(60));
    assert!(report(&applications, &server).quiesced, "{:#?}", applications.reports());
}

#[test]
fn an_application_that_is_off_is_listed_and_not_touched() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let mut applications = find(&[&server], Policy::Off);
    applications.prepare(within(20));
    applications.quiesce(Duration::from_secs(10), within(20));
    assert_eq!(workers(&applications), Vec::<u32>::new());
    applications.resume(within(10));
    let report = report(&applications, &server);
    assert!(!report.quiesced && !report.held && report.policy == Policy::Off, "{report:#?}");
    assert_eq!(codes(&report), ["policy_off"]);
    assert!(!report.device_numbers.is_empty());
    assert!(applications.pids().contains(&server.pid()));
}

#[test]
fn a_required_application_that_is_not_there_fails_the_run() {
    let absent = policy(Some("/nonexistent/data".to_owned()), Policy::Required);
    let applications = discover(&[policy(None, Policy::Off), absent]);
    let reason = applications.required_failure().unwrap();
    assert_eq!(
        (reason.code.as_str(), reason.subject.as_str()),
        ("not_found", "postgresql /nonexistent/data")
    );
}

#[test]
fn backends_belong_to_their_application_and_are_no_unknown_writers() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    let applications = find(&[&server], Policy::Preferred);
    let pids = applications.pids();
    let statement = "SELECT pid FROM pg_stat_activity WHERE backend_type IN ('checkpointer', 'walwriter')";
    for pid in server.sql(statement).lines() {
        assert!(pids.contains(&pid.parse().unwrap()), "{pid} in {pids:?}");
    }
}
