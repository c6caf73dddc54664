//! Carries a plan out: prepare, cut, export.

use crate::monitor::{Asked, COMMAND_TIMEOUT, Monitor, MonitorError};
use crate::point::here::{Away, Watched, here, stays};
use crate::point::plan::{DiskExport, Plan};
use crate::point::restart::{Disarmed, Restarter};
use crate::point::steps::{Step, StepError};
use qmp::command::Nothing;
use qmp::machine::{Cont, QueryMigrate, QueryStatus, Status, Stop};
use qmp::qom::DeviceListProperties;
use std::io;
use std::time::{Duration, Instant};

/// How long a QEMU that lives may take to greet again.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A point that failed. Whatever was put in place is removed by [`release`](crate::point::release).
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// This QEMU lacks something.
    #[error("this QEMU lacks {0}")]
    Unsupported(&'static str),
    /// A disk is served by an I/O thread, in a QEMU that may die of it: see [`reads_beside_io_threads`].
    #[error(
        "disk {0} is served by an I/O thread, and this QEMU could die when the reader of its snapshot disconnects"
    )]
    IoThread(String),
    /// The guest's commands go to the host's device past QEMU's block layer: see [`Disk::passthrough`].
    ///
    /// [`Disk::passthrough`]: crate::disks::Disk::passthrough
    #[error(
        "disk {0} passes the guest's SCSI commands through to the host's device, so QEMU can neither hold its writes back nor \
         see them all"
    )]
    Passthrough(String),
    /// The VM has migrated since the preparation, or does now: its disks are another QEMU's.
    #[error(transparent)]
    Away(Away),
    /// A step failed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The process that would restart the vCPUs could not be started.
    #[error("the process that restarts the vCPUs cannot be started: {0}")]
    Restarter(#[source] io::Error),
    /// The vCPUs were stopped and do not run again; this comes before all else.
    #[error("the VM was stopped and does not run again: {0}")]
    Paused(#[source] MonitorError),
}

impl From<MonitorError> for PointError {
    fn from(error: MonitorError) -> Self {
        Self::Step(StepError::Monitor(error))
    }
}

impl From<Away> for PointError {
    fn from(away: Away) -> Self {
        match away {
            Away::Monitor(error) => error.into(),
            away => Self::Away(away),
        }
    }
}

/// Everything slow is done.
#[derive(Debug)]
#[must_use = "what was prepared stays in QEMU until it is released"]
pub struct Prepared<'p> {
    plan: &'p Plan,
    restarter: Restarter,
    watched: Watched,
}

/// The disks are cut.
#[derive(Debug)]
pub struct Cut {
    /// How long the vCPUs were stopped at most: until `cont` was answered. Absent if they did not run before.
    pub stopped: Option<Duration>,
    /// They still stood when the last disk had been cut: nobody else had let them go on meanwhile.
    pub stood: bool,
    _restarter: Disarmed,
}

/// Does everything slow: scratch images, filters, NBD server. The guest runs on undisturbed.
///
/// # Errors
/// See [`PointError`]; call [`release`](crate::point::release) then.
pub fn prepare<'p>(monitor: &mut Monitor, plan: &'p Plan) -> Result<Prepared<'p>, PointError> {
    // First of all: once a filter is in place, such a guest's I/O would fail.
    if let Some(disk) = plan.disks.iter().find(|disk| disk.disk.passthrough) {
        return Err(PointError::Passthrough(disk.disk.name.clone()));
    }
    if let Some(disk) = plan.disks.iter().find(|disk| disk.disk.io_thread)
        && !reads_beside_io_threads(monitor)?
    {
        return Err(PointError::IoThread(disk.disk.name.clone()));
    }
    let schema = monitor.schema()?;
    if !schema.has_driver_option("copy-before-write", "on-cbw-error") {
        return Err(PointError::Unsupported("copy-before-write with on-cbw-error"));
    }
    if !schema.has_driver_option("copy-before-write", "cbw-timeout") {
        return Err(PointError::Unsupported("copy-before-write with cbw-timeout"));
    }
    if !schema.has_driver("snapshot-access") {
        return Err(PointError::Unsupported("snapshot-access"));
    }
    if plan.disks.iter().any(|disk| disk.base.is_some()) && !schema.exports_foreign_bitmaps() {
        return Err(PointError::Unsupported("exports with another node's bitmap"));
    }
    for step in plan.prepare_steps() {
        step.run(monitor)?;
    }
    let connection = monitor.duplicate_socket().map_err(PointError::Restarter)?;
    let restarter = Restarter::start(connection).map_err(PointError::Restarter)?;
    let watched = Watched::begin(monitor)?;
    Ok(Prepared { plan, restarter, watched })
}

/// Whether the reader of an export in an I/O thread may disconnect.
///
/// QEMU 7.2 then dies of a failed assertion (`nbd_blockdev_client_closed`). QEMU 9.0 gave up the lock behind it, and at the
/// same time learnt to spread one device over several I/O threads, which is what can be asked for.
fn reads_beside_io_threads(monitor: &mut Monitor) -> Result<bool, MonitorError> {
    let typename = "virtio-blk-device".to_owned();
    match monitor.run(&DeviceListProperties { typename }) {
        Ok(properties) => Ok(properties.iter().any(|property| property.name == "iothread-vq-mapping")),
        Err(MonitorError::Failed { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Prepared<'_> {
    /// Cuts all disks in one step. If the vCPUs run, they are stopped meanwhile and run again whatever fails. Once they stand,
    /// `standing` is called: what it sends to the guest is there when they go on, and not before, unless [`Cut::stood`] is false.
    ///
    /// `limit` bounds the stop itself, in which QEMU flushes every disk.
    ///
    /// # Errors
    /// See [`PointError`]; call [`release`](crate::point::release) then.
    pub fn cut(
        mut self,
        monitor: &mut Monitor,
        limit: Duration,
        standing: impl FnOnce(),
    ) -> Result<Cut, PointError> {
        let steps = self.plan.cut_steps();
        // The guest may be frozen and wait: what need not be asked is not.
        if !self.watched.has_run_since(monitor)? && !here(monitor)?.running {
            steps.iter().try_for_each(|step| step.run(monitor))?;
            let stood = !monitor.run(&QueryStatus {})?.running;
            return Ok(Cut { stopped: None, stood, _restarter: self.restarter.disarm() });
        }
        self.restarter.arm().map_err(PointError::Restarter)?;
        let began = Instant::now();
        let (outcome, resumed) = stop_carry_out_and_resume(monitor, &steps, limit, standing);
        let stopped = began.elapsed();
        let resumed = match resumed {
            Ok(resumed) => resumed,
            Err(error) => {
                self.restarter.try_once_more();
                return Err(PointError::Paused(error));
            }
        };
        let restarter = self.restarter.disarm();
        match resumed {
            Resumed::Runs { stood } => {
                outcome?;
                Ok(Cut { stopped: Some(stopped), stood, _restarter: restarter })
            }
            Resumed::Left(state) => Err(Away::Elsewhere(state).into()),
        }
    }
}

enum Resumed {
    Runs {
        /// It did not before: the disks were cut while it stood.
        stood: bool,
    },
    /// The VM has migrated meanwhile, and runs where it is now. The state of this QEMU.
    Left(String),
}

/// Stops the vCPUs, carries the steps out, asks what state the VM is in then, and lets it run, whatever failed before: also after a
/// `stop` that was not answered, for QEMU takes commands in order.
///
/// All of it is sent before the first answer is waited for. On a busy host each wait takes as long as a command, and all the while the
/// guest is frozen.
fn stop_carry_out_and_resume(
    monitor: &mut Monitor,
    steps: &[Step],
    limit: Duration,
    standing: impl FnOnce(),
) -> (Result<(), PointError>, Result<Resumed, MonitorError>) {
    let (migration, stop) = (monitor.ask(&QueryMigrate {}), monitor.ask(&Stop {}));
    let begun: Vec<_> = steps.iter().map(|step| step.begin(monitor)).collect();
    let (status, cont) = (monitor.ask(&QueryStatus {}), monitor.ask(&Cont {}));
    let migration = migration.and_then(|asked| monitor.hear(asked, COMMAND_TIMEOUT));
    let stopped = stop.and_then(|asked| monitor.hear(asked, limit));
    if stopped.is_ok() {
        standing();
    }
    let mut outcome = migration.map_err(PointError::from).and_then(|migration| Ok(stays(migration)?));
    outcome = outcome.and(stopped.map(|Nothing {}| ()).map_err(PointError::from));
    for begun in begun {
        outcome = outcome.and_then(|()| match begun? {
            Some(asked) => Ok(monitor.hear(asked, COMMAND_TIMEOUT).map(|Nothing {}| ())?),
            None => Ok(()),
        });
    }
    (outcome, resumed(monitor, status, cont))
}

/// Hears whether the vCPUs run. QEMU outlives a connection that broke, and then only a new one can tell it.
fn resumed(
    monitor: &mut Monitor,
    status: Result<Asked<Status>, MonitorError>,
    cont: Result<Asked<Nothing>, MonitorError>,
) -> Result<Resumed, MonitorError> {
    let mut stood = None;
    let heard = status.and_then(|asked| monitor.hear(asked, COMMAND_TIMEOUT)).and_then(|status| {
        if status.is_elsewhere() {
            return Ok(Resumed::Left(status.status));
        }
        let stood = *stood.insert(!status.running);
        cont.and_then(|asked| monitor.hear(asked, COMMAND_TIMEOUT)).map(|Nothing {}| Resumed::Runs { stood })
    });
    match heard {
        Err(error) if error.is_broken() => {
            monitor.reconnect(RECONNECT_TIMEOUT)?;
            go_on(monitor, stood)
        }
        heard => heard,
    }
}

/// Lets the vCPUs run, if they are here. A QEMU may run already because it heard the first `cont`: whether it `stood` before that
/// counts, if it said so.
fn go_on(monitor: &mut Monitor, stood: Option<bool>) -> Result<Resumed, MonitorError> {
    let status = monitor.run(&QueryStatus {})?;
    if status.is_elsewhere() {
        return Ok(Resumed::Left(status.status));
    }
    let stood = stood.unwrap_or(!status.running);
    monitor.run(&Cont {}).map(|_| Resumed::Runs { stood })
}

/// Makes the disks readable as they were at the point.
///
/// # Errors
/// See [`PointError`]; call [`release`](crate::point::release) then.
pub fn export(monitor: &mut Monitor, plan: &Plan) -> Result<Vec<DiskExport>, PointError> {
    for step in plan.export_steps() {
        step.run(monitor)?;
    }
    Ok(plan.exports())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::point::scripted::{Scripted, answer};
    use serde_json::{Value, json};
    use std::os::unix::net::UnixListener;
    use std::thread;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A QEMU that answers the commands of each connection with these, and hangs up at the next one.
    fn resumed(connections: Vec<Vec<Value>>) -> Result<Resumed, MonitorError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        // Not waited for: if `resume` is content with fewer connections, its answer shows that.
        thread::spawn(move || {
            for answers in connections {
                let mut qemu = Scripted::serve(&listener, &[]);
                for said in answers {
                    let command = qemu.hear();
                    qemu.say(&answer(&command, json!({ "return": said })));
                }
                qemu.wait();
            }
        });
        let mut monitor = Monitor::connect(&path, LIMIT).unwrap();
        let (status, cont) = (monitor.ask(&QueryStatus {}), monitor.ask(&Cont {}));
        super::resumed(&mut monitor, status, cont)
    }

    struct Ended {
        said_to_stand: bool,
        outcome: Result<(), PointError>,
        resumed: Result<Resumed, MonitorError>,
    }

    /// What `stop_carry_out_and_resume` makes of a QEMU that answers these, each with its command's name. It says nothing from `qom-set`
    /// on before the vCPUs are said to stand.
    fn carried_out(answers: [(&'static str, Value); 6]) -> Ended {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let (stands, standing) = std::sync::mpsc::channel();
        let qemu = thread::spawn(move || {
            let mut qemu = Scripted::serve(&listener, &[]);
            let asked: Vec<Value> = answers.iter().map(|_| qemu.hear()).collect();
            let mut stood = false;
            for (command, (name, said)) in asked.iter().zip(answers) {
                assert_eq!(command["execute"], name);
                if name == "qom-set" && !stood {
                    stood = standing.recv_timeout(Duration::from_millis(500)).is_ok();
                }
                qemu.say(&answer(command, said));
            }
            stood
        });
        let drive = |number| Step::SetDrive { device: format!("d{number}"), node: format!("n{number}") };
        let mut monitor = Monitor::connect(&path, LIMIT).unwrap();
        let ended = stop_carry_out_and_resume(&mut monitor, &[drive(0), drive(1)], LIMIT, || {
            stands.send(()).unwrap();
        });
        let (outcome, resumed) = ended;
        Ended { said_to_stand: qemu.join().unwrap(), outcome, resumed }
    }

    fn answers(stop: Value, migration: Value) -> [(&'static str, Value); 6] {
        let done = || json!({ "return": {} });
        [
            ("query-migrate", json!({ "return": migration })),
            ("stop", stop),
            ("qom-set", done()),
            ("qom-set", done()),
            ("query-status", json!({ "return": status(false) })),
            ("cont", done()),
        ]
    }

    #[test]
    fn all_of_a_cut_is_sent_before_the_first_answer() {
        let ended = carried_out(answers(json!({ "return": {} }), json!({})));
        ended.outcome.unwrap();
        assert!(matches!(ended.resumed, Ok(Resumed::Runs { stood: true })));
        assert!(ended.said_to_stand, "and the vCPUs are said to stand before they go on");
    }

    #[test]
    fn vcpus_that_could_not_be_stopped_are_not_said_to_stand() {
        let refused = json!({ "error": { "class": "GenericError", "desc": "no" } });
        let ended = carried_out(answers(refused, json!({})));
        assert!(!ended.said_to_stand && ended.outcome.is_err() && ended.resumed.is_ok());
    }

    #[test]
    fn a_cut_beside_a_migration_is_none() {
        let migration = json!({ "status": "active" });
        let ended = carried_out(answers(json!({ "return": {} }), migration));
        assert!(matches!(ended.outcome, Err(PointError::Away(Away::Migrating(_)))), "{:?}", ended.outcome);
        assert!(ended.resumed.is_ok());
    }

    fn status(running: bool) -> Value {
        let status = if running { "running" } else { "paused" };
        json!({ "running": running, "singlestep": false, "status": status })
    }

    #[test]
    fn a_vm_that_goes_on_at_once_stood_all_the_same_if_only_the_answer_was_lost() {
        let connections = vec![vec![status(false)], vec![status(true), json!({})]];
        assert!(matches!(resumed(connections), Ok(Resumed::Runs { stood: true })));
    }

    #[test]
    fn a_vm_that_somebody_let_go_on_during_the_cut_did_not_stand() {
        assert!(matches!(resumed(vec![vec![status(true), json!({})]]), Ok(Resumed::Runs { stood: false })));
        let connections = vec![vec![], vec![status(true), json!({})]];
        assert!(matches!(resumed(connections), Ok(Resumed::Runs { stood: false })));
    }
}
