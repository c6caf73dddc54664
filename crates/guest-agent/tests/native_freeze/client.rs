//! What a scene does inside the private root: starts agents, speaks to them, and looks whether writers wait.

use guest_agent::freeze::mountinfo::{Mount, parse};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for one answer of the agent.
const ANSWER_MAX: Duration = Duration::from_secs(40);
/// A write that takes this long waits for a thaw; one that does not takes microseconds, on a loaded machine more.
const BLOCKED: Duration = Duration::from_millis(400);
/// Longest time for a write that nothing holds up, on a loaded machine.
const WRITE_MAX: Duration = Duration::from_secs(10);
static PROBES: AtomicU64 = AtomicU64::new(0);
const SOCKET: &str = "/run/agent.sock";

/// The inside of the private root.
pub(crate) struct Inside;

impl Inside {
    pub(crate) fn new() -> Self {
        Self
    }

    /// Starts an agent and waits until it listens.
    pub(crate) fn agent(&self) -> Agent {
        self.started(Command::new("/bin/stillpoint-agent"))
    }

    /// One with these flags besides.
    pub(crate) fn agent_with(&self, flags: &[&str]) -> Agent {
        let mut command = Command::new("/bin/stillpoint-agent");
        command.args(flags);
        self.started(command)
    }

    /// One whose plain freezes have a lease of this many milliseconds.
    pub(crate) fn agent_with_compat_lease(&self, lease_ms: u64) -> Agent {
        self.agent_with(&[&format!("--compat-lease-ms={lease_ms}")])
    }

    /// Starts an agent in a mount namespace of its own, whose root is a folder that `Build::system` filled.
    pub(crate) fn agent_in(&self, root: &'static str) -> Agent {
        let mut command = Command::new("/bin/stillpoint-agent");
        // SAFETY: a fresh process with one thread, whose only work these system calls are.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                if libc::unshare(libc::CLONE_NEWNS) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                use rustix::mount as m;
                m::mount_change("/", m::MountPropagationFlags::PRIVATE | m::MountPropagationFlags::REC)?;
                for folder in ["proc", "sys", "run", "dev"] {
                    m::mount_bind(format!("/{folder}"), format!("{root}/{folder}"))?;
                }
                std::env::set_current_dir(root)?;
                rustix::process::pivot_root(".", "old")?;
                m::unmount("/old", m::UnmountFlags::DETACH)?;
                std::env::set_current_dir("/")
            });
        }
        self.started(command)
    }

    /// One whose state folder is this one.
    pub(crate) fn agent_with_state_in(&self, folder: &str) -> Agent {
        self.started_with_state_in(folder, Command::new("/bin/stillpoint-agent"))
    }

    fn started(&self, command: Command) -> Agent {
        self.started_with_state_in("/run", command)
    }

    fn started_with_state_in(&self, folder: &str, mut command: Command) -> Agent {
        // The last agent's socket would seem to be this one's.
        let _removed = fs::remove_file(SOCKET).is_ok();
        let log = File::options().create(true).append(true).open("/run/agent.log").unwrap();
        command.args(["-m", "unix-listen", "-p", SOCKET, "-t", folder, "-v"]).env_clear();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let agent = Agent { child };
        until("the agent listens", Duration::from_secs(20), || UnixStream::connect(SOCKET).is_ok());
        agent
    }

    /// The mount table as the agent sees it.
    pub(crate) fn mounts(&self) -> Vec<Mount> {
        parse(&fs::read("/proc/self/mountinfo").unwrap()).unwrap()
    }

    /// Whether a new file in a folder waits. The write is done when the folder is thawed.
    pub(crate) fn blocks(&self, folder: &str) -> bool {
        let (done, wait) = channel();
        // A name of its own each time: a file that exists can be opened while frozen, a new one cannot.
        let path = Path::new(folder).join(format!("probe-{}", PROBES.fetch_add(1, Relaxed)));
        thread::spawn(move || done.send(fs::write(path, b"x").is_ok()).is_ok());
        wait.recv_timeout(BLOCKED).is_err()
    }

    /// That all these wait, and none of those.
    pub(crate) fn expect_blocked(&self, folders: &[&str]) {
        for folder in folders {
            assert!(self.blocks(folder), "a write to {folder} should wait");
        }
    }

    pub(crate) fn expect_writable(&self, folders: &[&str]) {
        for folder in folders {
            let (done, wait) = channel();
            let path = Path::new(folder).join("writable");
            thread::spawn(move || done.send(fs::write(path, b"x")).is_ok());
            wait.recv_timeout(WRITE_MAX).unwrap_or_else(|_| panic!("a write to {folder} waits")).unwrap();
        }
    }

    /// Waits until a folder can be written to, and answers how long that took.
    pub(crate) fn until_writable(&self, folder: &str, at_most: Duration) -> Duration {
        let (done, wait) = channel();
        let path = Path::new(folder).join(format!("probe-{}", PROBES.fetch_add(1, Relaxed)));
        let begun = Instant::now();
        thread::spawn(move || done.send(fs::write(path, b"x")).is_ok());
        wait.recv_timeout(at_most)
            .unwrap_or_else(|_| panic!("{folder} is frozen still after {at_most:?}"))
            .unwrap();
        begun.elapsed()
    }

    /// Rewrites a file again and again, so that there is always something to flush.
    pub(crate) fn keep_dirty(&self, file: &str, mib: usize) {
        let mut file = File::create(file).unwrap();
        thread::spawn(move || {
            let chunk = vec![7u8; 1 << 20];
            loop {
                std::io::Seek::rewind(&mut file).unwrap();
                for _ in 0..mib {
                    file.write_all(&chunk).unwrap();
                    thread::sleep(Duration::from_millis(5));
                }
            }
        });
    }

    /// Starts a process in a mount namespace of its own and answers its id once it has prepared that.
    pub(crate) fn in_other_namespace(&self, prepare: fn()) -> i32 {
        let mut command = Command::new("/bin/sleeper");
        command.arg("--sleep").env_clear().stdin(Stdio::null());
        // SAFETY: a fresh process with one thread; the system calls of `prepare` are its only work.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                if libc::unshare(libc::CLONE_NEWNS) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                prepare();
                Ok(())
            });
        }
        i32::try_from(command.spawn().unwrap().id()).unwrap()
    }

    /// Whether every thread of a process is under a tracer.
    pub(crate) fn is_traced(&self, pid: &str) -> bool {
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
        threads.flatten().all(|thread| {
            let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        })
    }

    /// The process id of the guard, once there is one.
    pub(crate) fn guard(&self) -> Option<i32> {
        fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            // A guard that is dead and not yet waited for has no command line any more.
            command.starts_with(b"stillpoint-guard\0").then_some(pid)
        })
    }
}

/// Waits until something holds.
pub(crate) fn until(what: &str, at_most: Duration, holds: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < at_most, "not within {at_most:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
    begun.elapsed()
}

pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: a plain system call; the process is of this private process namespace.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "kill {pid}");
}

/// A running agent.
pub(crate) struct Agent {
    child: Child,
}

impl Agent {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn connect(&self) -> Channel {
        Channel { lines: BufReader::new(UnixStream::connect(SOCKET).unwrap()) }
    }

    /// One request on a connection of its own; panics on an error.
    pub(crate) fn ask(&self, command: &str, arguments: Value) -> Value {
        let answer = self.connect().ask(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].clone()
    }

    /// One request that must fail; answers the description.
    pub(crate) fn refused(&self, command: &str, arguments: Value) -> String {
        let answer = self.connect().ask(command, arguments);
        answer["error"]["desc"]
            .as_str()
            .unwrap_or_else(|| panic!("{command} should fail: {answer}"))
            .to_owned()
    }

    /// A freeze of our own, with the lease in milliseconds.
    pub(crate) fn freeze(&self, id: &str, lease_ms: u64) -> Value {
        self.ask("stillpoint-freeze", json!({"id": id, "lease_ms": lease_ms, "want": "filesystem"}))
    }

    pub(crate) fn thaw(&self, id: &str) -> Value {
        self.ask("stillpoint-thaw", json!({"id": id}))
    }

    pub(crate) fn state(&self) -> String {
        self.ask("stillpoint-status", json!({}))["state"].as_str().unwrap().to_owned()
    }

    pub(crate) fn signal(&self, signal: i32) {
        kill(self.pid(), signal);
    }

    /// Waits for its end, and answers its exit code.
    pub(crate) fn ended(&mut self, at_most: Duration) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begun.elapsed() < at_most, "the agent has not ended within {at_most:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// One connection.
pub(crate) struct Channel {
    lines: BufReader<UnixStream>,
}

impl Channel {
    pub(crate) fn send(&mut self, command: &str, arguments: Value) {
        let request = json!({"execute": command, "arguments": arguments});
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
    }

    pub(crate) fn send_with_id(&mut self, command: &str, id: u64) {
        let request = json!({"execute": command, "id": id});
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
    }

    /// Asks until the agent takes no more, and never reads an answer.
    pub(crate) fn stuff(&mut self, command: &str) {
        let stream = self.lines.get_mut();
        stream.set_nonblocking(true).unwrap();
        let request = json!({"execute": command}).to_string().repeat(100);
        let mut refused = 0;
        while refused < 20 {
            refused = if stream.write(request.as_bytes()).is_ok() { 0 } else { refused + 1 };
            thread::sleep(Duration::from_millis(if refused > 0 { 20 } else { 0 }));
        }
    }

    /// Waits until there is something to read, and leaves it there.
    pub(crate) fn wait_for_something(&self) {
        let mut watched = [PollFd::new(self.lines.get_ref(), PollFlags::IN)];
        assert!(poll(&mut watched, Some(&ANSWER_MAX.try_into().unwrap())).unwrap() > 0, "no answer in time");
    }

    pub(crate) fn receive(&mut self) -> Value {
        self.receive_within(ANSWER_MAX)
    }

    pub(crate) fn receive_within(&mut self, at_most: Duration) -> Value {
        self.lines.get_ref().set_read_timeout(Some(at_most)).unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap_or_else(|error| panic!("no answer: {error}"));
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.send(command, arguments);
        self.receive()
    }
}

/// The report of one file system.
pub(crate) fn filesystem<'r>(report: &'r Value, mountpoint: &str) -> &'r Value {
    let all = report["filesystems"].as_array().unwrap();
    all.iter()
        .find(|one| one["mountpoint"] == mountpoint)
        .unwrap_or_else(|| panic!("{mountpoint} is not in {report}"))
}

pub(crate) fn codes(reasons: &Value) -> Vec<&str> {
    reasons.as_array().unwrap().iter().map(|reason| reason["code"].as_str().unwrap()).collect()
}
