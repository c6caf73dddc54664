//! `verify`: reads everything and checks it.

use super::{find, of_repository, open_repository};
use crate::arguments::Global;
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::progress::Bar;
use crate::units::Bytes;
use crate::{Output, tell};
use engine::watch::Watch;
use serde_json::{Value, json};
use std::fmt::Write;

/// Damaged places that are listed for people.
const LISTED_MAX: usize = 20;

pub(crate) fn run(global: &Global, id: Option<&str>) -> Result<Output, Explanation> {
    let repository = open_repository(global)?;
    let id = id.map(|id| find(&repository, id)).transpose()?;
    let bar = Bar::new(global.json);
    bar.step("verifying");
    let report = repository
        .verify(id.as_ref(), &mut |done, total| bar.progress(done, total))
        .map_err(|e| of_repository("nothing was verified", &e))?;
    drop(bar);
    let damage: Vec<Value> = report
        .damage
        .iter()
        .map(|d| {
            json!({
                "snapshot": d.snapshot.to_string(), "part": d.part, "offset": d.offset, "cause": d.cause.to_string(),
            })
        })
        .collect();
    let object = json!({
        "snapshots": report.snapshots, "bytes": report.bytes, "damage_total": report.damage_total, "damage": damage,
    });
    if report.damage_total == 0 {
        let text =
            format!("{} snapshots with {} of disks are sound\n", report.snapshots, Bytes(report.bytes));
        return Ok(Output::new(text, object));
    }
    let mut text = format!("damaged places: {}\n", report.damage_total);
    for damage in report.damage.iter().take(LISTED_MAX) {
        let part = damage.part.as_deref().unwrap_or("manifest");
        let place = damage.offset.map_or(String::new(), |offset| format!(" from byte {offset}"));
        // Writing to a String cannot fail.
        writeln!(text, "  {} {}{place}: {}", damage.snapshot, Plain(part), Plain(&damage.cause))
            .unwrap_or_default();
    }
    let mut hurt: Vec<String> = report.damage.iter().map(|damage| damage.snapshot.to_string()).collect();
    hurt.dedup();
    let explanation = Explanation::new(
        Exit::Damaged,
        format!("{} of {} snapshots are damaged", hurt.len(), report.snapshots),
        "stored objects are missing, cannot be read or were changed",
        "restore the objects named above from a copy of the repository; undamaged snapshots can be used as before",
    );
    tell(&format!("{explanation}\n"));
    Ok(Output { text, json: object, exit: Exit::Damaged as u8 })
}
