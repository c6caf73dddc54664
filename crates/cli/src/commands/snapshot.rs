//! `snapshot`: takes one.

use super::{of_register, of_repository, open_register, open_repository, reach_monitor};
use crate::arguments::{Global, SnapshotArguments};
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::progress::Bar;
use crate::receipt::Page;
use crate::{Output, tell};
use engine::CopyError;
use engine::snapshot::{SnapshotError, Taken, take};
use engine::watch::Cancel;
use serde_json::{Value, json};
use snapshot::{Level, Reason, Request};
use vm::at_rest::AtRestError;
use vm::nbd_client::NbdClientError;
use vm::point::steps::StepError;
use vm::point::{Away, PointError};
use vm::untouched::Touched;

pub(crate) fn run(global: &Global, wish: &SnapshotArguments, cancel: &Cancel) -> Result<Output, Explanation> {
    let request = request(wish)?;
    let register = open_register(global)?;
    let repository = open_repository(global)?;
    let taken = take(&register, &repository, &request, &Bar::new(global.json), cancel)
        .map_err(|error| explain(&request, &error))?;
    if let Some(left) = &taken.left {
        tell(&format!(
            "warning: the snapshot is complete, but not everything was cleaned up in the VM: {}\n  \
             to do: nothing; the next snapshot of this VM tries again\n",
            Plain(left)
        ));
    }
    let id = taken.id.to_string();
    let parent = taken.manifest.parent.map(|parent| parent.to_string());
    let page = Page {
        snapshot: &id,
        parent: parent.as_deref(),
        description: request.description.as_deref(),
        receipt: &taken.receipt,
        verdict: &taken.verdict,
    };
    Ok(Output::new(page.to_string(), object(&request, &taken)))
}

fn request(wish: &SnapshotArguments) -> Result<Request, Explanation> {
    // What is wanted is the most that can be reached, so it bounds what may be required.
    let default = if wish.no_data { Level::None } else { Level::Crash.min(wish.want) };
    let require = wish.require.unwrap_or(default);
    let contradiction = |cause: String| {
        Explanation::new(Exit::Usage, "no snapshot was taken", cause, "lower --require, or raise --want")
    };
    if require > wish.want {
        return Err(contradiction(format!("{require} is required, but only {} is wanted", wish.want)));
    }
    if wish.want == Level::Clean {
        let cause = "a running VM cannot be snapshotted as clean".to_owned();
        return Err(contradiction(cause));
    }
    if wish.no_data && require > Level::None {
        return Err(contradiction("a snapshot without disks is worth none".to_owned()));
    }
    Ok(Request {
        disks: wish.disks.clone(),
        no_data: wish.no_data,
        want: wish.want,
        require,
        description: wish.description.clone(),
        applications: wish.applications.clone(),
        lease_ms: wish.lease * 1000,
        ..Request::new(&wish.name)
    })
}

/// The object that `--json` ends with.
fn object(request: &Request, taken: &Taken) -> Value {
    let receipt = &taken.receipt;
    let guest = receipt.guest.clone().unwrap_or_default();
    let applications: Vec<Value> = guest
        .applications
        .iter()
        .zip(&taken.verdict.applications)
        .map(|(report, (level, reasons))| {
            json!({
                "kind": report.kind, "instance": report.instance, "version": report.version, "level": level,
                "position": report.position, "reasons": reasons,
            })
        })
        .collect();
    let disks: Vec<Value> = receipt
        .disks
        .iter()
        .filter_map(|disk| {
            let copy = disk.copy.as_ref()?;
            Some(json!({
                "name": disk.name, "size_bytes": disk.size_bytes, "method": copy.method, "read_bytes": copy.read_bytes,
                "changed_bytes": copy.changed_bytes, "stored_bytes": copy.stored_bytes,
            }))
        })
        .collect();
    let filesystems: Vec<Value> = guest
        .filesystems
        .iter()
        .map(|f| {
            json!({
                "mountpoint": f.mountpoint, "type": f.kind, "device": f.device, "state": f.state, "frozen_ms": f.frozen_ms,
            })
        })
        .collect();
    json!({
        "snapshot": taken.id.to_string(),
        "vm": request.vm,
        "parent": taken.manifest.parent.map(|parent| parent.to_string()),
        "point_at": receipt.point.as_ref().map(|point| timestamp(point.at_ms)),
        "freeze_sent_at": receipt.order.freeze_sent_ms.map(timestamp),
        "level": taken.verdict.level,
        "wanted": request.want,
        "required": request.require,
        "reasons": taken.verdict.reasons,
        "disks": disks,
        "applications": applications,
        "filesystems": filesystems,
        "lease_ms": guest.lease_ms,
        "stall": {
            "freeze_ms": guest.freeze_ms, "frozen_ms": guest.frozen_ms, "thaw_ms": guest.thaw_ms,
            "flush_rounds_ms": guest.flush_rounds_ms,
        },
        "phases_ms": receipt.phases_ms,
    })
}

/// RFC 3339 in UTC, from milliseconds since 1970.
fn timestamp(ms: u64) -> Option<String> {
    let time = jiff::Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok()?;
    Some(format!("{time:.3}"))
}

pub(super) fn explain(request: &Request, error: &SnapshotError) -> Explanation {
    let vm = &request.vm;
    let problem = format!("no snapshot of {vm} was taken");
    let plain = |exit, to_do: &str| Explanation::new(exit, &problem, error.to_string(), to_do);
    match error {
        SnapshotError::Register(error) => of_register(&problem, error),
        SnapshotError::Repository(error) | SnapshotError::Copy { source: CopyError::Store(error), .. } => {
            let explained = of_repository(&problem, error);
            if explained.exit != Exit::Damaged {
                return explained;
            }
            // What is damaged belongs to an earlier snapshot, with which this one was compared.
            let to_do = "run `stillpoint verify` to see which earlier snapshots are affected; restore the object from a copy \
                         of the repository, or delete them: the next one is then complete without them";
            Explanation { to_do: to_do.to_owned(), ..explained }
        }
        SnapshotError::Monitor(_) => plain(Exit::Unreachable, &reach_monitor(vm)),
        SnapshotError::Leftovers(_) => {
            plain(Exit::Failed, "try again; if it persists, restart the VM: its disks are sound")
        }
        SnapshotError::Held(_) => plain(
            Exit::Busy,
            "wait until it has ended; if it died, take a snapshot from where it was started, which undoes what it left, or \
             restart the VM",
        ),
        SnapshotError::OtherFilter(_) | SnapshotError::Point(PointError::Step(StepError::ServerTaken)) => {
            plain(Exit::Busy, "wait until that backup has ended, or end it with its own tool")
        }
        SnapshotError::Away(Away::Migrating(_))
        | SnapshotError::Point(PointError::Away(Away::Migrating(_))) => plain(
            Exit::Busy,
            "wait until it has migrated, and register the monitor of the QEMU that it then runs in; or cancel the migration",
        ),
        SnapshotError::Away(_) | SnapshotError::Point(PointError::Away(_)) => plain(
            Exit::Unreachable,
            "if it migrates, wait until it has; then register the monitor of the QEMU that it runs in",
        ),
        SnapshotError::Ended(_) => plain(
            Exit::Unreachable,
            "start the VM, and take it again; no snapshot is left of this run, and the VM's disks are as the VM left them",
        ),
        SnapshotError::Image { why: Touched::InUse(_), .. } => plain(
            Exit::Busy,
            "if the VM runs, register the monitor that it has now with `vm remove` and `vm add`; if another program writes to \
             the image, wait until it has ended",
        ),
        SnapshotError::Image { .. } | SnapshotError::AtRest(AtRestError::Unreadable { .. }) => plain(
            Exit::Unreachable,
            "start the VM, and take it then; if the image was moved, the next snapshot of the running VM learns its place",
        ),
        SnapshotError::AtRest(AtRestError::Folder { .. }) => {
            plain(Exit::Failed, "check the state folder's owner and space, or give another with --state")
        }
        SnapshotError::AtRest(_) => plain(
            Exit::Failed,
            "see the cause: QEMU's own tools must be able to open the image; or start the VM, and take it then",
        ),
        SnapshotError::Started(_) => plain(
            Exit::Unreachable,
            "take it again: a running VM is snapshotted as it runs; no snapshot is left of this run, and the VM was not disturbed",
        ),
        SnapshotError::NoSuchDisk { .. } | SnapshotError::NoDisk => plain(
            Exit::NotFound,
            &format!("see `stillpoint vm show {vm}` for its disks, and why others do not count"),
        ),
        SnapshotError::Short(_) => plain(
            Exit::Failed,
            "make room there, or give a state folder on another file system with --state, and try again; the VM was not disturbed",
        ),
        SnapshotError::Plan(_) => plain(Exit::Usage, "give another state folder with --state"),
        SnapshotError::Point(PointError::Paused(_)) => {
            plain(Exit::Failed, "let the VM run, with `cont` in QEMU's monitor; its disks are sound")
        }
        SnapshotError::Point(PointError::Unsupported(_)) => plain(Exit::Failed, "use QEMU 7.2 or later"),
        SnapshotError::Point(PointError::IoThread(_)) => plain(
            Exit::Failed,
            "use QEMU 9 or later, attach the disk without an I/O thread, or leave it out with --disk",
        ),
        SnapshotError::Point(PointError::Passthrough(_)) => plain(
            Exit::Failed,
            "attach the disk as scsi-hd, or to a virtio-blk without scsi=on; or name the other disks with --disk; or shut the VM off, \
             and take it then",
        ),
        SnapshotError::Point(PointError::Step(step)) if step.is_out_of_space() => plain(
            Exit::Failed,
            "make room in the state folder, or give another with --state, and try again; the VM was not disturbed",
        ),
        SnapshotError::Point(_) => plain(Exit::Failed, "see the cause, and try again; the disks are sound"),
        SnapshotError::Freeze { thawed, .. } => {
            let state = if *thawed {
                "The guest is not frozen"
            } else {
                "The thaw was not answered, so see at once whether the guest still hangs"
            };
            plain(
                Exit::BelowRequired,
                &format!("see `stillpoint check {vm}`; or accept less with --require crash. {state}"),
            )
        }
        SnapshotError::BelowRequired { reached, required, reasons } => Explanation::new(
            Exit::BelowRequired,
            format!("no {required}-consistent snapshot of {vm} was taken"),
            format!(
                "only {reached} was reached: {}; {}, and nothing was kept",
                list(reasons),
                state(reasons)
            ),
            format!("see `stillpoint check {vm}`, mend the cause, or accept it with --require {reached}"),
        ),
        SnapshotError::RequiredApplication(reason) => Explanation::new(
            Exit::BelowRequired,
            format!("no snapshot of {vm} was taken: a required application was not quiesced"),
            format!("{}: {}; nothing was kept", reason.subject, reason.message),
            format!("see `stillpoint check {vm}`, or make its policy preferred"),
        ),
        // No lack of room brings this about, and trying again would not help.
        SnapshotError::Copy { source: CopyError::Read(NbdClientError::TooManyExtents), .. } => plain(
            Exit::Failed,
            "leave the disk out with --disk, and report this as a bug: QEMU told of the disk in pieces smaller than a sector; the \
             VM was not disturbed",
        ),
        SnapshotError::Copy { .. } => plain(
            Exit::Failed,
            "make room in the state folder, whose disk was most likely full or slow, and try again; a VM that still runs was \
             not disturbed",
        ),
        SnapshotError::Interrupted => Explanation::new(
            Exit::Interrupted,
            problem,
            "interrupted; a guest that may have been frozen was told to thaw, and what was begun in the VM was undone as far as it answered",
            "nothing, or take it again",
        ),
    }
}

/// Whether the guest was let go of. A stock agent that stops answering may leave it frozen, and that must be said.
fn state(reasons: &[Reason]) -> &'static str {
    if reasons.iter().any(|reason| reason.code == "thaw_failed") {
        "the thaw was not answered, so see at once whether the guest still hangs"
    } else {
        "the guest is not frozen"
    }
}

fn list(reasons: &[Reason]) -> String {
    let shown: Vec<String> =
        reasons.iter().take(4).map(|reason| format!("{}: {}", reason.subject, reason.message)).collect();
    let more = reasons.len().saturating_sub(shown.len());
    if more > 0 { format!("{} and {more} more", shown.join("; ")) } else { shown.join("; ") }
}
