//! A libvirt of the test's own, which neither reads nor changes anything of the machine's, and one domain in it.
//!
//! It is Debian's, unpacked in the cache (`cargo xtask package-parts`), and runs in a view of the machine's files of its own,
//! without networks, and without KVM: a domain of type `qemu` needs none, and libvirt would try it. Its processes end with
//! the first of them, and that with the test.

use crate::accelerator::Accelerator;
use crate::guest::{Agent, DiskFormat, Init, kernel_words, write_initrd};
use crate::harness::{Harness, Output};
use crate::image::Image;
use crate::packages::Packages;
use crate::qemu::Disk;
use crate::view::in_view;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// From an empty folder to answers; most of it is libvirt looking at QEMU.
const START_TIME_MAX: Duration = Duration::from_secs(90);
/// The longest of virsh's commands here copies two disks.
const COMMAND_TIME_MAX_S: &str = "180";
/// What runs there; `SOCKETS` is replaced by a folder outside.
const START: &str = r#"
[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
mkdir -p /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /run/libvirt
echo 'libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin' >>/etc/passwd
printf 'libvirt-qemu:x:64055:\nlibvirt:x:64056:\n' >>/etc/group
cat >/etc/libvirt/qemu.conf <<END
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
END
cat >/etc/libvirt/libvirtd.conf <<END
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_dir = "SOCKETS"
log_outputs = "3:stderr"
END
libvirtd &
wait $!
"#;

/// What virsh said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Its exit code; 124 if it was still at it after its time.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// The standard output of a command that must have succeeded.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, 0, "virsh failed: {}{}", self.out, self.err);
        self.out
    }
}

/// libvirtd, killed with all that it started when this value is dropped.
pub struct Libvirt {
    child: Child,
    folder: tempfile::TempDir,
}

impl Libvirt {
    /// Starts it, and waits until it answers.
    ///
    /// # Errors
    /// If it does not; the error has its log.
    pub fn start() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("stillpoint-libvirt-").tempdir()?;
        let at = |name: &str| folder.path().join(name);
        for name in ["work", "sockets"] {
            std::fs::create_dir(at(name))?;
        }
        let start = START.replace("SOCKETS", &at("sockets").display().to_string());
        let mut command = in_view(&start, &at("work"), &[Packages::get().libvirt()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(at("log"))?);
        let mut libvirt = Self { child: crate::process::spawn(command)?, folder };
        let end = Instant::now() + START_TIME_MAX;
        loop {
            let said = libvirt.virsh(&["version"])?;
            if said.code == 0 {
                return Ok(libvirt);
            }
            if Instant::now() >= end || libvirt.child.try_wait()?.is_some() {
                return Err(io::Error::other(format!("{}\nlibvirtd: {}", said.err, libvirt.log())));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The folder of this libvirt, in which a domain's files may lie.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The end of its log.
    #[must_use]
    pub fn log(&self) -> String {
        let text = std::fs::read(self.folder.path().join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("Ethtool")).collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Runs virsh, for a time.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn virsh(&self, words: &[&str]) -> io::Result<Said> {
        let root = Packages::get().libvirt();
        let socket = self.folder.path().join("sockets/libvirt-sock");
        let libraries = ["usr/lib", "lib"].map(|name| root.join(name).join("x86_64-linux-gnu"));
        let output = Command::new("timeout")
            .arg(COMMAND_TIME_MAX_S)
            .arg(root.join("usr/bin/virsh"))
            .args(["--connect", &format!("qemu+unix:///system?socket={}", socket.display())])
            .args(words)
            .env("LC_ALL", "C")
            .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).map_err(io::Error::other)?)
            .stdin(Stdio::null())
            .output()?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Said {
            code: output.status.code().unwrap_or(-1),
            out: text(output.stdout),
            err: text(output.stderr),
        })
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- libvirtd's log ends with:\n{}", self.log());
        }
        // Fails only if it has ended; its children go with it.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// A domain named `guest`, from the guest image, with our agent at its port; disks `vda` (root) and `vdb` (data).
pub struct Domain<'l> {
    libvirt: &'l Libvirt,
    harness: Harness,
    disks: [PathBuf; 2],
}

impl<'l> Domain<'l> {
    /// Creates it and waits until the guest runs commands of the test.
    ///
    /// # Errors
    /// If libvirt refuses it, or it does not boot within `limit` (times six under emulation).
    pub fn boot(libvirt: &'l Libvirt, limit: Duration) -> io::Result<Self> {
        let image = Image::get();
        let folder = libvirt.folder();
        // Copies with nothing below them: blockcommit, left to itself, commits down to the last image of a chain, which would
        // be the one in the cache.
        let disk = |name: &str, base: &Path| Disk::fresh(name, base, DiskFormat::Raw, folder);
        let disks = [disk("root", &image.root())?.path, disk("data", &image.data())?.path];
        let initrd = folder.join("initrd.img");
        write_initrd(image, Agent::Ours, Init::Busybox, None, &[], &initrd)?;
        // libvirt has no KVM here, whatever the other tests run on.
        let words = kernel_words(Agent::Ours, Init::Busybox, Accelerator::Tcg) + " stillpoint.postgresql=off";
        let definition = folder.join("guest.xml");
        std::fs::write(&definition, domain(image, &initrd, &words, &disks, folder))?;
        let said = libvirt.virsh(&["create", &definition.display().to_string()])?;
        if said.code != 0 {
            return Err(io::Error::other(format!("{}\nlibvirtd: {}", said.err, libvirt.log())));
        }
        let harness = Harness::new(folder.join("harness.sock"));
        harness.ready(limit * Accelerator::Tcg.patience()).map_err(|error| {
            let serial = std::fs::read(folder.join("serial.log")).unwrap_or_default();
            io::Error::other(format!("{error}\n{}", String::from_utf8_lossy(&serial)))
        })?;
        Ok(Self { libvirt, harness, disks })
    }

    /// Runs virsh.
    ///
    /// # Panics
    /// If it cannot be started.
    #[track_caller]
    pub fn virsh(&self, words: &[&str]) -> Said {
        self.libvirt.virsh(words).expect("virsh starts")
    }

    /// The files of its disks, raw.
    #[must_use]
    pub fn disks(&self) -> &[PathBuf; 2] {
        &self.disks
    }

    /// Runs a shell command in the guest, beside the agent under test; at most two minutes.
    ///
    /// # Panics
    /// If the guest does not answer.
    #[track_caller]
    pub fn exec(&self, command: &str) -> Output {
        self.harness.shell(command, Duration::from_secs(120)).expect(command)
    }

    /// Has the guest go on with Debian's agent at the port, or with ours again.
    ///
    /// # Panics
    /// If it does not answer libvirt soon.
    #[track_caller]
    pub fn run_agent(&self, agent: Agent) {
        // Renamed over the one that init starts whenever it has ended.
        let next = match agent {
            Agent::Ours => "cp ours next",
            _ => {
                r"printf '#!/bin/sh\necho $$ >/run/stillpoint/pid\nexec /usr/sbin/qemu-ga -t /run\n' >next && chmod 755 next"
            }
        };
        let swap = format!(
            "cd /run/stillpoint && {{ [ -e ours ] || cp stillpoint-agent ours; }} && {next} && mv next stillpoint-agent && \
             {{ busybox killall stillpoint-agent || kill $(cat pid); }}"
        );
        self.exec(&swap).success();
        let end = Instant::now() + Duration::from_secs(20) * Accelerator::Tcg.patience();
        loop {
            let info = self.virsh(&["qemu-agent-command", "guest", r#"{"execute":"guest-info"}"#]);
            let ours = info.out.contains("stillpoint-freeze");
            if info.code == 0 && ours == (agent == Agent::Ours) {
                return;
            }
            assert!(Instant::now() < end, "{agent:?} does not answer: {info:?}");
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

fn domain(image: &Image, initrd: &Path, words: &str, disks: &[PathBuf; 2], folder: &Path) -> String {
    let at = |name: &str| folder.join(name).display().to_string();
    let disk = |path: &Path, device: &str, serial: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw' discard='unmap' cache='unsafe'/>\
             <source file='{}'/><target dev='{device}' bus='virtio'/><serial>{serial}</serial></disk>",
            path.display()
        )
    };
    let channel = |socket: &str, port: &str| {
        format!(
            "<channel type='unix'><source mode='bind' path='{}'/><target type='virtio' name='{port}'/></channel>",
            at(socket)
        )
    };
    format!(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>768</memory><vcpu>2</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd><cmdline>{words}</cmdline></os>\
         <features><acpi/></features><cpu mode='maximum'/><on_reboot>destroy</on_reboot><devices>\
         <emulator>/usr/bin/qemu-system-x86_64</emulator>{}{}{}{}\
         <serial type='file'><source path='{}'/><target port='0'/></serial>\
         <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><memballoon model='none'/>\
         <video><model type='none'/></video></devices></domain>",
        image.kernel().display(),
        initrd.display(),
        disk(&disks[0], "vda", "root"),
        disk(&disks[1], "vdb", "data"),
        channel("agent.sock", "org.qemu.guest_agent.0"),
        channel("harness.sock", "org.stillpoint.harness"),
        at("serial.log"),
    )
}
