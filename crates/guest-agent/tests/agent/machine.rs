//! What the agent tells of the machine that the tests run on. Nothing is changed on it.

use crate::guest::Agent;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

#[test]
fn processors_and_memory_are_told_and_wishes_that_change_nothing_succeed() {
    let agent = Agent::start();
    let mut client = agent.client();
    let vcpus = client.call("guest-get-vcpus", json!({}));
    let numbers: BTreeSet<_> =
        vcpus.as_array().expect("a list").iter().map(|vcpu| vcpu["logical-id"].to_string()).collect();
    let folders = fs::read_dir("/sys/devices/system/cpu").expect("a kernel").filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        let digits = name.strip_prefix("cpu")?;
        digits.parse::<u32>().ok().map(|number| number.to_string())
    });
    assert_eq!(numbers, folders.collect());
    assert_eq!(client.call("guest-set-vcpus", json!({"vcpus": []})), 0);
    // What hosts send back is what they were told.
    assert_eq!(client.call("guest-set-vcpus", json!({"vcpus": vcpus})), vcpus.as_array().map_or(0, Vec::len));
    let error = client.error("guest-set-vcpus", json!({"vcpus": [{"logical-id": 4711, "online": true}]}));
    assert_eq!(error, "Could not open '/sys/devices/system/cpu/cpu4711/': No such file or directory");

    let blocks = client.call("guest-get-memory-blocks", json!({}));
    let wishes = json!({"mem-blks": [{"phys-index": 99_999_999, "online": true}]});
    let response = client.call("guest-set-memory-blocks", wishes);
    if blocks == json!([]) {
        let error = client.error("guest-get-memory-block-info", json!({}));
        assert_eq!(error, "Could not open '/sys/devices/system/memory/': No such file or directory");
        assert_eq!(response[0]["response"], "operation-not-supported");
    } else {
        let size = client.call("guest-get-memory-block-info", json!({}))["size"].as_u64().expect("a number");
        assert!(size.is_power_of_two(), "{size}");
        assert_eq!(response, json!([{"phys-index": 99_999_999, "response": "not-found", "error-code": 2}]));
    }
}

#[test]
fn disks_are_those_of_the_kernel() {
    let agent = Agent::start();
    let disks = agent.client().call("guest-get-disks", json!({}));
    let told: BTreeSet<_> =
        disks.as_array().expect("a list").iter().map(|disk| disk["name"].to_string()).collect();
    let names = fs::read_dir("/sys/class/block").expect("a kernel").filter_map(|entry| {
        let entry = entry.ok()?;
        let size = fs::read_to_string(entry.path().join("size")).ok()?;
        // Hidden ones, and those without a medium, are no disks.
        let is_there = size.trim() != "0" && entry.path().join("dev").exists();
        is_there
            .then(|| Value::from(format!("/dev/{}", entry.file_name().to_string_lossy().replace('!', "/"))))
    });
    assert_eq!(told, names.map(|name| name.to_string()).collect());
}

#[test]
fn statistics_are_those_of_the_kernel() {
    let agent = Agent::start();
    let mut client = agent.client();
    let disks = client.call("guest-get-diskstats", json!({}));
    let table = fs::read_to_string("/proc/diskstats").expect("a kernel");
    assert_eq!(disks.as_array().map(Vec::len), Some(table.lines().count()));
    let cpus = client.call("guest-get-cpustats", json!({}));
    let stat = fs::read_to_string("/proc/stat").expect("a kernel");
    let lines = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
    assert_eq!(cpus.as_array().map(Vec::len), Some(lines.count()));
    assert_eq!(cpus[0]["type"], "linux");
    assert!(cpus[0]["idle"].as_u64().is_some() && cpus[0]["guestnice"].as_u64().is_some(), "{cpus}");
    let load = client.call("guest-get-load", json!({}));
    for name in ["load1m", "load5m", "load15m"] {
        assert!(load[name].as_f64().is_some_and(|load| load >= 0.0), "{load}");
    }
}

/// No free stretch is that long, so nothing is trimmed.
#[test]
fn a_trim_tells_of_every_file_system_what_became_of_it() {
    let agent = Agent::start();
    let mut client = agent.client();
    let trimmed = client.call("guest-fstrim", json!({"minimum": i64::MAX}));
    let paths = trimmed["paths"].as_array().expect("a list");
    for path in paths {
        assert!(path["path"].as_str().is_some_and(|path| path.starts_with('/')), "{path}");
        let nothing = path["trimmed"] == 0 || path["error"].is_string();
        assert!(nothing, "{path}");
    }
    let filesystems = client.call("guest-get-fsinfo", json!({}));
    assert!(paths.len() <= filesystems.as_array().map_or(0, Vec::len));
    assert!(agent.log().contains("guest-fstrim called"), "{}", agent.log());
}
