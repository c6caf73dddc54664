//! A real PostgreSQL server in a temporary folder, run as the user `postgres`.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for a server to start or stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// Programs of one version, and an empty cluster to copy.
pub(crate) struct Version {
    bin: PathBuf,
    template: PathBuf,
}

impl Version {
    /// Debian's: `STILLPOINT_POSTGRESQL` or `/usr/lib/postgresql/15`.
    pub(crate) fn debian() -> Option<&'static Self> {
        static VERSION: OnceLock<Option<Version>> = OnceLock::new();
        let place = std::env::var_os("STILLPOINT_POSTGRESQL").map(PathBuf::from);
        let place = place.unwrap_or_else(|| "/usr/lib/postgresql/15".into());
        VERSION.get_or_init(|| Self::at(&place, false)).as_ref()
    }

    /// The newest: `STILLPOINT_POSTGRESQL_18`, or what `fetch-postgresql-18.sh` left in the cache.
    pub(crate) fn eighteen() -> Option<&'static Self> {
        static VERSION: OnceLock<Option<Version>> = OnceLock::new();
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let place = std::env::var_os("STILLPOINT_POSTGRESQL_18").map(PathBuf::from);
        let place = place.or_else(|| Some(cache?.join("stillpoint/postgresql-18")));
        VERSION.get_or_init(|| Self::at(&place?, true)).as_ref()
    }

    /// `copied`: the place may be in someone's home, where the user `postgres` cannot go.
    fn at(place: &Path, copied: bool) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            crate::skipped("servers are started as another user, which takes root");
            return None;
        }
        if !place.join("bin/postgres").exists() || !run(Command::new("id").arg("postgres")) {
            crate::skipped(&format!("no PostgreSQL in {} (or no user postgres)", place.display()));
            return None;
        }
        let folder = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        let mut bin = place.join("bin");
        if copied {
            assert!(run(Command::new("cp").arg("-a").arg(place).arg(folder.path().join("programs"))));
            bin = folder.path().join("programs/bin");
        }
        let template = folder.path().join("template");
        assert!(run(Command::new("chown").arg("postgres:").arg(folder.path())));
        let mut initdb = as_postgres(&bin.join("initdb"));
        initdb.args(["--no-sync", "-U", "postgres", "--auth-local=peer", "-E", "UTF8", "--locale=C", "-D"]);
        assert!(run(initdb.arg(&template)), "initdb failed");
        remove_at_exit(folder);
        Some(Self { bin, template })
    }
}

/// A running server. Dropping it kills it.
pub(crate) struct Server {
    version: &'static Version,
    folder: TempDir,
    process: Mutex<Option<Child>>,
    in_own_mounts: bool,
}

impl Server {
    /// Starts an empty cluster with these lines in its configuration.
    pub(crate) fn start(version: &'static Version, settings: &str) -> Self {
        let server = Self::prepared(version, settings);
        server.up();
        server
    }

    /// An empty cluster that does not run yet.
    pub(crate) fn prepared(version: &'static Version, settings: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        let server = Self { version, folder, process: Mutex::new(None), in_own_mounts: false };
        assert!(run(Command::new("cp").arg("-a").arg(&version.template).arg(server.data())));
        std::fs::create_dir(server.sockets()).unwrap();
        for path in [server.folder.path(), &server.sockets()] {
            assert!(run(Command::new("chown").arg("postgres:").arg(path)));
        }
        let configuration =
            std::fs::OpenOptions::new().append(true).open(server.data().join("postgresql.conf"));
        let sockets = server.sockets();
        let own = format!(
            "\nlisten_addresses = ''\nunix_socket_directories = '{}'\nlogging_collector = off\nshared_buffers = 16MB\n",
            sockets.display()
        );
        configuration.unwrap().write_all(format!("{own}{settings}\n").as_bytes()).unwrap();
        server
    }

    /// As `start`, but with its socket on a file system that only its own mount namespace has.
    pub(crate) fn start_in_own_mounts(version: &'static Version) -> Self {
        let mut server = Self::prepared(version, "");
        server.in_own_mounts = true;
        server.up();
        server
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn sockets(&self) -> PathBuf {
        self.folder.path().join("sockets")
    }

    /// What the module calls it.
    pub(crate) fn instance(&self) -> String {
        self.data().display().to_string()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.lock().unwrap().as_ref().unwrap().id()
    }

    /// Starts it and waits until it lets clients in.
    pub(crate) fn up(&self) {
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        let program = self.version.bin.join("postgres");
        let mut command = if self.in_own_mounts {
            // The shell and setpriv become the server: its pid is the child's.
            let mut command = Command::new("unshare");
            let script = "mount -t tmpfs none \"$1\" && chown postgres: \"$1\" && shift && exec \"$@\"";
            command.args(["--mount", "sh", "-c", script, "sh"]).arg(self.sockets());
            let setpriv = as_postgres(&program);
            command.arg(setpriv.get_program()).args(setpriv.get_args());
            command
        } else {
            as_postgres(&program)
        };
        command.arg("-D").arg(self.data()).env("LC_ALL", "C").current_dir("/");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        *self.process.lock().unwrap() = Some(child);
        self.wait("ready", |server| {
            let file = std::fs::read_to_string(server.data().join("postmaster.pid")).unwrap_or_default();
            file.lines().nth(7).is_some_and(|line| line.trim() == "ready")
        });
    }

    /// Stops it: `TERM`, `INT` or `QUIT`, as `kill` names them.
    pub(crate) fn down(&self, signal: &str) {
        self.signal(signal);
        self.wait("stopped", |server| {
            server.process.lock().unwrap().as_mut().is_none_or(|child| child.try_wait().unwrap().is_some())
        });
    }

    pub(crate) fn signal(&self, signal: &str) {
        self.kill(signal, &self.pid().to_string());
    }

    /// Sends a signal to a process that belongs to this test.
    pub(crate) fn kill(&self, signal: &str, pid: &str) {
        assert!(run(Command::new("kill").arg(format!("-{signal}")).arg(pid)), "kill -{signal} {pid}");
    }

    /// Writes a file into the data directory.
    pub(crate) fn own_file(&self, name: &str, content: &str) {
        let path = self.data().join(name);
        std::fs::write(&path, content).unwrap();
        assert!(run(Command::new("chown").arg("postgres:").arg(path)));
    }

    /// Runs statements as the superuser; what comes back is text without decoration.
    pub(crate) fn sql(&self, statements: &str) -> String {
        self.sql_as("postgres", statements)
    }

    /// Starts statements as the superuser, and goes on.
    pub(crate) fn start_sql(&self, statements: &str) -> Child {
        self.psql("postgres", statements).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    pub(crate) fn sql_as(&self, role: &str, statements: &str) -> String {
        let output = self.psql(role, statements).output().unwrap();
        assert!(output.status.success(), "{statements}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn psql(&self, role: &str, statements: &str) -> Command {
        let mut psql = as_postgres(Path::new("/usr/bin/psql"));
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-U", role, "-h"]).arg(self.sockets());
        psql.args(["-c", statements]).current_dir("/");
        psql
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done(self) {
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < until, "not {what}: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.lock().unwrap().take() {
            let pid = child.id().to_string();
            // SIGQUIT ends its children too; SIGCONT in case a test stopped it.
            for signal in ["-QUIT", "-CONT"] {
                let _gone_already = run(Command::new("kill").arg(signal).arg(&pid));
            }
            let ended = child.wait().unwrap();
            assert!(ended.code().is_some() || ended.signal().is_some());
        }
    }
}

/// What all tests of this process share is never dropped; without this it would stay.
fn remove_at_exit(folder: TempDir) {
    static FOLDERS: Mutex<Vec<TempDir>> = Mutex::new(Vec::new());
    extern "C" fn remove() {
        // A folder that cannot be removed is no fault of what was tested.
        drop(FOLDERS.lock().map(|mut folders| folders.clear()));
    }
    FOLDERS.lock().unwrap().push(folder);
    // SAFETY: `remove` takes nothing and cannot unwind; a second registration finds nothing left to do.
    assert_eq!(unsafe { libc::atexit(remove) }, 0);
}

/// A command run as the user `postgres`, ending with this thread.
fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL", "--"]);
    command.arg(program);
    command
}

fn run(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}
