//! Runs the scenes one after another, each in its own private root, and prints as Rust's own test runner does.

use super::private_root::THROTTLE;
use super::scenes::{self, LONG, Scene};
use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time of one scene, building included: mkfs and a loaded machine are slow.
const SCENE_MAX: Duration = Duration::from_secs(120);
/// The same of one that is run only by `make test-long`.
const LONG_SCENE_MAX: Duration = Duration::from_secs(1_800);

pub(crate) fn main(words: &[&str]) {
    let filters: Vec<&&str> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let exact = words.contains(&"--exact");
    let wanted = |scene: &&Scene| {
        filters.is_empty()
            || filters
                .iter()
                .any(|filter| if exact { scene.name == **filter } else { scene.name.contains(**filter) })
    };
    let (only_long, with_long) = (words.contains(&"--ignored"), words.contains(&"--include-ignored"));
    let due = |scene: &&Scene| with_long || is_long(scene) == only_long;
    let scenes: Vec<&Scene> = scenes::all().filter(wanted).filter(due).collect();
    if words.contains(&"--list") {
        scenes.iter().for_each(|scene| println!("{}: test", scene.name));
        return;
    }
    println!("\nrunning {} tests", scenes.len());
    if let Some(reason) = cannot_run() {
        scenes.iter().for_each(|scene| println!("test {} ... skipped: {reason}", scene.name));
        return;
    }
    let mut failed = Vec::new();
    for scene in &scenes {
        let begun = Instant::now();
        let outcome = run(scene);
        let seconds = begun.elapsed().as_secs_f32();
        match outcome {
            Ok(text) if text.contains("SKIPPED") => {
                println!("test {} ... skipped:{}", scene.name, text.replace("SKIPPED", "").trim_end())
            }
            Ok(text) => {
                println!("test {} ... ok ({seconds:.1} s)", scene.name);
                if words.contains(&"--nocapture") {
                    println!("{text}");
                }
            }
            Err(text) => {
                println!("test {} ... FAILED ({seconds:.1} s)", scene.name);
                failed.push((scene.name, text));
            }
        }
    }
    for (name, text) in &failed {
        println!("\n---- {name} ----\n{text}");
    }
    println!(
        "\ntest result: {}. {} passed; {} failed",
        if failed.is_empty() { "ok" } else { "FAILED" },
        scenes.len() - failed.len(),
        failed.len()
    );
    std::process::exit(i32::from(!failed.is_empty()));
}

fn is_long(scene: &Scene) -> bool {
    LONG.contains(&scene.name)
}

fn longest(scene: &Scene) -> Duration {
    if is_long(scene) { LONG_SCENE_MAX } else { SCENE_MAX }
}

fn cannot_run() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root (mount and process namespaces, loop devices)".to_owned());
    }
    for tool in ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mksquashfs", "losetup", "ldd"] {
        let found = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|folder| Path::new(folder).join(tool).exists());
        if !found {
            return Some(format!(
                "needs {tool} (Debian: e2fsprogs, xfsprogs, btrfs-progs, squashfs-tools, mount, libc-bin)"
            ));
        }
    }
    (!Path::new("/dev/loop-control").exists()).then(|| "needs /dev/loop-control".to_owned())
}

/// Starts the stage, gives its mounts to a rescuer, lets it go on, and waits.
fn run(scene: &Scene) -> Result<String, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("--stage").arg(scene.name).arg(folder.path());
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    // Another build of the agent, for example the static one that guests get.
    if let Some(agent) = std::env::var_os("STILLPOINT_AGENT") {
        command.env("STILLPOINT_AGENT", agent);
    }
    // Stock agents to compare with.
    if let Some(folders) = std::env::var_os("STILLPOINT_STOCK_AGENTS") {
        command.env("STILLPOINT_STOCK_AGENTS", folders);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: `unshare` and `prctl` are plain system calls, made in the single thread of the fresh child.
    unsafe {
        command.pre_exec(|| {
            if libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut stage = command.spawn().map_err(|error| error.to_string())?;
    let mut stderr = stage.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let mut text = Vec::new();
        // What could not be read is missing from a message for people, no more.
        let _read = stderr.read_to_end(&mut text).is_ok();
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut lines = BufReader::new(stage.stdout.take().unwrap());
    let (mut throttled, mut mounts) = (String::new(), String::new());
    // `throttled 7:1 …` and `mounts a b c` when built; nothing if the building failed.
    let built = lines.read_line(&mut throttled).is_ok()
        && lines.read_line(&mut mounts).is_ok()
        && mounts.starts_with("mounts");
    let mut rescuer = None;
    if built {
        match hold(stage.id(), folder.path(), &mounts)
            .and_then(|folders| start_rescuer(&folders, longest(scene)))
        {
            Ok(started) => {
                rescuer = Some(started);
                let mut stdin = stage.stdin.take().unwrap();
                stdin.write_all(b"go\n").map_err(|error| error.to_string())?;
            }
            Err(error) => {
                stage.kill().map_err(|error| error.to_string())?;
                stage.wait().map_err(|error| error.to_string())?;
                return Err(format!("the rescuer cannot hold the mounts: {error}"));
            }
        }
    }
    let status = wait(&mut stage, longest(scene));
    for device in throttled.split_whitespace().skip(1) {
        // The device may be gone already; the rule for its number must go all the same.
        let _unset = std::fs::write(THROTTLE, format!("{device} 0")).is_ok();
    }
    // Whatever is frozen still is thawed now, so that everything in there can end.
    let rescued = rescuer.map_or("rescued 0 stuck 0 told".to_owned(), end_rescuer);
    if status.is_none() {
        // Its child, the first process of the namespace, is killed by the kernel with it (PR_SET_PDEATHSIG).
        stage.kill().map_err(|error| error.to_string())?;
        stage.wait().map_err(|error| error.to_string())?;
    }
    let text = errors.join().unwrap_or_default();
    match status {
        None => Err(format!("took longer than {:?}; {rescued}\n{text}", longest(scene))),
        Some(status) if !status.success() => Err(format!("{status}; {rescued}\n{text}")),
        Some(_) if !rescued.starts_with("rescued 0 stuck 0 told") => {
            Err(format!("left something frozen: {rescued}\n{text}"))
        }
        Some(_) => Ok(text),
    }
}

fn wait(child: &mut Child, at_most: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + at_most;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// Opens every test mount through the stage's own view, and makes sure that none is of this machine.
fn hold(stage: u32, folder: &Path, mounts: &str) -> std::io::Result<Vec<File>> {
    let own = std::fs::metadata("/")?.dev();
    let temporary = std::fs::metadata(std::env::temp_dir())?.dev();
    mounts
        .split_whitespace()
        .skip(1)
        .map(|mount| {
            let root = format!("/proc/{stage}/root");
            let path = Path::new(&root).join(folder.strip_prefix("/").unwrap()).join(mount);
            let file = File::open(&path)?;
            let device = file.metadata()?.dev();
            if device == own || device == temporary {
                return Err(std::io::Error::other(format!("{mount} is a file system of this machine")));
            }
            Ok(file)
        })
        .collect()
}

fn start_rescuer(folders: &[File], longest: Duration) -> std::io::Result<Child> {
    let fds: Vec<i32> = folders.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new("/proc/self/exe");
    command.arg("--rescue").arg((longest.as_secs() + 10).to_string()).args(fds.iter().map(i32::to_string));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: `setsid` and `fcntl` are plain system calls; the descriptors are open in the parent until `spawn` returns.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            fds.iter().try_for_each(|fd| fcntl_setfd(BorrowedFd::borrow_raw(*fd), FdFlags::empty()))?;
            Ok(())
        });
    }
    command.spawn()
}

fn end_rescuer(mut rescuer: Child) -> String {
    drop(rescuer.stdin.take());
    let mut text = String::new();
    if let Some(mut out) = rescuer.stdout.take() {
        // An empty text is not the expected one, and fails the test.
        let _read = out.read_to_string(&mut text).is_ok();
    }
    let _ended = wait(&mut rescuer, Duration::from_secs(70));
    text.trim().to_owned()
}
