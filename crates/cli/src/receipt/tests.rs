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

#[test]
fn what_rests_on_a_hooks_word_says_so_and_how_the_hook_fared() {
    let page = page(
        r#"{"vm": "db1", "run": "r1", "agent": {"kind": "stillpoint", "version": "0.1.0"},
            "point": {"at_ms": 1795453083000, "vcpus_stopped": true, "disks": ["root"]},
            "disks": [{"name": "root", "serial": "root", "size_bytes": 2147483648}],
            "order": {"frozen_before_point": true, "point_before_thaw": true, "thaw_answered": true},
            "guest": {"id": "r1", "agent_version": "0.1.0", "boot_id": "", "lease_ms": 30000, "thawed_by": "host",
                "prepare_ms": 1, "quiesce_ms": 1, "flush_rounds_ms": [], "freeze_ms": 1, "frozen_ms": 1, "thaw_ms": 1,
                "filesystems": [{"mountpoint": "/", "type": "ext4", "device": "/dev/vda", "device_number": "254:0",
                    "disks": [{"name": "vda", "serial": "root", "size_bytes": 2147483648}], "read_only": false, "state": "held"}],
                "applications": [{"kind": "mysql", "instance": "/var/lib/mysql", "policy": "preferred", "device_numbers": ["254:0"],
                    "quiesced": true, "held": true, "crash_safe": false, "facts": {}, "reasons": [],
                    "attested_by": "/etc/qemu/fsfreeze-hook.d/10-mysql"}],
                "hooks": [{"path": "/etc/qemu/fsfreeze-hook.d/10-mysql",
                    "freeze": {"outcome": "succeeded", "exit_code": 0, "ms": 40, "output_bytes": 9, "output": "locked \u001b[2J"},
                    "thaw": {"outcome": "succeeded", "exit_code": 0, "ms": 7, "output_bytes": 0}}],
                "uncovered": [], "unknown_writers": [], "reasons": []}}"#,
    );
    assert!(page.contains("application-consistent"), "{page}");
    assert!(page.contains("    attested by /etc/qemu/fsfreeze-hook.d/10-mysql\n"), "{page}");
    assert!(page.contains("freeze succeeded 40 ms, thaw succeeded 7 ms"), "{page}");
    assert!(page.contains("locked \\u{1b}[2J") && !page.contains('\u{1b}'), "{page}");
    assert!(page.contains("a hook's word, not seen by the agent [attested]"), "{page}");
}
