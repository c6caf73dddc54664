//! What a command is: a name, arguments and the type of its answer.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A command of QEMU's monitor. Its fields are the arguments; those left `None` are not sent.
pub trait Command: Serialize {
    /// Name on the wire.
    const NAME: &'static str;
    /// What QEMU answers.
    type Answer: DeserializeOwned;
}

/// The answer of commands that answer nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Nothing {}

macro_rules! commands {
    ($($type:ty => $name:literal -> $answer:ty;)*) => {$(
        impl $crate::command::Command for $type {
            const NAME: &'static str = $name;
            type Answer = $answer;
        }
    )*};
}
pub(crate) use commands;

/// Ends the negotiation that starts every connection; QEMU takes no other command before.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QmpCapabilities {}

/// Runs a command of the human monitor and answers what it printed. For tests; nothing depends on its text.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct HumanMonitorCommand {
    /// The line to run.
    pub command_line: String,
}

commands! {
    QmpCapabilities => "qmp_capabilities" -> Nothing;
    HumanMonitorCommand => "human-monitor-command" -> String;
}
