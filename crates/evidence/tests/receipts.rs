//! No receipt at all is worth more than its evidence.

use arbitrary::Unstructured;
use evidence::receipts;
use snapshot::{Level, judge};
use std::collections::BTreeMap;

const RECEIPTS: u64 = 200_000;

#[test]
fn no_receipt_is_worth_more_than_its_evidence() {
    let mut seen: BTreeMap<Level, u64> = BTreeMap::new();
    for seed in 0..RECEIPTS {
        let mut rng = fastrand::Rng::with_seed(seed);
        let bytes: Vec<u8> = (0..512).map(|_| rng.u8(..)).collect();
        let receipt = receipts::receipt(&mut Unstructured::new(&bytes)).unwrap();
        let verdict = judge(&receipt);
        let most = evidence::most(&receipt);
        assert!(verdict.level <= most, "receipt {seed}: {} > {most}: {receipt:#?}", verdict.level);
        let reports = receipt.guest.iter().flat_map(|report| &report.applications);
        for (application, (level, _)) in reports.zip(&verdict.applications) {
            let most = evidence::most_of(&receipt, application);
            assert!(*level <= most, "receipt {seed}: application {level} > {most}: {receipt:#?}");
        }
        *seen.entry(verdict.level).or_default() += 1;
    }
    println!("{seen:?}");
    for level in [Level::None, Level::Crash, Level::Filesystem, Level::Application] {
        assert!(
            seen.get(&level).is_some_and(|count| *count > RECEIPTS / 1000),
            "hardly any {level}: {seen:?}"
        );
    }
}

/// The other direction, so that the property above is not won by judging everything low: where the two disagree, the
/// judgement is the stricter one, and that is rare.
#[test]
fn most_receipts_are_worth_all_of_their_evidence() {
    let (mut equal, mut below) = (0, 0);
    for seed in 0..RECEIPTS / 10 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let bytes: Vec<u8> = (0..512).map(|_| rng.u8(..)).collect();
        let receipt = receipts::receipt(&mut Unstructured::new(&bytes)).unwrap();
        if judge(&receipt).level == evidence::most(&receipt) { equal += 1 } else { below += 1 }
    }
    println!("{equal} equal, {below} below");
    assert!(below * 20 < equal, "{equal} equal, {below} below");
}
