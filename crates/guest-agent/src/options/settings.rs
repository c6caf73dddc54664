//! What the key file and the flags say together. Flags win, except that lists of commands and of file systems add up.

use super::flags::{Flag, Given};
use super::keyfile::KeyFile;
use crate::freeze::selection::Selection;
use crate::hooks;
use guest_protocol::stillpoint::LEASE_MS_MAX;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

/// Version that is reported to hosts, which compare it as QEMU's. It is the one whose behaviour is kept.
pub const REPORTED_VERSION: &str = "11.1.3";
/// Port of `isa-serial`.
const SERIAL_PORT: &str = "/dev/ttyS0";
/// Where QEMU's virtio-serial port is, by its well-known name.
pub const VIRTIO_PORT: &str = "/dev/virtio-ports/org.qemu.guest_agent.0";

/// qemu-ga's own keys.
const GENERAL: &str = "general";
/// Ours, which qemu-ga passes over.
pub(super) const OURS: &str = "stillpoint";
/// All keys of ours: one that is misspelt would be one that is missing.
const OUR_KEYS: &[&str] = &[
    "compat-lease-ms",
    "freeze-exclude",
    "freeze-include",
    "hook-limit-ms",
    "report-hook-output",
    "report-version",
];

/// How hosts are listened to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// A virtio-serial port.
    #[default]
    VirtioSerial,
    /// A serial line.
    IsaSerial,
    /// A unix socket.
    UnixListen,
    /// A socket of the host's own address family for guests.
    VsockListen,
}

impl Method {
    const ALL: [Method; 4] =
        [Method::VirtioSerial, Method::IsaSerial, Method::UnixListen, Method::VsockListen];

    /// As `-m` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Method::VirtioSerial => "virtio-serial",
            Method::IsaSerial => "isa-serial",
            Method::UnixListen => "unix-listen",
            Method::VsockListen => "vsock-listen",
        }
    }

    fn read(text: &str) -> Result<Method, String> {
        let method = Self::ALL.into_iter().find(|method| method.name() == text);
        method.ok_or_else(|| format!("unsupported channel method/type: {text}"))
    }

    /// The path where none is given; listening has none.
    pub fn default_path(self) -> Option<PathBuf> {
        match self {
            Method::VirtioSerial => Some(VIRTIO_PORT.into()),
            Method::IsaSerial => Some(SERIAL_PORT.into()),
            Method::UnixListen | Method::VsockListen => None,
        }
    }
}

/// All that can be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `-m`
    pub method: Method,
    /// `-p`; `None` is the method's own default.
    pub path: Option<PathBuf>,
    /// `-l`; `None` is standard error.
    pub logfile: Option<PathBuf>,
    /// `-f`, used with `-d` only.
    pub pidfile: PathBuf,
    /// `-F`
    pub hook: Option<PathBuf>,
    /// `-t`
    pub statedir: PathBuf,
    /// `-v`
    pub verbose: bool,
    /// `-d`
    pub daemon: bool,
    /// `-r`
    pub retry_path: bool,
    /// `-b`, the last of each list first, as qemu-ga keeps and shows it.
    pub blocked: Vec<String>,
    /// `-a`; if any are given, nothing else is allowed.
    pub allowed: Vec<String>,
    /// `--report-version`, ours.
    pub reported_version: String,
    /// `--compat-lease-ms`, ours: how long a plain `guest-fsfreeze-freeze` may hold the guest.
    pub compat_lease: Duration,
    /// `--freeze-include` and `--freeze-exclude`, ours.
    pub selection: Selection,
    /// `--hook-limit-ms`, ours: how long one call of a hook may take.
    pub hook_limit: Duration,
    /// `--report-hook-output`, ours: hosts are told what hooks write.
    pub report_hook_output: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            method: Method::default(),
            path: None,
            logfile: None,
            pidfile: PathBuf::from("/var/run/qemu-ga.pid"),
            hook: None,
            statedir: PathBuf::from("/var/run"),
            verbose: false,
            daemon: false,
            retry_path: false,
            blocked: Vec::new(),
            allowed: Vec::new(),
            reported_version: REPORTED_VERSION.to_owned(),
            compat_lease: Duration::from_millis(LEASE_MS_MAX),
            selection: Selection::default(),
            hook_limit: hooks::LIMIT_DEFAULT,
            report_hook_output: false,
        }
    }
}

impl Options {
    /// Takes what a key file says.
    /// # Errors
    /// A sentence about a value that cannot be.
    pub(super) fn take_file(&mut self, file: &KeyFile) -> Result<(), String> {
        let general = |key| file.string(GENERAL, key);
        let set =
            |flag: &mut bool, key| file.boolean(GENERAL, key).map(|value| *flag = value.unwrap_or(*flag));
        set(&mut self.daemon, "daemon")?;
        set(&mut self.verbose, "verbose")?;
        set(&mut self.retry_path, "retry-path")?;
        if let Some(method) = general("method")? {
            self.method = Method::read(&method)?;
        }
        self.path = general("path")?.map(PathBuf::from).or(self.path.take());
        self.logfile = general("logfile")?.map(PathBuf::from).or(self.logfile.take());
        self.hook = general("fsfreeze-hook")?.map(PathBuf::from).or(self.hook.take());
        for (place, key) in [(&mut self.pidfile, "pidfile"), (&mut self.statedir, "statedir")] {
            if let Some(path) = general(key)? {
                *place = path.into();
            }
        }
        // `blacklist` is the name before qemu-ga 9.1: what it refuses must not become allowed by an upgrade.
        for key in ["block-rpcs", "blacklist"] {
            self.blocked.extend(commands(&general(key)?.unwrap_or_default()));
        }
        self.allowed.extend(commands(&general("allow-rpcs")?.unwrap_or_default()));
        self.take_ours(file)
    }

    fn take_ours(&mut self, file: &KeyFile) -> Result<(), String> {
        if let Some(unknown) = file.keys(OURS).find(|key| !OUR_KEYS.contains(key)) {
            return Err(format!("Key file contains key “{unknown}” in group “{OURS}”, which does not exist"));
        }
        let ours = |key| file.string(OURS, key);
        if let Some(version) = ours("report-version")? {
            self.reported_version = version;
        }
        if let Some(lease) = ours("compat-lease-ms")? {
            self.compat_lease = milliseconds(&lease, LEASE_MS_MAX)?;
        }
        if let Some(limit) = ours("hook-limit-ms")? {
            self.hook_limit = milliseconds(&limit, hooks::LIMIT_MS_MAX)?;
        }
        if let Some(report) = file.boolean(OURS, "report-hook-output")? {
            self.report_hook_output = report;
        }
        self.selection.include(&ours("freeze-include")?.unwrap_or_default())?;
        self.selection.exclude(&ours("freeze-exclude")?.unwrap_or_default())
    }

    /// Takes a flag that sets something.
    /// # Errors
    /// A sentence about a value that cannot be.
    pub(super) fn take_flag(&mut self, Given { flag, value }: Given) -> Result<(), String> {
        match flag {
            Flag::Method => self.method = Method::read(&text(&value))?,
            Flag::Path => self.path = Some(value.into()),
            Flag::Logfile => self.logfile = Some(value.into()),
            Flag::Pidfile => self.pidfile = value.into(),
            Flag::FsfreezeHook if value.is_empty() => self.hook = Some(hooks::DEFAULT_PATH.into()),
            Flag::FsfreezeHook => self.hook = Some(value.into()),
            Flag::Statedir => self.statedir = value.into(),
            Flag::Verbose => self.verbose = true,
            Flag::Daemonize => self.daemon = true,
            Flag::RetryPath => self.retry_path = true,
            Flag::BlockRpcs => self.blocked.extend(commands(&text(&value))),
            Flag::AllowRpcs => self.allowed.extend(commands(&text(&value))),
            Flag::ReportVersion => self.reported_version = text(&value),
            Flag::CompatLeaseMs => self.compat_lease = milliseconds(&text(&value), LEASE_MS_MAX)?,
            Flag::HookLimitMs => self.hook_limit = milliseconds(&text(&value), hooks::LIMIT_MS_MAX)?,
            Flag::ReportHookOutput => self.report_hook_output = true,
            Flag::FreezeInclude => self.selection.include(&text(&value))?,
            Flag::FreezeExclude => self.selection.exclude(&text(&value))?,
            Flag::Config | Flag::DumpConf | Flag::Help | Flag::Version => {}
        }
        Ok(())
    }

    /// Makes every path independent of the working folder, which a daemon leaves.
    pub fn make_absolute(&mut self) {
        let absolute = |path: &mut PathBuf| {
            // Only an empty path or a working folder that is gone has no absolute form; opening it says so better.
            if let Ok(absolute) = std::path::absolute(&*path) {
                *path = absolute;
            }
        };
        let socket = self.path.as_mut().filter(|_| self.method != Method::VsockListen);
        let optional = [socket, self.logfile.as_mut(), self.hook.as_mut()];
        optional.into_iter().flatten().chain([&mut self.pidfile, &mut self.statedir]).for_each(absolute);
    }
}

fn text(value: &OsStr) -> String {
    value.to_string_lossy().into_owned()
}

/// A list of commands, the last first.
fn commands(list: &str) -> impl Iterator<Item = String> {
    list.rsplit(',').filter(|name| !name.is_empty()).map(str::to_owned)
}

fn milliseconds(text: &str, most: u64) -> Result<Duration, String> {
    let number = text.trim_ascii_end().parse().ok().filter(|ms| (1..=most).contains(ms));
    number
        .map(Duration::from_millis)
        .ok_or_else(|| format!("'{text}' is no number of milliseconds up to {most}"))
}
