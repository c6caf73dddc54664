//! One snapshot by ours or by a stock agent, and where it lies in the guest's time.

use super::figures::Span;
use crate::cost::Cost;
use guest_protocol::stillpoint::GuestReport;
use qmp::job::{JobCancel, JobDismiss, QueryJobs};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use vm::agent::AgentError;
use vm::monitor::Monitor;
use vm_tests::{Guest, Stillpoint, snapshot_id};

/// What is looked at ends so long after the resume.
const AFTER_NS: u64 = 1_000_000_000;
const VM: &str = "bench";
/// The guest's clock is asked so often; the quickest answer counts.
const CLOCK_PROBES: usize = 25;
/// How long a stock agent may take to freeze or thaw.
const STOCK_LIMIT: Duration = Duration::from_secs(60);
/// How long QEMU may take over the end of a job.
const JOB_LIMIT: Duration = Duration::from_secs(60);
/// A load that is refused so often in a row is too heavy for the guest.
const REFUSALS_MAX: usize = 3;
/// Added where several figures in whole milliseconds are summed up.
const ROUNDING_NS: u64 = 10_000_000;

/// A snapshot that was taken under load.
pub(super) struct Taken {
    /// From the first flush round (a stock agent: from the freeze command) to a second after the resume.
    pub(super) window: Span,
    /// The same from the moment at which the freeze command was sent: with the applications' checkpoints.
    pub(super) whole: Span,
    /// First FIFREEZE to last FITHAW (a stock agent: freeze command to thaw's answer).
    pub(super) frozen: Span,
    /// From the last FIFREEZE's return to the thaw: in it the processors were stopped.
    pub(super) held: Span,
    /// Its steps, in words.
    pub(super) steps: String,
    pub(super) cost: Cost,
}

/// How the host's wall clock and the guest's differ.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// To be added to the host's time, in nanoseconds.
    offset_ns: i128,
    error_ns: u64,
}

impl Clock {
    pub(super) fn of(guest: &Guest) -> Result<Self, String> {
        let mut best: Option<Self> = None;
        for _ in 0..CLOCK_PROBES {
            let asked = now_ns();
            let said: i128 = guest
                .with_stock_agent(|agent| agent.call("guest-get-time", None, STOCK_LIMIT))
                .map_err(|error| error.to_string())?;
            let error_ns = (now_ns() - asked) / 2;
            if best.is_none_or(|best| error_ns < best.error_ns) {
                best = Some(Self { offset_ns: said - i128::from(asked + error_ns), error_ns });
            }
        }
        best.ok_or_else(|| "the guest's clock was not asked".to_owned())
    }

    pub(super) fn guest_ns(self, host_ns: u64) -> u64 {
        u64::try_from(i128::from(host_ns) + self.offset_ns).unwrap_or(0)
    }

    pub(super) fn drift_ms(self, later: Self) -> f64 {
        (later.offset_ns - self.offset_ns) as f64 / 1e6
    }

    /// How long the guest's clock stood still until `later`, in nanoseconds: it does with its processors.
    pub(super) fn stood_ns(self, later: Self) -> u64 {
        u64::try_from(self.offset_ns - later.offset_ns).unwrap_or(0)
    }

    pub(super) fn error_ms(self) -> f64 {
        self.error_ns as f64 / 1e6
    }
}

pub(super) fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Takes the first snapshot, with which the program's own register and repository are ready. Answers the
/// disks' nodes and sizes.
pub(super) fn first(guest: &Guest, stillpoint: &Stillpoint) -> Result<Vec<(String, u64)>, String> {
    let (qmp, agent) = (guest.qmp_socket(), guest.agent_socket());
    let add = ["vm", "add", VM, "--qmp", &qmp.to_string_lossy(), "--agent", &agent.to_string_lossy()];
    stillpoint.run(&add)?.success()?;
    let said = stillpoint.run(&["snapshot", VM, "--require", "application"])?.success()?;
    let size = |name: &str| {
        let mut disks = said["disks"].as_array().into_iter().flatten();
        let disk = disks.find(|disk| disk["name"].as_str() == Some(&format!("disk-{name}")));
        disk.and_then(|disk| disk["size_bytes"].as_u64()).ok_or_else(|| format!("no disk-{name} in {said}"))
    };
    guest.disks().iter().map(|disk| Ok((disk.name.clone(), size(&disk.name)?))).collect()
}

/// A whole `stillpoint snapshot`; taken again where the guest refused because by its last flush the freeze would have been a
/// long one, as an administrator would have to do.
pub(super) fn ours(guest: &Guest, stillpoint: &Stillpoint) -> Result<Taken, String> {
    for _ in 0..REFUSALS_MAX {
        match attempt(guest, stillpoint) {
            Err(why) if why.contains("freeze_would_stall") => println!("refused: {why}"),
            taken => return taken,
        }
    }
    Err(format!("{REFUSALS_MAX} snapshots in a row were refused"))
}

fn attempt(guest: &Guest, stillpoint: &Stillpoint) -> Result<Taken, String> {
    let clock = Clock::of(guest)?;
    let (said, cost) =
        Cost::of(guest.pid(), || stillpoint.run(&["snapshot", VM, "--require", "application"])?.success())?;
    let shown = stillpoint.run(&["show", snapshot_id(&said)?])?.success()?;
    let receipt = &shown["receipt"];
    let report: GuestReport =
        serde_json::from_value(receipt["guest"].clone()).map_err(|error| error.to_string())?;
    let host = |value: &Value| value.as_u64().ok_or_else(|| format!("a time is missing in {receipt}"));
    let phases = &receipt["phases_ms"];
    let sent_ms = host(&receipt["order"]["freeze_sent_ms"])?;
    let answered_ms = sent_ms + host(&phases["freeze"])? + host(&phases["point"])? + host(&phases["thaw"])?;
    let sent_ns = clock.guest_ns(sent_ms * 1_000_000);
    let answered_ns = clock.guest_ns(answered_ms * 1_000_000) + ROUNDING_NS;

    let ns = |ms: u64| ms * 1_000_000;
    let frozen_at_ns = ns(report.frozen_at_ms.ok_or("the guest does not say when it was frozen")?);
    let from_ns = frozen_at_ns - ns(report.freeze_ms);
    let frozen = Span { from_ns, to_ns: from_ns + ns(report.frozen_ms) };
    if frozen.from_ns < sent_ns || frozen.to_ns > answered_ns {
        return Err(format!(
            "the clocks do not fit: frozen from {} to {}, freeze sent {sent_ns}, thaw answered {answered_ns}",
            frozen.from_ns, frozen.to_ns
        ));
    }
    // An older agent does not say it, and quiesced between its flush rounds.
    let flushed_ms: u64 = report.flush_rounds_ms.iter().sum();
    let flushing_ms = report.flushing_ms.unwrap_or(report.quiesce_ms + flushed_ms);
    let first_flush_ns = from_ns - ns(flushing_ms) - ROUNDING_NS;
    let to_ns = answered_ns + AFTER_NS;
    let each: Vec<String> = report
        .filesystems
        .iter()
        .map(|one| format!("{} {} ms", one.mountpoint, one.frozen_ms.unwrap_or(0)))
        .collect();
    let stopped_ms = receipt["point"]["stopped_ms"].as_f64().unwrap_or(0.0);
    let facts = |name: &str| {
        let of = |application: &guest_protocol::stillpoint::ApplicationReport| {
            application.facts.get(name).cloned()
        };
        report.applications.iter().find_map(of).unwrap_or_default()
    };
    let steps = format!(
        "prepare {} (CHECKPOINT {}), flush rounds {:?}, quiesce {} (CHECKPOINT {}), FIFREEZE {}, frozen {} ({}), \
         thaw {}; cut {}, in it stop to cont {:.0}; copied {}",
        report.prepare_ms,
        facts("prepare_checkpoint_ms"),
        report.flush_rounds_ms,
        report.quiesce_ms,
        facts("quiesce_checkpoint_ms"),
        report.freeze_ms,
        report.frozen_ms,
        each.join(", "),
        report.thaw_ms,
        phases["point"],
        stopped_ms,
        phases["copy"],
    );
    let window = Span { from_ns: first_flush_ns.max(sent_ns), to_ns };
    let whole = Span { from_ns: sent_ns, to_ns };
    let held = Span { from_ns: frozen_at_ns, ..frozen };
    Ok(Taken { window, whole, frozen, held, steps, cost })
}

/// What takes snapshots by a stock agent and QEMU's backup jobs.
pub(super) struct Stock {
    monitor: Monitor,
    disks: Vec<(String, u64)>,
    folder: tempfile::TempDir,
}

impl Stock {
    pub(super) fn new(guest: &Guest, disks: Vec<(String, u64)>) -> Result<Self, String> {
        let monitor =
            Monitor::connect(&guest.second_qmp_socket(), JOB_LIMIT).map_err(|error| error.to_string())?;
        let folder = tempfile::Builder::new().prefix("stillpoint-stock-").tempdir();
        Ok(Self { monitor, disks, folder: folder.map_err(|error| error.to_string())? })
    }

    /// guest-fsfreeze-freeze, one transaction of blockdev-backup over all disks, guest-fsfreeze-thaw. The jobs copy what the
    /// guest overwrites (`sync=none`, as for a backup that is pulled) until a second after the thaw.
    pub(super) fn snapshot(&mut self, guest: &Guest) -> Result<Taken, String> {
        for (disk, size) in self.disks.clone() {
            self.open_target(&disk, size)?;
        }
        let clock = Clock::of(guest)?;
        let (mut sent_ns, mut answered_ns, mut steps) = (0, 0, String::new());
        let ((), cost) = Cost::of(guest.pid(), || {
            sent_ns = now_ns();
            let frozen =
                guest.with_stock_agent(|agent| agent.fsfreeze_freeze(STOCK_LIMIT, &AtomicBool::new(false)));
            let froze_ns = now_ns();
            let cut = frozen.as_ref().map_err(AgentError::to_string).and_then(|_| self.cut());
            let cut_ns = now_ns();
            // Whatever went wrong: a stock agent never thaws by itself.
            let thawed = guest.with_stock_agent(|agent| agent.fsfreeze_thaw(STOCK_LIMIT));
            answered_ns = now_ns();
            cut?;
            let count = thawed.map_err(|error| error.to_string())?;
            if count != self.disks.len() as i64 {
                return Err(format!("{count} file systems were thawed, of {}", self.disks.len()));
            }
            let ms = |from: u64, to: u64| (to - from) as f64 / 1e6;
            steps = format!(
                "freeze {:.0}, transaction {:.0}, thaw {:.0}",
                ms(sent_ns, froze_ns),
                ms(froze_ns, cut_ns),
                ms(cut_ns, answered_ns)
            );
            std::thread::sleep(Duration::from_nanos(AFTER_NS));
            Ok(())
        })?;
        for (disk, _) in self.disks.clone() {
            self.close_target(&disk)?;
        }
        let frozen = Span { from_ns: clock.guest_ns(sent_ns), to_ns: clock.guest_ns(answered_ns) };
        let window = Span { to_ns: frozen.to_ns + AFTER_NS, ..frozen };
        // A backup job stops no processor.
        Ok(Taken { window, whole: window, frozen, held: frozen, steps, cost })
    }

    fn cut(&mut self) -> Result<(), String> {
        let actions = self.disks.iter().map(|(disk, _)| {
            json!({
                "type": "blockdev-backup",
                "data": {
                    "job-id": job(disk), "device": disk, "target": target(disk), "sync": "none",
                    "auto-dismiss": false,
                },
            })
        });
        let actions: Vec<Value> = actions.collect();
        self.ask("transaction", &json!({ "actions": actions }))
    }

    fn path(&self, disk: &str) -> PathBuf {
        self.folder.path().join(disk)
    }

    fn open_target(&mut self, disk: &str, size: u64) -> Result<(), String> {
        let path = self.path(disk);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(size.to_string());
        crate::idle_vm::run(&mut create)?;
        // As the product opens its scratch: neither waits for the host's disk.
        let cache = json!({ "direct": false, "no-flush": true });
        let file = json!({ "driver": "file", "filename": path.display().to_string(), "cache": cache });
        let node = json!({
            "driver": "qcow2", "node-name": target(disk), "file": file, "cache": cache, "backing": disk,
        });
        self.ask("blockdev-add", &node)
    }

    fn close_target(&mut self, disk: &str) -> Result<(), String> {
        let id = job(disk);
        self.monitor.run(&JobCancel { id: id.clone() }).map_err(|error| error.to_string())?;
        let end = Instant::now() + JOB_LIMIT;
        loop {
            let jobs = self.monitor.run(&QueryJobs {}).map_err(|error| error.to_string())?;
            let status = jobs.iter().find(|one| one.id == id).map(|one| one.status.as_str());
            match status {
                Some("concluded") => break,
                None => return Err(format!("the backup of {disk} is gone")),
                Some(status) if Instant::now() >= end => {
                    return Err(format!("the backup of {disk} is still {status}"));
                }
                Some(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        self.monitor.run(&JobDismiss { id }).map_err(|error| error.to_string())?;
        self.ask("blockdev-del", &json!({ "node-name": target(disk) }))?;
        std::fs::remove_file(self.path(disk)).map_err(|error| error.to_string())
    }

    fn ask(&mut self, name: &str, arguments: &Value) -> Result<(), String> {
        self.monitor.run_raw(name, arguments, JOB_LIMIT).map(drop).map_err(|error| error.to_string())
    }
}

fn job(disk: &str) -> String {
    format!("stock-{disk}")
}

fn target(disk: &str) -> String {
    format!("stock-{disk}-target")
}
