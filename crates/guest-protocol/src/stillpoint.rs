//! Our own commands beside qemu-ga's: arguments and answers, as `docs/protocol/agent.md` lists them.
//!
//! The answers are evidence, not verdicts: the guest says what it did and saw, and the host computes a level
//! from that (`snapshot::level`). Everything here comes from a guest that may lie, so the host bounds and escapes it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest run id that is accepted, in bytes. Ours are 26; a host may choose its own.
pub const RUN_ID_BYTES_MAX: usize = 64;
/// Longest lease that a host may ask for. Source: KubeVirt's own limit for a freeze, 5 minutes.
pub const LEASE_MS_MAX: u64 = 300_000;
/// Most file systems in a report; a guest with more gets the reason `too_many_filesystems`.
pub const FILESYSTEMS_MAX: usize = 4096;
/// Most applications in a report.
pub const APPLICATIONS_MAX: usize = 256;
/// Most hooks of a run.
pub const HOOKS_MAX: usize = 64;
/// Longest text in a report, in bytes; longer ones end in `…`.
pub const TEXT_BYTES_MAX: usize = 1024;

/// What a run tries for in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// Freeze file systems, leave applications alone.
    Filesystem,
    /// Quiesce applications, then freeze file systems.
    Application,
}

/// What to do about one application (or all of a kind).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Not quiesced: the run fails.
    Required,
    /// Not quiesced: the level falls.
    #[default]
    Preferred,
    /// Not quiesced on purpose; still counted.
    Off,
}

/// A policy for the applications that it names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApplicationPolicy {
    /// Kind as reported, e.g. `postgresql`.
    pub kind: String,
    /// Instance as reported; absent: every instance of the kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// What to do about it.
    pub policy: Policy,
}

/// Arguments of `stillpoint-check` (rehearsal: everything but locks and freeze).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckArguments {
    /// What the later run will want.
    #[serde(default = "want_application")]
    pub want: Want,
    /// Policies of the later run.
    #[serde(default)]
    pub applications: Vec<ApplicationPolicy>,
}

/// Arguments of `stillpoint-freeze`. The answer comes when everything that could be frozen is frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreezeArguments {
    /// The run's id, chosen by the host; renew and thaw name it again.
    pub id: String,
    /// How long the guest may stay frozen, in milliseconds, counted in the guest from the first FIFREEZE.
    pub lease_ms: u64,
    /// Longest time for prepare (checkpoints, flush rounds), in milliseconds.
    #[serde(default = "prepare_ms_default")]
    pub prepare_ms_max: u64,
    /// Longest time for taking locks, per application, in milliseconds.
    #[serde(default = "quiesce_ms_default")]
    pub quiesce_ms_max: u64,
    /// The stall that the host accepts for all FIFREEZE calls together, in milliseconds.
    /// A freeze predicted to take longer is refused before it starts.
    #[serde(default = "budget_ms_default")]
    pub budget_ms: u64,
    /// What to try for.
    #[serde(default = "want_application")]
    pub want: Want,
    /// Policies; an application that none names is `preferred`.
    #[serde(default)]
    pub applications: Vec<ApplicationPolicy>,
}

impl FreezeArguments {
    /// A run of this id and lease (milliseconds), everything else by default.
    pub fn new(id: impl Into<String>, lease_ms: u64) -> Self {
        Self {
            id: id.into(),
            lease_ms,
            prepare_ms_max: prepare_ms_default(),
            quiesce_ms_max: quiesce_ms_default(),
            budget_ms: budget_ms_default(),
            want: want_application(),
            applications: Vec::new(),
        }
    }
}

const fn want_application() -> Want {
    Want::Application
}
const fn prepare_ms_default() -> u64 {
    120_000
}
const fn quiesce_ms_default() -> u64 {
    10_000
}
const fn budget_ms_default() -> u64 {
    5_000
}

/// Arguments of `stillpoint-renew`: the guest may stay frozen for `lease_ms` from now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenewArguments {
    /// The run's id.
    pub id: String,
    /// New lease from now, in milliseconds.
    pub lease_ms: u64,
}

/// Arguments of `stillpoint-thaw`. Thawing what is thawed answers that run's report again; an unknown id is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThawArguments {
    /// The run's id.
    pub id: String,
}

/// Answer of `stillpoint-check`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Version of the agent, e.g. `0.1.0`.
    pub agent_version: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Smallest freeze budget that a discovered application allows, in milliseconds.
    pub budget_ms: u64,
    /// Dirty and write-back pages now, in bytes. Source: `/proc/meminfo`.
    pub dirty_bytes: u64,
    /// Predicted time of the FIFREEZE calls after flushing, in milliseconds.
    pub predicted_freeze_ms: u64,
    /// Every file system that counts, with what would become of it.
    pub filesystems: Vec<FilesystemReport>,
    /// Every discovered application; `quiesced` and `held` are false.
    pub applications: Vec<ApplicationReport>,
    /// Hooks that would be called, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<String>,
    /// Mounts that no freeze can cover.
    pub uncovered: Vec<Reason>,
    /// What stands in the way.
    pub reasons: Vec<Reason>,
}

/// Answer of `stillpoint-freeze`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeReport {
    /// The run's id.
    pub id: String,
    /// How many superblocks are frozen by this run.
    pub frozen: u64,
    /// Lease granted, in milliseconds from the first FIFREEZE; may be less than asked for.
    pub lease_ms: u64,
    /// Time of the FIFREEZE calls together, in milliseconds.
    pub freeze_ms: u64,
}

/// Answer of `stillpoint-renew`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewReport {
    /// The run's id.
    pub id: String,
    /// Lease granted from now, in milliseconds.
    pub lease_ms: u64,
}

/// Answer of `stillpoint-status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Where the guest stands.
    pub state: State,
    /// The run that holds it, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What is left of the lease, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_left_ms: Option<u64>,
    /// The last run's report, kept until the next run or the agent's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<GuestReport>,
}

/// Where the guest stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is held.
    #[default]
    Thawed,
    /// Checkpoints and flush rounds.
    Preparing,
    /// Locks are being taken.
    Quiescing,
    /// FIFREEZE calls run.
    Freezing,
    /// Everything that could be frozen is frozen.
    Frozen,
    /// FITHAW calls and the release of locks run.
    Thawing,
}

/// The guest half of a receipt: the answer of `stillpoint-thaw`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// The run's id.
    pub id: String,
    /// Version of the agent.
    pub agent_version: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Guest's wall clock when the last FIFREEZE returned, milliseconds since 1970; for people, proves nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_at_ms: Option<u64>,
    /// Lease that was granted at the freeze, in milliseconds.
    pub lease_ms: u64,
    /// Who ended the freeze.
    pub thawed_by: ThawCause,
    /// Checkpoints and discovery, in milliseconds.
    pub prepare_ms: u64,
    /// Taking locks, in milliseconds.
    pub quiesce_ms: u64,
    /// Each flush round before the freeze, in milliseconds.
    pub flush_rounds_ms: Vec<u64>,
    /// First flush round begun to first FIFREEZE called, with a quiesce that came between, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flushing_ms: Option<u64>,
    /// First FIFREEZE called to last FIFREEZE returned, in milliseconds.
    pub freeze_ms: u64,
    /// First FIFREEZE called to last FITHAW returned, in milliseconds.
    pub frozen_ms: u64,
    /// First FITHAW called to last FITHAW returned, in milliseconds.
    pub thaw_ms: u64,
    /// Every local file system, frozen or not.
    pub filesystems: Vec<FilesystemReport>,
    /// Every discovered application.
    pub applications: Vec<ApplicationReport>,
    /// Every hook that was called, in the order of the freeze.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<HookReport>,
    /// Mounts that no freeze can cover (network file systems, ZFS …).
    pub uncovered: Vec<Reason>,
    /// Processes that write to the frozen file systems and belong to no discovered application.
    pub unknown_writers: Vec<UnknownWriter>,
    /// What went wrong in the guest as a whole.
    pub reasons: Vec<Reason>,
}

/// Who ended a freeze.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThawCause {
    /// Nothing was frozen.
    #[default]
    NothingFrozen,
    /// The host asked for it.
    Host,
    /// The freeze itself failed and was undone.
    FailedFreeze,
    /// The lease ended.
    LeaseEnded,
    /// The agent was told to stop, or died, and the guard thawed.
    AgentGone,
}

/// One superblock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemReport {
    /// Where it is seen best (the shortest reachable mount point).
    pub mountpoint: String,
    /// Type, e.g. `ext4`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Source as mountinfo names it, e.g. `/dev/vda1`.
    pub device: String,
    /// `MAJOR:MINOR` of the superblock.
    pub device_number: String,
    /// The whole disks that carry it, through partitions, LVM, md, LUKS and loop files. Empty: none found.
    pub disks: Vec<GuestDisk>,
    /// Mounted or made read-only at the block level: nothing can be written.
    pub read_only: bool,
    /// What became of it.
    pub state: FilesystemState,
    /// FIFREEZE called to FITHAW returned, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u64>,
    /// The kernel's words where something failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// What became of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilesystemState {
    /// In a rehearsal: would be frozen.
    #[default]
    Freezable,
    /// Frozen by this run, and our FITHAW was the one that thawed it.
    Held,
    /// Frozen by this run, but our FITHAW found it thawed already.
    EarlyThaw,
    /// Cannot be frozen (EOPNOTSUPP), but a flush before and a flush after with no block written in between
    /// prove that nothing changed.
    Unwritten,
    /// Cannot be frozen.
    Unsupported,
    /// Frozen by someone else (EBUSY); left alone.
    HeldByOther,
    /// No mount point of it could be opened.
    Unreachable,
    /// FIFREEZE failed for another reason.
    Failed,
    /// The run did not freeze (refused, aborted or not wanted).
    NotFrozen,
}

/// A whole disk as the guest sees it, for matching with the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDisk {
    /// Kernel name, e.g. `vda`.
    pub name: String,
    /// Serial number, if the disk has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// PCI address of its controller, `DDDD:BB:SS.F`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// One instance of an application.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationReport {
    /// Kind, e.g. `postgresql`.
    pub kind: String,
    /// What tells it from its like, e.g. the data directory.
    pub instance: String,
    /// Server version, e.g. `15.18`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Policy that was applied.
    pub policy: Policy,
    /// Superblocks (`MAJOR:MINOR`) that hold any of its files.
    pub device_numbers: Vec<String>,
    /// Its own flush or lock was granted before the freeze.
    pub quiesced: bool,
    /// What was granted is a lock that keeps its writers out until after the thaw (not only a flush).
    #[serde(default)]
    pub locked: bool,
    /// After the thaw: same server, same session, lock never released.
    pub held: bool,
    /// Crash-safe by its own settings, all of which could be read (with `quiesced`: flushed before the freeze).
    pub crash_safe: bool,
    /// Data that only a step in prepare saved: age of that step at the freeze, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_ms_before: Option<u64>,
    /// Log position reached at the quiesce, in the application's own notation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Settings and facts that the claim rests on.
    pub facts: BTreeMap<String, String>,
    /// Hook that claims the quiesce, if no module did; it is among the report's hooks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attested_by: Option<String>,
    /// Why it is less than it could be, and what the copy will need.
    pub reasons: Vec<Reason>,
}

/// One hook: called before the freeze, and again after the thaw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookReport {
    /// Its path.
    pub path: String,
    /// What came of the call before the freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<HookCall>,
    /// What came of the call after the thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<HookCall>,
}

/// One call of a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookCall {
    /// How it ended.
    pub outcome: HookOutcome,
    /// Its exit code, if it ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// How much it wrote, in bytes.
    pub output_bytes: u64,
    /// The beginning and the end of that, where the guest's administrator lets it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

/// How a call of a hook ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HookOutcome {
    /// With exit code 0.
    Succeeded,
    /// With another exit code, or by a signal.
    Failed,
    /// It took too long and was ended.
    TimedOut,
    /// A thaw came, or the agent was told to end, and it was ended.
    Aborted,
    /// It could not be started.
    #[default]
    NotStarted,
    /// It is not root's own, or others may write to it.
    Refused,
}

/// A process that was seen writing and belongs to no discovered application.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnknownWriter {
    /// Process id.
    pub pid: u32,
    /// Its `comm`.
    pub command: String,
    /// Mount points of the file systems on which it has files open for writing.
    pub mountpoints: Vec<String>,
}

/// One reason: a stable code, what it is about, and a sentence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Stable code, e.g. `early_thaw`.
    pub code: String,
    /// Mount point, application or disk.
    pub subject: String,
    /// A sentence for people.
    pub message: String,
}

impl Reason {
    /// Puts the three parts together.
    pub fn new(code: &str, subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), subject: subject.into(), message: message.into() }
    }
}
