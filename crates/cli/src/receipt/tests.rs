//! The page, from receipts that are written down here.

use super::*;
use snapshot::judge;

/// Prints a receipt; the time of the point, which depends on the time zone, is taken out.
fn page(receipt: &str) -> String {
    let receipt: Receipt = serde_json::from_str(receipt).expect("a receipt");
    let verdict = judge(&receipt);
    let page = Page {
        snapshot: "01m84nfr53zabrmw1adyhgwn21",
        parent: None,
        description: Some("before the upgrade \u{1b}[2J"),
        receipt: &receipt,
        verdict: &verdict,
    };
    let at = receipt.point.as_ref().map_or_else(String::new, |point| instant(point.at_ms));
    page.to_string().replace(&at, "TIME")
}

#[test]
fn a_quiesced_snapshot_names_its_evidence() {
    let page = page(include_str!("application.json"));
    insta::assert_snapshot!(page);
}

#[test]
fn a_paused_vm_is_crash_consistent_and_the_page_says_why() {
    let page = page(
        r#"{"vm": "db1", "run": "r1", "wanted": "application", "required": "crash",
            "point": {"at_ms": 1795453083000, "vcpus_stopped": true, "stopped_ms": 0.0, "disks": ["root"]},
            "disks": [{"name": "root", "size_bytes": 2147483648, "copy":
                {"method": "compared", "read_bytes": 2147483648, "changed_bytes": 40960, "stored_bytes": 4096}}],
            "order": {"point_before_thaw": true},
            "reasons": [{"code": "vm_paused", "subject": "db1", "message": "the VM is paused"}]}"#,
    );
    insta::assert_snapshot!(page);
}
