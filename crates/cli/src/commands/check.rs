//! `check`: the rehearsal.

use super::{of_register, open_register, reach_monitor};
use crate::Output;
use crate::arguments::Global;
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::receipt::said;
use crate::units::{Bytes, Millis};
use engine::check::{CheckError, Rehearsal, rehearse};
use guest_protocol::stillpoint::{CheckReport, FilesystemState};
use serde_json::json;
use std::fmt::Write;

pub(crate) fn run(global: &Global, name: &str) -> Result<Output, Explanation> {
    let register = open_register(global)?;
    let problem = format!("{name} was not checked");
    let entry = register.get(name).map_err(|e| of_register(&problem, &e))?;
    let rehearsal = rehearse(&register, &entry).map_err(|error| match error {
        CheckError::Register(error) => of_register(&problem, &error),
        CheckError::Monitor(_) => {
            Explanation::new(Exit::Unreachable, &problem, error.to_string(), reach_monitor(name))
        }
        CheckError::Agent(_) => Explanation::new(
            Exit::Unreachable,
            &problem,
            error.to_string(),
            format!("check that stillpoint-agent runs in the guest and that `stillpoint vm show {name}` names its channel"),
        ),
    })?;
    let text = match &rehearsal.report {
        None => format!(
            "{name}: {}\nthe best level that can be reached is {}\n",
            Plain(&rehearsal.agent),
            rehearsal.level
        ),
        Some(report) => page(name, &rehearsal, report),
    };
    let object = json!({
        "vm": name, "agent": rehearsal.agent, "level": rehearsal.level, "reasons": rehearsal.reasons,
        "report": rehearsal.report,
    });
    Ok(Output::new(text, object))
}

fn page(name: &str, rehearsal: &Rehearsal, report: &CheckReport) -> String {
    let mut text = format!(
        "{name}: {}\nlevel to expect   {}\nfreeze to expect  {} ({} not yet written)\nfile systems\n",
        Plain(&rehearsal.agent),
        rehearsal.level,
        Millis(report.predicted_freeze_ms),
        Bytes(report.dirty_bytes)
    );
    // Writing to a String cannot fail.
    for f in &report.filesystems {
        let state = match f.state {
            FilesystemState::Freezable => "can be frozen",
            FilesystemState::Unsupported => "cannot be frozen",
            FilesystemState::HeldByOther => "frozen by someone else",
            FilesystemState::Unreachable => "unreachable",
            _ => "",
        };
        writeln!(
            text,
            "  {:<28} {:<7} {:<12} {state}",
            Plain(&f.mountpoint),
            Plain(&f.kind),
            Plain(&f.device)
        )
        .unwrap_or_default();
    }
    if !report.applications.is_empty() {
        text.push_str("applications\n");
    }
    for a in &report.applications {
        let version = a.version.as_deref().unwrap_or("");
        writeln!(text, "  {} {} {}", Plain(&a.kind), Plain(version), Plain(&a.instance)).unwrap_or_default();
    }
    if !report.hooks.is_empty() {
        text.push_str("hooks\n");
    }
    for hook in &report.hooks {
        writeln!(text, "  {}", Plain(hook)).unwrap_or_default();
    }
    if !rehearsal.reasons.is_empty() {
        text.push_str("to know\n");
    }
    for reason in &rehearsal.reasons {
        writeln!(text, "  {}", said(reason)).unwrap_or_default();
    }
    text
}
