//! Interfaces and routes, in a network of the agent's own.

use crate::guest::{Agent, until};
use crate::sandbox::Sandbox;
use serde_json::{Value, json};
use std::io::Write;
use std::process::{Command, Stdio};

/// Runs `ip` in the agent's network.
fn ip(agent: &Agent, words: &str) {
    ip_batch(agent, words);
}

fn ip_batch(agent: &Agent, commands: &str) {
    let mut ip = Command::new("nsenter")
        .args(["-n", "-t", &agent.pid().to_string(), "ip", "-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nsenter runs");
    ip.stdin.take().expect("a pipe").write_all(format!("{commands}\n").as_bytes()).expect("written");
    assert!(ip.wait().expect("it ends").success(), "ip {commands}");
}

#[test]
fn interfaces_have_their_addresses_and_those_with_one_their_counters() {
    let Some(sandbox) = Sandbox::new() else { return };
    let agent = sandbox.start();
    let mut client = agent.client();
    let interfaces = client.call("guest-network-get-interfaces", json!({}));
    let lo =
        interfaces.as_array().expect("a list").iter().find(|one| one["name"] == "lo").expect("there is one");
    assert_eq!(*lo, json!({"name": "lo", "hardware-address": "00:00:00:00:00:00"}), "no address yet");
    ip(&agent, "link set lo up\naddr add 192.0.2.7/24 dev lo label lo:x\naddr add 2001:db8::7/64 dev lo");
    let interfaces = client.call("guest-network-get-interfaces", json!({}));
    let named =
        |name: &str| interfaces.as_array().expect("a list").iter().find(|one| one["name"] == name).cloned();
    let lo = named("lo").expect("there is one");
    let addresses: Vec<Value> = lo["ip-addresses"].as_array().expect("a list").clone();
    assert_eq!(addresses[0], json!({"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8}));
    assert!(
        addresses.contains(&json!({"ip-address": "2001:db8::7", "ip-address-type": "ipv6", "prefix": 64}))
    );
    for counter in
        ["rx-bytes", "rx-packets", "rx-errs", "rx-dropped", "tx-bytes", "tx-packets", "tx-errs", "tx-dropped"]
    {
        assert!(lo["statistics"][counter].is_u64(), "{counter}: {lo}");
    }
    assert_eq!(
        named("lo:x"),
        Some(json!({"name": "lo:x", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [
            {"ip-address": "192.0.2.7", "ip-address-type": "ipv4", "prefix": 24}]}))
    );
}

#[test]
fn d32_the_counters_of_hundreds_of_interfaces_are_read_once() {
    let Some(sandbox) = Sandbox::new() else { return };
    let agent = sandbox.start();
    let labels: Vec<String> = (0..300)
        .map(|index| format!("addr add 10.0.{}.{}/32 dev lo label lo:{index}", index / 250, index % 250))
        .collect();
    ip_batch(&agent, &format!("link set lo up\n{}", labels.join("\n")));
    let trace = sandbox.path("trace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-e", "trace=open,openat", "-o"]).arg(&trace).args(["-p", &agent.pid().to_string()]);
    let Ok(mut strace) = strace.stderr(Stdio::null()).spawn() else {
        writeln!(std::io::stderr(), "SKIPPED: needs strace").expect("a standard error");
        return;
    };
    let status = format!("/proc/{}/status", agent.pid());
    until("it is traced", || !std::fs::read_to_string(&status).expect("it runs").contains("TracerPid:\t0\n"));
    let interfaces = agent.client().call("guest-network-get-interfaces", json!({}));
    assert!(interfaces.as_array().is_some_and(|list| list.len() > 300), "{interfaces}");
    rustix::process::kill_process(rustix::process::Pid::from_child(&strace), rustix::process::Signal::INT)
        .expect("it runs");
    strace.wait().expect("it ends");
    let trace = std::fs::read_to_string(trace).expect("a trace");
    assert_eq!(trace.matches("/proc/net/dev").count(), 1, "{trace}");
}

#[test]
fn routes_are_those_of_the_kernel() {
    let Some(sandbox) = Sandbox::new() else { return };
    let agent = sandbox.start();
    let mut client = agent.client();
    ip(&agent, "link set lo up\nroute add 192.0.2.0/24 dev lo metric 7 advmss 1360");
    let routes = client.call("guest-network-get-route", json!({}));
    let routes = routes.as_array().expect("a list");
    let version_4 = routes.iter().find(|route| route["version"] == 4).expect("one");
    assert_eq!(
        *version_4,
        json!({"iface": "lo", "destination": "192.0.2.0", "gateway": "0.0.0.0", "mask": "255.255.255.0",
               "metric": 7, "flags": 1, "refcnt": 0, "use": 0, "mtu": 1400, "window": 0, "irtt": 0, "version": 4})
    );
    let version_6 = routes.iter().find(|route| route["destination"] == "::1");
    if let Some(version_6) = version_6 {
        assert_eq!((&version_6["iface"], &version_6["desprefixlen"]), (&json!("lo"), &json!("128")));
    } else {
        writeln!(std::io::stderr(), "SKIPPED in part: no IPv6 here").expect("a standard error");
    }
}
