//! Whole runs by seed. `SEED=n cargo test -p simulation --test runs -- --nocapture` repeats one and prints what happened;
//! `SCHEDULES=n` says how many there are.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use simulation::schedule::{Fault, pairs};
use simulation::{Sabotage, Simulated, simulate};
use snapshot::Level;
use std::collections::BTreeMap;

/// In `make test`; `make test-long` asks for more.
const SCHEDULES: u64 = 1_000;
/// With as many as this, every fault must have struck at every step.
const ENOUGH: u64 = 10_000;

#[expect(clippy::disallowed_methods, reason = "which seeds are run is the caller's wish")]
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[track_caller]
fn expect_nothing_wrong(seed: u64, run: &Simulated) {
    let log = run.log.join("\n");
    assert!(
        run.violations.is_empty(),
        "seed {seed}: {}\n{}\n{log}\n`SEED={seed} cargo test -p simulation --test runs` repeats it",
        run.end,
        run.violations.join("\n"),
    );
}

#[test]
fn no_schedule_yields_a_level_above_its_evidence_or_leaves_anything_behind() {
    let folder = tempfile::tempdir().unwrap();
    if let Some(seed) = number("SEED") {
        let run = simulate(seed, None, folder.path());
        println!("{}\nended: {}, really {:?}", run.log.join("\n"), run.end, run.truth);
        return expect_nothing_wrong(seed, &run);
    }
    let count = number("SCHEDULES").unwrap_or(SCHEDULES);
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut levels: BTreeMap<(Option<Level>, Option<Level>), u64> = BTreeMap::new();
    let mut met = BTreeMap::new();
    for seed in 0..count {
        let run = simulate(seed, None, folder.path());
        expect_nothing_wrong(seed, &run);
        *ends.entry(run.end).or_default() += 1;
        *levels.entry((run.level, run.truth)).or_default() += 1;
        run.met.into_iter().for_each(|pair| *met.entry(pair).or_insert(0_u64) += 1);
    }
    println!("{count} schedules");
    ends.iter().for_each(|(end, count)| println!("{count:7} {end}"));
    println!("level kept, what the cut was worth:");
    levels.iter().for_each(|((level, truth), count)| println!("{count:7} {level:?} {truth:?}"));
    println!("faults that struck:");
    met.iter().for_each(|((step, fault), count)| println!("{count:7} {step:?} {fault}"));
    let missing: Vec<_> = pairs().filter(|pair| !met.contains_key(pair)).collect();
    println!("never met: {missing:?}");
    assert!(count < ENOUGH || missing.is_empty(), "never met: {missing:?}");
    for level in [Level::Crash, Level::Filesystem, Level::Application] {
        assert!(levels.keys().any(|(kept, _)| *kept == Some(level)), "no run was kept as {level}");
    }
}

#[test]
fn a_seed_repeats_exactly() {
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..60 {
        assert_eq!(simulate(seed, None, folder.path()), simulate(seed, None, folder.path()), "seed {seed}");
    }
}

/// The first schedule that finds a defect: of those of `make test`, but for a guard that hangs while its host is silent.
#[track_caller]
fn finds(sabotage: Sabotage, words: &str) -> Simulated {
    let folder = tempfile::tempdir().unwrap();
    let mut runs = (0..ENOUGH).map(|seed| (seed, simulate(seed, Some(sabotage), folder.path())));
    let found = runs.find(|(_, run)| run.violations.iter().any(|violation| violation.contains(words)));
    let (seed, run) = found.unwrap_or_else(|| panic!("{sabotage:?} goes unnoticed"));
    println!("{sabotage:?}: seed {seed}");
    run
}

#[test]
fn a_thaw_that_is_only_assumed_is_found() {
    finds(Sabotage::ThawAssumed, "invariant 3");
}

#[test]
fn an_early_thaw_that_is_ignored_is_found() {
    finds(Sabotage::EarlyThawIgnored, "invariant 3");
}

#[test]
fn a_thaw_that_is_not_sent_after_a_failed_freeze_is_found() {
    finds(Sabotage::ThawForgotten, "invariant 4");
}

#[test]
fn a_copy_that_is_sealed_though_it_broke_off_is_found() {
    finds(Sabotage::CopyAssumed, "not complete");
}

#[test]
fn a_filter_that_stays_is_found() {
    finds(Sabotage::FilterForgotten, "left in QEMU");
}

#[test]
fn writes_that_a_failed_run_loses_are_found() {
    finds(Sabotage::WritesForgotten, "miss writes");
}

#[test]
fn a_cut_while_the_guest_runs_is_found() {
    finds(Sabotage::CutRunning, "invariant 3");
}

#[test]
fn a_thaw_that_is_sent_before_the_guest_stands_still_is_found() {
    finds(Sabotage::ThawTooEarly, "invariant 3");
}

#[test]
fn a_guard_that_sleeps_through_the_lease_is_found() {
    finds(Sabotage::GuardAsleep, "invariant 1");
}

#[test]
fn an_agent_that_relies_on_a_guard_which_hangs_is_found() {
    let found = finds(Sabotage::GuardTrusted, "invariant 1");
    assert!(found.met.iter().any(|(_, fault)| *fault == Fault::GuardHangs), "{:?}", found.met);
}
