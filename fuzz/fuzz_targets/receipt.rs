//! Receipts, as JSON from a store or made up field by field. None is worth more than its evidence, by rules that are
//! written down a second time in `crates/evidence`; taking evidence away never raises a level.
#![no_main]

use arbitrary::Unstructured;
use evidence::receipts;
use libfuzzer_sys::fuzz_target;
use snapshot::receipt::Receipt;
use snapshot::{Request, judge, required_unmet};

fn check(receipt: &Receipt) {
    let verdict = judge(receipt);
    assert!(verdict.level <= evidence::most(receipt), "{} is too much", verdict.level);
    let reports = receipt.guest.iter().flat_map(|report| &report.applications);
    for (application, (level, _)) in reports.zip(&verdict.applications) {
        assert!(*level <= evidence::most_of(receipt, application), "{level} is too much for an application");
    }
    let _unmet = required_unmet(&Request::new("vm"), receipt, &verdict).is_some();
    let without: [fn(&mut Receipt); 6] = [
        |receipt| receipt.point = None,
        |receipt| receipt.stock = None,
        |receipt| receipt.order.frozen_before_point = false,
        |receipt| receipt.order.point_before_thaw = false,
        |receipt| receipt.order.thaw_answered = false,
        |receipt| receipt.point.iter_mut().for_each(|point| point.vcpus_stopped = false),
    ];
    for spoil in without {
        let mut less = receipt.clone();
        spoil(&mut less);
        assert!(judge(&less).level <= verdict.level, "less evidence, and a higher level");
    }
    let text = serde_json::to_vec(receipt).expect("a receipt is JSON");
    let again: Receipt = serde_json::from_slice(&text).expect("what was written");
    assert_eq!(judge(&again), verdict, "the level changed on the way through the store");
}

fuzz_target!(|bytes: &[u8]| {
    match bytes.split_first() {
        Some((b'{', _)) => {
            if let Ok(receipt) = serde_json::from_slice::<Receipt>(bytes) {
                check(&receipt);
            }
        }
        Some((_, rest)) => {
            if let Ok(receipt) = receipts::receipt(&mut Unstructured::new(rest)) {
                check(&receipt);
            }
        }
        None => {}
    }
});
