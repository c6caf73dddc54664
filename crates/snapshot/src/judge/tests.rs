//! Each test takes a perfect run, spoils one piece of evidence, and says what is left of the level.

use super::*;
use crate::receipt::{Order, Point, StockFilesystem};
use guest_protocol::stillpoint::UnknownWriter;

/// PostgreSQL on an xfs data disk beside an ext4 root, everything held and answered.
fn perfect() -> Receipt {
    let disk = |name: &str, serial: &str| DiskEvidence {
        name: name.to_owned(),
        serial: Some(serial.to_owned()),
        pci: None,
        size_bytes: 1 << 30,
        copy: None,
    };
    Receipt {
        vm: "db1".to_owned(),
        run: "run1".to_owned(),
        point: Some(Point {
            vcpus_stopped: true,
            disks: vec!["root".to_owned(), "data".to_owned()],
            ..Point::default()
        }),
        disks: vec![disk("root", "root"), disk("data", "data")],
        agent: Agent::Stillpoint { version: "0.1.0".to_owned() },
        order: Order {
            frozen_before_point: true,
            point_before_thaw: true,
            thaw_answered: true,
            ..Order::default()
        },
        guest: Some(GuestReport {
            id: "run1".to_owned(),
            thawed_by: ThawCause::Host,
            filesystems: vec![
                filesystem("/", "254:0", "root"),
                filesystem("/var/lib/postgresql", "254:16", "data"),
            ],
            applications: vec![ApplicationReport {
                kind: "postgresql".to_owned(),
                instance: "/var/lib/postgresql/15/main".to_owned(),
                device_numbers: vec!["254:16".to_owned()],
                quiesced: true,
                held: true,
                crash_safe: true,
                ..ApplicationReport::default()
            }],
            ..GuestReport::default()
        }),
        ..Receipt::default()
    }
}

fn filesystem(mountpoint: &str, number: &str, serial: &str) -> FilesystemReport {
    FilesystemReport {
        mountpoint: mountpoint.to_owned(),
        kind: "ext4".to_owned(),
        device: "/dev/vda".to_owned(),
        device_number: number.to_owned(),
        disks: vec![GuestDisk {
            name: "vda".to_owned(),
            serial: Some(serial.to_owned()),
            ..GuestDisk::default()
        }],
        state: FilesystemState::Held,
        ..FilesystemReport::default()
    }
}

/// Spoils a perfect run and expects a level with a reason of that code.
#[track_caller]
fn check(spoil: impl FnOnce(&mut Receipt), level: Level, code: &str) {
    let mut receipt = perfect();
    spoil(&mut receipt);
    let verdict = judge(&receipt);
    let codes: Vec<&str> = verdict.reasons.iter().map(|reason| reason.code.as_str()).collect();
    assert_eq!(verdict.level, level, "{codes:?}");
    assert!(codes.contains(&code), "{code} not in {codes:?}");
}

#[track_caller]
fn check_guest(spoil: impl FnOnce(&mut GuestReport), level: Level, code: &str) {
    check(|receipt| spoil(receipt.guest.as_mut().unwrap()), level, code);
}

#[test]
fn a_perfect_run_is_application_consistent_and_needs_no_reason() {
    let verdict = judge(&perfect());
    assert_eq!((verdict.level, &verdict.reasons[..]), (Level::Application, &[][..]));
    assert_eq!(verdict.applications[0].0, Level::Application);
}

#[test]
fn an_empty_receipt_is_worth_nothing() {
    assert_eq!(judge(&Receipt::default()).level, Level::None);
}

#[test]
fn disks_cut_while_the_guest_ran_are_torn() {
    check(|r| r.point.as_mut().unwrap().vcpus_stopped = false, Level::None, "point_not_atomic");
}

#[test]
fn a_vm_that_is_shut_off_is_as_after_a_power_failure_whoever_claims_to_have_frozen_it() {
    let off = |r: &mut Receipt| {
        let point = r.point.as_mut().unwrap();
        (point.vcpus_stopped, point.shut_off) = (false, true);
    };
    check(off, Level::Crash, "vm_shut_off");
    let unseen = |r: &mut Receipt| {
        off(r);
        r.point.as_mut().unwrap().writers_unseen = vec!["data".to_owned()];
    };
    check(unseen, Level::None, "writers_unseen");
}

#[test]
fn a_disk_outside_the_point_makes_it_none_unless_it_was_left_out_by_choice() {
    let drop = |r: &mut Receipt| r.point.as_mut().unwrap().disks = vec!["data".to_owned()];
    check(drop, Level::None, "disk_outside_point");
    check(
        |r| {
            drop(r);
            r.disks_chosen = true;
        },
        Level::Application,
        "filesystem_left_out",
    );
}

#[test]
fn an_application_with_a_file_on_a_disk_left_out_is_none() {
    check(
        |r| {
            r.point.as_mut().unwrap().disks = vec!["data".to_owned()];
            r.disks_chosen = true;
            r.guest.as_mut().unwrap().applications[0].device_numbers.push("254:0".to_owned());
        },
        Level::None,
        "outside_point",
    );
}

#[test]
fn each_missing_message_of_the_order_proof_leaves_a_crash() {
    check(|r| r.order.frozen_before_point = false, Level::Crash, "not_frozen");
    check(|r| r.order.point_before_thaw = false, Level::Crash, "freeze_unproven");
    check(|r| r.order.thaw_answered = false, Level::Crash, "thaw_unanswered");
    check(|r| r.guest = None, Level::Crash, "no_report");
}

#[test]
fn a_report_of_another_run_proves_nothing() {
    check_guest(|g| g.id = "run0".to_owned(), Level::Crash, "freeze_unproven");
}

#[test]
fn a_freeze_that_ended_by_itself_leaves_a_crash() {
    check_guest(|g| g.thawed_by = ThawCause::LeaseEnded, Level::Crash, "lease_ended");
    check_guest(|g| g.thawed_by = ThawCause::AgentGone, Level::Crash, "not_frozen");
}

#[test]
fn one_file_system_thawed_early_lowers_the_whole_vm() {
    check_guest(|g| g.filesystems[0].state = FilesystemState::EarlyThaw, Level::Crash, "early_thaw");
}

#[test]
fn a_file_system_that_cannot_be_frozen_counts_as_frozen_only_if_nothing_wrote_to_it() {
    check_guest(
        |g| g.filesystems[0].state = FilesystemState::Unsupported,
        Level::Crash,
        "filesystem_not_frozen",
    );
    let mut receipt = perfect();
    receipt.guest.as_mut().unwrap().filesystems[0].state = FilesystemState::Unwritten;
    assert_eq!(judge(&receipt).level, Level::Application);
}

#[test]
fn a_read_only_file_system_needs_no_freeze() {
    let mut receipt = perfect();
    let root = &mut receipt.guest.as_mut().unwrap().filesystems[0];
    (root.read_only, root.state) = (true, FilesystemState::Unsupported);
    assert_eq!(judge(&receipt).level, Level::Application);
}

#[test]
fn a_writable_file_system_on_an_unknown_disk_makes_it_none() {
    check_guest(|g| g.filesystems[0].disks.clear(), Level::None, "filesystem_outside_point");
    check_guest(
        |g| g.filesystems[0].disks[0].serial = Some("iscsi-1".to_owned()),
        Level::None,
        "filesystem_outside_point",
    );
}

#[test]
fn what_the_guest_could_not_look_at_or_freeze_lowers_the_level() {
    let gap = |code: &str| Reason::new(code, "/", "");
    check_guest(|g| g.uncovered.push(gap("zfs_cannot_freeze")), Level::Crash, "zfs_cannot_freeze");
    check_guest(|g| g.reasons.push(gap("too_many_namespaces")), Level::Crash, "too_many_namespaces");
    check_guest(|g| g.reasons.push(gap("agent_restarted")), Level::Crash, "agent_restarted");
    check_guest(|g| g.reasons.push(gap("too_many_applications")), Level::Filesystem, "too_many_applications");
    check_guest(|g| g.reasons.push(gap("discovery_incomplete")), Level::Filesystem, "discovery_incomplete");
    check_guest(|g| g.uncovered.push(gap("network_filesystem")), Level::Application, "network_filesystem");
}

#[test]
fn file_systems_that_lie_elsewhere_say_nothing_of_the_disks_that_were_cut() {
    // A data disk without a file system of its own, cut while everything that was frozen lies on another.
    let alone = |r: &mut Receipt| {
        r.point.as_mut().unwrap().disks = vec!["data".to_owned()];
        r.disks_chosen = true;
        let guest = r.guest.as_mut().unwrap();
        guest.filesystems.truncate(1);
        guest.applications.clear();
    };
    check(alone, Level::Crash, "no_filesystem_reported");
    check_guest(|g| g.filesystems.clear(), Level::None, "no_filesystem_reported");
}

#[test]
fn a_freeze_that_did_not_hold_is_a_crash_even_if_every_file_system_is_read_only() {
    check(
        |r| {
            r.order.thaw_answered = false;
            r.guest.as_mut().unwrap().filesystems.iter_mut().for_each(|f| f.read_only = true);
        },
        Level::Crash,
        "thaw_unanswered",
    );
}

#[test]
fn without_an_application_nobody_vouches_above_filesystem() {
    check_guest(|g| g.applications.clear(), Level::Filesystem, "no_application_found");
}

#[test]
fn an_application_that_was_not_quiesced_held_or_crash_safe_is_worth_its_file_systems() {
    check_guest(|g| g.applications[0].quiesced = false, Level::Filesystem, "not_quiesced");
    check_guest(|g| g.applications[0].held = false, Level::Filesystem, "not_held");
    check_guest(|g| g.applications[0].crash_safe = false, Level::Filesystem, "not_crash_safe");
    check_guest(|g| g.applications[0].policy = Policy::Off, Level::Filesystem, "policy_off");
    check_guest(|g| g.applications[0].saved_ms_before = Some(900), Level::Filesystem, "saved_before_freeze");
}

#[test]
fn a_lock_held_counts_where_settings_are_not_crash_safe() {
    let mut receipt = perfect();
    let application = &mut receipt.guest.as_mut().unwrap().applications[0];
    (application.crash_safe, application.locked) = (false, true);
    assert_eq!(judge(&receipt).level, Level::Application);
}

#[test]
fn unknown_writers_are_listed_and_do_not_lower_known_applications() {
    check_guest(
        |g| {
            g.unknown_writers =
                vec![UnknownWriter { pid: 7, command: "cron".to_owned(), mountpoints: vec!["/".to_owned()] }];
        },
        Level::Application,
        "unknown_writers",
    );
}

#[test]
fn a_required_application_below_application_is_unmet_whatever_the_level_required() {
    let request = Request::new("db1");
    let mut receipt = perfect();
    receipt.guest.as_mut().unwrap().applications[0].policy = Policy::Required;
    assert_eq!(required_unmet(&request, &receipt, &judge(&receipt)), None);
    receipt.guest.as_mut().unwrap().applications[0].held = false;
    assert!(required_unmet(&request, &receipt, &judge(&receipt)).is_some());
}

#[test]
fn a_required_application_that_nobody_reports_is_unmet() {
    let policy = |kind: &str, instance: Option<&str>| Request {
        applications: vec![ApplicationPolicy {
            kind: kind.to_owned(),
            instance: instance.map(str::to_owned),
            policy: Policy::Required,
        }],
        ..Request::new("db1")
    };
    let unmet = |request: &Request, receipt: &Receipt| required_unmet(request, receipt, &judge(receipt));
    let here = Some("/var/lib/postgresql/15/main");
    assert_eq!(unmet(&policy("postgresql", None), &perfect()), None);
    assert_eq!(unmet(&policy("postgresql", here), &perfect()), None);
    assert!(unmet(&policy("postgresql", Some("/elsewhere")), &perfect()).is_some());
    assert!(unmet(&policy("mariadb", None), &perfect()).is_some());
    assert!(unmet(&policy("postgresql", None), &stock_run()).is_some());
    let nobody = Receipt { agent: Agent::None, guest: None, ..perfect() };
    assert!(unmet(&policy("postgresql", None), &nobody).is_some());
    let definition_only = Request { no_data: true, ..policy("postgresql", None) };
    assert_eq!(unmet(&definition_only, &nobody), None);
}

fn stock_run() -> Receipt {
    let filesystem = |mountpoint: &str, device: &str| StockFilesystem {
        mountpoint: mountpoint.to_owned(),
        kind: "ext4".to_owned(),
        device: device.to_owned(),
    };
    Receipt {
        agent: Agent::QemuGa { version: "7.2.22".to_owned() },
        guest: None,
        stock: Some(StockFreeze {
            frozen: 2,
            thawed: 2,
            frozen_after_point: true,
            filesystems: vec![
                filesystem("/", "vda"),
                filesystem("/srv", "vdb"),
                filesystem("/srv/bind", "vdb"),
            ],
        }),
        ..perfect()
    }
}

#[track_caller]
fn check_stock(spoil: impl FnOnce(&mut StockFreeze), level: Level, code: &str) {
    let mut receipt = stock_run();
    spoil(receipt.stock.as_mut().unwrap());
    let verdict = judge(&receipt);
    assert_eq!(verdict.level, level, "{:?}", verdict.reasons);
    assert!(verdict.reasons.iter().any(|reason| reason.code == code), "{:?}", verdict.reasons);
}

#[test]
fn a_stock_qemu_ga_reaches_filesystem_and_says_why_not_more() {
    check_stock(|_| {}, Level::Filesystem, "stock_agent");
}

#[test]
fn a_stock_freeze_with_a_hole_is_a_crash() {
    check_stock(|s| s.frozen = 1, Level::Crash, "filesystem_not_frozen");
    check_stock(|s| s.thawed = 1, Level::Crash, "early_thaw");
    check_stock(|s| s.frozen_after_point = false, Level::Crash, "early_thaw");
    check_stock(|s| s.filesystems[0].kind = "vfat".to_owned(), Level::Crash, "filesystem_not_frozen");
    check_stock(|s| s.frozen = 0, Level::Crash, "not_frozen");
}

#[test]
fn without_an_agent_it_is_a_crash_with_a_reason() {
    check(|r| (r.agent, r.guest) = (Agent::None, None), Level::Crash, "no_agent");
}

#[test]
fn a_virtio_serial_cut_to_twenty_bytes_still_names_its_disk() {
    assert!(same_serial(Some("0123456789012345678901"), "01234567890123456789"));
    assert!(!same_serial(Some("0123456789"), "01234"));
    assert!(!same_serial(Some(""), ""));
}

#[test]
fn two_disks_with_one_serial_are_told_apart_by_address_or_not_at_all() {
    check(|r| r.disks[1].serial = Some("root".to_owned()), Level::None, "filesystem_outside_point");
}

#[test]
fn a_file_system_that_is_named_twice_is_believed_the_lesser() {
    for first in [true, false] {
        let mut receipt = perfect();
        let guest = receipt.guest.as_mut().unwrap();
        let mut again = guest.filesystems[1].clone();
        again.state = FilesystemState::NotFrozen;
        guest.filesystems.insert(if first { 0 } else { 2 }, again);
        let verdict = judge(&receipt);
        assert_eq!((verdict.level, verdict.applications[0].0), (Level::Crash, Level::Crash), "{verdict:?}");
    }
}

#[test]
fn a_file_system_that_is_only_said_to_be_freezable_was_not_frozen() {
    check_guest(
        |g| g.filesystems[0].state = FilesystemState::Freezable,
        Level::Crash,
        "filesystem_not_frozen",
    );
}

/// What a guest may put where something else belongs.
fn absurd() -> Vec<serde_json::Value> {
    let texts = [
        "",
        "root",
        "data",
        "254:0",
        "254:16",
        "held",
        "host",
        "run1",
        "run2",
        "not_frozen",
        "lease_ended",
        "off",
        "\u{1b}[2J",
    ];
    let mut values: Vec<serde_json::Value> = texts.iter().map(|text| (*text).into()).collect();
    values.extend([
        u64::MAX.into(),
        (-1).into(),
        1.5.into(),
        true.into(),
        false.into(),
        serde_json::Value::Null,
    ]);
    values.extend([serde_json::json!([]), serde_json::json!({})]);
    values
}

/// Goes down a tree by choices; at their end puts a value in, or doubles what is there, or takes it out.
fn lie(value: &mut serde_json::Value, choices: &[usize], put: &serde_json::Value) {
    let Some((choice, rest)) = choices.split_first() else {
        *value = put.clone();
        return;
    };
    match value {
        serde_json::Value::Array(list) if !list.is_empty() => {
            let at = choice % list.len();
            match (rest.is_empty(), choice % 3) {
                (true, 0) => list.push(list[at].clone()),
                (true, 1) => drop(list.remove(at)),
                _ => lie(&mut list[at], rest, put),
            }
        }
        serde_json::Value::Object(members) if !members.is_empty() => {
            let at = choice % members.len();
            let member = members.values_mut().nth(at).unwrap();
            lie(member, rest, put);
        }
        other => *other = put.clone(),
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 4096, ..Default::default() })]
    #[test]
    fn no_lie_of_a_guest_is_worth_more_than_what_it_says(
        lies in proptest::collection::vec(
            (proptest::collection::vec(proptest::prelude::any::<usize>(), 1..6), 0_usize..100), 1..5)
    ) {
        let mut receipt = perfect();
        let mut told = serde_json::to_value(receipt.guest.take()).unwrap();
        let absurd = absurd();
        for (choices, put) in &lies {
            lie(&mut told, choices, &absurd[put % absurd.len()]);
        }
        // What is no report never becomes part of a receipt.
        receipt.guest = serde_json::from_value(told).unwrap_or_default();
        let verdict = judge(&receipt);
        let Some(guest) = &receipt.guest else {
            assert!(verdict.level <= Level::Crash);
            return Ok(());
        };
        assert_eq!(verdict.applications.len(), guest.applications.len());
        if verdict.level >= Level::Filesystem {
            assert!(guest.id == receipt.run && guest.thawed_by == ThawCause::Host, "{guest:?}");
            assert!(!guest.filesystems.is_empty());
            for f in &guest.filesystems {
                let frozen = matches!(f.state, FilesystemState::Held | FilesystemState::Unwritten);
                assert!(frozen || f.read_only, "{f:?}");
                assert!(!f.disks.is_empty() || f.read_only, "{f:?}");
            }
        }
        for (a, (level, _)) in guest.applications.iter().zip(&verdict.applications) {
            assert!(*level < Level::Application || (a.quiesced && a.held && a.policy != Policy::Off), "{a:?}");
            assert!(verdict.level <= *level, "{verdict:?}");
        }
        assert!(verdict.level < Level::Application || !guest.applications.is_empty());
        if verdict.level < Level::Application {
            assert!(!verdict.reasons.is_empty(), "{guest:?}");
        }
        required_unmet(&Request::new("db1"), &receipt, &verdict);
    }
}

/// PostgreSQL as a hook saw it, instead of a module.
fn attested(report: &mut GuestReport) -> &mut HookReport {
    report.applications[0].crash_safe = false;
    report.applications[0].attested_by = Some("/etc/qemu/fsfreeze-hook.d/10-pg".to_owned());
    let call = Some(HookCall { outcome: HookOutcome::Succeeded, exit_code: Some(0), ..HookCall::default() });
    let path = "/etc/qemu/fsfreeze-hook.d/10-pg".to_owned();
    report.hooks = vec![HookReport { path, freeze: call.clone(), thaw: call }];
    &mut report.hooks[0]
}

#[test]
fn what_a_hook_attests_counts_and_is_shown_as_its_word() {
    let mut receipt = perfect();
    attested(receipt.guest.as_mut().unwrap());
    let verdict = judge(&receipt);
    assert_eq!(verdict.level, Level::Application);
    let [reason] = &verdict.reasons[..] else { panic!("{:?}", verdict.reasons) };
    assert_eq!(reason.code, "attested");
    assert!(reason.message.starts_with("attested by /etc/qemu/fsfreeze-hook.d/10-pg"), "{}", reason.message);
}

#[test]
fn a_hook_vouches_for_nothing_that_it_does_not_name() {
    check_guest(
        |report| {
            attested(report);
            let other = ApplicationReport { attested_by: None, ..report.applications[0].clone() };
            report.applications.push(ApplicationReport { instance: "/other".to_owned(), ..other });
        },
        Level::Filesystem,
        "not_crash_safe",
    );
    check_guest(
        |report| {
            attested(report);
            report.applications.clear();
        },
        Level::Filesystem,
        "no_application_found",
    );
}

#[test]
fn a_hooks_word_is_worth_nothing_unless_it_was_called_before_and_after_without_complaint() {
    let spoil: [fn(&mut HookReport); 6] = [
        |hook| hook.thaw = None,
        |hook| hook.freeze = None,
        |hook| hook.path.push('x'),
        |hook| hook.thaw.as_mut().unwrap().outcome = HookOutcome::TimedOut,
        |hook| hook.thaw.as_mut().unwrap().outcome = HookOutcome::Failed,
        |hook| hook.freeze.as_mut().unwrap().outcome = HookOutcome::Failed,
    ];
    for spoil in spoil {
        check_guest(|report| spoil(attested(report)), Level::Filesystem, "attestation_unproven");
    }
    check_guest(
        |report| {
            let second = HookReport { thaw: None, ..attested(report).clone() };
            report.hooks.push(second);
        },
        Level::Filesystem,
        "attestation_unproven",
    );
}
