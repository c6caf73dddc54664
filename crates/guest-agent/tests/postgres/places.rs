//! Where files and sockets lie.

use crate::server::{Server, Version};
use crate::{codes, discover, find, policy, report, within};
use guest_protocol::stillpoint::Policy;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// `MAJOR:MINOR` of a file system that is not btrfs.
fn device_number(path: &Path) -> String {
    let device = std::fs::metadata(path).unwrap().dev();
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

#[test]
fn a_tablespace_and_a_log_on_other_file_systems_count_as_places_of_the_application() {
    let Some(version) = Version::debian() else { return };
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let server = Server::prepared(version, "");
    let disk = device_number(&server.data());
    let shm = device_number(memory.path());
    assert_ne!(disk, shm, "the test needs two file systems");
    server.up();
    let before = report(&find(&[&server], Policy::Preferred), &server);
    assert_eq!(before.device_numbers, [disk.as_str()]);

    assert!(Command::new("chown").arg("postgres:").arg(memory.path()).status().unwrap().success());
    server.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", memory.path().display()));
    let with_tablespace = report(&find(&[&server], Policy::Preferred), &server);
    let mut both = [disk.clone(), shm.clone()];
    both.sort();
    assert_eq!(with_tablespace.device_numbers, both);
    server.sql("DROP TABLESPACE fast");

    server.down("INT");
    let log = memory.path().join("log");
    assert!(Command::new("mv").arg(server.data().join("pg_wal")).arg(&log).status().unwrap().success());
    std::os::unix::fs::symlink(&log, server.data().join("pg_wal")).unwrap();
    server.up();
    let with_log = report(&find(&[&server], Policy::Preferred), &server);
    assert_eq!(with_log.device_numbers, both);
}

#[test]
fn a_server_in_its_own_mount_namespace_is_reached_through_its_root() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start_in_own_mounts(version);
    assert_eq!(
        std::fs::read_dir(server.sockets()).unwrap().count(),
        0,
        "its socket is not to be seen from here"
    );
    let all = discover(&[policy(None, Policy::Off)]).reports();
    let named = all.iter().find(|report| report.instance.starts_with(&server.instance())).unwrap();
    let policies = [policy(None, Policy::Off), policy(Some(named.instance.clone()), Policy::Required)];
    let mut applications = discover(&policies);
    applications.prepare(within(60));
    applications.quiesce(Duration::from_secs(30), within(60));
    applications.resume(within(10));
    assert_eq!(applications.required_failure(), None, "{:#?}", applications.reports());
}

#[test]
fn scratch_that_lies_in_memory_is_no_place_of_the_application() {
    let Some(version) = Version::debian() else { return };
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let server = Server::prepared(version, "");
    let scratch = server.data().join("pg_stat_tmp");
    std::fs::remove_dir(&scratch).unwrap();
    std::os::unix::fs::symlink(memory.path(), &scratch).unwrap();
    assert!(Command::new("chown").arg("postgres:").arg(memory.path()).status().unwrap().success());
    server.up();
    let report = report(&find(&[&server], Policy::Preferred), &server);
    assert_eq!(report.device_numbers, [device_number(&server.data())]);
}

/// What exclusive backups of PostgreSQL up to 14 leave in a running server's data directory.
#[test]
fn a_server_in_an_exclusive_backup_is_not_quiesced() {
    let Some(version) = Version::debian() else { return };
    let server = Server::prepared(version, "");
    server.up();
    let label = server.data().join("backup_label");
    std::fs::write(&label, "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n").unwrap();
    let mut applications = find(&[&server], Policy::Preferred);
    applications.prepare(within(60));
    let labelled = report(&applications, &server);
    assert!(codes(&labelled).contains(&"exclusive_backup"), "{labelled:#?}");
    std::fs::remove_file(label).unwrap();
    let mut applications = find(&[&server], Policy::Preferred);
    applications.prepare(within(60));
    let unlabelled = report(&applications, &server);
    assert!(!codes(&unlabelled).contains(&"exclusive_backup"), "{unlabelled:#?}");
}
