//! One whole run by its seed, and everything that must hold afterwards.

use crate::guest::Kind;
use crate::hands::{Behind, SimulatedHands};
use crate::line::{Ended, Shared, SimulatedLine, wait};
use crate::schedule::{Fault, Step};
use crate::world::{Doom, Sabotage, World};
use engine::guest::Guest;
use guest_protocol::stillpoint::Policy;
use snapshot::conduct::{Failure, conduct};
use snapshot::receipt::{DiskEvidence, Receipt};
use snapshot::{Level, judge};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use vm::agent::Agent;
use vm::disks::Disk;
use vm::point::undo::release;
use vm::point::{DiskRequest, Plan, Request as PointRequest};

/// The run's id; its first eight characters name its nodes.
const RUN: &str = "abcd1234abcd1234";
/// How long an agent may take to answer at all. Source: `engine::guest`.
const FIND: Duration = Duration::from_secs(5);
/// How long the world goes on after the run: longer than any lease and any hang.
const AFTER: Duration = Duration::from_secs(400);

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Simulated {
    /// Its end, in a word or two.
    pub end: String,
    /// The level in the manifest, if there is one.
    pub level: Option<Level>,
    /// What the cut was really worth; absent: there was none.
    pub truth: Option<Level>,
    /// The faults that struck, and where.
    pub met: BTreeSet<(Step, Fault)>,
    /// What must not have happened.
    pub violations: Vec<String>,
    /// Everything that happened, with its time.
    pub log: Vec<String>,
}

/// Runs one seed. `folder` is for the ledgers of agents, which are files.
pub fn simulate(seed: u64, sabotage: Option<Sabotage>, folder: &Path) -> Simulated {
    let world: Shared = Rc::new(RefCell::new(World::new(seed, sabotage, folder)));
    let plan = plan(&world.borrow());
    let outcome = catch_unwind(AssertUnwindSafe(|| run(&world, &plan, seed)));
    let end = match outcome {
        Ok(end) => end,
        Err(payload) => match payload.downcast::<Ended>() {
            Ok(ended) if ended.0 == Doom::Killed => "host killed".to_owned(),
            Ok(_) => "host panicked".to_owned(),
            Err(other) => resume_unwind(other),
        },
    };
    check(&world, &plan, &end);
    let mut world = world.borrow_mut();
    let level = world
        .store
        .manifests
        .get("new")
        .and_then(|(_, manifest)| manifest.as_ref()?["level"].as_str()?.parse().ok());
    Simulated {
        end,
        level,
        truth: world.truth,
        met: std::mem::take(&mut world.met),
        violations: std::mem::take(&mut world.violations),
        log: std::mem::take(&mut world.log),
    }
}

fn plan(world: &World) -> Plan {
    let disk = |name: &String| -> Disk {
        serde_json::from_value(serde_json::json!({
            "name": name, "device": format!("/machine/peripheral/{name}"), "node": format!("{name}-node"),
            "format": "qcow2", "file": "/x", "size_bytes": 1 << 30, "bus": "virtio_blk", "keeps_bitmaps": true
        }))
        .expect("a disk")
    };
    let wanted = |name: &String| DiskRequest {
        disk: disk(name),
        base: world.base.clone(),
        only_base: world.base.is_some(),
    };
    Plan::new(&PointRequest {
        tag: RUN[..8].to_owned(),
        repository: "repo".to_owned(),
        snapshot: RUN.to_owned(),
        folder: "/scratch/run".into(),
        cbw_timeout_s: 5,
        running: true,
        disks: world.wanted.iter().map(wanted).collect(),
    })
    .expect("names that fit")
}

fn run(world: &Shared, plan: &Plan, seed: u64) -> String {
    let (request, receipt) = {
        let world = world.borrow();
        let disk = |name: &String| DiskEvidence {
            name: name.clone(),
            serial: Some(name.clone()),
            ..DiskEvidence::default()
        };
        let receipt = Receipt {
            vm: "vm".to_owned(),
            run: RUN.to_owned(),
            disks: world.disks.iter().map(disk).collect(),
            disks_chosen: !world.request.disks.is_empty(),
            ..Receipt::default()
        };
        (world.request.clone(), receipt)
    };
    let there = world.borrow().guest.kind != Kind::Nobody;
    let agent = if there { Agent::over(SimulatedLine(Rc::clone(world)), seed, FIND).ok() } else { None };
    let guest = Guest::over(agent);
    let mut receipt = receipt;
    receipt.agent = guest.kind();
    let can_freeze = guest.can_freeze();
    let hands = SimulatedHands {
        world: Rc::clone(world),
        guest,
        plan: plan.clone(),
        packs: BTreeSet::new(),
        froze: None,
        left: None,
    };
    let (hands, outcome) = conduct(hands, &request, receipt, can_freeze);
    let left = if hands.left.is_some() { ", something left" } else { "" };
    match outcome {
        Ok(kept) => format!("kept {}{left}", kept.verdict.level),
        Err(failure) => {
            let cause = match failure {
                Failure::Freeze { .. } => "freeze failed",
                Failure::RequiredApplication(_) => "required application",
                Failure::BelowRequired { .. } => "below required",
                Failure::Interrupted => "interrupted",
                Failure::Action(_) => "action failed",
            };
            format!("{cause}{left}")
        }
    }
}

/// What must hold after every run, whatever happened in it.
fn check(world: &Shared, plan: &Plan, end: &str) {
    let mut wrong = Vec::new();
    {
        let mut world = world.borrow_mut();
        (world.over, world.doom) = (true, None);
    }
    let manifest = world.borrow().store.manifests.get("new").cloned();
    let kept = manifest.is_some();
    if !world.borrow().killed && kept != end.starts_with("kept") && end != "host panicked" {
        wrong.push(format!("it ended as '{end}', and there is {} manifest", if kept { "a" } else { "no" }));
    }
    if let Some((packs, manifest)) = &manifest {
        worth(&world.borrow(), manifest.as_ref(), &mut wrong);
        let disks = world.borrow().wanted.clone();
        let whole =
            disks.iter().all(|disk| (0..2).all(|number| packs.contains(&format!("new-{disk}-{number}"))));
        if !whole || !packs.is_subset(&world.borrow().store.packs) {
            wrong.push("a snapshot is visible that is not complete (invariant 5)".to_owned());
        }
    }
    for name in ["first", "second"] {
        let world = world.borrow();
        let sound =
            world.store.manifests.get(name).is_some_and(|(packs, _)| packs.is_subset(&world.store.packs));
        if !sound {
            wrong.push(format!("the {name} snapshot was harmed (invariant 5)"));
        }
    }
    thawed(&world.borrow(), &mut wrong);
    // A program that was killed in the cut left a process that lets the virtual CPUs run.
    {
        let mut world = world.borrow_mut();
        let ours = world.qemu.alive && !world.is_paused();
        if world.killed && ours {
            world.go_on();
        }
        if ours && !world.qemu.running {
            wrong.push("the virtual CPUs stand still (invariant 8)".to_owned());
        }
        world.qemu.fault = None;
    }
    let until = world.borrow().now + AFTER;
    while world.borrow().now < until {
        wait(world, until, false);
    }
    let stays = world.borrow().guest.still_frozen();
    if !stays.is_empty() && world.borrow().guest.kind == Kind::Ours {
        wrong.push(format!("file systems {stays:?} stay frozen (invariant 1)"));
    }
    released(world, plan, kept, &mut wrong);
    let mut world = world.borrow_mut();
    world.violations.extend(wrong);
}

/// The level in the manifest, against what the world knows.
fn worth(world: &World, manifest: Option<&serde_json::Value>, wrong: &mut Vec<String>) {
    let Some(manifest) = manifest else { return };
    let stored = manifest["level"].as_str().and_then(|word| word.parse::<Level>().ok());
    let receipt = serde_json::from_value::<Receipt>(manifest["receipt"].clone());
    let (Some(stored), Ok(receipt)) = (stored, receipt) else {
        return wrong.push("the manifest cannot be read".to_owned());
    };
    if judge(&receipt).level != stored {
        wrong.push(format!("stored as {stored}, but its receipt is worth {}", judge(&receipt).level));
    }
    if stored > evidence::most(&receipt) {
        wrong.push(format!("stored as {stored}, its evidence is worth {}", evidence::most(&receipt)));
    }
    let truth = world.truth.unwrap_or(Level::None);
    if stored > truth {
        wrong.push(format!("stored as {stored}, but the cut was really {truth} (invariant 3)"));
    }
    if stored < world.request.require {
        wrong.push(format!("stored as {stored}, although {} was required", world.request.require));
    }
    let required = world.request.applications.iter().any(|policy| policy.policy == Policy::Required);
    if required && world.truth_of_application < Level::Application {
        wrong.push("kept without the application that was required".to_owned());
    }
}

/// Thaw is sent after every freeze, or was tried until patience ended (invariant 4).
fn thawed(world: &World, wrong: &mut Vec<String>) {
    let Some(froze) = world.wire.freeze_sent.filter(|_| !world.killed) else { return };
    let sent = world.wire.thaw_sent.is_some_and(|thaw| thaw >= froze);
    let tried = world.wire.thaw_tried.is_some_and(|tried| tried >= froze + Duration::from_secs(60));
    // Where QEMU has ended there is no guest to thaw.
    if !sent && !tried && world.qemu.alive {
        wrong.push("a freeze was sent and no thaw after it (invariant 4)".to_owned());
    }
}

/// What the run, or the next one by its journal, leaves in QEMU.
fn released(world: &Shared, plan: &Plan, kept: bool, wrong: &mut Vec<String>) {
    if !world.borrow().qemu.alive {
        return;
    }
    let noted = world.borrow().journal.clone();
    if let Some((plan, outcome)) = noted
        && let Err(error) = release(&mut Behind(world), &plan, outcome)
    {
        wrong.push(format!("the next run cannot clear up: {error}"));
    }
    let world = world.borrow();
    let left = world.qemu.leftovers();
    if !left.is_empty() {
        wrong.push(format!("left in QEMU: {}", left.join(", ")));
    }
    for disk in &plan.disks {
        let node = &disk.disk.node;
        let has_new = world.qemu.bitmaps.contains_key(&(node.clone(), disk.bitmap.clone()));
        // A program killed between manifest and journal leaves a snapshot whose bitmap the next run takes for a failed
        // one's: the next increment then begins at the snapshot before, and holds more.
        if kept && !has_new && !world.killed {
            wrong.push("kept, but its bitmap is gone".to_owned());
        }
        if !kept && has_new {
            wrong.push("no snapshot, but a bitmap of it".to_owned());
        }
        // The next increment begins at this run's bitmap, else at the one before, else with a full read.
        let gap = match (has_new, &world.base) {
            (true, _) => {
                world.qemu.since_cut.get(node).and_then(|owed| world.qemu.gap(node, &disk.bitmap, owed))
            }
            (false, Some(base)) => {
                world.qemu.owed.get(node).and_then(|owed| world.qemu.gap(node, base, owed))
            }
            (false, None) => None,
        };
        wrong.extend(gap.map(|gap| format!("the next increment would miss writes: {gap}")));
    }
}
