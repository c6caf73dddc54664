//! Settings and contents that a copy's safety rests on.

use crate::server::{Server, Version};
use crate::{codes, quiesce, report};

/// Quiesces a server with these settings; after statements that are run `before`.
fn check(settings: &str, before: &str, crash_safe: bool, code: &str, words: &str) {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, settings);
    for statement in before.lines() {
        server.sql(statement.trim());
    }
    let applications = quiesce(&[&server]);
    let report = report(&applications, &server);
    assert!(report.quiesced, "{report:#?}");
    assert_eq!(report.crash_safe, crash_safe, "{report:#?}");
    let said = report.reasons.iter().any(|reason| reason.code == code && reason.message.contains(words));
    assert!(said, "{:?} {report:#?}", codes(&report));
}

#[test]
fn fsync_off_is_not_crash_safe() {
    check("fsync = off", "", false, "not_crash_safe", "fsync");
}

#[test]
fn full_page_writes_off_is_not_crash_safe() {
    check("full_page_writes = off", "", false, "not_crash_safe", "full_page_writes");
}

#[test]
fn asynchronous_commit_in_the_server_is_not_crash_safe() {
    check("synchronous_commit = off", "", false, "asynchronous_commit", "in the server");
}

#[test]
fn asynchronous_commit_of_one_role_is_seen() {
    let roles = "CREATE ROLE app\nALTER ROLE app SET synchronous_commit = false";
    check("", roles, false, "asynchronous_commit", "role app in database (any)");
}

#[test]
fn asynchronous_commit_of_one_database_is_seen() {
    let databases = "CREATE DATABASE shop\nALTER DATABASE shop SET Synchronous_Commit = 'OFF'";
    check("", databases, false, "asynchronous_commit", "role (any) in database shop");
}

#[test]
fn an_override_for_our_own_role_does_not_hide_the_servers_setting() {
    let own = "ALTER ROLE postgres SET synchronous_commit = on";
    check("synchronous_commit = off", own, false, "settings_unreadable", "hidden");
}

#[test]
fn local_commit_is_durable_here_and_so_crash_safe() {
    check("synchronous_commit = local", "", true, "session_settings_unseen", "session");
}

#[test]
fn unlogged_tables_are_named_by_database() {
    let tables = "CREATE UNLOGGED TABLE cache (n int)\nCREATE TABLE kept (n int)";
    check("", tables, true, "unlogged_tables", "1 in database postgres are empty in a copy: public.cache");
}

#[test]
fn prepared_transactions_are_counted() {
    let transaction = "CREATE TABLE t (n int)\nBEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'doubt'";
    check("max_prepared_transactions = 2", transaction, true, "prepared_transactions", "1 in doubt");
}

#[test]
fn a_function_that_bears_a_systems_name_is_not_called() {
    let impostor = "CREATE FUNCTION public.pg_is_in_recovery() RETURNS bool LANGUAGE sql AS 'SELECT 1/0 = 1'\n\
        ALTER DATABASE postgres SET search_path = public, pg_catalog";
    check("", impostor, true, "session_settings_unseen", "session");
}
