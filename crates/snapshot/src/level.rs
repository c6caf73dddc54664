//! The five promises a snapshot can make, lowest first.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What the disks of a snapshot are worth. A higher level includes the lower ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Disks from different instants, or parts outside the point.
    None,
    /// An atomic cut: what a power failure at the point leaves.
    Crash,
    /// Frozen for the whole time of the point: every completed write is in, as after `kill -9`.
    Filesystem,
    /// Besides, the application's own flush or lock was granted, and held until after the thaw.
    Application,
    /// The application was stopped, or its storage cleanly closed.
    Clean,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 5] = [Self::None, Self::Crash, Self::Filesystem, Self::Application, Self::Clean];

    /// The word used in every message, option and file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
            Self::Clean => "clean",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no level; the levels are none, crash, filesystem, application and clean")]
pub struct UnknownLevel(String);

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(word: &str) -> Result<Self, UnknownLevel> {
        Self::ALL.into_iter().find(|level| level.name() == word).ok_or_else(|| UnknownLevel(word.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_as_promises() {
        assert!(Level::ALL.is_sorted());
        assert!(Level::Crash < Level::Filesystem && Level::Filesystem < Level::Application);
    }

    #[test]
    fn every_level_is_read_back_from_its_name() {
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
        assert!("consistent".parse::<Level>().is_err());
    }
}
