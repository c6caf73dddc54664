//! What a user asks for.

use crate::Level;
use guest_protocol::stillpoint::ApplicationPolicy;

/// One wish for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Name of the VM in the host's register.
    pub vm: String,
    /// Disks that are wanted, by name; empty: every disk that counts.
    pub disks: Vec<String>,
    /// Keep the VM's definition and firmware only, no disk.
    pub no_data: bool,
    /// What to try for.
    pub want: Level,
    /// The least that may be kept.
    pub require: Level,
    /// A line for people.
    pub description: Option<String>,
    /// Policies for applications; an application that none names is `preferred`.
    pub applications: Vec<ApplicationPolicy>,
    /// How long the guest may stay frozen, in milliseconds.
    pub lease_ms: u64,
    /// The stall accepted for freezing, in milliseconds.
    pub budget_ms: u64,
}

impl Request {
    /// Default lease, in milliseconds: a point takes tens of milliseconds, and a guest whose host dies waits this long.
    pub const LEASE_MS: u64 = 10_000;
    /// Default stall budget of the freeze, in milliseconds. Source: `docs/design/decisions.md`.
    pub const BUDGET_MS: u64 = 5_000;

    /// A wish for all disks of `vm` at the best level, with the defaults of the field's users.
    pub fn new(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            disks: Vec::new(),
            no_data: false,
            want: Level::Application,
            require: Level::Crash,
            description: None,
            applications: Vec::new(),
            lease_ms: Self::LEASE_MS,
            budget_ms: Self::BUDGET_MS,
        }
    }

    /// Whether the guest is asked to freeze at all.
    pub fn freezes(&self) -> bool {
        !self.no_data && self.want >= Level::Filesystem
    }
}
