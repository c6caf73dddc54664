//! What goes wrong in one run, decided by its seed.

use std::fmt;

/// Where a run stands when something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Everything slow before the freeze.
    Prepare,
    /// Freeze was asked for.
    Freeze,
    /// The disks are being cut.
    Cut,
    /// Thaw was asked for.
    Thaw,
    /// Disks are read and stored.
    Copy,
    /// The manifest is written.
    Seal,
    /// A kept run clears up.
    Release,
    /// A failed run clears up.
    Undo,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Prepare,
        Self::Freeze,
        Self::Cut,
        Self::Thaw,
        Self::Copy,
        Self::Seal,
        Self::Release,
        Self::Undo,
    ];
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// Answers of the guest take seconds, or longer than anybody waits.
    AnswersLate,
    /// Answers of the guest come twice.
    AnswersTwice,
    /// Answers of the guest are lost.
    AnswersLost,
    /// What the host says is lost.
    RequestsLost,
    /// Lines that nobody sent, and answers to other conversations.
    StrayLines,
    /// The connection breaks, perhaps in the middle of a line, and can be made again.
    LineCut,
    /// The connection breaks and cannot be made again for a while.
    LineDead,
    /// The agent is killed and started again.
    AgentKilled,
    /// The agent stands still for a while.
    AgentHangs,
    /// The guard is killed.
    GuardKilled,
    /// The guard stands still for a while.
    GuardHangs,
    /// Agent and guard are killed at once.
    BothKilled,
    /// The guest's owner pauses its VM for a while: the guest's clock stands, the host's goes on.
    GuestPaused,
    /// The guest is reset.
    GuestReset,
    /// Someone else in the guest thaws a file system.
    ForeignThaw,
    /// An application's server restarts or its session ends.
    SessionLost,
    /// The host's program stands still for a while, perhaps longer than the lease.
    HostStalls,
    /// Someone wants the run to end.
    Interrupted,
    /// The host's program is killed.
    HostKilled,
    /// The host's program has a defect and panics.
    HostPanics,
    /// A command of QEMU fails.
    MonitorFails,
    /// A command of QEMU is carried out but its answer does not come.
    MonitorSilent,
    /// QEMU ends.
    QemuDies,
    /// The snapshot in QEMU breaks: scratch is full or too slow.
    SnapshotBreaks,
    /// One write to the store fails.
    StoreFails,
    /// Every write to the store fails from now on.
    StoreFull,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::AnswersLate,
        Self::AnswersTwice,
        Self::AnswersLost,
        Self::RequestsLost,
        Self::StrayLines,
        Self::LineCut,
        Self::LineDead,
        Self::AgentKilled,
        Self::AgentHangs,
        Self::GuardKilled,
        Self::GuardHangs,
        Self::BothKilled,
        Self::GuestPaused,
        Self::GuestReset,
        Self::ForeignThaw,
        Self::SessionLost,
        Self::HostStalls,
        Self::Interrupted,
        Self::HostKilled,
        Self::HostPanics,
        Self::MonitorFails,
        Self::MonitorSilent,
        Self::QemuDies,
        Self::SnapshotBreaks,
        Self::StoreFails,
        Self::StoreFull,
    ];

    /// Whether it can meet a run at this step at all: a store is not written to while a guest freezes.
    pub fn fits(self, step: Step) -> bool {
        match self {
            Self::StoreFails | Self::StoreFull => matches!(step, Step::Copy | Step::Seal),
            Self::MonitorFails | Self::MonitorSilent => {
                matches!(step, Step::Prepare | Step::Cut | Step::Copy | Step::Release | Step::Undo)
            }
            Self::SnapshotBreaks => matches!(step, Step::Thaw | Step::Copy),
            // A guard lives no longer than its run in the guest.
            Self::ForeignThaw | Self::GuardHangs => {
                matches!(step, Step::Freeze | Step::Cut | Step::Thaw)
            }
            _ => true,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Every fault at every step that it fits.
pub fn pairs() -> impl Iterator<Item = (Step, Fault)> {
    Step::ALL.into_iter().flat_map(|step| {
        Fault::ALL.into_iter().filter(move |fault| fault.fits(step)).map(move |fault| (step, fault))
    })
}

/// The faults of one run: none to three, each at a step. Half of them fall where a level is won or lost.
pub fn draw(rng: &mut fastrand::Rng) -> Vec<(Step, Fault)> {
    let all: Vec<(Step, Fault)> = pairs().collect();
    let is_decisive = |(step, _): &(Step, Fault)| matches!(step, Step::Freeze | Step::Cut | Step::Thaw);
    let decisive: Vec<(Step, Fault)> = all.iter().copied().filter(is_decisive).collect();
    let count = [0, 1, 1, 1, 2, 2, 3][rng.usize(..7)];
    let mut one = || {
        let from = if rng.bool() { &decisive } else { &all };
        from[rng.usize(..from.len())]
    };
    (0..count).map(|_| one()).collect()
}
