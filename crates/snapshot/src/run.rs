//! What a run does next: one table, for every state and everything that can happen in it.
//!
//! The engine carries the actions out and reports back what happened. Two rules hold in every row: after a freeze
//! was asked for, thaw is sent, whatever the answer was; and what a failed run leaves behind is undone.

use crate::{Level, Request};

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing has been asked of the guest.
    Prepared,
    /// Freeze was sent.
    Freezing,
    /// The freeze failed; the guest is being thawed before the disks are cut without it.
    GivingUpFreeze,
    /// The disks are being cut.
    Cutting,
    /// Thaw was sent after the point.
    Thawing,
    /// The level is being computed.
    Judging,
    /// Disks are read and stored.
    Copying,
    /// The manifest is being written.
    Sealing,
    /// The snapshot exists; scratch and old bitmaps are being removed.
    Releasing,
    /// The run failed; the guest is being thawed.
    Abandoning,
    /// The run failed and the guest is thawed; everything is being undone.
    Undoing,
    /// Over: the snapshot exists.
    Kept,
    /// Over: there is no snapshot.
    Abandoned,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Preparations are complete.
    Begin,
    /// The guest says that it is frozen.
    Frozen,
    /// The guest refused, failed or did not answer the freeze.
    FreezeFailed,
    /// Every disk was cut.
    PointTaken,
    /// QEMU refused the point.
    PointFailed,
    /// The guest answered the thaw, or never will: either way it was sent and its time is over.
    ThawEnded,
    /// The level is at least what is required.
    LevelReached,
    /// The level is below what is required.
    LevelMissed,
    /// Every disk is stored.
    Copied,
    /// Reading or storing failed, or the snapshot broke.
    CopyFailed,
    /// The manifest is written.
    Sealed,
    /// The manifest could not be written.
    SealFailed,
    /// Release or undo is complete.
    Cleared,
    /// Someone wants the run to end.
    Interrupted,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send freeze and wait for the answer.
    Freeze,
    /// Cut the disks.
    Cut,
    /// Send thaw and wait for the answer, bounded.
    Thaw,
    /// Compute the level.
    Judge,
    /// Read and store.
    Copy,
    /// Write the manifest.
    Seal,
    /// Remove scratch and the old bitmaps; the new ones are the next base.
    Release,
    /// Remove scratch and merge the new bitmaps back, so that the next run is complete.
    Undo,
}

/// One run's walk through the table.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    state: State,
    freezes: bool,
    require: Level,
}

impl Run {
    /// A run of `request`, whose preparations are not complete yet. `can_freeze`: an agent answers in the guest.
    pub fn new(request: &Request, can_freeze: bool) -> Self {
        Self { state: State::Prepared, freezes: request.freezes() && can_freeze, require: request.require }
    }

    /// Where the run stands.
    pub const fn state(&self) -> State {
        self.state
    }

    /// The guest may hold a freeze of this run.
    pub const fn may_be_frozen(&self) -> bool {
        self.freezes
            && matches!(self.state, State::Freezing | State::GivingUpFreeze | State::Cutting | State::Thawing)
    }

    /// Takes what happened; returns what to do next, or nothing when the run is over or the event means nothing here.
    pub fn next(&mut self, event: Event) -> Option<Action> {
        use {Action as A, Event as E, State as S};
        let below_freeze_is_enough = self.require <= Level::Crash;
        let (state, action) = match (self.state, event) {
            (S::Prepared, E::Begin) if self.freezes => (S::Freezing, A::Freeze),
            (S::Prepared, E::Begin) => (S::Cutting, A::Cut),
            (S::Freezing, E::Frozen) => (S::Cutting, A::Cut),
            (S::Freezing, E::FreezeFailed) if below_freeze_is_enough => (S::GivingUpFreeze, A::Thaw),
            (S::Freezing, E::FreezeFailed | E::Interrupted) => (S::Abandoning, A::Thaw),
            (S::GivingUpFreeze, E::ThawEnded) => {
                self.freezes = false;
                (S::Cutting, A::Cut)
            }
            (S::Cutting, E::PointTaken) if self.freezes => (S::Thawing, A::Thaw),
            (S::Cutting, E::PointTaken) => (S::Judging, A::Judge),
            (S::Cutting, E::PointFailed | E::Interrupted) if self.freezes => (S::Abandoning, A::Thaw),
            (S::Cutting, E::PointFailed) => (S::Undoing, A::Undo),
            (S::Thawing, E::ThawEnded) => (S::Judging, A::Judge),
            (S::Judging, E::LevelReached) => (S::Copying, A::Copy),
            (S::Judging, E::LevelMissed) => (S::Undoing, A::Undo),
            (S::Copying, E::Copied) => (S::Sealing, A::Seal),
            (S::Copying, E::CopyFailed) => (S::Undoing, A::Undo),
            (S::Sealing, E::Sealed) => (S::Releasing, A::Release),
            (S::Sealing, E::SealFailed) => (S::Undoing, A::Undo),
            (S::Abandoning, E::ThawEnded) => (S::Undoing, A::Undo),
            // A sealed snapshot exists: an interruption comes too late. A thaw is never cut short.
            (S::Releasing | S::Abandoning | S::Undoing | S::Thawing | S::GivingUpFreeze, E::Interrupted) => {
                return None;
            }
            (S::Kept | S::Abandoned, _) => return None,
            (_, E::Interrupted) => (S::Undoing, A::Undo),
            (S::Releasing, E::Cleared) => {
                self.state = S::Kept;
                return None;
            }
            (S::Undoing, E::Cleared) => {
                self.state = S::Abandoned;
                return None;
            }
            _ => return None,
        };
        self.state = state;
        Some(action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [Event; 14] = [
        Event::Begin,
        Event::Frozen,
        Event::FreezeFailed,
        Event::PointTaken,
        Event::PointFailed,
        Event::ThawEnded,
        Event::LevelReached,
        Event::LevelMissed,
        Event::Copied,
        Event::CopyFailed,
        Event::Sealed,
        Event::SealFailed,
        Event::Cleared,
        Event::Interrupted,
    ];

    fn request(require: Level) -> Request {
        Request { require, ..Request::new("db1") }
    }

    /// Walks a run through `events` and tells its actions and its end.
    fn walk(require: Level, can_freeze: bool, events: &[Event]) -> (Vec<Action>, State) {
        let mut run = Run::new(&request(require), can_freeze);
        let actions = events.iter().filter_map(|&event| run.next(event)).collect();
        (actions, run.state())
    }

    #[test]
    fn a_clean_run_freezes_cuts_thaws_copies_and_seals() {
        use {Action as A, Event as E};
        let events = [
            E::Begin,
            E::Frozen,
            E::PointTaken,
            E::ThawEnded,
            E::LevelReached,
            E::Copied,
            E::Sealed,
            E::Cleared,
        ];
        let actions = vec![A::Freeze, A::Cut, A::Thaw, A::Judge, A::Copy, A::Seal, A::Release];
        assert_eq!(walk(Level::Application, true, &events), (actions, State::Kept));
    }

    #[test]
    fn a_failed_freeze_is_thawed_before_the_disks_are_cut_without_it() {
        use {Action as A, Event as E};
        let events = [E::Begin, E::FreezeFailed, E::ThawEnded, E::PointTaken];
        let actions = vec![A::Freeze, A::Thaw, A::Cut, A::Judge];
        assert_eq!(walk(Level::Crash, true, &events), (actions, State::Judging));
    }

    #[test]
    fn a_failed_freeze_ends_a_run_that_requires_more_than_crash() {
        use {Action as A, Event as E};
        let events = [E::Begin, E::FreezeFailed, E::ThawEnded, E::Cleared];
        assert_eq!(
            walk(Level::Filesystem, true, &events),
            (vec![A::Freeze, A::Thaw, A::Undo], State::Abandoned)
        );
    }

    #[test]
    fn a_run_without_an_agent_never_freezes_and_never_thaws() {
        use {Action as A, Event as E};
        let events = [E::Begin, E::PointTaken, E::LevelReached, E::Copied, E::Sealed, E::Cleared];
        assert_eq!(
            walk(Level::Crash, false, &events),
            (vec![A::Cut, A::Judge, A::Copy, A::Seal, A::Release], State::Kept)
        );
    }

    proptest! {
        /// Answers come only to what was asked, but may be any answer, at any step, with an interruption at any moment.
        #[test]
        fn thaw_follows_every_freeze_and_undo_every_failure(
            choices in proptest::collection::vec(0_usize..EVENTS.len(), 0..60),
            require in prop_oneof![Just(Level::Crash), Just(Level::Application)],
        ) {
            let mut run = Run::new(&request(require), true);
            let mut done = vec![];
            for event in choices.into_iter().map(|choice| EVENTS[choice]) {
                done.extend(run.next(event));
            }
            // Then the world answers the worst to whatever is still open.
            for event in [Event::FreezeFailed, Event::PointFailed, Event::ThawEnded, Event::PointFailed,
                          Event::LevelMissed, Event::CopyFailed, Event::SealFailed, Event::ThawEnded, Event::Cleared] {
                done.extend(run.next(event));
            }
            let froze = done.iter().position(|&action| action == Action::Freeze);
            if let Some(froze) = froze {
                prop_assert!(done[froze..].contains(&Action::Thaw), "{done:?}");
                let cut = done.iter().rposition(|&action| action == Action::Cut);
                let thaw = done.iter().rposition(|&action| action == Action::Thaw);
                if run.state() == State::Kept && cut < thaw {
                    prop_assert!(done.contains(&Action::Judge));
                }
            }
            if run.state() == State::Abandoned {
                prop_assert!(done.contains(&Action::Undo), "{done:?}");
                prop_assert!(!done.contains(&Action::Release), "{done:?}");
            }
            if run.state() == State::Kept {
                prop_assert!(done.contains(&Action::Seal), "{done:?}");
            }
        }
    }
}
