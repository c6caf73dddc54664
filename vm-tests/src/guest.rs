//! One running guest, from its disks to its end.

use crate::accelerator::{Accelerator, accelerator};
use crate::acks::Acks;
use crate::block_graph::BlockGraph;
use crate::commands::{AS_POSTGRES, DATA_RECORDS, ROOT_RECORDS, psql};
use crate::harness::{self, Harness, Output};
use crate::image::Image;
use crate::qemu::{Disk, Machine, Qemu};
use serde_json::json;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm::monitor::{Monitor, MonitorError};

/// On a tmpfs that any user may write to: noting down a stall waits for no disk.
const STALLS: &str = "/dev/shm/stalls";
/// A commit or write takes an emulated processor some milliseconds; this is their rest from each other.
const PACED: &str = "--pause-us 20000";

/// Which agent answers on the guest's agent port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// Ours, as built from this checkout.
    Ours,
    /// Debian's qemu-ga.
    Stock,
    /// Nobody.
    None,
}

/// Which init the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Starts what a test needs, in seconds, and the agent again whenever it ends.
    Busybox,
    /// As a distribution has it; our agent is installed with its packaged unit.
    Systemd,
}

/// How a guest's disks come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// A qcow2 overlay on the image in the cache: made at once.
    Qcow2,
    /// A sparse raw copy of the image.
    Raw,
}

/// What the guest is to be; [`Guest::builder`] gives the usual one.
#[derive(Clone, Debug)]
pub struct GuestBuilder {
    agent: Agent,
    init: Init,
    format: DiskFormat,
    machine: Machine,
    disks: Option<Vec<Disk>>,
    memory_mib: u32,
    vcpus: u32,
    append: String,
    arguments: Vec<String>,
    older_agent: Option<PathBuf>,
    delivered: Vec<PathBuf>,
    lifetime: Duration,
}

impl GuestBuilder {
    /// The agent on the agent port; ours unless said.
    #[must_use]
    pub fn agent(mut self, agent: Agent) -> Self {
        self.agent = agent;
        self
    }

    /// Which init runs; busybox's unless said.
    #[must_use]
    pub fn init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// The format of fresh disks; qcow2 unless said.
    #[must_use]
    pub fn disk_format(mut self, format: DiskFormat) -> Self {
        self.format = format;
        self
    }

    /// The emulated machine; `q35` unless said.
    #[must_use]
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// Boots from these disks instead of fresh ones: a restored snapshot. They are written to.
    #[must_use]
    pub fn disks(mut self, disks: Vec<Disk>) -> Self {
        self.disks = Some(disks);
        self
    }

    /// Memory; 512 MiB unless said.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Processors; one unless said.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// More words for the kernel command line, for example `stillpoint.postgresql=off`.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append.push(' ');
        self.append.push_str(words);
        self
    }

    /// More arguments for QEMU.
    #[must_use]
    pub fn qemu_arguments<const N: usize>(mut self, arguments: [&str; N]) -> Self {
        self.arguments.extend(arguments.map(str::to_owned));
        self
    }

    /// Another build of our agent, delivered beside it for [`Guest::run_agent`].
    #[must_use]
    pub fn older_agent(mut self, program: Option<PathBuf>) -> Self {
        self.older_agent = program;
        self
    }

    /// More files for the guest, which has them in `/run/stillpoint`.
    #[must_use]
    pub fn deliver<P: Into<PathBuf>>(mut self, files: impl IntoIterator<Item = P>) -> Self {
        self.delivered.extend(files.into_iter().map(Into::into));
        self
    }

    /// When QEMU is killed whatever the test does; 15 minutes unless said.
    #[must_use]
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Makes the disks and starts QEMU; the guest boots while the caller goes on.
    ///
    /// # Errors
    /// If a disk cannot be made, or QEMU ends at once (the error holds what it printed).
    pub fn start(self) -> io::Result<Guest> {
        let image = Image::get();
        let accelerator = accelerator(image);
        let folder = tempfile::Builder::new().prefix("stillpoint-guest-").tempdir()?;
        let disks = match self.disks {
            Some(disks) => disks,
            None => vec![
                Disk::fresh("root", &image.root(), self.format, folder.path())?,
                Disk::fresh("data", &image.data(), self.format, folder.path())?,
            ],
        };
        let initrd = folder.path().join("initrd.img");
        write_initrd(image, self.agent, self.init, self.older_agent.as_deref(), &self.delivered, &initrd)?;
        let append = kernel_words(self.agent, self.init, accelerator) + &self.append;
        let started = Instant::now();
        let qemu = Qemu::start(
            folder.path(),
            &disks,
            [
                vec!["-machine".to_owned(), self.machine.name().to_owned()],
                accelerator.arguments().map(str::to_owned).to_vec(),
                vec!["-m".to_owned(), self.memory_mib.to_string(), "-smp".to_owned(), self.vcpus.to_string()],
                vec!["-kernel".to_owned(), image.kernel().display().to_string()],
                vec!["-initrd".to_owned(), initrd.display().to_string()],
                vec!["-append".to_owned(), append],
                self.arguments,
            ]
            .concat(),
            self.lifetime,
        )?;
        let acks = Acks::collect(qemu.connect("acks")?);
        let harness = Harness::new(qemu.socket("harness"));
        Ok(Guest { qemu, disks, acks, harness, started, accelerator, folder })
    }
}

/// The kernel command line of a guest with this agent and init.
pub(crate) fn kernel_words(agent: Agent, init: Init, accelerator: Accelerator) -> String {
    let agent = match agent {
        Agent::Ours => "ours",
        Agent::Stock => "stock",
        Agent::None => "none",
    };
    // An emulated TSC runs at the speed of a busy host: the guest's clock once ran at twice the speed with it.
    let clock = if accelerator == Accelerator::Tcg { "tsc=unstable clocksource=hpet" } else { "" };
    let init = if init == Init::Systemd { "stillpoint.init=systemd systemd.show_status=0" } else { "" };
    format!("console=ttyS0 quiet mitigations=off panic=-1 {clock} stillpoint.agent={agent} {init}")
}

/// The image's own initrd, and behind it the programs of this checkout and what else is delivered.
pub(crate) fn write_initrd(
    image: &Image,
    agent: Agent,
    init: Init,
    older: Option<&Path>,
    delivered: &[PathBuf],
    path: &Path,
) -> io::Result<()> {
    std::fs::copy(image.initrd(), path)?;
    let mut file = std::fs::OpenOptions::new().append(true).open(path)?;
    let mut overlay = crate::overlay::Overlay::with_folder("stillpoint");
    overlay.add_program("stillpoint/load", &std::fs::read(image.load())?);
    if agent == Agent::Ours {
        overlay.add_program("stillpoint/stillpoint-agent", &std::fs::read(image.agent())?);
        if init == Init::Systemd {
            for name in ["stillpoint-agent.service", "60-stillpoint-agent.rules"] {
                let packaged = crate::image::checkout().join("packaging/systemd").join(name);
                overlay.add_file(&format!("stillpoint/{name}"), &std::fs::read(packaged)?);
            }
        }
    }
    if let Some(older) = older {
        overlay.add_program("stillpoint/agent-older", &std::fs::read(older)?);
        overlay.add_program("stillpoint/agent-today", &std::fs::read(image.agent())?);
    }
    for path in delivered {
        let name = path.file_name().unwrap_or_default().display();
        overlay.add_file(&format!("stillpoint/{name}"), &std::fs::read(path)?);
    }
    overlay.finish(&mut file)
}

/// A virtual machine that dies with this value: QEMU is killed by its pid when it is dropped, when its lifetime is over,
/// and by the kernel when the test process ends.
///
/// Its folder (sockets, disks, serial log) goes with it.
pub struct Guest {
    // QEMU is dropped, and so dead, before the folder with its files goes.
    qemu: Qemu,
    disks: Vec<Disk>,
    acks: Acks,
    harness: Harness,
    started: Instant,
    accelerator: Accelerator,
    folder: tempfile::TempDir,
}

impl Guest {
    /// The usual guest: our agent, two fresh qcow2 disks, q35, one processor, 512 MiB.
    #[must_use]
    pub fn builder() -> GuestBuilder {
        GuestBuilder {
            agent: Agent::Ours,
            init: Init::Busybox,
            format: DiskFormat::Qcow2,
            machine: Machine::Q35,
            disks: None,
            memory_mib: 512,
            vcpus: 1,
            append: String::new(),
            arguments: Vec::new(),
            older_agent: None,
            delivered: Vec::new(),
            lifetime: Duration::from_secs(15 * 60),
        }
    }

    /// QEMU's monitor, for the program under test.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.qemu.socket("qmp")
    }

    /// A second monitor, for the test itself: QEMU serves one connection to each.
    #[must_use]
    pub fn second_qmp_socket(&self) -> PathBuf {
        self.qemu.socket("qmp2")
    }

    /// What QEMU's block layer looks like now.
    ///
    /// # Panics
    /// If QEMU does not answer.
    #[must_use]
    pub fn block_graph(&self) -> BlockGraph {
        let graph = BlockGraph::of(&self.second_qmp_socket());
        self.or_serial("QEMU's monitor", graph)
    }

    /// The socket of the agent under test.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.qemu.socket("agent")
    }

    /// The acknowledgements of the load in this guest.
    #[must_use]
    pub fn acks(&self) -> &Acks {
        &self.acks
    }

    /// The disks: `root`, then `data`.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The folder with the guest's files; gone with the guest.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Waits until the guest runs commands of the test, and returns the time since the start.
    ///
    /// # Panics
    /// If it does not within `limit` (times six under emulation); shows the end of the serial console.
    pub fn booted(&self, limit: Duration) -> Duration {
        let ready = self.harness.ready(limit * self.accelerator.patience());
        self.or_serial("the guest does not boot", ready);
        self.started.elapsed()
    }

    /// Waits until the agent under test answers, and returns the time since the start. The connection is closed again.
    ///
    /// # Panics
    /// If it does not within `limit` (times six under emulation); shows the end of the serial console.
    pub fn agent_ready(&self, limit: Duration) -> Duration {
        let ready = harness::answers(&self.agent_socket(), limit * self.accelerator.patience());
        self.or_serial("the agent does not answer", ready);
        self.started.elapsed()
    }

    /// Waits until PostgreSQL in the guest answers queries, and returns the time since the start.
    ///
    /// # Panics
    /// If it does not within `limit` (times six under emulation); shows the end of the serial console.
    pub fn postgresql_ready(&self, limit: Duration) -> Duration {
        let end = Instant::now() + limit * self.accelerator.patience();
        while self.exec(&psql("bench", "select 1")).code != 0 {
            if Instant::now() >= end {
                let log = self.exec("cat /var/log/postgresql/*.log");
                panic!("PostgreSQL does not answer: {}\n{}", log.out, self.serial_tail());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        self.started.elapsed()
    }

    /// Runs a shell command in the guest, beside the agent under test and whatever its state; at most two minutes.
    ///
    /// It must touch no frozen file system by writing, or it waits for the thaw as any program does.
    ///
    /// # Panics
    /// If the guest does not answer; shows the end of the serial console.
    pub fn exec(&self, command: &str) -> Output {
        let output = self.harness.shell(command, Duration::from_secs(120));
        self.or_serial(command, output)
    }

    /// One SQL statement in database `bench`, unaligned and without headers; it must succeed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn sql(&self, statement: &str) -> String {
        self.exec(&psql("bench", statement)).success().trim_end().to_owned()
    }

    /// Starts the load: numbered commits (`c`), and numbered writes without fsync to ext4 (`w`) and to xfs (`x`), each
    /// acknowledged to [`Guest::acks`]. It runs until the guest ends, or [`Guest::stop_load`].
    ///
    /// It leaves the guest's processor to what is tested. Where the load itself matters, see [`Guest::start_heavy_load`].
    pub fn start_load(&self) {
        self.start_acknowledging(&format!("--commits bench {PACED}"));
    }

    /// The same at the load's own pace, which leaves an emulated processor no time for anything else.
    pub fn start_heavy_load(&self) {
        self.start_acknowledging("--commits bench");
    }

    /// Starts only the writers without fsync, for a guest without PostgreSQL.
    pub fn start_writers(&self) {
        self.start_acknowledging(PACED);
    }

    fn start_acknowledging(&self, more: &str) {
        self.start(&format!(
            "exec {AS_POSTGRES} /run/stillpoint/load --acks /dev/virtio-ports/org.stillpoint.acks \
             --writes w={ROOT_RECORDS} --writes x={DATA_RECORDS} {more} >/run/load.log 2>&1"
        ));
    }

    /// Waits until both writers without fsync have written on, and returns how long that took: no file system is frozen.
    ///
    /// # Panics
    /// If one has not within `limit` (times six under emulation).
    #[track_caller]
    pub fn writes_go_on(&self, limit: Duration) -> Duration {
        let began = Instant::now();
        let limit = limit * self.accelerator.patience();
        for kind in ['w', 'x'] {
            let next = self.acks.highest(kind) + 20;
            assert!(
                self.acks.wait_for(kind, next, limit),
                "the writer '{kind}' stands still\n{}",
                self.serial_tail()
            );
        }
        began.elapsed()
    }

    /// The longest time that either writer without fsync stood since then.
    pub fn longest_silence(&self, since: Instant) -> Duration {
        let acks = self.acks().so_far();
        let gaps = ['w', 'x'].map(|kind| {
            let mut times = vec![since];
            times.extend(acks.iter().filter(|ack| ack.kind == kind && ack.at > since).map(|ack| ack.at));
            times.push(Instant::now());
            times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
        });
        gaps[0].max(gaps[1])
    }

    /// Starts pgbench's own transactions, `clients` at once, for at most `seconds`.
    pub fn start_pgbench(&self, clients: u32, seconds: u32) {
        self.start(&format!(
            "exec {AS_POSTGRES} /usr/lib/postgresql/15/bin/pgbench --no-vacuum --client={clients} --time={seconds} bench \
             >/run/pgbench.log 2>&1"
        ));
    }

    /// Starts the load that writes down how long its fsyncs (`f` on the data disk's xfs, `r` on the root's ext4) and its
    /// commits (`c`) take, beside a writer that overwrites `dirty_mib_per_s` of the data disk at random and syncs nothing.
    pub fn start_measured_load(&self, dirty_mib_per_s: u32) {
        self.start(&format!(
            "exec {AS_POSTGRES} /run/stillpoint/load --stalls {STALLS} --commits bench --syncs f=/var/lib/postgresql/synced \
             --syncs r=/var/tmp/synced --dirty {dirty_mib_per_s}=/var/lib/postgresql/dirtied >/run/load.log 2>&1"
        ));
    }

    /// What that load wrote down so far: letter, beginning (guest's clock) and duration in nanoseconds, a line each.
    ///
    /// # Panics
    /// If there is nothing.
    #[must_use]
    pub fn stalls(&self) -> String {
        self.exec(&format!("cat {STALLS} || cat /run/load.log")).success()
    }

    /// Lends the connection to the stock agent that the tests use: it can freeze the guest as well as run commands.
    ///
    /// # Errors
    /// What `action` failed with.
    pub fn with_stock_agent<T>(
        &self,
        action: impl FnOnce(&mut vm::agent::Agent) -> Result<T, vm::agent::AgentError>,
    ) -> Result<T, vm::agent::AgentError> {
        self.harness.with_agent(harness::ANSWER_TIME_MAX, action)
    }

    /// Has the guest go on with one build of our agent: today's, or the one given to [`GuestBuilder::older_agent`].
    ///
    /// # Panics
    /// If it does not answer soon.
    pub fn run_agent(&self, older: bool) {
        let build = if older { "agent-older" } else { "agent-today" };
        // Renamed over the running one, which cannot be written to; init starts it again when it has ended. That is waited for:
        // one that is about to end would still say that it is ready.
        let swap = format!(
            "cd /run/stillpoint && busybox cp {build} next && busybox mv next stillpoint-agent && \
             before=$(busybox pidof stillpoint-agent) && kill $before && \
             for one in $before; do while [ -e /proc/$one ]; do busybox sleep 0.1; done; done"
        );
        self.exec(&swap).success();
        self.agent_ready(Duration::from_secs(60));
    }

    /// Ends the load and pgbench.
    pub fn stop_load(&self) {
        // Fails only if neither runs.
        let _ended = self.exec("busybox killall load pgbench");
    }

    /// Starts a shell command in the guest and leaves it running.
    ///
    /// # Panics
    /// If the guest does not answer.
    pub fn start(&self, command: &str) {
        let started = self.harness.start(command);
        self.or_serial(command, started);
    }

    /// Asks the guest to power off, waits for QEMU's end, and returns the time that took.
    ///
    /// # Panics
    /// If it has not ended within `limit` (times six under emulation).
    pub fn power_off(self, limit: Duration) -> Duration {
        let asked = Instant::now();
        let limit = limit * self.accelerator.patience();
        self.or_serial("guest-shutdown", self.harness.power_off(limit));
        if !self.qemu.wait(limit) {
            panic!("the guest does not power off\n{}", self.serial_tail());
        }
        asked.elapsed()
    }

    /// Presses the reset button: the guest boots again, and its load has to be started again. What was acknowledged is forgotten,
    /// because a reset takes back what no fsync made last.
    ///
    /// # Panics
    /// If QEMU does not answer.
    pub fn reset(&self) {
        let reset = || -> Result<(), MonitorError> {
            let mut monitor = Monitor::connect(&self.second_qmp_socket(), harness::ANSWER_TIME_MAX)?;
            // It was started with -no-reboot: a guest that crashes ends.
            let orders = [("set-action", json!({ "reboot": "reset" })), ("system_reset", json!({}))];
            orders.iter().try_for_each(|(order, arguments)| {
                monitor.run_raw(order, arguments, harness::ANSWER_TIME_MAX).map(drop)
            })
        };
        self.or_serial("QEMU's monitor", reset());
        self.harness.forget();
        self.acks.forget();
    }

    /// Pulls the plug: QEMU is killed. Returns the disks, which the folder beside them keeps alive.
    #[must_use]
    pub fn kill(self) -> (tempfile::TempDir, Vec<Disk>) {
        let Self { qemu, disks, folder, .. } = self;
        drop(qemu);
        (folder, disks)
    }

    /// The end of what the guest wrote to its serial console.
    #[must_use]
    pub fn serial_tail(&self) -> String {
        self.qemu.serial_tail()
    }

    fn or_serial<T, E: fmt::Display>(&self, what: &str, result: Result<T, E>) -> T {
        result.unwrap_or_else(|error| panic!("{what}: {error}\n{}", self.serial_tail()))
    }
}
