//! The arguments of the commands that take more than one, typed.

pub mod accounts;
pub mod exec;
mod file;
pub(crate) mod hotplug;

pub use file::{FileCall, FileOpen, FileOperation};
pub use hotplug::{MemoryBlockWish, VcpuWish};

use crate::Error;
use crate::json::Received;
use crate::members::{self, Members};
use crate::stillpoint::{
    APPLICATIONS_MAX, ApplicationPolicy, CheckArguments, FreezeArguments, Policy, RUN_ID_BYTES_MAX,
    RenewArguments, ThawArguments, Want,
};

/// What `guest-shutdown` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Off, with the power.
    Powerdown,
    /// Off.
    Halt,
    /// Off and on again.
    Reboot,
}

impl Shutdown {
    pub(crate) fn read(members: &mut Members) -> Result<Self, Error> {
        match members.optional("mode", members::string)?.as_deref() {
            None | Some("powerdown") => Ok(Self::Powerdown),
            Some("halt") => Ok(Self::Halt),
            Some("reboot") => Ok(Self::Reboot),
            // The bracket stays open in qemu-ga too.
            Some(_) => Err(Error::generic("mode is invalid (valid values are: halt|powerdown|reboot")),
        }
    }
}

/// How `guest-suspend-*` suspends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspend {
    /// To disk.
    Disk,
    /// To memory.
    Ram,
    /// To both.
    Hybrid,
}

pub(crate) fn check(members: &mut Members) -> Result<CheckArguments, Error> {
    Ok(CheckArguments { want: want(members)?, applications: policies(members)? })
}

pub(crate) fn freeze(members: &mut Members) -> Result<FreezeArguments, Error> {
    let defaults = FreezeArguments::new(members.required("id", run_id)?, 0);
    Ok(FreezeArguments {
        lease_ms: members.required("lease_ms", members::unsigned)?,
        prepare_ms_max: members
            .optional("prepare_ms_max", members::unsigned)?
            .unwrap_or(defaults.prepare_ms_max),
        quiesce_ms_max: members
            .optional("quiesce_ms_max", members::unsigned)?
            .unwrap_or(defaults.quiesce_ms_max),
        budget_ms: members.optional("budget_ms", members::unsigned)?.unwrap_or(defaults.budget_ms),
        want: want(members)?,
        applications: policies(members)?,
        id: defaults.id,
    })
}

pub(crate) fn renew(members: &mut Members) -> Result<RenewArguments, Error> {
    Ok(RenewArguments {
        id: members.required("id", run_id)?,
        lease_ms: members.required("lease_ms", members::unsigned)?,
    })
}

pub(crate) fn thaw(members: &mut Members) -> Result<ThawArguments, Error> {
    Ok(ThawArguments { id: members.required("id", run_id)? })
}

fn run_id(value: Received, path: &str) -> Result<String, Error> {
    let id = members::string(value, path)?;
    let fits = (1..=RUN_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(id) } else { Err(members::not_accepted(path, &id)) }
}

fn want(members: &mut Members) -> Result<Want, Error> {
    let want = members.optional("want", |value, path| match members::string(value, path)?.as_str() {
        "filesystem" => Ok(Want::Filesystem),
        "application" => Ok(Want::Application),
        other => Err(members::not_accepted(path, other)),
    })?;
    Ok(want.unwrap_or(Want::Application))
}

fn policies(members: &mut Members) -> Result<Vec<ApplicationPolicy>, Error> {
    let objects = members.optional("applications", members::objects)?.unwrap_or_default();
    if objects.len() > APPLICATIONS_MAX {
        return Err(Error::generic(format!(
            "Parameter 'applications' has more than {APPLICATIONS_MAX} elements"
        )));
    }
    objects.into_iter().map(policy).collect()
}

fn policy(mut members: Members) -> Result<ApplicationPolicy, Error> {
    let policy = ApplicationPolicy {
        kind: members.required("kind", members::string)?,
        instance: members.optional("instance", members::string)?,
        policy: members.required("policy", |value, path| match members::string(value, path)?.as_str() {
            "required" => Ok(Policy::Required),
            "preferred" => Ok(Policy::Preferred),
            "off" => Ok(Policy::Off),
            other => Err(members::not_accepted(path, other)),
        })?,
    };
    members.finish()?;
    Ok(policy)
}
