//! A receipt as people read it.

use crate::escape::Plain;
use crate::units::{Bytes, Millis, instant};
use guest_protocol::stillpoint::{FilesystemState, GuestReport, HookCall, HookOutcome, ThawCause};
use snapshot::receipt::{Agent, CopyMethod, DiskEvidence, Receipt};
use snapshot::{Level, Reason, Verdict};
use std::fmt::{self, Display, Formatter};

/// A receipt with what it is worth.
pub(crate) struct Page<'a> {
    pub(crate) snapshot: &'a str,
    pub(crate) parent: Option<&'a str>,
    pub(crate) description: Option<&'a str>,
    pub(crate) receipt: &'a Receipt,
    pub(crate) verdict: &'a Verdict,
}

impl Display for Page<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let receipt = self.receipt;
        writeln!(f, "snapshot {}   {}   {}", self.snapshot, Plain(&receipt.vm), promise(self.verdict.level))?;
        if let Some(description) = self.description {
            line(f, "note", Plain(description))?;
        }
        if let (Some(wanted), Some(required)) = (receipt.wanted, receipt.required) {
            line(f, "asked for", format_args!("{wanted}, at least {required}"))?;
        }
        line(f, "parent", self.parent.unwrap_or("none: complete by itself"))?;
        self.point(f)?;
        match (&receipt.guest, &receipt.agent) {
            (Some(guest), _) => freeze(f, guest)?,
            (None, Agent::QemuGa { version }) => {
                line(f, "guest", format_args!("qemu-ga {}", Plain(version)))?;
                if let Some(stock) = &receipt.stock {
                    line(
                        f,
                        "",
                        format_args!("{} file systems frozen, {} thawed", stock.frozen, stock.thawed),
                    )?;
                }
            }
            (None, Agent::Stillpoint { version }) => {
                line(f, "guest", format_args!("stillpoint-agent {}, no report", Plain(version)))?;
            }
            (None, Agent::None) => line(f, "guest", "no agent took part")?,
        }
        disks(f, &receipt.disks)?;
        if let Some(guest) = &receipt.guest {
            filesystems(f, guest)?;
            self.applications(f, guest)?;
            hooks(f, guest)?;
        }
        reasons(f, &self.verdict.reasons)?;
        let t = receipt.phases_ms;
        let times = [
            ("prepare", t.prepare),
            ("freeze", t.freeze),
            ("point", t.point),
            ("thaw", t.thaw),
            ("copy", t.copy),
            ("seal", t.seal),
        ];
        // What did not take place, or is not over yet when the receipt is sealed, has no time.
        let took = times.iter().filter(|(_, ms)| *ms > 0);
        let times: Vec<String> = took.map(|(name, ms)| format!("{name} {}", Millis(*ms))).collect();
        line(f, "times", times.join(", "))
    }
}

impl Page<'_> {
    fn point(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some(point) = &self.receipt.point else { return line(f, "point", "none") };
        let what = match point.disks.len() {
            1 => "1 disk".to_owned(),
            n if point.writers_unseen.is_empty() => format!("{n} disks at one instant"),
            n => format!("{n} disks"),
        };
        let how = if point.shut_off {
            ", while the VM was shut off".to_owned()
        } else if point.vcpus_stopped && point.stopped_ms <= 0.0 {
            ", while the VM was paused".to_owned()
        } else if point.vcpus_stopped {
            format!(", virtual CPUs stopped for at most {:.1} ms", point.stopped_ms)
        } else {
            String::new()
        };
        line(f, "point", format_args!("{}: {what}{how}", instant(point.at_ms)))
    }

    fn applications(&self, f: &mut Formatter<'_>, guest: &GuestReport) -> fmt::Result {
        heading(f, "applications", guest.applications.is_empty())?;
        for (report, (level, _)) in guest.applications.iter().zip(&self.verdict.applications) {
            let version = report.version.as_deref().unwrap_or_default();
            let name = format!("{} {version}", report.kind);
            let at = report.position.as_ref().map_or(String::new(), |position| format!("   at {position}"));
            writeln!(
                f,
                "  {:<18} {:<28} {level:<12}{}",
                Plain(name.trim_end()),
                Plain(&report.instance),
                Plain(at)
            )?;
            if let Some(hook) = &report.attested_by {
                writeln!(f, "    attested by {}", Plain(hook))?;
            }
        }
        Ok(())
    }
}

/// The level, with the promise that it makes.
pub(crate) fn promise(level: Level) -> &'static str {
    match level {
        Level::None => "none (disks from different instants, or parts outside the point)",
        Level::Crash => "crash-consistent (as after a power failure)",
        Level::Filesystem => "filesystem-consistent (every completed write is in)",
        Level::Application => "application-consistent",
        Level::Clean => "clean (stopped or cleanly closed)",
    }
}

fn freeze(f: &mut Formatter<'_>, guest: &GuestReport) -> fmt::Result {
    let end = match guest.thawed_by {
        ThawCause::Host => "thawed by the host",
        ThawCause::NothingFrozen => "nothing was frozen",
        ThawCause::FailedFreeze => "the freeze failed and was undone",
        ThawCause::LeaseEnded => "thawed by its own lease",
        ThawCause::AgentGone => "thawed by the guard, the agent was gone",
    };
    line(f, "guest", format_args!("stillpoint-agent {}, {end}", Plain(&guest.agent_version)))?;
    line(
        f,
        "quiesce",
        format_args!("prepared in {}, quiesced in {}", Millis(guest.prepare_ms), Millis(guest.quiesce_ms)),
    )?;
    let rounds: Vec<String> = guest.flush_rounds_ms.iter().map(|ms| Millis(*ms).to_string()).collect();
    line(
        f,
        "freeze",
        format_args!(
            "{} until frozen, {} in all (lease {}); flushed before in {}",
            Millis(guest.freeze_ms),
            Millis(guest.frozen_ms),
            Millis(guest.lease_ms),
            if rounds.is_empty() { "no round".to_owned() } else { rounds.join(" + ") }
        ),
    )
}

fn disks(f: &mut Formatter<'_>, disks: &[DiskEvidence]) -> fmt::Result {
    heading(f, "disks", disks.is_empty())?;
    for disk in disks {
        write!(f, "  {:<18} {:>9}", Plain(&disk.name), Bytes(disk.size_bytes))?;
        match &disk.copy {
            None => writeln!(f, "   not in the snapshot")?,
            Some(copy) => writeln!(
                f,
                "   read {}, changed {}, stored {} ({})",
                Bytes(copy.read_bytes),
                Bytes(copy.changed_bytes),
                Bytes(copy.stored_bytes),
                match copy.method {
                    CopyMethod::Full => "full",
                    CopyMethod::Bitmap => "increment",
                    CopyMethod::Compared => "increment by comparison: no bitmap",
                }
            )?,
        }
    }
    Ok(())
}

fn filesystems(f: &mut Formatter<'_>, guest: &GuestReport) -> fmt::Result {
    heading(f, "file systems", guest.filesystems.is_empty())?;
    for filesystem in &guest.filesystems {
        let state = match filesystem.state {
            FilesystemState::Held => "frozen",
            FilesystemState::EarlyThaw => "thawed by someone else",
            FilesystemState::Unwritten => "cannot be frozen, but nothing was written",
            FilesystemState::Unsupported => "cannot be frozen",
            FilesystemState::HeldByOther => "frozen by someone else",
            FilesystemState::Unreachable => "unreachable",
            FilesystemState::Failed => "refused the freeze",
            FilesystemState::NotFrozen | FilesystemState::Freezable => "not frozen",
        };
        let time = filesystem.frozen_ms.map_or(String::new(), |ms| format!(" {}", Millis(ms)));
        writeln!(
            f,
            "  {:<28} {:<7} {:<12} {state}{time}",
            Plain(&filesystem.mountpoint),
            Plain(&filesystem.kind),
            Plain(&filesystem.device)
        )?;
        if let Some(detail) = &filesystem.detail {
            writeln!(f, "    {}", Plain(detail))?;
        }
    }
    Ok(())
}

fn hooks(f: &mut Formatter<'_>, guest: &GuestReport) -> fmt::Result {
    heading(f, "hooks", guest.hooks.is_empty())?;
    let told = |call: &Option<HookCall>| {
        let Some(call) = call else { return "not called".to_owned() };
        let how = match call.outcome {
            HookOutcome::Succeeded => "succeeded",
            HookOutcome::Failed => "failed",
            HookOutcome::TimedOut => "took too long",
            HookOutcome::Aborted => "called off",
            HookOutcome::NotStarted => "could not be started",
            HookOutcome::Refused => "refused",
        };
        format!("{how} {}", Millis(call.ms))
    };
    for hook in &guest.hooks {
        let (freeze, thaw) = (told(&hook.freeze), told(&hook.thaw));
        writeln!(f, "  {:<47} freeze {freeze}, thaw {thaw}", Plain(&hook.path))?;
        for output in [&hook.freeze, &hook.thaw].into_iter().flatten().filter_map(|call| call.output.as_ref())
        {
            writeln!(f, "    {}", Plain(output.trim_end()))?;
        }
    }
    Ok(())
}

/// Reasons as a list; nothing if there are none.
pub(crate) fn reasons(f: &mut Formatter<'_>, reasons: &[Reason]) -> fmt::Result {
    heading(f, "to know", reasons.is_empty())?;
    for reason in reasons {
        writeln!(f, "  {}", said(reason))?;
    }
    Ok(())
}

/// A reason on one line; some are about the guest as a whole and have no subject.
pub(crate) fn said(reason: &Reason) -> String {
    let subject =
        if reason.subject.is_empty() { String::new() } else { format!("{}: ", Plain(&reason.subject)) };
    format!("{subject}{} [{}]", Plain(&reason.message), Plain(&reason.code))
}

fn heading(f: &mut Formatter<'_>, name: &str, empty: bool) -> fmt::Result {
    if empty { Ok(()) } else { writeln!(f, "{name}") }
}

fn line(f: &mut Formatter<'_>, name: &str, text: impl Display) -> fmt::Result {
    writeln!(f, "  {name:<10} {text}")
}

#[cfg(test)]
mod tests;
