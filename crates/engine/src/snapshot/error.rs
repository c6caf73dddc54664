//! Why there is no snapshot.

use crate::copy::CopyError;
use crate::register::RegisterError;
use snapshot::conduct::Failure;
use snapshot::{Level, Reason};
use vm::at_rest::AtRestError;
use vm::monitor::MonitorError;
use vm::point::{Away, PlanError, PointError, Short, UndoError};
use vm::untouched::Touched;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The register or the journal failed, or the VM is busy.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The monitor cannot be reached, or failed before anything was changed.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// What an earlier run left cannot be removed.
    #[error("what an earlier run left in the VM cannot be removed: {0}")]
    Leftovers(#[source] UndoError),
    /// A run that is not in this state folder's journals holds the VM.
    #[error("the run {0} works on this VM, or died at it; it was not started from this state folder")]
    Held(String),
    /// Another tool's backup filter is in place.
    #[error("a backup's filter that is not this run's is in place on disk '{0}'")]
    OtherFilter(String),
    /// The disks are not this QEMU's, or will not be for long.
    #[error(transparent)]
    Away(Away),
    /// The VM ended before the snapshot was complete.
    #[error("the VM ended during the run: {0}")]
    Ended(String),
    /// Nobody listens at the monitor, and yet an image cannot be read as that of a VM that is shut off.
    #[error("nobody listens at the VM's monitor, so it was taken for shut off; but of disk '{disk}' {why}")]
    Image {
        /// Its name.
        disk: String,
        /// Why.
        why: Touched,
    },
    /// The images cannot be opened.
    #[error(transparent)]
    AtRest(#[from] AtRestError),
    /// An image was written to while it was read.
    #[error("the VM was started, or another program wrote to its disks, while they were read: {0}")]
    Started(Touched),
    /// A wanted disk is not there, or does not count.
    #[error("'{disk}' is no disk of this VM that can be in a snapshot; there are: {known}")]
    NoSuchDisk {
        /// As asked for.
        disk: String,
        /// Names of those that count.
        known: String,
    },
    /// No disk counts.
    #[error("this VM has no disk that can be in a snapshot")]
    NoDisk,
    /// The names do not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Scratch would take the room of the VM's own images.
    #[error(transparent)]
    Short(#[from] Short),
    /// QEMU could not cut the disks.
    #[error("QEMU could not cut the disks: {0}")]
    Point(#[from] PointError),
    /// The guest could not be frozen, and a frozen one was required.
    #[error("the guest could not be frozen: {cause}")]
    Freeze {
        /// The agent's words.
        cause: String,
        /// The guest answered the thaw that followed, or said that nothing of the run is frozen.
        thawed: bool,
    },
    /// The snapshot would be worth less than required.
    #[error("the snapshot would be {reached}, and {required} was required")]
    BelowRequired {
        /// What it would be worth.
        reached: Level,
        /// What was required.
        required: Level,
        /// Why.
        reasons: Vec<Reason>,
    },
    /// A required application was not quiesced.
    #[error("{}: {}", .0.subject, .0.message)]
    RequiredApplication(Reason),
    /// A disk could not be copied.
    #[error("disk '{disk}': {source}")]
    Copy {
        /// Its name.
        disk: String,
        /// Why.
        source: CopyError,
    },
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// Someone wanted it to end.
    #[error("interrupted")]
    Interrupted,
}

impl SnapshotError {
    /// It is one that the end of the VM's QEMU may have caused.
    pub(super) fn is_of_the_vm(&self) -> bool {
        matches!(
            self,
            Self::Monitor(_)
                | Self::Point(_)
                | Self::Copy { source: CopyError::Read(_) | CopyError::Incomplete, .. }
        )
    }
}

impl From<Away> for SnapshotError {
    fn from(away: Away) -> Self {
        match away {
            Away::Monitor(error) => Self::Monitor(error),
            away => Self::Away(away),
        }
    }
}

impl From<Failure<Self>> for SnapshotError {
    fn from(failure: Failure<Self>) -> Self {
        match failure {
            Failure::Freeze { cause, thawed } => Self::Freeze { cause, thawed },
            Failure::RequiredApplication(reason) => Self::RequiredApplication(reason),
            Failure::BelowRequired { reached, required, reasons } => {
                Self::BelowRequired { reached, required, reasons }
            }
            Failure::Interrupted => Self::Interrupted,
            Failure::Action(error) => error,
        }
    }
}
