//! One instance of an application on its way through a run, and the evidence that it leaves.

use super::channel::{Answer, Note, Phase};
use super::kinds::{Found, Kind};
use super::process::Process;
use super::worker::{Errand, Lost, Worker};
use crate::program::Program;
use guest_protocol::stillpoint::{ApplicationReport, Policy, Reason, TEXT_BYTES_MAX};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Most reasons and facts that one application may report.
const ENTRIES_MAX: usize = 128;
/// A worker that was told to end gets this long to close its session.
const END_PATIENCE: Duration = Duration::from_millis(500);

/// Where an instance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Found; no phase failed.
    Good,
    /// A phase failed, or the policy forbids it: not touched any more.
    Out,
    /// Resumed: the run is over for it.
    Resumed,
}

/// What is asked of every instance in a phase.
pub(super) struct Turn<'a> {
    pub(super) program: &'a Program,
    pub(super) until: Instant,
    pub(super) abort: &'a AtomicBool,
}

/// An instance in a run.
pub(super) struct Instance {
    pub(super) freeze_budget: Duration,
    pub(super) stalls_writers: bool,
    pub(super) process: Process,
    pub(super) report: ApplicationReport,
    errand: Option<Errand>,
    worker: Option<Worker>,
    standing: Standing,
}

impl Instance {
    pub(super) fn new(kind: &Kind, found: Found, policy: Policy) -> Self {
        let mut instance = Self {
            freeze_budget: kind.freeze_budget,
            stalls_writers: kind.stalls_writers,
            process: found.process,
            report: ApplicationReport {
                kind: kind.name.to_owned(),
                instance: clip(&found.instance),
                version: found.version.as_deref().map(clip),
                policy,
                device_numbers: found.device_numbers.into_iter().collect(),
                ..ApplicationReport::default()
            },
            errand: None,
            worker: None,
            standing: Standing::Good,
        };
        instance.take(Answer { facts: found.facts, notes: found.notes, ..Answer::default() });
        match found.errand {
            _ if policy == Policy::Off => {
                instance.out(Note::new("policy_off", "left alone, as its policy says"))
            }
            Ok(errand) => instance.errand = Some(errand),
            Err(note) => instance.out(note),
        }
        instance
    }

    pub(super) fn worker_pid(&self) -> Option<u32> {
        self.worker.as_ref().and_then(Worker::pid)
    }

    /// Connects and reads; the worker ends with it.
    pub(super) fn rehearse(&mut self, turn: &Turn<'_>) {
        if let Some(answer) = self.ask(Phase::Rehearse, "rehearse_timeout", turn) {
            // The level to expect rests on the settings too, not only the level of a real run.
            self.report.crash_safe = answer.crash_safe;
            self.take(answer);
        }
        self.end();
    }

    /// Slow and harmless work.
    pub(super) fn prepare(&mut self, turn: &Turn<'_>) {
        if let Some(answer) = self.ask(Phase::Prepare, "prepare_timeout", turn) {
            self.take(answer);
        }
    }

    /// Takes what is held over the freeze.
    pub(super) fn quiesce(&mut self, turn: &Turn<'_>) {
        if let Some(answer) = self.ask(Phase::Quiesce, "quiesce_timeout", turn) {
            self.report.quiesced = true;
            self.report.crash_safe = answer.crash_safe;
            self.take(answer);
        }
    }

    /// Proves that it was held, then lets go. Whatever was taken is let go of in any case, because the worker ends.
    pub(super) fn resume(&mut self, turn: &Turn<'_>) {
        if self.standing == Standing::Resumed {
            return;
        }
        if self.report.quiesced
            && let Some(answer) = self.ask(Phase::Resume, "session_lost", turn)
        {
            self.take(answer);
            if self.process.runs() {
                self.report.held = true;
            } else {
                self.out(Note::new("post_check_failed", "its main process is not the one that was quiesced"));
            }
        }
        self.end();
        self.standing = Standing::Resumed;
    }

    /// Why it counts as not quiesced, or as not held once it was resumed.
    pub(super) fn failure(&self) -> Option<Reason> {
        let failed = match self.standing {
            Standing::Good => false,
            Standing::Out => true,
            Standing::Resumed => !self.report.held,
        };
        let unknown = || self.reason(Note::new("not_quiesced", "it was not quiesced"));
        failed.then(|| self.report.reasons.last().cloned().unwrap_or_else(unknown))
    }

    /// Has the worker go through a phase, starting it if need be. `None`: it failed, and the reason is noted.
    fn ask(&mut self, phase: Phase, timeout_code: &str, turn: &Turn<'_>) -> Option<Answer> {
        if self.standing != Standing::Good {
            return None;
        }
        match self.answer(phase, turn) {
            Ok(Answer { failure: None, .. }) if !self.process.runs() && phase != Phase::Resume => {
                self.out(Note::new("session_lost", "its main process ended"));
                None
            }
            Ok(mut answer) => match answer.failure.take() {
                None => Some(answer),
                Some(note) => {
                    self.take(answer);
                    self.out(note);
                    None
                }
            },
            Err(lost) => {
                let code = match lost {
                    Lost::TimedOut => timeout_code,
                    Lost::Aborted => "aborted",
                    Lost::Ended | Lost::Io(_) if phase == Phase::Resume => "session_lost",
                    Lost::Ended | Lost::Io(_) => "worker_lost",
                };
                self.out(Note::new(code, format!("no answer from its worker: {lost}")));
                None
            }
        }
    }

    fn answer(&mut self, phase: Phase, turn: &Turn<'_>) -> Result<Answer, Lost> {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            none => {
                let Some(errand) = &self.errand else { return Err(Lost::Ended) };
                none.insert(Worker::start(turn.program, &self.report.kind, errand)?)
            }
        };
        worker.ask(phase, turn.until, turn.abort)
    }

    /// Adds an answer's evidence to the report, within the limits. What a later phase says replaces the earlier.
    fn take(&mut self, answer: Answer) {
        let report = &mut self.report;
        for (name, value) in answer.facts {
            if report.facts.len() < ENTRIES_MAX || report.facts.contains_key(&name) {
                report.facts.insert(clip(&name), clip(&value));
            }
        }
        report.version = answer.version.as_deref().map(clip).or(report.version.take());
        report.position = answer.position.as_deref().map(clip).or(report.position.take());
        for note in answer.notes {
            self.note(note);
        }
    }

    /// Counts it as failed, for this reason, and lets go of it.
    pub(super) fn out(&mut self, note: Note) {
        self.note(note);
        self.standing = Standing::Out;
        // Killed, not asked: it has just shown that it does not answer, or has nothing to lose.
        self.worker = None;
    }

    fn note(&mut self, note: Note) {
        let reason = self.reason(note);
        let reasons = &mut self.report.reasons;
        reasons.retain(|known| known.code != reason.code || known.message != reason.message);
        reasons.truncate(ENTRIES_MAX - 1);
        reasons.push(reason);
    }

    fn reason(&self, note: Note) -> Reason {
        let subject = clip(&format!("{} {}", self.report.kind, self.report.instance));
        Reason::new(&clip(&note.code), subject, clip(&note.message))
    }

    fn end(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.end(END_PATIENCE);
        }
    }
}

/// At most as long as a text in a report may be.
fn clip(text: &str) -> String {
    if text.len() <= TEXT_BYTES_MAX {
        return text.to_owned();
    }
    let room = TEXT_BYTES_MAX - '…'.len_utf8();
    let end = (0..=room).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_ends_in_an_ellipsis_and_at_a_letter() {
        let clipped = clip(&"ä".repeat(TEXT_BYTES_MAX));
        assert!(clipped.len() <= TEXT_BYTES_MAX && clipped.ends_with("ä…"), "{}", clipped.len());
        assert_eq!(clip("short"), "short");
    }
}
