//! `guest-info`.

use guest_protocol::answers::{CommandInfo, Info};
use guest_protocol::{COMMANDS, Command};

/// The version that hosts are told, and all commands, last first.
pub(super) fn info(version: &str, is_enabled: impl Fn(&Command) -> bool) -> Info {
    let command = |command: &Command| CommandInfo {
        enabled: is_enabled(command),
        name: command.name.into(),
        success_response: command.answers_success,
    };
    Info { version: version.to_owned(), supported_commands: COMMANDS.iter().rev().map(command).collect() }
}
