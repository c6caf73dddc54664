//! How errors are printed, one of each kind that a person may meet.

use super::*;
use ::snapshot::{Level, Reason, Request};
use ::vm::monitor::MonitorError;
use ::vm::nbd_client::NbdClientError;
use ::vm::point::steps::StepError;
use ::vm::point::{Away, PointError, Short};
use engine::CopyError;
use engine::boot::BootError;
use engine::restore::RestoreError;
use engine::snapshot::SnapshotError;
use std::io::{self, ErrorKind};

fn print(explanations: &[Explanation]) -> String {
    let print = |e: &Explanation| format!("[{}]\n{e}\n", e.exit as u8);
    explanations.iter().map(print).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_snapshot_that_was_not_taken_says_why_and_what_to_do() {
    let request = Request::new("db1");
    let below = |code: &str, message: &str| SnapshotError::BelowRequired {
        reached: Level::Crash,
        required: Level::Application,
        reasons: vec![Reason::new(code, "db1", message)],
    };
    let copy = |source: NbdClientError| SnapshotError::Copy {
        disk: "data".to_owned(),
        source: CopyError::Read(source),
    };
    let path = || PathBuf::from("/run/vms/db1.qmp");
    let errors = [
        SnapshotError::Register(RegisterError::Unknown("db1".to_owned())),
        SnapshotError::Register(RegisterError::Busy("db1".to_owned())),
        SnapshotError::Monitor(MonitorError::Connect { path: path(), source: ErrorKind::NotFound.into() }),
        SnapshotError::Monitor(MonitorError::Busy { path: path() }),
        SnapshotError::Held("abcdefgh".to_owned()),
        SnapshotError::OtherFilter("data".to_owned()),
        SnapshotError::Point(PointError::Step(StepError::ServerTaken)),
        SnapshotError::Away(Away::Elsewhere("postmigrate".to_owned())),
        SnapshotError::Away(Away::Migrating("active".to_owned())),
        SnapshotError::Ended("the NBD server closed the connection".to_owned()),
        SnapshotError::NoSuchDisk { disk: "dat".to_owned(), known: "root, data".to_owned() },
        SnapshotError::NoDisk,
        SnapshotError::Short(Short {
            folder: "/var/lib/stillpoint/scratch".into(),
            free_bytes: 700 << 20,
            reserve_bytes: 1 << 30,
        }),
        SnapshotError::Point(PointError::Unsupported("snapshot-access")),
        SnapshotError::Point(PointError::IoThread("data".to_owned())),
        SnapshotError::Point(PointError::Passthrough("data".to_owned())),
        SnapshotError::Point(PointError::Paused(MonitorError::Io(ErrorKind::BrokenPipe.into()))),
        SnapshotError::Freeze { cause: "the agent failed stillpoint-freeze: busy".to_owned(), thawed: true },
        SnapshotError::Freeze {
            cause: "the agent did not answer stillpoint-freeze within 30000 ms".to_owned(),
            thawed: false,
        },
        below("vm_paused", "the VM is paused, so nobody in the guest can answer"),
        below("thaw_failed", "the agent did not answer guest-fsfreeze-thaw within 10000 ms"),
        SnapshotError::RequiredApplication(Reason::new(
            "not_quiesced",
            "postgresql",
            "CHECKPOINT took too long",
        )),
        copy(NbdClientError::Closed),
        copy(NbdClientError::TooManyExtents),
        SnapshotError::Interrupted,
    ];
    let printed: Vec<_> = errors.iter().map(|error| super::snapshot::explain(&request, error)).collect();
    let printed = print(&printed);
    insta::assert_snapshot!(printed);
}

#[test]
fn a_disk_that_was_not_restored_says_why_and_what_to_do() {
    let path = || PathBuf::from("/srv/images/data.raw");
    let target = |kind: ErrorKind| RestoreError::Target { path: path(), source: io::Error::from(kind) };
    let errors = [
        RestoreError::Exists(path()),
        RestoreError::NotAFile("/srv/images".into()),
        RestoreError::NoFolder("/srv/images".into()),
        RestoreError::InUse(path()),
        RestoreError::Changed(path()),
        RestoreError::TooSmall { path: "/dev/sdx".into(), have: 1 << 20, need: 1 << 30 },
        RestoreError::RawOnly("/dev/sdx".into()),
        target(ErrorKind::StorageFull),
        target(ErrorKind::PermissionDenied),
        RestoreError::Convert { path: path(), cause: "exit status: 1: no space".to_owned() },
        RestoreError::Interrupted,
    ];
    let printed: Vec<_> = errors.iter().map(|error| restore::explain("data", error)).collect();
    let printed = print(&printed);
    insta::assert_snapshot!(printed);
}

#[test]
fn a_vm_that_was_not_removed_says_why_and_what_to_do() {
    let errors = [
        RegisterError::Unfinished("db1".to_owned()),
        RegisterError::Scratch { name: "db1".to_owned(), cause: "0.qcow2: permission denied".to_owned() },
    ];
    let printed = print(&errors.iter().map(|e| of_register("db1 was not removed", e)).collect::<Vec<_>>());
    insta::assert_snapshot!(printed);
}

#[test]
fn a_twin_that_was_not_started_says_why_and_what_to_do() {
    let errors = [
        BootError::NoDisk,
        BootError::Machine("microvm".to_owned()),
        BootError::Missing("kernel"),
        BootError::FirmwareFormat("qcow2".to_owned()),
        BootError::File { path: "/var/lib/stillpoint/twins/a".into(), source: ErrorKind::StorageFull.into() },
    ];
    let printed = print(&errors.iter().map(boot::explain).collect::<Vec<_>>());
    insta::assert_snapshot!(printed);
}

#[test]
fn a_repository_that_cannot_be_used_says_why_and_what_to_do() {
    let errors = [
        Error::NoSuchSnapshot { prefix: "db7".to_owned() },
        Error::AmbiguousSnapshot {
            prefix: "0".to_owned(),
            matches: vec!["01m84nfr53zabrmw1adyhgwn21".parse().unwrap()],
        },
        Error::EmptyPassphrase,
        Error::Missing { object: "packs/a/00000000".to_owned() },
    ];
    let printed: Vec<_> = errors.iter().map(|e| of_repository("the repository cannot be used", e)).collect();
    let printed = print(&printed);
    insta::assert_snapshot!(printed);
}
