//! Sends every stream to both agents and compares what they answer, line by line.

use super::differences::{Between, DIFFERENCES, Difference, Run};
use super::peer::{Line, Peer, shown};
use super::streams::{Like, Stream};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// So many failures of one kind are enough to see what is wrong.
const FAILURES_MAX: usize = 6;

/// Major and minor number of a stock agent.
pub(crate) type Version = (u32, u32);

/// What came of it.
#[derive(Default)]
pub(crate) struct Tally {
    streams: usize,
    answers: usize,
    /// How often each difference was seen.
    seen: BTreeMap<&'static str, usize>,
    /// Commands that one of the two does not have, so that their streams were passed over.
    absent: BTreeSet<String>,
    failures: BTreeMap<&'static str, Vec<String>>,
}

impl Tally {
    /// Prints what was compared; fails if anything differed that has no reason, or nothing did where there is one.
    pub(crate) fn conclude(self, run: Run, name: &str, version: Version) {
        eprintln!("qemu-ga {name}: {} streams, {} answers compared", self.streams, self.answers);
        for (name, times) in &self.seen {
            let why = DIFFERENCES.iter().find(|one| one.name == *name).map_or("", |one| one.why);
            eprintln!("  {times:5} × {name}: {why}");
        }
        if !self.absent.is_empty() {
            let absent: Vec<&str> = self.absent.iter().map(String::as_str).collect();
            eprintln!("  not compared, one of the two does not have them: {}", absent.join(" "));
        }
        let mut failed = 0;
        for (name, failures) in &self.failures {
            failed += failures.len();
            for failure in failures.iter().take(FAILURES_MAX) {
                eprintln!("{name}: {failure}\n");
            }
        }
        assert!(failed == 0, "{failed} answers differ");
        let out_of_date =
            DIFFERENCES.iter().filter(|one| (one.met)(run, version) && !self.seen.contains_key(one.name));
        let out_of_date: Vec<&str> = out_of_date.map(|one| one.name).collect();
        assert!(out_of_date.is_empty(), "nothing differs any more in {out_of_date:?}");
        assert!(self.streams > 0, "nothing was compared");
    }

    fn fail(&mut self, name: &'static str, failure: String) {
        self.failures.entry(name).or_default().push(failure);
    }

    /// Compares what was answered to one stream.
    pub(crate) fn take(&mut self, version: Version, stream: &Stream, stock: &[Line], ours: &[Line]) {
        self.streams += 1;
        self.answers += stock.len();
        if stock.len() == ours.len() {
            let unlike: Vec<_> = stock
                .iter()
                .zip(ours)
                .filter(|(stock, ours)| !alike(stream.like, stock, ours))
                .map(|(stock, ours)| self.reason(version, stream, stock, ours).ok_or((stock, ours)))
                .collect();
            if unlike.iter().all(Result::is_ok) {
                for name in unlike.into_iter().flatten() {
                    *self.seen.entry(name).or_default() += 1;
                }
                return;
            }
        }
        let whole = DIFFERENCES.iter().find(|one| match one.between {
            Between::Streams(is) => is(version, stream, stock, ours),
            _ => false,
        });
        match whole {
            Some(difference) => *self.seen.entry(difference.name).or_default() += 1,
            None => {
                let (stock, ours) = (listed(stock), listed(ours));
                let failure = format!("{}\n  stock: {stock}\n  ours:  {ours}", shown(&stream.pieces));
                self.fail(stream.name, failure);
            }
        }
    }

    fn reason(&self, version: Version, stream: &Stream, stock: &Line, ours: &Line) -> Option<&'static str> {
        let (stock, ours) = (value(stock)?, value(ours)?);
        let is = |one: &&Difference| match one.between {
            Between::Lines(is) => is(version, stream, &stock, &ours),
            _ => false,
        };
        DIFFERENCES.iter().find(is).map(|one| one.name)
    }

    /// Compares what came of a script, step by step.
    pub(crate) fn script(&mut self, name: &'static str, version: Version, stock: &[Value], ours: &[Value]) {
        self.streams += 1;
        self.answers += stock.len();
        for (index, (stock, ours)) in stock.iter().zip(ours).enumerate() {
            if stock == ours {
                continue;
            }
            let is = |one: &&Difference| match one.between {
                Between::Steps(is) => is(version, name, stock, ours),
                _ => false,
            };
            match DIFFERENCES.iter().find(is) {
                Some(difference) => *self.seen.entry(difference.name).or_default() += 1,
                None => self.fail(name, format!("step {index}\n  stock: {stock}\n  ours:  {ours}")),
            }
        }
        if stock.len() != ours.len() {
            self.fail(name, format!("{} answers of stock, {} of ours", stock.len(), ours.len()));
        }
    }

    pub(crate) fn absent(&mut self, command: &str) {
        self.absent.insert(command.to_owned());
    }
}

/// Sends all streams to both.
pub(crate) fn compare(
    tally: &mut Tally,
    version: Version,
    stock: &mut Peer,
    ours: &mut Peer,
    streams: &[Stream],
) {
    let known: Vec<BTreeSet<String>> =
        [&mut *stock, &mut *ours].into_iter().map(|peer| peer.commands().into_iter().collect()).collect();
    for stream in streams {
        if let Some(command) = stream.command
            && known.iter().any(|known| !known.contains(command))
        {
            tally.absent(command);
            continue;
        }
        let answers = stock.hear(&stream.pieces, 0);
        let of_ours = ours.hear(&stream.pieces, answers.len());
        tally.take(version, stream, &answers, &of_ours);
    }
}

/// The same, but for the order of members, which carries no meaning.
fn alike(like: Like, stock: &Line, ours: &Line) -> bool {
    if stock == ours {
        return true;
    }
    let (Some(first), Some(second)) = (value(stock), value(ours)) else { return false };
    if like == Like::ButNumbers {
        return masked(first) == masked(second);
    }
    let sorted = |line: &Line| {
        let mut bytes = line.clone();
        bytes.sort_unstable();
        bytes
    };
    first == second && sorted(stock) == sorted(ours)
}

/// The line's JSON; the byte before a delimited sync's answer is part of the comparison.
pub(crate) fn value(line: &[u8]) -> Option<Value> {
    match line.strip_prefix(b"\xFF") {
        Some(rest) => Some(Value::Array(vec![Value::Null, serde_json::from_slice(rest).ok()?])),
        None => serde_json::from_slice(line).ok(),
    }
}

/// Every number replaced, as those of two moments differ.
pub(crate) fn masked(value: Value) -> Value {
    match value {
        Value::Number(_) => Value::from(0),
        Value::Array(elements) => elements.into_iter().map(masked).collect(),
        Value::Object(members) => members
            .into_iter()
            .map(|(name, member)| (name, masked(member)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        other => other,
    }
}

fn listed(lines: &[Line]) -> String {
    let shown = |line: &Line| {
        let text = String::from_utf8_lossy(line).into_owned();
        if text.chars().count() > 500 { text.chars().take(500).collect::<String>() + "…" } else { text }
    };
    let mut text: Vec<String> = lines.iter().take(8).map(shown).collect();
    if lines.len() > 8 {
        text.push(format!("… {} lines", lines.len()));
    }
    text.join("\n         ")
}
