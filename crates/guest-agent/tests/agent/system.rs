//! Commands that change the guest as a whole, in a sandbox; the system's own programs are stubs that note their calls.

use crate::guest::Client;
use crate::sandbox::Sandbox;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

const PING: &str = r#"{"execute":"guest-ping"}"#;

/// Calls a command whose success is not answered: the next answer is the ping's.
#[track_caller]
fn silent(client: &mut Client, command: &str, arguments: Value) {
    client.send(json!({"execute": command, "arguments": arguments}).to_string());
    assert_eq!(client.ask(PING), r#"{"return": {}}"#, "{command}");
}

#[test]
fn set_time_sets_the_clock_and_then_the_hardwares() {
    let Some(sandbox) = Sandbox::new().map(Sandbox::with_a_clock_that_pretends) else { return };
    sandbox.stub("hwclock", "");
    let agent = sandbox.start();
    let mut client = agent.client();
    assert_eq!(client.call("guest-set-time", json!({"time": 1_700_000_000_123_456_789i64})), json!({}));
    assert_eq!(sandbox.calls(), "hwclock -w\n");
    assert_eq!(client.call("guest-set-time", json!({})), json!({}));
    assert_eq!(sandbox.calls(), "hwclock -s\n");
    sandbox.stub("hwclock", "echo no clock here; exit 1");
    let failed = "child process has failed to set hardware clock to system time: no clock here\n";
    assert_eq!(client.error("guest-set-time", json!({"time": 0})), failed);
    assert_eq!(client.error("guest-set-time", json!({})), failed);
    fs::remove_file(sandbox.path("/usr/sbin/hwclock")).expect("removed");
    assert_eq!(
        client.error("guest-set-time", json!({})),
        "child process has failed to set hardware clock to system time: failed to exec '/sbin/hwclock': \
         No such file or directory\n"
    );
}

#[test]
fn a_time_that_cannot_be_set_leaves_the_hardwares_clock_alone() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.stub("hwclock", "");
    let agent = sandbox.start();
    let mut client = agent.client();
    let refused = client.error("guest-set-time", json!({"time": 1_700_000_000_000_000_000i64}));
    assert_eq!(refused, "Failed to set time to guest: Operation not permitted");
    for time in [-1_000_000_000i64, 3_155_760_000_000_000_000] {
        let refused = client.error("guest-set-time", json!({"time": time}));
        assert!(refused.starts_with("Invalid time"), "{refused}");
    }
    let refused = client.error("guest-set-time", json!({"time": "now"}));
    assert_eq!(refused, "Invalid parameter type for 'time', expected: integer");
    assert_eq!(sandbox.calls(), "");
}

#[test]
fn shutdown_calls_the_systems_own_program_and_answers_only_its_failure() {
    let Some(sandbox) = Sandbox::new() else { return };
    for program in ["poweroff", "halt", "reboot"] {
        sandbox.stub(program, "");
    }
    sandbox.stub("shutdown", "");
    let agent = sandbox.start();
    let mut client = agent.client();
    silent(&mut client, "guest-shutdown", json!({}));
    silent(&mut client, "guest-shutdown", json!({"mode": "halt"}));
    silent(&mut client, "guest-shutdown", json!({"mode": "reboot"}));
    assert_eq!(sandbox.calls(), "poweroff \nhalt \nreboot \n");
    sandbox.stub("reboot", "echo busy >&2; exit 1");
    let failed = "child process has failed to shutdown: busy\n";
    assert_eq!(client.error("guest-shutdown", json!({"mode": "reboot"})), failed);
    assert_eq!(
        client.error("guest-shutdown", json!({"mode": "sleep"})),
        "mode is invalid (valid values are: halt|powerdown|reboot"
    );
    for program in ["poweroff", "halt", "reboot"] {
        fs::remove_file(sandbox.path(&format!("/usr/sbin/{program}"))).expect("removed");
    }
    sandbox.calls();
    for (mode, flag) in [("powerdown", "-P"), ("halt", "-H"), ("reboot", "-r")] {
        silent(&mut client, "guest-shutdown", json!({"mode": mode}));
        assert_eq!(sandbox.calls(), format!("shutdown -h {flag} +0 hypervisor initiated shutdown\n"));
    }
    fs::remove_file(sandbox.path("/usr/sbin/shutdown")).expect("removed");
    assert_eq!(
        client.error("guest-shutdown", json!({})),
        "child process has failed to shutdown: failed to exec '/sbin/shutdown': No such file or directory\n"
    );
}

#[test]
fn a_program_that_shuts_down_slowly_holds_up_nobody_else() {
    let Some(sandbox) = Sandbox::new() else { return };
    let go = sandbox.path("go");
    sandbox.stub("poweroff", &format!("until [ -e {} ]; do sleep 0.05; done", go.display()));
    let agent = sandbox.start();
    let mut client = agent.client();
    client.send(r#"{"execute":"guest-shutdown"}"#);
    assert_eq!(agent.client().ask(PING), r#"{"return": {}}"#);
    fs::write(go, "").expect("written");
    assert_eq!(client.ask(PING), r#"{"return": {}}"#);
}

/// A `systemctl` that knows these units and answers `verb` with this code.
fn systemctl(sandbox: &Sandbox, units: &str, code: u8) {
    let script = format!("case \"$1 $2\" in {units}) exit 3;; 'status '*) exit 4;; *) exit {code};; esac");
    sandbox.stub("systemctl", &script);
}

#[test]
fn suspending_is_systemds_business_where_it_can() {
    let Some(sandbox) = Sandbox::new() else { return };
    systemctl(&sandbox, "'status '*", 0);
    sandbox.stub("pm-is-supported", "exit 0");
    let agent = sandbox.start();
    let mut client = agent.client();
    for (command, calls) in [
        ("guest-suspend-disk", "systemctl status systemd-hibernate\nsystemctl hibernate\n"),
        ("guest-suspend-ram", "systemctl status systemd-suspend\nsystemctl suspend\n"),
        ("guest-suspend-hybrid", "systemctl status systemd-hybrid-sleep\nsystemctl hybrid-sleep\n"),
    ] {
        silent(&mut client, command, json!({}));
        assert_eq!(sandbox.calls(), calls);
    }
}

#[test]
fn without_systemd_it_is_that_of_pm_utils_or_of_the_kernel() {
    let Some(sandbox) = Sandbox::new() else { return };
    systemctl(&sandbox, "nothing", 1);
    sandbox.stub("pm-is-supported", "[ \"$1\" = --hibernate ]");
    sandbox.stub("pm-hibernate", "");
    sandbox.file("/sys/power/state", "freeze mem disk\n");
    let agent = sandbox.start();
    let mut client = agent.client();
    silent(&mut client, "guest-suspend-disk", json!({}));
    assert_eq!(
        sandbox.calls(),
        "systemctl status systemd-hibernate\npm-is-supported --hibernate\npm-hibernate \n"
    );
    silent(&mut client, "guest-suspend-ram", json!({}));
    let state = fs::read_to_string(sandbox.path("/sys/power/state")).expect("a file");
    assert!(state.starts_with("mem"), "{state}");
    assert_eq!(
        client.error("guest-suspend-hybrid", json!({})),
        "the requested suspend mode is not supported by the guest"
    );
}

#[test]
fn d31_a_suspend_that_failed_by_every_means_does_not_pretend_success() {
    let Some(sandbox) = Sandbox::new() else { return };
    systemctl(&sandbox, "'status '*", 7);
    let agent = sandbox.start();
    let mut client = agent.client();
    for (command, verb) in [
        ("guest-suspend-disk", "hibernate"),
        ("guest-suspend-ram", "suspend"),
        ("guest-suspend-hybrid", "hybrid-sleep"),
    ] {
        let words =
            format!("the helper program 'systemctl {verb}' returned an unexpected exit status code (7)");
        assert_eq!(client.error(command, json!({})), words);
    }
    sandbox.stub("pm-is-supported", "");
    sandbox.stub("pm-suspend", "exit 5");
    let words = "the helper program 'pm-suspend' returned an unexpected exit status code (5)";
    assert_eq!(client.error("guest-suspend-ram", json!({})), words);
}

#[test]
fn a_password_goes_to_chpasswds_input_and_nowhere_else() {
    let Some(sandbox) = Sandbox::new() else { return };
    let input = sandbox.path("input");
    let input = input.display();
    sandbox.stub("chpasswd", &format!("cat >{input}; tr '\\0' ' ' </proc/$PPID/cmdline >>{input}.cmdline"));
    let agent = sandbox.start();
    let mut client = agent.client();
    let secret = "p:ss wörd";
    let arguments = |password: &str, crypted: bool| json!({"username": "alice", "password": STANDARD.encode(password), "crypted": crypted});
    assert_eq!(client.call("guest-set-user-password", arguments(secret, false)), json!({}));
    assert_eq!(fs::read_to_string(sandbox.path("input")).expect("a file"), format!("alice:{secret}\n"));
    assert_eq!(client.call("guest-set-user-password", arguments("$6$x$y", true)), json!({}));
    assert_eq!(sandbox.calls(), "chpasswd \nchpasswd -e\n");
    assert!(!agent.log().contains(secret), "{}", agent.log());
    sandbox.stub("chpasswd", "echo user unknown >&2; exit 1");
    let failed = "child process has failed to set user password: user unknown\n";
    assert_eq!(client.error("guest-set-user-password", arguments("x", false)), failed);
    sandbox.calls();
    let refused = client.error("guest-set-user-password", arguments("a\nroot:b", false));
    assert_eq!(refused, "forbidden characters in raw password");
    let bad = json!({"username": "a:b", "password": "", "crypted": false});
    assert_eq!(client.error("guest-set-user-password", bad), "forbidden characters in username");
    let bad = json!({"username": "a", "password": "*", "crypted": false});
    assert_eq!(client.error("guest-set-user-password", bad), "Base64 data contains invalid characters");
    let missing = client.error("guest-set-user-password", json!({"username": "a", "password": ""}));
    assert_eq!(missing, "Parameter 'crypted' is missing");
    assert_eq!(sandbox.calls(), "");
    fs::remove_file(sandbox.path("/usr/sbin/chpasswd")).expect("removed");
    assert_eq!(
        client.error("guest-set-user-password", arguments("x", false)),
        "child process has failed to set user password: failed to exec 'chpasswd': No such file or directory\n"
    );
}

#[test]
fn the_real_chpasswd_changes_the_users_password() {
    let Some(sandbox) = Sandbox::new() else { return };
    // A copy of what PAM needs; the users are our own.
    for place in ["pam.d", "security", "login.defs", "nsswitch.conf"] {
        let from = format!("/etc/{place}");
        let copied = Command::new("cp").args(["-a", &from]).arg(sandbox.path("/etc")).status();
        assert!(copied.expect("cp runs").success(), "{from}");
    }
    sandbox.file("/etc/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n");
    sandbox.file("/etc/shadow", "root:*:19000:0:99999:7:::\nalice:!:19000:0:99999:7:::\n");
    let Ok(_) = fs::copy("/usr/sbin/chpasswd", sandbox.path("/usr/sbin/chpasswd")) else {
        writeln!(std::io::stderr(), "SKIPPED: there is no chpasswd here").expect("a standard error");
        return;
    };
    let agent = sandbox.start();
    let mut client = agent.client();
    let hash = "$6$abcdefgh$0123456789";
    let arguments = json!({"username": "alice", "password": STANDARD.encode(hash), "crypted": true});
    assert_eq!(client.call("guest-set-user-password", arguments), json!({}));
    let shadow = || fs::read_to_string(sandbox.path("/etc/shadow")).expect("a file");
    assert!(shadow().contains(&format!("alice:{hash}:")), "{}", shadow());
    let arguments = json!({"username": "alice", "password": STANDARD.encode("secret"), "crypted": false});
    assert_eq!(client.call("guest-set-user-password", arguments), json!({}));
    assert!(shadow().contains("alice:$") && !shadow().contains(hash), "{}", shadow());
    assert!(shadow().contains("root:*:19000"), "{}", shadow());
    let nobody = json!({"username": "nobody-has-this-name", "password": "eA==", "crypted": false});
    let refused = client.error("guest-set-user-password", nobody);
    assert!(refused.starts_with("child process has failed to set user password: "), "{refused}");
}

#[test]
fn authorized_keys_are_kept_as_qemu_ga_keeps_them() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.file("/etc/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:61234:61234::/home/alice:/bin/sh\n");
    let home = sandbox.path("/home/alice");
    fs::create_dir(&home).expect("created");
    std::os::unix::fs::chown(&home, Some(61_234), Some(61_234)).expect("given");
    let agent = sandbox.start();
    let mut client = agent.client();
    let file = || fs::read_to_string(home.join(".ssh/authorized_keys")).expect("a file");
    let (one, two) = ("algo key1 comments", "algo key2 comments");
    let keys = |keys: &[&str]| json!({"username": "alice", "keys": keys});
    assert_eq!(client.call("guest-ssh-add-authorized-keys", keys(&[two])), json!({}));
    assert_eq!(file(), two);
    client.call("guest-ssh-add-authorized-keys", keys(&[one, two]));
    assert_eq!(file(), format!("{two}\n{one}"));
    let told = client.call("guest-ssh-get-authorized-keys", json!({"username": "alice"}));
    assert_eq!(told, json!({"keys": [one, two]}));
    assert_eq!(client.call("guest-ssh-remove-authorized-keys", keys(&[two])), json!({}));
    assert_eq!(file(), one);
    let reset = json!({"username": "alice", "keys": [two], "reset": true});
    assert_eq!(client.call("guest-ssh-add-authorized-keys", reset), json!({}));
    assert_eq!(file(), two);
    client.call("guest-ssh-add-authorized-keys", json!({"username": "alice", "keys": [], "reset": true}));
    assert_eq!(file(), "");
    for command in ["guest-ssh-add-authorized-keys", "guest-ssh-remove-authorized-keys"] {
        let refused = client.error(command, keys(&["not a valid\nkey"]));
        assert_eq!(refused, "invalid OpenSSH public key: 'not a valid\nkey'");
        let refused = client.error(command, json!({"username": "", "keys": []}));
        assert!(refused.starts_with("failed to lookup user '': "), "{refused}");
        assert_eq!(client.error(command, json!({"username": "alice"})), "Parameter 'keys' is missing");
    }
}

#[test]
fn d29_a_home_full_of_links_leads_nowhere_and_the_agent_keeps_its_rights() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.file("/etc/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:61234:61234::/home/alice:/bin/sh\n");
    let home = sandbox.path("/home/alice");
    fs::create_dir(&home).expect("created");
    std::os::unix::fs::chown(&home, Some(61_234), Some(61_234)).expect("given");
    std::os::unix::fs::symlink("/etc", home.join(".ssh")).expect("linked");
    let agent = sandbox.start();
    let mut client = agent.client();
    let keys = json!({"username": "alice", "keys": ["algo key"], "reset": true});
    let refused = client.error("guest-ssh-add-authorized-keys", keys.clone());
    assert_eq!(refused, "failed to create directory '/home/alice/.ssh': Not a directory");
    assert!(!sandbox.path("/etc/authorized_keys").exists());
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(sandbox.path("/etc")).expect("a folder").uid(), 0, "it is root's as before");
    // Only the thread that worked there was alice.
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("it runs");
    assert!(status.contains("Uid:\t0\t0\t0\t0\n"), "{status}");
    let pid =
        client.call("guest-exec", json!({"path": "/usr/bin/id", "arg": ["-u"], "capture-output": true}));
    let mut status = Value::Null;
    crate::guest::until("it ends", || {
        status = client.call("guest-exec-status", pid.clone());
        status["exited"] == true
    });
    assert_eq!(status["out-data"], STANDARD.encode("0\n"));
}

#[test]
fn users_are_those_of_the_systems_records() {
    let Some(sandbox) = Sandbox::new() else { return };
    let agent = sandbox.start();
    let mut client = agent.client();
    assert_eq!(client.call("guest-get-users", json!({})), json!([]));
    let records = "[2] [00000] [~~  ] [reboot  ] [~           ] [6.1             ] [0.0.0.0        ] [2023-11-14T22:00:00,000000+00:00]\n\
                   [7] [01234] [ts/0] [alice   ] [pts/0       ] [host            ] [192.0.2.1      ] [2023-11-14T22:13:20,500000+00:00]\n\
                   [7] [01235] [ts/1] [root    ] [pts/1       ] [                ] [0.0.0.0        ] [2023-11-14T22:30:00,000000+00:00]\n\
                   [7] [01236] [ts/2] [alice   ] [pts/2       ] [                ] [0.0.0.0        ] [2023-11-14T23:00:00,000000+00:00]\n\
                   [8] [01237] [ts/3] [gone    ] [pts/3       ] [                ] [0.0.0.0        ] [2023-11-14T20:00:00,000000+00:00]\n";
    let Ok(mut utmpdump) = Command::new("utmpdump")
        .arg("-r")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
    else {
        writeln!(std::io::stderr(), "SKIPPED: needs utmpdump of util-linux").expect("a standard error");
        return;
    };
    utmpdump.stdin.take().expect("a pipe").write_all(records.as_bytes()).expect("written");
    let binary = utmpdump.wait_with_output().expect("it ends").stdout;
    sandbox.file("/run/utmp", binary);
    assert_eq!(
        client.call("guest-get-users", json!({})),
        json!([{"user": "alice", "login-time": 1_700_000_000.5}, {"user": "root", "login-time": 1_700_001_000}])
    );
}

#[test]
fn name_and_zone_are_those_that_hold_now() {
    let Some(sandbox) = Sandbox::new() else { return };
    let agent = sandbox.start();
    let mut client = agent.client();
    assert_eq!(client.call("guest-get-host-name", json!({})), json!({"host-name": "a-guest"}));
    assert_eq!(client.call("guest-get-timezone", json!({})), json!({"zone": "UTC", "offset": 0}));
    let copied = fs::copy("/usr/share/zoneinfo/Asia/Kolkata", sandbox.path("/etc/localtime"));
    if copied.is_err() {
        writeln!(std::io::stderr(), "SKIPPED: no time zones here").expect("a standard error");
        return;
    }
    assert_eq!(client.call("guest-get-timezone", json!({})), json!({"zone": "IST", "offset": 19_800}));
    let agent = sandbox.start_with(&[("TZ", "<-03>3")]);
    let told = agent.client().call("guest-get-timezone", json!({}));
    assert_eq!(told, json!({"zone": "-03", "offset": -10_800}));
}
