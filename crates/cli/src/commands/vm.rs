//! `vm`: the register.

use super::{of_register, open_register, reach_monitor};
use crate::arguments::{Global, VmCommand};
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::units::{Bytes, instant};
use crate::{Output, tell};
use engine::register::VmEntry;
use engine::survey::{Survey, SurveyError, survey};
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};

pub(crate) fn run(global: &Global, command: &VmCommand) -> Result<Output, Explanation> {
    let register = open_register(global)?;
    match command {
        VmCommand::Add { name, qmp, agent } => {
            let agent = agent.as_deref().map(absolute).transpose()?;
            let entry = VmEntry { name: name.clone(), qmp: absolute(qmp)?, agent };
            register.add(&entry).map_err(|e| of_register(&format!("{name} was not registered"), &e))?;
            for socket in [Some(&entry.qmp), entry.agent.as_ref()].into_iter().flatten() {
                // Only whether it is there: connecting would take the channel from whoever uses it now.
                if !socket.exists() {
                    let socket = Plain(socket.display());
                    tell(&format!("warning: {socket} is not there now; it must be when the VM runs\n"));
                }
            }
            let text = format!("registered {name}; see what counts with `stillpoint vm show {name}`\n");
            Ok(Output::new(text, json!({ "added": entry })))
        }
        VmCommand::List => {
            let entries = register.list().map_err(|e| of_register("the VMs cannot be listed", &e))?;
            let mut text = String::new();
            for entry in &entries {
                let agent =
                    entry.agent.as_ref().map_or("no agent".to_owned(), |path| path.display().to_string());
                // Writing to a String cannot fail.
                writeln!(
                    text,
                    "{:<16} {}   {}",
                    Plain(&entry.name),
                    Plain(entry.qmp.display()),
                    Plain(agent)
                )
                .unwrap_or_default();
            }
            if entries.is_empty() {
                text = "no VM is registered\n".to_owned();
            }
            Ok(Output::new(text, json!({ "vms": entries })))
        }
        VmCommand::Show { name } => {
            let entry =
                register.get(name).map_err(|e| of_register(&format!("{name} cannot be shown"), &e))?;
            let problem = format!("{name} cannot be asked");
            let seen = survey(&register, &entry).map_err(|error| match error {
                SurveyError::Register(error) => of_register(&problem, &error),
                SurveyError::Monitor(error) => {
                    Explanation::new(Exit::Unreachable, &problem, error.to_string(), reach_monitor(name))
                }
            })?;
            Ok(Output::new(page(&entry, &seen), json!({ "vm": entry, "seen": seen })))
        }
        VmCommand::Remove { name } => {
            register.remove(name).map_err(|e| of_register(&format!("{name} was not removed"), &e))?;
            Ok(Output::new(format!("forgot {name}; its snapshots stay\n"), json!({ "removed": name })))
        }
    }
}

fn page(entry: &VmEntry, seen: &Survey) -> String {
    let d = &seen.definition;
    let mut text = format!(
        "{}   {}   {} vCPUs, {} memory, QEMU {}\nmonitor  {}\nagent    {}\ndisks\n",
        Plain(&entry.name),
        match seen.last_seen_ms {
            Some(at_ms) => format!("shut off, last seen {}", instant(at_ms)),
            None if seen.running => "running".to_owned(),
            None => "not running".to_owned(),
        },
        d.cpus,
        Bytes(d.memory_bytes),
        Plain(&d.qemu_version),
        Plain(entry.qmp.display()),
        Plain(&seen.agent)
    );
    for disk in &seen.drives.disks {
        // Writing to a String cannot fail.
        writeln!(
            text,
            "  {:<18} {:>9}  {:<6} serial {:<20} {}",
            Plain(&disk.name),
            Bytes(disk.size_bytes),
            Plain(&disk.format),
            Plain(disk.serial.as_deref().unwrap_or("-")),
            Plain(&disk.file)
        )
        .unwrap_or_default();
    }
    if !seen.drives.left_out.is_empty() {
        text.push_str("left out\n");
    }
    for left in &seen.drives.left_out {
        let why = serde_json::to_value(left.why).ok().and_then(|why| why.as_str().map(str::to_owned));
        writeln!(text, "  {:<18} {}", Plain(&left.name), why.unwrap_or_default().replace('_', " "))
            .unwrap_or_default();
    }
    text
}

fn absolute(path: &Path) -> Result<PathBuf, Explanation> {
    std::path::absolute(path).map_err(|e| {
        Explanation::new(Exit::Usage, "a socket has no path", e.to_string(), "give the socket's path")
    })
}
