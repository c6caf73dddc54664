//! Builds the private root, enters it, and refuses to go on when it is not private.

use super::client::Inside;
use super::scenes::Scene;
use guest_agent::freeze::mountinfo;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use std::fs::{self, File};
use std::io::{BufRead, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Exit code when the root is not private: nothing was frozen.
const NOT_PRIVATE: i32 = 99;

/// Where the machine's own group of processes is told how fast a device may be written. Source: Linux
/// `Documentation/admin-guide/cgroup-v1/blkio-controller.rst`.
pub(crate) const THROTTLE: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";

/// What a scene builds its mounts with, before the root is entered. Paths are relative to the new root.
pub(crate) struct Build {
    root: PathBuf,
    mounts: Vec<String>,
    throttled: Vec<String>,
}

impl Build {
    fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    fn tool(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// A folder.
    pub(crate) fn folder(&self, inside: &str) {
        fs::create_dir_all(self.path(inside)).unwrap();
    }

    /// An image file of a size, made with `mkfs.KIND`, attached to a loop device; answers the device.
    /// The file lies on the private tmpfs, or on a test file system mounted there.
    pub(crate) fn device(&self, image: &str, kind: &str, mib: u64) -> String {
        let image = self.path(image);
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let name = image.to_str().unwrap();
        match kind {
            "ext4" => self.tool("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0", name]),
            "xfs" => self.tool("mkfs.xfs", &["-q", "-f", name]),
            "btrfs" => self.tool("mkfs.btrfs", &["-q", "-f", name]),
            "squashfs" => {
                let empty = self.path("img/empty");
                fs::create_dir_all(&empty).unwrap();
                fs::remove_file(&image).unwrap();
                self.tool("mksquashfs", &[empty.to_str().unwrap(), name, "-quiet", "-no-progress"])
            }
            other => panic!("no mkfs for {other}"),
        };
        let device = self.tool("losetup", &["--find", "--show", name]);
        let node = self.path(&device);
        if !node.exists() {
            let minor: u32 = device.trim_start_matches("/dev/loop").parse().unwrap();
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &node,
                rustix::fs::FileType::BlockDevice,
                mode,
                rustix::fs::makedev(7, minor),
            )
            .unwrap();
        }
        device
    }

    /// Mounts a device; the rescuer will hold it. The device is given back when the last mount goes.
    pub(crate) fn mount(&mut self, device: &str, kind: &str, inside: &str) {
        self.folder(inside);
        let flags = if kind == "squashfs" { MountFlags::RDONLY } else { MountFlags::empty() };
        mount(device, self.path(inside), kind, flags, c"").unwrap();
        self.tool("losetup", &["--detach", device]);
        self.mounts.push(inside.trim_start_matches('/').to_owned());
    }

    /// Both at once, on an image of its own.
    pub(crate) fn filesystem(&mut self, kind: &str, inside: &str) -> String {
        let mib = if kind == "xfs" { 320 } else { 128 };
        let image = format!("img/{}.img", inside.trim_matches('/').replace('/', "-"));
        let device = self.device(&image, kind, mib);
        self.mount(&device, kind, inside);
        device
    }

    /// Another mount of a device that is mounted already.
    pub(crate) fn mount_again(&mut self, device: &str, kind: &str, inside: &str, options: &str) {
        self.folder(inside);
        let options = std::ffi::CString::new(options).unwrap();
        mount(device, self.path(inside), kind, MountFlags::empty(), options.as_c_str()).unwrap();
        self.mounts.push(inside.trim_start_matches('/').to_owned());
    }

    /// Runs a tool of the machine; arguments that begin with `/` are paths in the new root.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) {
        let full: Vec<String> = arguments
            .iter()
            .map(|word| {
                if word.starts_with('/') {
                    self.path(word).to_str().unwrap().to_owned()
                } else {
                    (*word).to_owned()
                }
            })
            .collect();
        self.tool(program, &full.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Lets a device write no faster than this. The machine's own group sets it; whoever started the test unsets it.
    /// False where this kernel or its groups cannot.
    pub(crate) fn throttle(&mut self, device: &str, bytes_per_second: u64) -> bool {
        let name = device.trim_start_matches("/dev/");
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).unwrap().trim().to_owned();
        let set = fs::write(THROTTLE, format!("{number} {bytes_per_second}")).is_ok();
        if set {
            self.throttled.push(number);
        } else {
            fs::write(self.path("run/no-throttle"), THROTTLE).unwrap();
        }
        set
    }

    /// A bind mount.
    pub(crate) fn bind(&self, from: &str, to: &str) {
        rustix::mount::mount_bind(self.path(from), self.path(to)).unwrap();
    }

    /// Takes a mount away while it may be in use.
    pub(crate) fn detach(&mut self, inside: &str) {
        unmount(self.path(inside), UnmountFlags::DETACH).unwrap();
        self.mounts.retain(|mount| mount != inside.trim_start_matches('/'));
    }

    /// Puts the agent, its libraries and the usual folders on a mounted file system, so that it can be a root.
    pub(crate) fn system(&self, inside: &str) {
        for name in ["bin", "dev", "proc", "sys", "run", "old"] {
            self.folder(&format!("{inside}/{name}"));
        }
        let build = Build { root: self.path(inside), mounts: Vec::new(), throttled: Vec::new() };
        install(&build, &self.path("bin/stillpoint-agent"), "bin/stillpoint-agent");
    }

    /// Brings a program of the machine along; false if the machine has none.
    pub(crate) fn program(&self, program: &str) -> bool {
        let there = Path::new(program).exists();
        if there {
            install(
                self,
                program.as_ref(),
                &format!("bin/{}", Path::new(program).file_name().unwrap().to_str().unwrap()),
            );
        }
        there
    }

    /// A hook in the folder of `-F`, with a shell to run it and `log` to call in it. What hooks log lies on a tmpfs.
    pub(crate) fn hook(&self, name: &str, text: &str) {
        for program in ["/bin/sh", "/bin/sleep", "/bin/cat", "/bin/dd"] {
            if !self.path(program).exists() {
                assert!(self.program(program), "{program}");
            }
        }
        self.folder("etc/qemu/fsfreeze-hook.d");
        let path = self.path("etc/qemu/fsfreeze-hook.d").join(name);
        let log = "log() { echo \"$*\" >>/run/hooks.log; }";
        fs::write(&path, format!("#!/bin/sh\n{log}\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A path as it is outside the new root, for what the scene does by hand.
    pub(crate) fn outside(&self, inside: &str) -> PathBuf {
        self.path(inside)
    }
}

/// In the new mount namespace, still with the machine's root: builds, then starts the first process of the new
/// process namespace.
pub(crate) fn stage(scene: &Scene, folder: &Path) {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", folder, "tmpfs", MountFlags::empty(), c"size=1536m,mode=755").unwrap();
    let mut build = Build { root: folder.to_owned(), mounts: Vec::new(), throttled: Vec::new() };
    for name in ["bin", "dev", "proc", "sys", "run", "tmp", "img", "old"] {
        build.folder(name);
    }
    for (name, minor) in [("null", 3), ("zero", 5), ("urandom", 9)] {
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let node = build.path("dev").join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            node,
            rustix::fs::FileType::CharacterDevice,
            mode,
            rustix::fs::makedev(1, minor),
        )
        .unwrap();
    }
    let agent =
        std::env::var("STILLPOINT_AGENT").unwrap_or(env!("CARGO_BIN_EXE_stillpoint-agent").to_owned());
    install(&build, agent.as_ref(), "bin/stillpoint-agent");
    install(&build, "/proc/self/exe".as_ref(), "bin/sleeper");
    (scene.build)(&mut build);
    println!("throttled {}", build.throttled.join(" "));
    println!("mounts {}", build.mounts.join(" "));
    std::io::stdout().flush().unwrap();
    let mut go = String::new();
    std::io::stdin().lock().read_line(&mut go).unwrap();
    if go != "go\n" {
        std::process::exit(NOT_PRIVATE);
    }
    // Only now: the first child after this is the first process of the new namespace, and the namespace ends with it.
    // SAFETY: a plain system call.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWPID) }, 0, "a process namespace");
    let mut command = Command::new("/proc/self/exe");
    command.arg("--inside").arg(scene.name).arg(folder).env_clear().env("PATH", "/bin").stdin(Stdio::null());
    // SAFETY: `prctl` is a plain system call.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let status = command.status().unwrap();
    std::process::exit(status.code().unwrap_or(101));
}

/// Copies a program with the libraries that it needs: no folder of the machine may be mounted inside.
fn install(build: &Build, program: &Path, to: &str) {
    fs::copy(program, build.path(to)).unwrap();
    let output = Command::new("ldd").arg(fs::canonicalize(program).unwrap()).output().unwrap();
    // A static program has none, and `ldd` says so.
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else { continue };
        build.folder(Path::new(library).parent().unwrap().to_str().unwrap());
        fs::copy(library, build.path(library)).unwrap();
    }
}

/// The first process of the namespace: enters the root, makes sure of it, and plays the scene.
pub(crate) fn inside(scene: &Scene, folder: &Path) {
    mount("proc", folder.join("proc"), "proc", MountFlags::empty(), c"").unwrap();
    // The machine's own: what an agent could change there would be changed for everybody.
    mount("sysfs", folder.join("sys"), "sysfs", MountFlags::RDONLY, c"").unwrap();
    std::env::set_current_dir(folder).unwrap();
    rustix::process::pivot_root(".", "old").unwrap();
    std::env::set_current_dir("/").unwrap();
    unmount("/old", UnmountFlags::DETACH).unwrap();
    if let Err(reason) = is_private() {
        eprintln!("the root is not private, nothing was done: {reason}");
        std::process::exit(NOT_PRIVATE);
    }
    (scene.play)(&Inside::new());
}

/// Only tmpfs, proc, sysfs and file systems on loop devices may be seen, by any process that can be seen.
fn is_private() -> Result<(), String> {
    if std::process::id() != 1 {
        return Err("this is not the first process of its namespace".to_owned());
    }
    let own = fs::read_link("/proc/self/ns/mnt").map_err(|error| error.to_string())?;
    for process in fs::read_dir("/proc").map_err(|error| error.to_string())?.flatten() {
        let is_process = process.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        if is_process && fs::read_link(process.path().join("ns/mnt")).ok() != Some(own.clone()) {
            return Err(format!("process {:?} sees other mounts", process.file_name()));
        }
    }
    let table = fs::read("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let mounts = mountinfo::parse(&table).map_err(|error| error.to_string())?;
    for mount in &mounts {
        let harmless = ["tmpfs", "proc", "sysfs", "overlay"].contains(&mount.kind.as_str());
        let on_loop =
            mount.device.major == 7 || (mount.kind == "btrfs" && mount.source.starts_with("/dev/loop"));
        if !harmless && !on_loop {
            return Err(format!("{} is {} on {}", mount.mountpoint.display(), mount.kind, mount.source));
        }
    }
    let root = mountinfo::covering(&mounts, Path::new("/")).map(|mount| mount.kind.as_str());
    if root == Some("tmpfs") { Ok(()) } else { Err(format!("the root is {root:?}")) }
}
