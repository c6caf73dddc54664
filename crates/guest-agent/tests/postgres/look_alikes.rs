//! Processes and sockets that only look like a server.

use crate::server::{Server, Version};
use crate::{discover, find, policy, report, skipped, within};
use guest_protocol::stillpoint::Policy;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// A process of a program named `postgres` that is none, in a folder like a data directory.
struct LookAlike {
    folder: tempfile::TempDir,
    listener: UnixListener,
    child: Child,
}

impl LookAlike {
    /// Run by one user in a folder of another.
    fn start(user: &str, owner: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        let path = folder.path();
        let data = path.join("data");
        std::fs::create_dir_all(data.join("global")).unwrap();
        std::fs::copy("/bin/sleep", path.join("postgres")).unwrap();
        std::fs::write(data.join("PG_VERSION"), "15\n").unwrap();
        std::fs::write(data.join("global/pg_control"), "").unwrap();
        for (name, whom) in [(path, user), (&data, owner)] {
            assert!(Command::new("chown").arg("-R").arg(whom).arg(name).status().unwrap().success());
        }
        assert!(Command::new("chmod").arg("755").arg(path).arg(&data).status().unwrap().success());
        let listener = listen_as(user, path.join(".s.PGSQL.5432"));
        listener.set_nonblocking(true).unwrap();
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), "--clear-groups", "--pdeathsig=KILL", "--"]);
        let child = command.arg(path.join("postgres")).arg("300").current_dir(&data).spawn().unwrap();
        let lines = format!("{}\n{}\n0\n5432\n{}\n\n0\nready\n", child.id(), data.display(), path.display());
        std::fs::write(data.join("postmaster.pid"), lines).unwrap();
        // Until it runs the program that gives it its name.
        let program = || std::fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
        while !program().ends_with("postgres") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Self { folder, listener, child }
    }

    fn instance(&self) -> String {
        self.folder.path().join("data").display().to_string()
    }
}

impl Drop for LookAlike {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The kernel remembers who listens: here the right user, but this process instead of the look-alike.
fn listen_as(user: &str, path: PathBuf) -> UnixListener {
    let id = Command::new("id").args(["-u", user]).output().unwrap().stdout;
    let uid = rustix::process::Uid::from_raw(String::from_utf8(id).unwrap().trim().parse().unwrap());
    let listen = move || {
        // Of this thread only, which ends with it.
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        UnixListener::bind(path).unwrap()
    };
    std::thread::spawn(listen).join().unwrap()
}

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skipped("needs root");
    }
    root
}

#[test]
fn a_process_in_a_data_directory_of_another_user_gets_no_connection() {
    if !root() {
        return;
    }
    let fake = LookAlike::start("nobody", "daemon");
    let mut applications =
        discover(&[policy(None, Policy::Off), policy(Some(fake.instance()), Policy::Preferred)]);
    applications.prepare(within(5));
    let known = applications.reports().iter().any(|report| report.instance == fake.instance());
    assert!(!known && !applications.pids().contains(&fake.child.id()), "it is an unknown writer");
    assert_eq!(fake.listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_socket_that_another_process_listens_on_is_told_nothing() {
    if !root() {
        return;
    }
    let fake = LookAlike::start("nobody", "nobody");
    let policies = [policy(None, Policy::Off), policy(Some(fake.instance()), Policy::Required)];
    let mut applications = discover(&policies);
    applications.prepare(within(10));
    assert_eq!(applications.required_failure().unwrap().code, "auth_failed");
    let (mut connection, _) = fake.listener.accept().unwrap();
    connection.set_nonblocking(false).unwrap();
    assert_eq!(connection.read(&mut [0; 1]).unwrap(), 0, "closed without a word");
}

#[test]
fn a_script_that_calls_itself_postgres_is_none() {
    let Some(version) = Version::debian() else { return };
    let server = Server::start(version, "");
    // In the data directory of a real server, as its user, with its name in the argument list.
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--clear-groups", "--pdeathsig=KILL", "--", "bash", "-c"]);
    let mut child = command.arg("exec -a postgres sleep 300").current_dir(server.data()).spawn().unwrap();
    let applications = find(&[&server], Policy::Preferred);
    assert_eq!(report(&applications, &server).facts["postmaster_pid"], server.pid().to_string());
    assert!(!applications.pids().contains(&child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(Path::new(&server.instance()).exists());
}
