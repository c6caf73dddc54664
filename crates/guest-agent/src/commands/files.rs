//! `guest-file-*`: files of the guest that hosts opened.
//!
//! A file is lent to one job at a time; requests for it that come meanwhile wait, so that they take effect in the order
//! in which they came. Handles outlive clients, as in qemu-ga, since most hosts connect anew for each command; but there
//! are only so many, and the one that was not used for longest makes room.

mod open;
mod operation;
mod reading;

use super::jobs::Jobs;
use super::{Delivery, Reply};
use crate::state::Handles;
use crate::{log, note};
use guest_protocol::Error;
use guest_protocol::arguments::{FileCall, FileOpen, FileOperation};
use guest_protocol::connection::Piece;
use open::OpenFile;
use reading::Reading;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Most files that are open. Programs started with `guest-exec` need descriptors too, and 1,024 is a usual limit.
const HANDLES_MAX: usize = 256;
/// Most requests that wait for one file.
const WAITING_MAX: usize = 256;
/// Most bytes of writes that wait for files or are being written.
const WAITING_BYTES_MAX: usize = 256 << 20;

/// All open files.
#[derive(Debug)]
pub(super) struct Files {
    handles: BTreeMap<i64, Handle>,
    numbers: Arc<Handles>,
    /// Counts uses, to know the handle that was not used for longest.
    clock: u64,
}

#[derive(Debug)]
struct Handle {
    /// Not here while it is lent.
    file: Option<OpenFile>,
    waiting: VecDeque<(u64, FileOperation)>,
    waiting_bytes: usize,
    lent_bytes: usize,
    used: u64,
}

/// What a job did.
#[derive(Debug)]
pub(super) struct Done {
    /// None: the file is new.
    handle: Option<i64>,
    /// Not there if it is closed, or lent to what follows.
    file: Option<OpenFile>,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    Whole(Result<Value, Error>),
    Opened(i64),
    Piece(Piece, Option<Reading>),
}

/// An answer of which there is more, with the file that it is read from.
#[derive(Debug)]
pub struct Transfer {
    handle: i64,
    reading: Reading,
}

impl Done {
    fn new(handle: i64, file: OpenFile, answer: Result<Value, Error>) -> Done {
        Done { handle: Some(handle), file: Some(file), answer: Answer::Whole(answer) }
    }

    /// The file is gone.
    pub(super) fn lost(handle: i64, error: Error) -> Done {
        Done { handle: Some(handle), file: None, answer: Answer::Whole(Err(error)) }
    }
}

impl Files {
    pub(super) fn new(numbers: Arc<Handles>) -> Files {
        Files { handles: BTreeMap::new(), numbers, clock: 0 }
    }

    pub(super) fn open(&mut self, jobs: &mut Jobs, ticket: u64, arguments: FileOpen) -> Reply {
        let numbers = self.numbers.clone();
        let work = move || {
            let opened = open::open(&arguments).and_then(|file| {
                let handle = numbers.next().map_err(|error| {
                    log!(Error, "failed to commit persistent state to disk: {}", crate::words(&error));
                    Error::generic("failed to commit persistent state to disk")
                })?;
                note!("guest-file-open, handle: {handle}");
                Ok((file, handle))
            });
            match opened {
                Ok((file, handle)) => Done { handle: None, file: Some(file), answer: Answer::Opened(handle) },
                Err(error) => Done { handle: None, file: None, answer: Answer::Whole(Err(error)) },
            }
        };
        // Where it panics there is no handle yet that could be lost.
        match jobs.start_on_file(ticket, NO_HANDLE, work) {
            Ok(()) => Reply::Later,
            Err(error) => Reply::Now(Err(error)),
        }
    }

    pub(super) fn operate(&mut self, jobs: &mut Jobs, ticket: u64, call: FileCall) -> Reply {
        let FileCall { handle, operation } = call;
        if matches!(operation, FileOperation::Close) {
            note!("guest-file-close called, handle: {handle}");
        }
        let bytes = operation::bytes(&operation);
        let in_flight: usize =
            self.handles.values().map(|handle| handle.waiting_bytes + handle.lent_bytes).sum();
        let Some(found) = self.handles.get_mut(&handle) else {
            return Reply::Now(Err(Error::generic(format!("handle '{handle}' has not been found"))));
        };
        if let Err(error) = operation::check(&operation) {
            return Reply::Now(Err(error));
        }
        if found.waiting.len() >= WAITING_MAX || (in_flight > 0 && in_flight + bytes > WAITING_BYTES_MAX) {
            return Reply::Now(Err(Error::generic("too many requests wait for this file")));
        }
        self.clock += 1;
        found.used = self.clock;
        found.waiting_bytes += bytes;
        found.waiting.push_back((ticket, operation));
        match self.begin_next(jobs, handle) {
            None => Reply::Later,
            // Only what was just added can have been begun.
            Some((_, error)) => Reply::Now(Err(error)),
        }
    }

    /// Lends the file to the request that waits for it, if it is here. Gives the ticket of one that could not be begun.
    fn begin_next(&mut self, jobs: &mut Jobs, handle: i64) -> Option<(u64, Error)> {
        let found = self.handles.get_mut(&handle)?;
        let mut file = found.file.take()?;
        let Some((ticket, operation)) = found.waiting.pop_front() else {
            found.file = Some(file);
            return None;
        };
        found.lent_bytes = operation::bytes(&operation);
        found.waiting_bytes -= found.lent_bytes;
        let work = move || match operation {
            FileOperation::Read(count) => Reading::new(file, count).next_piece(handle, Vec::new()),
            FileOperation::Close => {
                Done { handle: Some(handle), file: None, answer: Answer::Whole(operation::close(file)) }
            }
            operation => {
                let answer = operation::carry_out(&mut file, handle, operation);
                Done::new(handle, file, answer)
            }
        };
        jobs.start_on_file(ticket, handle, work).err().map(|error| (ticket, error))
    }

    /// Takes what a job did, begins what waited for the file, and gives what is to be answered.
    pub(super) fn done(&mut self, jobs: &mut Jobs, ticket: u64, done: Done) -> Vec<(u64, Delivery)> {
        let mut deliveries = Vec::new();
        match done.answer {
            Answer::Whole(answer) => deliveries.push((ticket, Delivery::Answer(answer))),
            Answer::Opened(handle) => {
                if let Some(file) = done.file {
                    self.add(handle, file);
                }
                deliveries.push((ticket, Delivery::Answer(Ok(handle.into()))));
                return deliveries;
            }
            Answer::Piece(piece, Some(reading)) => {
                let handle = done.handle.unwrap_or(NO_HANDLE);
                deliveries.push((ticket, Delivery::Piece(piece, Some(Transfer { handle, reading }))));
                return deliveries;
            }
            Answer::Piece(piece, None) => deliveries.push((ticket, Delivery::Piece(piece, None))),
        }
        if let Some(handle) = done.handle {
            deliveries.extend(self.give_back(jobs, handle, done.file));
        }
        deliveries
    }

    /// Goes on with an answer. False where it cannot; then the answer is to end.
    pub(super) fn go_on(
        &mut self,
        jobs: &mut Jobs,
        ticket: u64,
        transfer: Transfer,
        memory: Vec<u8>,
    ) -> bool {
        let Transfer { handle, reading } = transfer;
        let begun = jobs.go_on_with_file(ticket, handle, move || reading.next_piece(handle, memory));
        if let Err(error) = &begun {
            log!(Error, "the file behind handle {handle} is lost: {error}");
            // What waits for it is answered when the host asks again.
            self.handles.remove(&handle);
        }
        begun.is_ok()
    }

    /// Nobody wants the rest of an answer. Gives what is to be answered in turn.
    pub(super) fn end(&mut self, jobs: &mut Jobs, transfer: Transfer) -> Vec<(u64, Delivery)> {
        self.give_back(jobs, transfer.handle, Some(transfer.reading.into_file()))
    }

    fn give_back(&mut self, jobs: &mut Jobs, handle: i64, file: Option<OpenFile>) -> Vec<(u64, Delivery)> {
        let mut deliveries = Vec::new();
        let Some(found) = self.handles.get_mut(&handle) else { return deliveries };
        found.lent_bytes = 0;
        if file.is_none() {
            let waiting = self.handles.remove(&handle).map(|handle| handle.waiting).unwrap_or_default();
            for (ticket, _) in waiting {
                let error = Error::generic(format!("handle '{handle}' has not been found"));
                deliveries.push((ticket, Delivery::Answer(Err(error))));
            }
            return deliveries;
        }
        found.file = file;
        if let Some((ticket, error)) = self.begin_next(jobs, handle) {
            // With the thread the file was lost.
            deliveries.push((ticket, Delivery::Answer(Err(error))));
            deliveries.extend(self.give_back(jobs, handle, None));
        }
        deliveries
    }

    fn add(&mut self, handle: i64, file: OpenFile) {
        if self.handles.len() >= HANDLES_MAX {
            let idle = self.handles.iter().filter(|(_, handle)| handle.file.is_some());
            let idlest = idle.min_by_key(|(_, handle)| handle.used).map(|(number, _)| *number);
            if let Some(idlest) = idlest.and_then(|idlest| Some((idlest, self.handles.remove(&idlest)?))) {
                log!(Warning, "too many open files: handle {} is closed", idlest.0);
                // Closing may wait for a server. Where there is no thread for it, it is done here.
                let closing = std::thread::Builder::new().name("close".to_owned());
                let _begun = closing.stack_size(64 << 10).spawn(move || drop(idlest.1)).is_ok();
            }
        }
        self.clock += 1;
        let file = Some(file);
        let (waiting, used) = (VecDeque::new(), self.clock);
        self.handles.insert(handle, Handle { file, waiting, waiting_bytes: 0, lent_bytes: 0, used });
    }
}

/// Stands for the handle that a file will have. None is ever negative.
const NO_HANDLE: i64 = -1;
