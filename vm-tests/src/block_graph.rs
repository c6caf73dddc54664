//! What QEMU's block layer looks like to a test: everything that a run puts there and has to take out again.

use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use vm::monitor::{Monitor, MonitorError};

const LIMIT: Duration = Duration::from_secs(30);

/// Devices and their nodes, nodes and their bitmaps, exports, jobs and the run state, in words. What changes by itself
/// as a guest writes (sizes, counts of dirty bytes) is left out, so two that are equal mean that nothing was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockGraph(Vec<String>);

impl BlockGraph {
    /// Asks the monitor behind a socket, and lets go of it again.
    ///
    /// # Errors
    /// Those of the monitor.
    pub fn of(qmp: &Path) -> Result<Self, MonitorError> {
        let mut monitor = Monitor::connect(qmp, LIMIT)?;
        let mut ask = |name: &str| monitor.run_raw(name, &json!({}), LIMIT);
        let mut lines = Vec::new();
        for device in list(ask("query-block")?) {
            lines.push(format!("device {} uses {}", device["qdev"], device["inserted"]["node-name"]));
        }
        for node in list(ask("query-named-block-nodes")?) {
            let mut bitmaps: Vec<String> =
                list(node["dirty-bitmaps"].clone()).iter().map(bitmap_in_words).collect();
            bitmaps.sort();
            lines.push(format!("node {} {} {bitmaps:?}", node["node-name"], node["drv"]));
        }
        lines.extend(
            list(ask("query-block-exports")?).iter().map(|export| format!("export {}", export["id"])),
        );
        lines.extend(list(ask("query-jobs")?).iter().map(|job| format!("job {}", job["id"])));
        lines.push(format!("state {}", ask("query-status")?["status"]));
        lines.sort();
        Ok(Self(lines))
    }

    /// The same without what is new in the name of each run's bitmap, to compare one finished run with another.
    #[must_use]
    pub fn shape(&self) -> Vec<String> {
        let nameless = |line: &String| {
            let mut parts = line.split("stillpoint-");
            let first = parts.next().unwrap_or_default().to_owned();
            parts.fold(first, |shape, part| {
                let name_ends = part.find([' ', '"']).unwrap_or(part.len());
                shape + "stillpoint-" + &part[name_ends..]
            })
        };
        self.0.iter().map(nameless).collect()
    }

    /// How many lines contain a text.
    #[must_use]
    pub fn count(&self, text: &str) -> usize {
        self.0.iter().filter(|line| line.contains(text)).count()
    }
}

fn bitmap_in_words(bitmap: &Value) -> String {
    let word = |name: &str| if bitmap[name] == true { format!(" {name}") } else { String::new() };
    let name = bitmap["name"].as_str().unwrap_or_default();
    format!("{name}{}{}{}{}", word("recording"), word("persistent"), word("inconsistent"), word("busy"))
}

fn list(answer: Value) -> Vec<Value> {
    match answer {
        Value::Array(items) => items,
        _ => vec![],
    }
}
