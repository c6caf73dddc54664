//! `snapshots` and `show`.

use super::{of_repository, open_repository, read_manifest};
use crate::Output;
use crate::arguments::Global;
use crate::escape::Plain;
use crate::explain::{Exit, Explanation};
use crate::receipt::Page;
use crate::units::{Bytes, instant};
use repository::Manifest;
use serde_json::{Value, json};
use snapshot::{Receipt, judge};
use std::fmt::Write;

pub(crate) fn list(global: &Global, vm: Option<&str>) -> Result<Output, Explanation> {
    let repository = open_repository(global)?;
    let all = repository.snapshots().map_err(|e| of_repository("the snapshots cannot be listed", &e))?;
    let chosen: Vec<_> =
        all.iter().filter(|(_, s)| vm.is_none_or(|vm| s.vm == vm || s.damage.is_some())).collect();
    let mut text = format!(
        "{:<26}  {:<16} {:<24} {:<12} {:>10} {:>10}  {}\n",
        "SNAPSHOT", "VM", "POINT", "LEVEL", "SIZE", "STORED", "NOTE"
    );
    for (id, summary) in &chosen {
        let note = summary.damage.as_deref().or(summary.description.as_deref()).unwrap_or("");
        writeln!(
            text,
            "{:<26}  {:<16} {:<24} {:<12} {:>10} {:>10}  {}",
            id.to_string(),
            Plain(&summary.vm),
            instant(summary.created_at_ms),
            Plain(if summary.damage.is_some() { "DAMAGED" } else { &summary.level }),
            Bytes(summary.size_bytes),
            Bytes(summary.stored_bytes),
            Plain(note)
        )
        .unwrap_or_default(); // writing to a String cannot fail
    }
    if chosen.is_empty() {
        text = "no snapshots\n".to_owned();
    }
    let rows: Vec<Value> = chosen
        .iter()
        .map(|(id, s)| {
            json!({
                "snapshot": id.to_string(), "vm": s.vm, "created_at_ms": s.created_at_ms, "level": s.level,
                "parent": s.parent.map(|parent| parent.to_string()), "description": s.description,
                "size_bytes": s.size_bytes, "stored_bytes": s.stored_bytes, "damage": s.damage,
            })
        })
        .collect();
    Ok(Output::new(text, json!({ "snapshots": rows })))
}

pub(crate) fn show(global: &Global, id: &str) -> Result<Output, Explanation> {
    let repository = open_repository(global)?;
    let (id, manifest) = read_manifest(&repository, id)?;
    let receipt = receipt(&manifest)?;
    // Never the stored word: the level is computed from the evidence each time.
    let verdict = judge(&receipt);
    let id = id.to_string();
    let parent = manifest.parent.map(|parent| parent.to_string());
    let page = Page {
        snapshot: &id,
        parent: parent.as_deref(),
        description: manifest.description.as_deref(),
        receipt: &receipt,
        verdict: &verdict,
    };
    let object = json!({
        "snapshot": id, "vm": manifest.vm, "parent": parent, "created_at_ms": manifest.created_at_ms,
        "description": manifest.description, "level": verdict.level, "reasons": verdict.reasons, "receipt": receipt,
        "definition": manifest.definition,
        "parts": manifest.parts.iter().map(|part| json!({
            "name": part.name, "role": part.role, "size_bytes": part.size_bytes,
        })).collect::<Vec<_>>(),
    });
    Ok(Output::new(page.to_string(), object))
}

/// The evidence in a manifest.
pub(super) fn receipt(manifest: &Manifest) -> Result<Receipt, Explanation> {
    serde_json::from_value(manifest.receipt.clone()).map_err(|e| {
        let to_do = "restore and boot still work; use the version that took the snapshot to read its receipt";
        Explanation::new(Exit::Damaged, "the receipt cannot be read", e.to_string(), to_do)
    })
}
