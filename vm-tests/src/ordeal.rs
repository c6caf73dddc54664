//! A working guest whose runs meet deaths: gates to put them at any step, and what must hold after each of them.

use crate::gate::Gate;
use crate::guest::{Guest, GuestBuilder};
use crate::stillpoint::{Ended, Running, Stillpoint};
use guest_protocol::stillpoint::{GuestReport, State};
use serde_json::{Value, json};
use snapshot::{Level, Receipt};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vm::agent::Agent;
use vm::monitor::Monitor;

/// For what an idle machine does in a second or two.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest time for a run to come to a step, and for anything to be over. Emulated, on a busy machine.
const STEP_LIMIT: Duration = Duration::from_secs(180);
/// How long a session of ours may outlast its run in PostgreSQL. A server looks after a dead client once a second.
const SESSION_LIMIT: Duration = Duration::from_secs(20);
/// Longest quiesce for a host that knows no phases: half of the agent's `compat_quiesce`.
const COMPAT_QUIESCE: Duration = Duration::from_secs(5);
/// Of a disk on which a flush does not end: a page takes four seconds.
const SLOW_BYTES_PER_S: u32 = 1024;
/// The number of `syncfs`. Source: Linux `arch/x86/entry/syscalls/syscall_64.tbl`.
const SYNCFS: u32 = 306;
/// When a guest is killed, whatever comes. The long run dies each death three times.
const LIFETIME: Duration = Duration::from_secs(90 * 60);
/// Levels, lowest first.
const LEVELS: [&str; 5] = ["none", "crash", "filesystem", "application", "clean"];
/// The title of a session of ours that waits for a lock.
const WAITING_SESSION: &str = "^postgres: .*postgres postgres .local. .*waiting";
/// Database connections of ours.
const OUR_SESSIONS: &str = "select count(*) from pg_stat_activity where application_name = 'stillpoint'";

/// Who can die in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The agent itself.
    Agent,
    /// The process that thaws when the agent cannot.
    Guard,
    /// The process that holds PostgreSQL's session.
    Worker,
    /// All three, so that none can act on another's death.
    All,
}

impl Victim {
    /// A word of their command lines.
    fn pattern(self) -> &'static str {
        match self {
            Self::Agent => "^/[a-z/]*stillpoint-agent$",
            Self::Guard => "^stillpoint-guard$",
            Self::Worker => "^quiesce-worker$",
            Self::All => "^(/[a-z/]*stillpoint-agent|stillpoint-guard|quiesce-worker)$",
        }
    }

    /// A shell command for the guest that ends them, and fails if there is none.
    #[must_use]
    pub fn killed(self) -> String {
        // Stopped first: nobody acts on the death of another before all are dead.
        signal(self.pattern(), &["STOP", "KILL"])
    }

    /// One that makes them hang.
    #[must_use]
    pub fn hung(self) -> String {
        signal(self.pattern(), &["STOP"])
    }
}

/// A shell command for the guest that sends signals to every process with such a word in its command line, and fails if
/// there is none. One that ends by itself meanwhile does no harm: where a freeze is refused, its guard and worker do.
#[must_use]
pub fn signal(pattern: &str, signals: &[&str]) -> String {
    let sent = signals.iter().map(|signal| {
        format!(
            "sent=; for pid in $pids; do kill -{signal} $pid 2>/dev/null && sent=1; done; [ -n \"$sent\" ]"
        )
    });
    format!("pids={}; {}", pids(pattern), sent.collect::<Vec<_>>().join(" && "))
}

/// For a shell in the guest: every process with such a word in its command line.
fn pids(pattern: &str) -> String {
    format!("$(grep -lzE '{pattern}' /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3)")
}

/// How much of an ordeal a guest goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A quarter of the deaths, once: each victim at another step than the one before. Every fourth of them is followed by a
    /// run that has to be whole, and so is the last. The load leaves the processor to them.
    Quarter,
    /// Each death three times, under a heavy load, and each is followed by such a run.
    ThreeTimes,
}

impl Extent {
    /// The rounds, numbered for people.
    pub fn rounds(self) -> std::ops::RangeInclusive<usize> {
        1..=if self == Self::Quarter { 1 } else { 3 }
    }
}

/// A guest with PostgreSQL under load, registered as `db1` through two gates, with one snapshot.
pub struct Ordeal {
    /// The guest.
    pub guest: Guest,
    /// The host.
    pub stillpoint: Stillpoint,
    /// In front of QEMU's monitor.
    pub monitor: Gate,
    /// In front of the agent's channel.
    pub agent: Gate,
    extent: Extent,
    untouched: Vec<String>,
    kept: usize,
    /// Snapshots whose level was compared with their evidence.
    weighed: BTreeSet<String>,
    deaths: usize,
    steps: usize,
    /// Of guests before this one, with the disks that it uses.
    folders: Vec<tempfile::TempDir>,
}

impl Ordeal {
    /// Boots the guest, puts it to work, and takes its first snapshot.
    ///
    /// # Panics
    /// If that fails.
    #[track_caller]
    pub fn begin(builder: GuestBuilder, stillpoint: Stillpoint, extent: Extent) -> Self {
        let guest = builder.lifetime(LIFETIME).start().expect("QEMU starts");
        put_to_work(&guest, extent);
        let gate = |socket| Gate::before(socket, guest.folder()).expect("a gate");
        let (monitor, agent) = (gate(&guest.qmp_socket()), gate(&guest.agent_socket()));
        // A VM of that name that runs no more may be registered.
        let _removed = stillpoint.run(&["vm", "remove", "db1"]).map(|ended| ended.code());
        stillpoint.register("db1", monitor.socket(), Some(agent.socket())).expect("registered");
        let kept = stillpoint.must(&["snapshots"])["snapshots"].as_array().map_or(0, Vec::len);
        let mut ordeal = Self {
            guest,
            stillpoint,
            monitor,
            agent,
            extent,
            untouched: vec![],
            kept,
            weighed: BTreeSet::new(),
            deaths: 0,
            steps: 0,
            folders: vec![],
        };
        ordeal.is_well();
        let first = ordeal.stillpoint.must(&["snapshot", "db1"]);
        assert_eq!(first["level"], "application", "{first}");
        ordeal.kept += 1;
        ordeal.untouched = ordeal.guest.block_graph().shape();
        ordeal
    }

    /// Waits until a guest that was reset is up, and puts it to work.
    ///
    /// # Panics
    /// If it does not boot.
    #[track_caller]
    pub fn works_again(&self) {
        put_to_work(&self.guest, self.extent);
    }

    /// Starts a run whose freeze has a lease of so many seconds.
    ///
    /// # Panics
    /// If the program does not start.
    #[track_caller]
    pub fn run(&self, lease_s: u32) -> Running {
        let lease = lease_s.to_string();
        self.stillpoint.start(&["snapshot", "db1", "--lease", &lease]).expect("it starts")
    }

    /// Whether the next death of the list is died.
    pub fn takes(&mut self) -> bool {
        let step = self.steps;
        self.steps += 1;
        // Of those who can die at four steps each: the first at the first, the next at the fourth, then third, then second.
        self.extent == Extent::ThreeTimes || (step + step / 4).is_multiple_of(4)
    }

    /// Waits until a gate holds what it was told to.
    ///
    /// # Panics
    /// If the run ends before.
    #[track_caller]
    pub fn come_to(&self, gate: &Gate, run: &mut Running) {
        let began = Instant::now();
        while !gate.wait(Duration::from_millis(50)) {
            assert!(!run.has_ended(), "the run ended before it came to that step");
            assert!(began.elapsed() < STEP_LIMIT, "the run does not come to that step");
        }
    }

    /// Keeps PostgreSQL from answering what a worker reads once its checkpoint before the freeze is done: the run stands
    /// between its first quiesce and its freeze, until [`Ordeal::release_quiesce`] or the quiesce's deadline.
    ///
    /// # Panics
    /// If PostgreSQL does not let us.
    #[track_caller]
    pub fn hold_quiesce(&self) {
        let keep = "set allow_system_table_mods = on; set application_name = 'keeper'; begin; \
                    alter view pg_prepared_xacts set (security_barrier = true); select pg_sleep(300)";
        // A view belongs to one database: that of the worker's session.
        self.guest.start(&crate::commands::psql("postgres", keep));
        self.until("the keeper sleeps", || {
            self.guest.sql("select count(*) from pg_stat_activity where application_name = 'keeper' and wait_event = 'PgSleep'") == "1"
        });
    }

    /// Waits until the run stands there. Told by its session's title, and looked for inside the guest: after five seconds the
    /// session gives up its wait, and where the machine is busy, to ask the server takes as long, or to ask from outside.
    ///
    /// # Panics
    /// If it does not come so far.
    #[track_caller]
    pub fn come_to_quiesce(&self) {
        let waits = format!("until [ -n \"{}\" ]; do busybox sleep 0.1; done", pids(WAITING_SESSION));
        self.guest.exec(&waits).success();
    }

    /// Lets PostgreSQL answer again.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn release_quiesce(&self) {
        self.guest
            .sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'keeper'");
    }

    /// Starts a run that does not get beyond its flush after the quiesce: the data disk takes no more than some bytes a second
    /// from then on, until [`Ordeal::release_flush`].
    ///
    /// # Panics
    /// If it does not come so far.
    #[track_caller]
    pub fn run_to_flush(&self, lease_s: u32) -> Running {
        self.hold_quiesce();
        let dirty = "dd if=/dev/zero of=/var/lib/postgresql/dirty bs=1M count=32";
        self.guest.exec(dirty).success();
        let mut run = self.run(lease_s);
        // The quiesce makes the server write, and so the disk is slow only afterwards.
        self.come_to_quiesce();
        self.throttle_data_disk(SLOW_BYTES_PER_S);
        self.release_quiesce();
        // That a thread of the agent's is in `syncfs` is what its kernel says.
        let flushes = format!(
            "for pid in {}; do grep -q '^{SYNCFS} ' /proc/$pid/task/*/syscall && exit; done; exit 1",
            pids(Victim::Agent.pattern())
        );
        self.until("the flush", || {
            assert!(!run.has_ended(), "the run ended before its flush");
            self.guest.exec(&flushes).code == 0
        });
        run
    }

    /// Lets the data disk be as fast as it is.
    ///
    /// # Panics
    /// If QEMU does not answer.
    #[track_caller]
    pub fn release_flush(&self) {
        self.throttle_data_disk(0);
    }

    /// 0: as fast as it is.
    #[track_caller]
    fn throttle_data_disk(&self, written_bytes_per_s: u32) {
        let limits = json!({
            "id": "/machine/peripheral/disk-data/virtio-backend", "bps": 0, "bps_rd": 0,
            "bps_wr": written_bytes_per_s, "iops": 0, "iops_rd": 0, "iops_wr": 0
        });
        self.tell_qemu("block_set_io_throttle", &limits);
    }

    /// Carries out a deed in the guest, and answers how long afterwards, by the guest's own clock, both of its file
    /// systems could be written to.
    ///
    /// # Panics
    /// If the deed fails, or the guest does not answer.
    #[track_caller]
    fn writable_after(&self, deed: &str) -> Duration {
        let command = format!(
            "read begin rest </proc/uptime; {{ {deed}; }} || exit 9; echo x >/var/tmp/probe && \
             echo x >/var/lib/postgresql/probe && read end rest </proc/uptime && echo $begin $end"
        );
        let said = self.guest.exec(&command).success();
        let times: Vec<f64> = said.split_whitespace().filter_map(|time| time.parse().ok()).collect();
        let [begin, end] = times[..] else { panic!("{said}") };
        Duration::from_secs_f64((end - begin).max(0.0))
    }

    /// Asserts that a deed leaves no file system frozen for longer than `limit`; waits for it.
    ///
    /// # Panics
    /// If it does.
    #[track_caller]
    pub fn thaws_within(&self, limit: Duration, deed: &str) {
        let frozen = self.writable_after(deed);
        println!("   writable {frozen:.2?} later, of {limit:?} at most");
        assert!(frozen <= limit, "frozen for {frozen:?}, and {limit:?} is promised");
    }

    /// What the guest says of its last run, as soon as none holds it any more.
    ///
    /// # Panics
    /// If a run goes on holding it, or its agent knows of none.
    #[track_caller]
    pub fn last_run(&self) -> GuestReport {
        let mut last = None;
        self.until("the end of the guest's run", || {
            let agent = Agent::connect(&self.guest.agent_socket(), LIMIT);
            let status = agent.and_then(|mut agent| agent.stillpoint_status());
            last = status.ok().filter(|status| status.state == State::Thawed).and_then(|status| status.last);
            last.is_some()
        });
        last.unwrap_or_default()
    }

    /// Its owner pauses the VM.
    ///
    /// # Panics
    /// If QEMU does not answer.
    #[track_caller]
    pub fn pause(&self) {
        self.tell_qemu("stop", &json!({}));
    }

    /// The same during a run, which has been told so when this returns.
    ///
    /// # Panics
    /// If QEMU does not answer, or the run is not told.
    #[track_caller]
    pub fn pause_the_run(&self) {
        let before = self.monitor.told("STOP");
        self.pause();
        self.until("the event", || self.monitor.told("STOP") > before);
    }

    /// Its owner lets the VM go on.
    ///
    /// # Panics
    /// If QEMU does not answer.
    #[track_caller]
    pub fn go_on(&self) {
        self.tell_qemu("cont", &json!({}));
    }

    #[track_caller]
    fn tell_qemu(&self, command: &str, arguments: &Value) {
        let monitor = Monitor::connect(&self.guest.second_qmp_socket(), LIMIT);
        let told = monitor.and_then(|mut monitor| monitor.run_raw(command, arguments, LIMIT));
        told.expect("QEMU answers");
    }

    /// A host that knows no ids and gives its freeze up in the quiesce: it syncs, thaws, and is answered.
    ///
    /// # Panics
    /// If it is not, or the thaw waits for the quiesce.
    #[track_caller]
    pub fn impatient_host(&self) {
        // What there is to write out in a checkpoint now is not written in the five seconds that its phases have each.
        self.guest.sql("checkpoint");
        let stream = UnixStream::connect(self.guest.agent_socket()).expect("QEMU listens");
        stream.set_read_timeout(Some(STEP_LIMIT)).expect("a time limit");
        let say = |text: &str| (&stream).write_all(text.as_bytes()).expect("QEMU reads");
        let mut lines = BufReader::new(&stream).lines().map(|line| line.expect("the agent answers"));
        let began = Instant::now();
        let (answered_after, thawed) = loop {
            assert!(
                began.elapsed() < STEP_LIMIT,
                "waited in vain for the quiesce\n{}",
                self.guest.serial_tail()
            );
            say("{\"execute\":\"guest-fsfreeze-freeze\"}\n");
            // Told by the agent: to be told by the server takes longer than the quiesce has. With an id, to overtake the freeze.
            loop {
                say("{\"execute\":\"stillpoint-status\",\"id\":1}\n");
                let answer: Value = serde_json::from_str(&lines.next().expect("an answer")).expect("JSON");
                assert!(answer["error"].is_null(), "the freeze failed: {answer}");
                if answer["return"]["state"] == json!(State::Quiescing) || !answer["return"].is_object() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            // Its checkpoint takes a moment; then it waits for the server.
            std::thread::sleep(Duration::from_secs(1));
            let asked = Instant::now();
            say(
                "{\"execute\":\"guest-sync\",\"arguments\":{\"id\":77}}\n{\"execute\":\"guest-fsfreeze-thaw\"}\n",
            );
            while lines.next().expect("an answer to the sync") != "{\"return\": 77}" {}
            let thawed = lines.next().expect("an answer to the thaw");
            println!("   {thawed} after {:.1?}", asked.elapsed());
            // Where PostgreSQL comes too late, on a busy machine, both file systems are frozen without it: once more.
            if thawed != "{\"return\": 2}" {
                break (asked.elapsed(), thawed);
            }
        };
        assert_eq!(thawed, "{\"return\": 0}");
        assert!(answered_after < COMPAT_QUIESCE, "the thaw waited for the quiesce: {answered_after:?}");
        drop(stream);
        // By the guest's own clock: a quiesce that was not given up had all of its time.
        let quiesced = Duration::from_millis(self.last_run().quiesce_ms);
        println!("   given up after {quiesced:.1?} in the quiesce");
        assert!(quiesced < COMPAT_QUIESCE, "the quiesce was not given up: {quiesced:?}");
    }

    /// Takes the gate away from the monitor, whose other end is then QEMU's own process, as for a user.
    ///
    /// # Panics
    /// If the VM cannot be registered anew.
    #[track_caller]
    pub fn monitor_without_gate(&self) {
        self.stillpoint.must(&["vm", "remove", "db1"]);
        let registered = self.stillpoint.register("db1", &self.guest.qmp_socket(), Some(self.agent.socket()));
        registered.expect("registered");
    }

    /// Ends QEMU as a crash would.
    ///
    /// # Panics
    /// If it has ended already.
    #[track_caller]
    pub fn kill_qemu(&self) {
        let pid = i32::try_from(self.guest.pid()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::KILL).expect("it runs");
    }

    /// Boots the guest again from its disks, puts it to work, and takes a snapshot.
    ///
    /// # Panics
    /// If that fails.
    #[track_caller]
    #[must_use]
    pub fn boot_again(self) -> Self {
        let Self { guest, stillpoint, extent, steps, mut folders, .. } = self;
        let (folder, disks) = guest.kill();
        folders.push(folder);
        Self { steps, folders, ..Self::begin(Guest::builder().disks(disks), stillpoint, extent) }
    }

    /// Waits for the end of a run that has to leave a snapshot, worth no more than `most`, and nothing else.
    ///
    /// # Panics
    /// If it leaves none, claims more, or leaves something in QEMU.
    #[track_caller]
    pub fn is_worth_at_most(&mut self, run: Running, most: &str) -> Value {
        let began = Instant::now();
        let taken = run.wait().and_then(Ended::success).expect("a snapshot");
        let level = taken["level"].as_str().unwrap_or_default();
        let codes: Vec<&str> = reasons(&taken).collect();
        println!("   {level} after {:.1?}, because {}", began.elapsed(), codes.join(", "));
        let rank = |level: &str| LEVELS.iter().position(|known| *known == level);
        assert!(rank(level).is_some() && rank(level) <= rank(most), "worth {most} at most: {taken}");
        self.kept += 1;
        taken
    }

    /// Asserts that writers and commits go on, and that PostgreSQL holds nothing of ours.
    ///
    /// # Panics
    /// If one stands still, or something is left.
    #[track_caller]
    fn is_well(&self) {
        self.guest.writes_go_on(LIMIT);
        let next = self.guest.acks().highest('c') + 5;
        assert!(self.guest.acks().wait_for('c', next, STEP_LIMIT), "commits stand still");
        let began = Instant::now();
        while self.guest.sql(OUR_SESSIONS) != "0" {
            assert!(
                began.elapsed() < SESSION_LIMIT,
                "a session of ours is left: {}",
                self.guest.sql("select * from pg_stat_activity where application_name = 'stillpoint'")
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        self.guest.exec("test ! -e /var/lib/postgresql/15/main/backup_label").success();
    }

    /// A death is over: all is well, and a run that follows is whole.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn is_over(&mut self) {
        self.is_well();
        self.deaths += 1;
        if self.extent == Extent::ThreeTimes || self.deaths.is_multiple_of(4) {
            self.next_run_is_whole();
        }
    }

    /// A round of deaths is over: the next run is whole, and all that is stored is sound.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn has_passed(&mut self) {
        self.next_run_is_whole();
        self.verify();
    }

    /// Takes a snapshot, which has to be application-consistent, leave QEMU as the first one did, and leave nothing on the
    /// host, of itself or of a run that died before.
    ///
    /// # Panics
    /// If it is not, or does not.
    #[track_caller]
    pub fn next_run_is_whole(&mut self) {
        let taken = self.stillpoint.must(&["snapshot", "db1"]);
        assert_eq!(taken["level"], "application", "{taken}");
        self.kept += 1;
        self.is_untouched();
        for folder in ["scratch", "journal"] {
            let entries = std::fs::read_dir(self.stillpoint.state().join(folder)).expect("a folder");
            let left: Vec<_> = entries.map(|entry| entry.expect("an entry").file_name()).collect();
            assert!(left.is_empty(), "left on the host, in {folder}: {left:?}");
        }
    }

    /// Asserts that QEMU's block layer is as after the first snapshot.
    ///
    /// # Panics
    /// If it is not.
    #[track_caller]
    pub fn is_untouched(&self) {
        assert_eq!(self.guest.block_graph().shape(), self.untouched);
    }

    /// Asserts that there are as many snapshots as there should be, all of them sound, and none worth more than its evidence.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    fn verify(&mut self) {
        self.stillpoint.assert_sound(self.kept);
        let listed = self.stillpoint.must(&["snapshots"]);
        let listed = listed["snapshots"].as_array().expect("a list");
        assert_eq!(listed.len(), self.kept, "{listed:?}");
        for snapshot in listed {
            let id = snapshot["snapshot"].as_str().expect("an id");
            if self.weighed.insert(id.to_owned()) {
                let shown = self.stillpoint.run(&["show", id]).and_then(Ended::success).expect("a receipt");
                within_evidence(snapshot, &shown).unwrap_or_else(|why| panic!("{id}: {why}\n{shown}"));
            }
        }
    }

    /// A run that died may have sealed its snapshot just before: counts what is there, which must be the same or one more.
    ///
    /// # Panics
    /// If it is neither.
    #[track_caller]
    pub fn count_again(&mut self) {
        let manifests = std::fs::read_dir(self.stillpoint.repository().join("manifests")).expect("a folder");
        // One that was being written has another name until it is complete.
        let complete = |name: &std::ffi::OsString| !name.to_string_lossy().contains('#');
        let stored = manifests.filter_map(|entry| Some(entry.ok()?.file_name())).filter(complete).count();
        assert!(stored == self.kept || stored == self.kept + 1, "{stored} of {}", self.kept);
        self.kept = stored;
    }

    #[track_caller]
    fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < STEP_LIMIT, "waited in vain for {what}\n{}", self.guest.serial_tail());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[track_caller]
fn put_to_work(guest: &Guest, extent: Extent) {
    println!("our agent after {:.1?}", guest.agent_ready(LIMIT));
    guest.booted(LIMIT);
    println!("PostgreSQL after {:.1?}", guest.postgresql_ready(LIMIT));
    match extent {
        Extent::Quarter => guest.start_load(),
        Extent::ThreeTimes => guest.start_heavy_load(),
    }
}

/// Whether neither the level that a snapshot was stored with nor the one that is shown for it exceeds what its receipt has
/// evidence for, by rules that share nothing with those that computed it.
fn within_evidence(listed: &Value, shown: &Value) -> Result<(), String> {
    let receipt: Receipt = serde_json::from_value(shown["receipt"].clone()).map_err(|why| why.to_string())?;
    let most = evidence::most(&receipt);
    for (how, told) in [("stored", &listed["level"]), ("shown", &shown["level"])] {
        let level = told.as_str().and_then(|level| level.parse::<Level>().ok());
        let level = level.ok_or_else(|| format!("{how} with no level: {told}"))?;
        if level > most {
            return Err(format!("{how} as {level}, its evidence is worth {most}"));
        }
    }
    Ok(())
}

/// The codes of the reasons in what a run printed.
fn reasons(taken: &Value) -> impl Iterator<Item = &str> {
    taken["reasons"].as_array().into_iter().flatten().filter_map(|reason| reason["code"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_above_its_evidence_is_told_whether_stored_or_shown() {
        let receipt = json!({
            "vm": "db1", "run": "run1", "disks": [{ "name": "root" }],
            "point": { "vcpus_stopped": true, "disks": ["root"] }
        });
        let compare = |stored: &str, shown: &str| {
            within_evidence(&json!({ "level": stored }), &json!({ "level": shown, "receipt": receipt }))
        };
        assert_eq!(compare("crash", "crash"), Ok(()));
        assert_eq!(compare("none", "crash"), Ok(()));
        assert!(compare("filesystem", "crash").unwrap_err().starts_with("stored as filesystem"));
        assert!(compare("crash", "application").unwrap_err().starts_with("shown as application"));
        assert!(compare("", "crash").is_err());
    }
}
