//! What a host keeps of an unfinished run, and what QEMU says is there. Whatever both hold, the way back can be
//! computed, touches nothing but what the journal names, and carrying it out on a list of names empties it.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qmp::block::{Device, Node};
use qmp::export::Export;
use qmp::machine::Status;
use serde_json::json;
use std::collections::BTreeSet;
use vm::point::steps::Step;
use vm::point::undo::{Facts, steps};
use vm::point::{DiskRequest, Outcome, Plan, Request};

#[derive(Arbitrary, Debug)]
struct There {
    disks: u8,
    increments: u8,
    running: bool,
    paused: bool,
    kept: bool,
    /// A bit for each thing of the plan, in the order of `names`.
    nodes: u32,
    exports: u8,
    in_place: u8,
    bitmaps: [u8; 4],
    files: u8,
    folder: bool,
    listens: bool,
    foreign_export: bool,
}

#[derive(Arbitrary, Debug)]
enum Input {
    /// What the journal holds.
    Plan(Vec<u8>),
    There(There),
}

fn disk(number: u8) -> vm::disks::Disk {
    serde_json::from_value(json!({
        "name": format!("d{number}"), "device": format!("/machine/peripheral/d{number}"),
        "node": format!("node{number}"), "format": "qcow2", "file": "/x", "size_bytes": 1 << 30,
        "bus": "virtio_blk", "keeps_bitmaps": true
    }))
    .expect("a disk")
}

fn plan(there: &There) -> Plan {
    let base = |number: u8| (there.increments >> number & 1 == 1).then(|| "stillpoint-repo-old".to_owned());
    let wanted = |number: u8| DiskRequest { disk: disk(number), base: base(number), only_base: true };
    Plan::new(&Request {
        tag: "abcd1234".to_owned(),
        repository: "repo".to_owned(),
        snapshot: "new".to_owned(),
        folder: "/run/scratch".into(),
        cbw_timeout_s: 5,
        running: there.running,
        disks: (0..=there.disks % 4).map(wanted).collect(),
    })
    .expect("names that fit")
}

fn facts(plan: &Plan, there: &There) -> Facts {
    let named = |name: &str| Node { node_name: Some(name.to_owned()), ..Node::default() };
    let mut facts = Facts {
        status: Status {
            running: !there.paused,
            status: if there.paused { "paused" } else { "running" }.into(),
        },
        server_listens: there.listens,
        folder: there.folder,
        ..Facts::default()
    };
    for (at, disk) in plan.disks.iter().enumerate() {
        let parts = [&disk.file_node, &disk.scratch_node, &disk.filter_node, &disk.access_node];
        let there_now = parts.iter().enumerate().filter(|(part, _)| there.nodes >> (at * 4 + part) & 1 == 1);
        facts.nodes.extend(there_now.map(|(_, name)| named(name)));
        let bits = there.bitmaps[at];
        let bitmaps = ["stillpoint-repo-old", "stillpoint-repo-new", "stillpoint-other-x", "someone-elses"];
        let bitmaps = bitmaps.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(bit, name)| {
            json!({"name": name, "recording": bits >> (bit + 4) & 1 == 1, "granularity": 4096, "count": 0})
        });
        let node = json!({"node-name": disk.disk.node, "dirty-bitmaps": bitmaps.collect::<Vec<_>>()});
        facts.nodes.push(serde_json::from_value(node).expect("a node"));
        let uses = if there.in_place >> at & 1 == 1 { &disk.filter_node } else { &disk.disk.node };
        let device = format!("d{at}");
        facts.devices.push(Device { qdev: Some(device), inserted: Some(named(uses)), ..Device::default() });
        if there.exports >> at & 1 == 1 {
            facts.exports.push(Export { id: disk.export.clone(), ..Export::default() });
        }
        if there.files >> at & 1 == 1 {
            facts.files.push(disk.scratch_file.clone());
        }
    }
    if there.foreign_export {
        facts.exports.push(Export { id: "theirs".into(), ..Export::default() });
    }
    facts
}

/// What a step names in QEMU, besides bitmaps.
fn check(plan: &Plan, facts: &Facts, outcome: Outcome) {
    let nodes: BTreeSet<&str> = plan
        .disks
        .iter()
        .flat_map(|disk| [&disk.file_node, &disk.scratch_node, &disk.filter_node, &disk.access_node])
        .map(String::as_str)
        .collect();
    let mut left: BTreeSet<String> = facts.nodes.iter().filter_map(|node| node.node_name.clone()).collect();
    for step in steps(plan, facts, outcome) {
        match step {
            Step::Close(node) => {
                assert!(nodes.contains(node.as_str()), "closes {node}, which is not ours");
                assert!(left.remove(&node), "closes {node}, which is not there");
            }
            Step::SetDrive { node, .. } => assert!(plan.disks.iter().any(|disk| disk.disk.node == node)),
            Step::EndExport(id) => assert!(plan.disks.iter().any(|disk| disk.export == id)),
            Step::RemoveFile(path) => assert!(facts.files.contains(&path) && path.starts_with(&plan.folder)),
            Step::RemoveFolder(path) => assert_eq!(path, plan.folder),
            Step::StopServer => assert!(!facts.exports.iter().any(|export| export.id == "theirs")),
            Step::Change(actions) => {
                let text = format!("{actions:?}");
                assert!(!text.contains("someone-elses") && !text.contains("stillpoint-other"), "{text}");
                assert!(outcome == Outcome::Dropped || !text.contains("name: \"stillpoint-repo-new\""));
            }
            Step::Resume => assert!(plan.running && facts.status.status == "paused"),
            Step::DismissJob(_) => {}
            making => panic!("a way back that makes something: {making:?}"),
        }
    }
    assert!(!left.iter().any(|node| nodes.contains(node.as_str())), "a node of ours stays");
}

fuzz_target!(|input: Input| match input {
    Input::Plan(bytes) => {
        if let Ok(plan) = serde_json::from_slice::<Plan>(&bytes) {
            let again = serde_json::to_vec(&plan).expect("what was JSON is JSON");
            assert_eq!(serde_json::from_slice::<Plan>(&again).expect("what was written"), plan);
            check(&plan, &Facts::default(), Outcome::Kept);
        }
    }
    Input::There(there) => {
        let plan = plan(&there);
        let outcome = if there.kept { Outcome::Kept } else { Outcome::Dropped };
        check(&plan, &facts(&plan, &there), outcome);
    }
});
