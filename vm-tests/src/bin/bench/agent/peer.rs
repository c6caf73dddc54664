//! One agent under measurement, and its one client.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(300);
/// Debian 12's, where its package puts it.
const INSTALLED: &str = "/usr/sbin/qemu-ga";
/// What no agent may do on the machine that measures it.
const BLOCKED: &str = "guest-fsfreeze-freeze,guest-fsfreeze-freeze-list,guest-fsfreeze-thaw,guest-shutdown,\
                       guest-suspend-disk,guest-suspend-ram,guest-suspend-hybrid,guest-set-time,guest-set-vcpus,\
                       guest-set-memory-blocks,guest-set-user-password,guest-fstrim,guest-ssh-add-authorized-keys,\
                       guest-ssh-remove-authorized-keys";

/// How an agent is started.
pub(super) struct Program {
    pub(super) name: String,
    words: Vec<String>,
}

impl Program {
    /// Ours, as `STILLPOINT_AGENT` names it; then the stock ones: the machine's, and those in `STILLPOINT_STOCK_AGENTS`.
    pub(super) fn all() -> Result<Vec<Program>, String> {
        let ours = std::env::var("STILLPOINT_AGENT").map_err(|_| "STILLPOINT_AGENT names no agent")?;
        let mut all = vec![Program { name: "ours".to_owned(), words: vec![ours] }];
        let mut stock = vec![vec![INSTALLED.to_owned()]];
        let unpacked = std::env::var_os("STILLPOINT_STOCK_AGENTS").unwrap_or_default();
        for root in std::env::split_paths(&unpacked).filter(|root| root.is_absolute()) {
            let at = |path: &str| root.join(path).display().to_string();
            let libraries = at("usr/lib/x86_64-linux-gnu");
            let loader = format!("{libraries}/ld-linux-x86-64.so.2");
            stock.push(vec![loader, "--library-path".to_owned(), libraries, at("usr/sbin/qemu-ga")]);
        }
        for words in stock {
            let output = Command::new(&words[0]).args(&words[1..]).arg("--version").output();
            let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            match said.as_ref().ok().and_then(|said| said.trim().strip_prefix("QEMU Guest Agent ")) {
                Some(version) => {
                    let version = version.split_whitespace().next().unwrap_or(version);
                    all.push(Program { name: format!("qemu-ga {version}"), words });
                }
                None => eprintln!("SKIPPED: {words:?} does not run: {said:?}"),
            }
        }
        if all.len() == 1 { Err("there is no stock agent to compare with".to_owned()) } else { Ok(all) }
    }
}

/// A running agent; killed when dropped.
pub(super) struct Peer {
    child: Child,
    folder: tempfile::TempDir,
    client: Option<UnixStream>,
}

impl Peer {
    pub(super) fn start(program: &Program) -> Result<Peer, String> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let socket = folder.path().join("socket");
        let child = spawn(program, "unix-listen", &socket, folder.path())?;
        let mut peer = Peer { child, folder, client: None };
        let begun = Instant::now();
        while peer.client.is_none() {
            peer.client = UnixStream::connect(&socket).ok();
            if begun.elapsed() > PATIENCE {
                return Err(format!("{} does not listen", program.name));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let client = peer.client()?;
        client.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        client.set_write_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        Ok(peer)
    }

    /// On an empty file in place of a port.
    pub(super) fn start_on_file(program: &Program) -> Result<Peer, String> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let file = folder.path().join("port");
        fs::write(&file, "").map_err(|error| error.to_string())?;
        let child = spawn(program, "virtio-serial", &file, folder.path())?;
        let mut peer = Peer { child, folder, client: None };
        std::thread::sleep(Duration::from_millis(500));
        match peer.child.try_wait() {
            Ok(None) => Ok(peer),
            ended => Err(format!("it does not take a file for a port: {ended:?}")),
        }
    }

    /// One request, one line.
    pub(super) fn ask(&mut self, request: &str) -> Result<Vec<u8>, String> {
        let client = self.client()?;
        client.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        let (mut line, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        while line.last() != Some(&b'\n') {
            match client.read(&mut buffer) {
                Ok(bytes @ 1..) => line.extend_from_slice(&buffer[..bytes]),
                ended => return Err(format!("no answer: {ended:?}")),
            }
        }
        Ok(line)
    }

    pub(super) fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let line = self.ask(&json!({"execute": command, "arguments": arguments}).to_string())?;
        let mut answer: Value = serde_json::from_slice(&line).map_err(|error| error.to_string())?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(format!("{command}: {answer}")),
        }
    }

    /// The `count` of an answer that is too long to be parsed without need.
    pub(super) fn sized(&mut self, command: &str, arguments: &Value) -> Result<usize, String> {
        let line = self.ask(&json!({"execute": command, "arguments": arguments}).to_string())?;
        let failed = || format!("{command}: {}", String::from_utf8_lossy(&line[..line.len().min(300)]));
        let name = b"\"count\": ";
        let at = line.windows(name.len()).position(|window| window == name).or_else(|| {
            // It may stand behind the long text.
            line.windows(name.len()).rposition(|window| window == name)
        });
        let digits =
            line[at.ok_or_else(failed)? + name.len()..].iter().take_while(|byte| byte.is_ascii_digit());
        let digits: String = digits.map(|byte| char::from(*byte)).collect();
        digits.parse().map_err(|_| failed())
    }

    pub(super) fn knows(&mut self, command: &str) -> Result<bool, String> {
        let info = self.call("guest-info", &json!({}))?;
        let commands = info["supported_commands"].as_array().ok_or("guest-info lists nothing")?;
        Ok(commands.iter().any(|one| one["name"] == command && one["enabled"] == true))
    }

    pub(super) fn hang_up(&mut self) {
        self.client = None;
    }

    /// A file with something in it.
    pub(super) fn file(&self, bytes: u64) -> Result<PathBuf, String> {
        let path = self.folder.path().join("file");
        let content: Vec<u8> = (0..bytes).map(|index| index.to_le_bytes()[2]).collect();
        fs::write(&path, content).map_err(|error| error.to_string())?;
        Ok(path)
    }

    /// User and system time so far, in steps of 10 ms.
    pub(super) fn cpu(&self) -> Result<Duration, String> {
        crate::cost::process(self.child.id())
    }

    pub(super) fn status_kib(&self, name: &str) -> Result<u64, String> {
        field(&self.read("status")?, name)
    }

    pub(super) fn pss_kib(&self) -> Result<u64, String> {
        field(&self.read("smaps_rollup")?, "Pss")
    }

    /// Context switches of all threads, wanted or not: an agent that sleeps has none.
    pub(super) fn switches(&self) -> Result<u64, String> {
        let tasks =
            fs::read_dir(format!("/proc/{}/task", self.child.id())).map_err(|error| error.to_string())?;
        let mut sum = 0;
        for task in tasks.flatten() {
            let status = fs::read_to_string(task.path().join("status")).map_err(|error| error.to_string())?;
            sum += field(&status, "voluntary_ctxt_switches")? + field(&status, "nonvoluntary_ctxt_switches")?;
        }
        Ok(sum)
    }

    /// The sizes of the program and of every library that it has mapped.
    pub(super) fn mapped_files_kib(&self) -> Result<u64, String> {
        let maps = self.read("maps")?;
        let files: BTreeSet<&str> = maps.lines().filter_map(|line| Some(&line[line.find('/')?..])).collect();
        let sizes = files.iter().filter_map(|file| fs::metadata(file).ok()).map(|found| found.len());
        Ok(sizes.sum::<u64>() >> 10)
    }

    fn read(&self, name: &str) -> Result<String, String> {
        let path = format!("/proc/{}/{name}", self.child.id());
        fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))
    }

    fn client(&mut self) -> Result<&mut UnixStream, String> {
        self.client.as_mut().ok_or_else(|| "nobody is connected".to_owned())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.child.kill().is_ok();
        let _waited = self.child.wait().is_ok();
    }
}

fn spawn(program: &Program, method: &str, path: &Path, folder: &Path) -> Result<Child, String> {
    let mut command = Command::new(&program.words[0]);
    command
        .args(&program.words[1..])
        .args(["-m", method, "-b", BLOCKED, "-p"])
        .arg(path)
        .arg("-t")
        .arg(folder);
    command.env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().map_err(|error| format!("{}: {error}", program.name))
}

/// A figure from a file of lines `NAME: FIGURE …`.
fn field(text: &str, name: &str) -> Result<u64, String> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let figure = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    figure.ok_or_else(|| format!("no {name} in /proc"))
}

/// So many bytes in base64.
pub(super) fn base64_of(bytes: usize) -> String {
    use base64::Engine as _;
    let content: Vec<u8> = (0..bytes).map(|index| index.to_le_bytes()[index % 3]).collect();
    base64::engine::general_purpose::STANDARD.encode(content)
}
