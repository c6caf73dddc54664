//! What the commands answer.

use crate::guest::Agent;
use serde_json::json;

#[test]
fn ping_and_sync_answer_as_qemu_ga_does() {
    let agent = Agent::start();
    let mut client = agent.client();
    assert_eq!(client.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
    assert_eq!(
        client.ask(r#"{'execute':'guest-sync','arguments':{'id':7},"id":[1]}"#),
        r#"{"return": 7, "id": [1]}"#
    );
    let delimited = client.ask(r#"{"execute":"guest-sync-delimited","arguments":{"id":8}}"#);
    assert_eq!(delimited, "\u{FFFD}{\"return\": 8}");
}

#[test]
fn info_lists_our_commands_beside_qemu_gas_last_first() {
    let agent = Agent::start();
    let info = agent.client().call("guest-info", json!({}));
    assert_eq!(info["version"], "11.1.3");
    let commands = info["supported_commands"].as_array().expect("a list");
    let names: Vec<_> = commands.iter().map(|command| command["name"].as_str().expect("a name")).collect();
    assert_eq!(names.first(), Some(&"stillpoint-status"));
    assert_eq!(names.last(), Some(&"guest-sync-delimited"));
    let shutdown = commands.iter().find(|command| command["name"] == "guest-shutdown").expect("listed");
    assert_eq!(*shutdown, json!({"enabled": true, "name": "guest-shutdown", "success-response": false}));
}

#[test]
fn blocked_commands_are_refused_and_shown_as_disabled() {
    let agent = Agent::start_with(&["-b", "guest-ping,stillpoint-freeze"], &[]);
    let mut client = agent.client();
    let refused = "Command guest-ping has been disabled: the command is not allowed";
    assert_eq!(client.error("guest-ping", json!({})), refused);
    let info = client.call("guest-info", json!({}));
    let disabled = info["supported_commands"].as_array().expect("a list").iter();
    let disabled: Vec<_> =
        disabled.filter(|command| command["enabled"] == false).map(|command| &command["name"]).collect();
    assert_eq!(disabled, ["stillpoint-freeze", "guest-ping"]);

    let agent = Agent::start_with(&["-a", "guest-info,guest-ping", "-b", "guest-ping"], &[]);
    let mut client = agent.client();
    assert_eq!(client.error("guest-ping", json!({})), refused);
    assert!(client.error("guest-exec", json!({"path": "true"})).contains("has been disabled"));
    client.call("guest-info", json!({}));
}

#[test]
fn time_is_in_nanoseconds() {
    let agent = Agent::start();
    let told = agent.client().call("guest-get-time", json!({})).as_u64().expect("a number");
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos();
    assert!(u128::from(told).abs_diff(now) < 60_000_000_000, "{told} is not {now}");
}

#[test]
fn osinfo_is_read_from_the_file_that_the_environment_names() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "ID=qemu-ga-test\nPRETTY_NAME=\"Fedora 20 \\\"x\\\"\"\nVARIANT_ID=server\n")
        .expect("written");
    let agent = Agent::start_with(&[], &[("QGA_OS_RELEASE", file.path().to_str().expect("a plain path"))]);
    let osinfo = agent.client().call("guest-get-osinfo", json!({}));
    assert_eq!(osinfo["id"], "qemu-ga-test");
    assert_eq!(osinfo["pretty-name"], "Fedora 20 \"x\"");
    assert_eq!(osinfo["variant-id"], "server");
    assert_eq!(osinfo.get("version"), None);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    assert_eq!(osinfo["kernel-release"], release.trim_end());
}

#[test]
fn fsinfo_lists_what_lies_on_block_devices() {
    let agent = Agent::start();
    let filesystems = agent.client().call("guest-get-fsinfo", json!({}));
    for filesystem in filesystems.as_array().expect("a list") {
        assert_ne!(filesystem["type"], "proc");
        assert!(filesystem["mountpoint"].is_string() && filesystem["disk"].is_array(), "{filesystem}");
    }
}

#[test]
fn a_thawed_guest_says_so() {
    let agent = Agent::start();
    let mut client = agent.client();
    assert_eq!(client.call("guest-fsfreeze-status", json!({})), "thawed");
    assert_eq!(client.call("stillpoint-status", json!({}))["state"], "thawed");
}
