//! The command line: every command, option and default.

use clap::{Args, Parser, Subcommand, ValueEnum};
use snapshot::Level;
use std::path::PathBuf;

/// Application-consistent snapshots of running VMs, with a receipt that says what each is worth.
#[derive(Debug, Parser)]
#[command(
    name = "stillpoint",
    version,
    propagate_version = true,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// In the help of a command its own options come first, and these below.
const EVERY_COMMAND: &str = "Options of every command";

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Folder of the repository
    #[arg(long, global = true, help_heading = EVERY_COMMAND, value_name = "FOLDER", env = "STILLPOINT_REPO")]
    pub(crate) repo: Option<PathBuf>,
    /// File whose first line is the repository's passphrase (otherwise: service credential, then terminal)
    #[arg(long, global = true, help_heading = EVERY_COMMAND, value_name = "FILE", env = "STILLPOINT_PASSPHRASE_FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// File with an age identity that opens the repository
    #[arg(
        long,
        global = true,
        help_heading = EVERY_COMMAND,
        value_name = "FILE",
        env = "STILLPOINT_KEY_FILE",
        conflicts_with = "passphrase_file"
    )]
    pub(crate) key_file: Option<PathBuf>,
    /// Folder for this host's register, journals and scratch [default: /var/lib/stillpoint, or ~/.local/state/stillpoint]
    #[arg(long, global = true, help_heading = EVERY_COMMAND, value_name = "FOLDER", env = "STILLPOINT_STATE")]
    pub(crate) state: Option<PathBuf>,
    /// Print one JSON object at the end instead of text
    #[arg(long, global = true, help_heading = EVERY_COMMAND)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a repository
    Init,
    /// Register, list, show or forget VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// Rehearse: everything that a snapshot does in the guest, except locks and freeze
    Check {
        /// The VM
        name: String,
    },
    /// Take a snapshot
    Snapshot(SnapshotArguments),
    /// List snapshots
    Snapshots {
        /// Only this VM's
        name: Option<String>,
    },
    /// Show a snapshot's receipt
    Show {
        /// The snapshot: an unambiguous beginning of its id, or a VM's name for its newest
        id: String,
    },
    /// Write disks of a snapshot to files or block devices
    Restore(RestoreArguments),
    /// Start an isolated twin from a snapshot; it ends with this command
    Boot(BootArguments),
    /// Read a snapshot, or all of them, and check every byte
    Verify {
        /// The snapshot: an unambiguous beginning of its id, or a VM's name for its newest; absent: all
        id: Option<String>,
    },
    /// Delete a snapshot; others, and the running VM, are not touched
    Delete {
        /// The snapshot: an unambiguous beginning of its id
        id: String,
    },
}

impl Command {
    /// It has something to undo when it is interrupted; the others simply end.
    pub(crate) fn cleans_up(&self) -> bool {
        matches!(self, Self::Snapshot(_) | Self::Restore(_) | Self::Boot(_))
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Register a VM by its sockets
    Add {
        /// Name of your choice
        name: String,
        /// QEMU's monitor (-qmp unix:SOCKET,server=on,wait=off)
        #[arg(long, value_name = "SOCKET")]
        qmp: PathBuf,
        /// Host end of the guest agent's channel (org.qemu.guest_agent.0)
        #[arg(long, value_name = "SOCKET")]
        agent: Option<PathBuf>,
    },
    /// List registered VMs
    List,
    /// Show a VM: its disks, what counts and what does not, its agent
    Show {
        /// The VM
        name: String,
    },
    /// Forget a VM; its snapshots stay
    Remove {
        /// The VM
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    /// The VM
    pub(crate) name: String,
    /// Only this disk (repeat for more) [default: every disk that counts; see `vm show`]
    #[arg(long = "disk", value_name = "DISK")]
    pub(crate) disks: Vec<String>,
    /// Keep the VM's definition and firmware only, no disk
    #[arg(long, conflicts_with = "disks")]
    pub(crate) no_data: bool,
    /// Level to try for: application, filesystem, crash or none
    #[arg(long, value_name = "LEVEL", default_value = "application")]
    pub(crate) want: Level,
    /// Least level to keep; below it the run fails and leaves nothing [default: crash]
    #[arg(long, value_name = "LEVEL")]
    pub(crate) require: Option<Level>,
    /// A line for people
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
    /// Policy for an application: KIND=required|preferred|off (repeat for more)
    #[arg(long = "application", value_name = "KIND=POLICY", value_parser = policy)]
    pub(crate) applications: Vec<guest_protocol::stillpoint::ApplicationPolicy>,
    /// Longest time that the guest may stay frozen, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub(crate) lease: u64,
}

fn policy(text: &str) -> Result<guest_protocol::stillpoint::ApplicationPolicy, String> {
    use guest_protocol::stillpoint::{ApplicationPolicy, Policy};
    let (kind, policy) = text.split_once('=').ok_or("write KIND=required, KIND=preferred or KIND=off")?;
    let policy = match policy {
        "required" => Policy::Required,
        "preferred" => Policy::Preferred,
        "off" => Policy::Off,
        other => return Err(format!("'{other}' is no policy; write required, preferred or off")),
    };
    Ok(ApplicationPolicy { kind: kind.to_owned(), instance: None, policy })
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    /// The snapshot: an unambiguous beginning of its id, or a VM's name for its newest
    pub(crate) id: String,
    /// Disk and where to write it (repeat for more)
    #[arg(long = "disk", value_name = "DISK=PATH", required = true, value_parser = disk_target)]
    pub(crate) disks: Vec<String>,
    /// Format of the new image; a block device takes raw only
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub(crate) format: Format,
    /// Overwrite what is there
    #[arg(long)]
    pub(crate) overwrite: bool,
}

fn disk_target(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((disk, path)) if !disk.is_empty() && !path.is_empty() => Ok(text.to_owned()),
        _ => Err("write DISK=PATH, e.g. data=/var/lib/images/data.raw".to_owned()),
    }
}

/// Format of a restored image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

#[derive(Debug, Args)]
pub(crate) struct BootArguments {
    /// The snapshot: an unambiguous beginning of its id, or a VM's name for its newest
    pub(crate) id: String,
    /// Memory in MiB [default: as the original]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=16_777_216))]
    pub(crate) memory: Option<u64>,
    /// Virtual CPUs [default: as the original]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) cpus: Option<u32>,
    /// kvm or tcg [default: kvm where it really runs a guest]
    #[arg(long, value_name = "ACCELERATOR", env = "STILLPOINT_ACCEL")]
    pub(crate) accel: Option<String>,
    /// Folder for the twin's sockets and overlays, which must not exist [default: one under the state folder]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) folder: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_policy_names_a_kind_and_one_of_three_words() {
        assert!(policy("postgresql=required").is_ok());
        assert!(policy("postgresql=always").is_err());
        assert!(policy("postgresql").is_err());
    }
}
