//! Real programs are called; nothing is frozen.

use super::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

/// Far more than any of these calls takes on a loaded machine.
const LONG: Duration = Duration::from_secs(60);

/// A folder of hooks, and what a run needs beside them.
struct House {
    folder: tempfile::TempDir,
    ledger: Arc<Ledger>,
    leftovers: Arc<Leftovers>,
    bell: crate::poll::Bell,
    stopped: AtomicBool,
    settings: Settings,
}

impl House {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        let bell = crate::poll::Bell::new().unwrap();
        let settings = Settings { path: folder.path().join("d"), limit: LONG, tell_output: true };
        Self {
            ledger: Arc::new(Ledger::create(&folder.path().join("undo"), &[], &[]).unwrap()),
            leftovers: Arc::new(Leftovers::beside(&bell).unwrap()),
            bell,
            stopped: AtomicBool::new(false),
            settings,
            folder,
        }
    }

    /// Adds a hook; `$LOG` in its text is the file in which `log` looks.
    fn hook(self, name: &str, text: &str) -> Self {
        let path = self.folder.path().join("d").join(name);
        let log = self.folder.path().join("log");
        write(&path, &format!("#!/bin/sh\nLOG={}\n{text}\n", log.display()));
        self
    }

    fn limit(mut self, limit: Duration) -> Self {
        self.settings.limit = limit;
        self
    }

    fn hooks(&self) -> Hooks {
        let paths = find(&self.settings.path).unwrap();
        Hooks::new(paths, Some(&self.settings), "run-7", &self.ledger, &self.leftovers)
    }

    fn freeze(&self, hooks: &mut Hooks) -> Result<(), Failure> {
        use std::os::fd::AsFd;
        let is_stopped = || self.stopped.load(SeqCst);
        hooks.freeze(Instant::now() + LONG, Stop { wake: self.bell.as_fd(), is_stopped: &is_stopped })
    }

    /// What the hooks wrote into their log, on one line.
    fn log(&self) -> String {
        let text = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        text.lines().collect::<Vec<_>>().join(" ")
    }
}

/// Has another process write a program: were it open here, a child that another test forks just now would have it open
/// as well, and what is open for writing cannot be executed.
fn write(path: &Path, text: &str) {
    let draft = path.with_extension("bak");
    fs::write(&draft, text).unwrap();
    let copied = std::process::Command::new("cp").arg(&draft).arg(path).status().unwrap();
    assert!(copied.success());
    fs::remove_file(draft).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

const NOTES: &str = "echo \"$(basename $0) $1\" >>$LOG";

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn lives(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

#[test]
fn hooks_are_called_in_order_and_after_the_thaw_in_reverse() {
    let house = House::new().hook("20-b", NOTES).hook("10-a", NOTES).hook("30-c", NOTES);
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    assert_eq!(house.log(), "10-a freeze 20-b freeze 30-c freeze");
    hooks.thaw();
    assert_eq!(house.log(), "10-a freeze 20-b freeze 30-c freeze 30-c thaw 20-b thaw 10-a thaw");
    hooks.thaw();
    drop(hooks);
    assert!(house.log().ends_with("10-a thaw"), "once is enough: {}", house.log());
}

#[test]
fn a_failing_hook_fails_the_freeze_and_those_that_were_called_are_called_after_it() {
    let house = House::new()
        .hook("10-a", NOTES)
        .hook("20-b", &format!("{NOTES}; echo cannot lock >&2; [ $1 = thaw ] || exit 5"))
        .hook("30-c", NOTES);
    let mut hooks = house.hooks();
    let failure = house.freeze(&mut hooks).unwrap_err();
    assert_eq!(failure.code, "hook_failed");
    assert!(
        failure.message.contains("failed to execute fsfreeze hook: exit status 5"),
        "{}",
        failure.message
    );
    assert!(
        !failure.message.contains("cannot lock"),
        "what it wrote stays in the guest: {}",
        failure.message
    );
    hooks.thaw();
    assert_eq!(house.log(), "10-a freeze 20-b freeze 20-b thaw 10-a thaw");
    let [a, b] = hooks.reports() else { panic!("{:?}", hooks.reports()) };
    assert_eq!(a.freeze.as_ref().unwrap().outcome, HookOutcome::Succeeded);
    let failed = b.freeze.as_ref().unwrap();
    assert_eq!((failed.outcome, failed.exit_code), (HookOutcome::Failed, Some(5)));
    assert_eq!(failed.output.as_deref(), Some("cannot lock\n"), "its administrator lets it out");
    assert_eq!(b.thaw.as_ref().unwrap().outcome, HookOutcome::Succeeded);
}

#[test]
fn a_run_that_is_dropped_calls_what_it_owes() {
    let house = House::new().hook("10-a", NOTES);
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    drop(hooks);
    assert_eq!(house.log(), "10-a freeze 10-a thaw");
    drop(house.hooks());
    assert_eq!(house.log(), "10-a freeze 10-a thaw", "nothing is owed where nothing was called");
}

#[test]
fn a_failing_call_after_the_thaw_is_told_and_the_others_are_called() {
    let house =
        House::new().hook("10-a", NOTES).hook("20-b", &format!("{NOTES}; [ $1 = freeze ] || kill -9 $$"));
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    hooks.thaw();
    assert_eq!(house.log(), "10-a freeze 20-b freeze 20-b thaw 10-a thaw");
    let codes: Vec<_> = hooks.reasons().iter().map(|reason| reason.code.as_str()).collect();
    assert_eq!(codes, ["hook_thaw_failed"]);
    assert_eq!(hooks.reports()[1].thaw.as_ref().unwrap().signal, Some(9));
}

#[test]
fn a_hook_that_takes_too_long_is_ended_with_what_it_started() {
    let house = House::new()
        .limit(Duration::from_millis(300))
        .hook("10-a", &format!("{NOTES}; [ $1 = thaw ] && exit; sleep 600 & echo $! >>$LOG; wait"));
    let mut hooks = house.hooks();
    let begun = Instant::now();
    assert_eq!(house.freeze(&mut hooks).unwrap_err().code, "hook_timeout");
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    let sleeper = house.log().rsplit(' ').next().unwrap().to_owned();
    until("the sleeper is gone", || !lives(&sleeper));
    assert_eq!(hooks.reports()[0].freeze.as_ref().unwrap().outcome, HookOutcome::TimedOut);
    hooks.thaw();
    assert!(house.log().ends_with("10-a thaw"), "{}", house.log());
}

#[test]
fn a_hook_may_let_go_when_it_is_told_to_end_and_is_killed_if_it_does_not_end() {
    let house = House::new().limit(Duration::from_millis(500)).hook(
        "10-a",
        "[ $1 = thaw ] && exit\ntrap 'echo letting go >>$LOG' TERM\nwhile :; do sleep 0.1; done",
    );
    let mut hooks = house.hooks();
    assert_eq!(house.freeze(&mut hooks).unwrap_err().code, "hook_timeout");
    assert_eq!(house.log(), "letting go");
    assert_eq!(hooks.reports()[0].freeze.as_ref().unwrap().signal, Some(9));
}

#[test]
fn a_child_that_stays_with_the_output_open_holds_up_nothing_and_lives_until_the_thaw() {
    let house = House::new().hook(
        "10-lock",
        "case $1 in freeze) sleep 600 & echo $! >>$LOG; echo holding;; thaw) kill $(cat $LOG);; esac",
    );
    let mut hooks = house.hooks();
    let begun = Instant::now();
    house.freeze(&mut hooks).unwrap();
    assert!(begun.elapsed() < LONG);
    let holder = house.log();
    assert!(lives(&holder), "a lock's holder is not ended with the hook");
    assert_eq!(hooks.reports()[0].freeze.as_ref().unwrap().output.as_deref(), Some("holding\n"));
    hooks.thaw();
    until("the holder is gone", || !lives(&holder));
}

#[test]
fn what_a_child_writes_later_neither_blocks_it_nor_ends_it() {
    let house = House::new().hook(
        "10-a",
        "[ $1 = thaw ] && exit\n(dd if=/dev/zero bs=1024 count=1000 2>/dev/null && echo written >>$LOG) &",
    );
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    until("all is written", || {
        house.leftovers.drop_some();
        house.log() == "written"
    });
}

#[test]
fn the_output_of_a_flood_is_bounded_and_reported() {
    let house = House::new().hook(
        "10-a",
        "[ $1 = thaw ] && exit\necho begin; dd if=/dev/zero bs=1048576 count=64 2>/dev/null; echo end",
    );
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    let call = hooks.reports()[0].freeze.clone().unwrap();
    assert_eq!(call.output_bytes, (64 << 20) + 10);
    assert!(call.output.unwrap().len() <= TEXT_BYTES_MAX);
}

#[test]
fn a_run_that_is_called_off_waits_for_no_hook() {
    let house =
        House::new().hook("10-a", &format!("{NOTES}; [ $1 = thaw ] || exec sleep 600")).hook("20-b", NOTES);
    let mut hooks = house.hooks();
    let failure = thread::scope(|scope| {
        let call = scope.spawn(|| house.freeze(&mut hooks));
        until("the first is called", || house.log() == "10-a freeze");
        house.stopped.store(true, SeqCst);
        house.bell.ring();
        call.join().unwrap().unwrap_err()
    });
    assert_eq!(failure.code, "aborted");
    hooks.thaw();
    assert_eq!(house.log(), "10-a freeze 10-a thaw", "the call after it is made all the same");
}

#[test]
fn a_hook_gets_its_verb_its_run_and_the_agents_environment_but_no_input() {
    let house = House::new().hook(
        "10-a",
        "echo $# $1 $STILLPOINT_RUN $STILLPOINT_LIMIT_MS ${PATH:+path} $(wc -c) $(ps -o sid= -p $$ | tr -d ' ') $$ >>$LOG",
    );
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    let log = house.log();
    let words: Vec<&str> = log.split(' ').collect();
    assert_eq!(words[..3], ["1", "freeze", "run-7"], "{log}");
    let limit: u64 = words[3].parse().unwrap();
    assert!((1..=60_000).contains(&limit), "{log}");
    assert_eq!(words[4..6], ["path", "0"], "{log}");
    assert_eq!(words[6], words[7], "a session of its own: {log}");
}

#[test]
fn a_script_without_its_interpreters_name_is_the_shells() {
    let house = House::new();
    let path = house.settings.path.join("10-a");
    write(&path, &format!("echo $1 >>{}/log\n", house.folder.path().display()));
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    assert_eq!(house.log(), "freeze");
}

#[test]
fn one_that_cannot_be_started_fails_the_freeze() {
    let house = House::new().hook("10-a", NOTES);
    let bad = house.settings.path.join("20-b");
    write(&bad, "#!/no/such/interpreter\n");
    let mut hooks = house.hooks();
    let failure = house.freeze(&mut hooks).unwrap_err();
    assert_eq!(failure.code, "hook_failed");
    assert!(failure.message.contains("failed to exec: No such file or directory"), "{}", failure.message);
    hooks.thaw();
    assert_eq!(house.log(), "10-a freeze 10-a thaw");
}

#[test]
fn one_that_others_may_change_meanwhile_is_not_called() {
    let house = House::new().hook("10-a", NOTES);
    let mut hooks = house.hooks();
    let path = house.settings.path.join("10-a");
    fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
    assert_eq!(house.freeze(&mut hooks).unwrap_err().code, "hook_refused");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    house.freeze(&mut hooks).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
    hooks.thaw();
    assert_eq!(house.log(), "10-a freeze");
    assert_eq!(hooks.reports()[0].thaw.as_ref().unwrap().outcome, HookOutcome::Refused);
    assert_eq!(hooks.reasons()[0].code, "hook_thaw_failed");
}

#[test]
fn a_claim_is_kept_if_its_hook_had_no_complaint_before_and_after() {
    let claims =
        "[ $1 = thaw ] && exit\necho stillpoint: quiesced app /proc; echo stillpoint: files /no/such/place";
    let complains =
        "[ $1 = thaw ] && exit 1\necho stillpoint: quiesced other /proc; echo stillpoint: nonsense";
    let house = House::new().hook("10-a", claims).hook("20-b", complains);
    let mut hooks = house.hooks();
    house.freeze(&mut hooks).unwrap();
    let [app, other] = hooks.claims() else { panic!("{:?}", hooks.claims()) };
    let (app, other) = (app.clone(), other.clone());
    assert!(app.hook.ends_with("10-a"));
    assert_eq!((app.kind.as_str(), app.device_numbers.len()), ("app", 2));
    assert!(
        app.device_numbers.contains(&"0:0".to_owned()),
        "a place that cannot be told is not inside the point"
    );
    assert!(!hooks.kept(&app), "not before the call after the thaw");
    hooks.thaw();
    assert!(hooks.kept(&app) && !hooks.kept(&other));
    let codes: Vec<_> = hooks.reasons().iter().map(|reason| reason.code.as_str()).collect();
    assert_eq!(codes, ["hook_claim_unreadable", "hook_thaw_failed"]);
}

#[test]
fn the_next_agent_ends_what_was_being_called_and_calls_what_is_owed() {
    let house = House::new().hook("10-a", NOTES).hook("20-b", NOTES).hook("30-c", NOTES);
    // As a dead agent left it: two were called, the second with a child that goes on.
    let mut hooks = house.hooks();
    let paths = hooks.paths.clone();
    house.ledger.owe_hooks(2);
    house.ledger.note_hook_call(crate::freeze::kernel::boottime_ns());
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", "sleep 600 & exec sleep 601"]);
    // SAFETY: a plain system call.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(
            &mut command,
            || Ok(rustix::process::setsid().map(drop)?),
        )
    };
    let mut called = command.spawn().unwrap();
    house.ledger.note_hook_process(u64::from(called.id()));
    hooks.paths.clear();
    drop(hooks);
    let mut left = Hooks::left(paths, None, "run-7", &house.ledger, &house.leftovers);
    until("it is ended", || called.try_wait().unwrap().is_some());
    until("and its child", || crate::quiesce::members_of_session(called.id()).is_empty());
    left.thaw();
    assert_eq!(house.log(), "20-b thaw 10-a thaw");
    assert_eq!(left.reports().len(), 2);
    assert_eq!(house.ledger.hooks_owed(), 0);
}

#[test]
fn a_process_that_is_older_than_the_call_is_nobodys_hook() {
    let house = House::new();
    let mut command = std::process::Command::new("/bin/sleep");
    // SAFETY: a plain system call.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(
            &mut command,
            || Ok(rustix::process::setsid().map(drop)?),
        )
    };
    let mut other = command.arg("600").spawn().unwrap();
    let later = crate::freeze::kernel::boottime_ns() + 10_000_000_000;
    house.ledger.note_hook_call(later);
    house.ledger.note_hook_process(u64::from(other.id()));
    drop(Hooks::left(Vec::new(), None, "run-7", &house.ledger, &house.leftovers));
    thread::sleep(Duration::from_millis(100));
    assert!(other.try_wait().unwrap().is_none(), "it must live");
    other.kill().unwrap();
    other.wait().unwrap();
}
