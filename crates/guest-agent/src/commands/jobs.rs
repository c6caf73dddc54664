//! Work that may wait for a disk or another program, each in a thread of its own.

use super::Reply;
use super::files::Done;
use crate::poll::Bell;
use guest_protocol::Error;
use serde_json::Value;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Most jobs at once: a dead disk must not collect threads without end.
const JOBS_MAX: usize = 16;

type Answer = Result<Value, Error>;

/// What a job brings.
#[derive(Debug)]
pub(super) enum Finished {
    /// The answer.
    Answer(Answer),
    /// What was done to a file.
    File(Done),
}

/// Jobs that run, and answers that wait to be taken.
#[derive(Debug)]
pub(super) struct Jobs {
    running: usize,
    bell: Arc<Bell>,
    send: Sender<(u64, Finished)>,
    receive: Receiver<(u64, Finished)>,
}

impl Jobs {
    pub(super) fn new() -> io::Result<Jobs> {
        let (send, receive) = channel();
        Ok(Jobs { running: 0, bell: Arc::new(Bell::new()?), send, receive })
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Makes the loop look at what has become ready.
    pub(super) fn ring(&self) {
        self.bell.ring();
    }

    /// Begins a job; its answer comes later, under the ticket.
    pub(super) fn start(&mut self, ticket: u64, work: impl FnOnce() -> Answer + Send + 'static) -> Reply {
        if self.is_full() {
            return Reply::Now(Err(too_many()));
        }
        let failed = || Finished::Answer(Err(panicked()));
        match self.spawn(ticket, || Finished::Answer(work()), failed) {
            Ok(()) => Reply::Later,
            Err(error) => Reply::Now(Err(error)),
        }
    }

    /// Whether a job that nobody waits for yet would be refused.
    pub(super) fn is_full(&self) -> bool {
        self.running >= JOBS_MAX
    }

    /// Begins work on a file, whatever else is running: the open files bound how much of it there is.
    /// # Errors
    /// When there is no thread to be had; what the work held is gone then.
    pub(super) fn start_on_file(
        &mut self,
        ticket: u64,
        handle: i64,
        work: impl FnOnce() -> Done + Send + 'static,
    ) -> Result<(), Error> {
        self.spawn(ticket, || Finished::File(work()), move || Finished::File(Done::lost(handle, panicked())))
    }

    fn spawn(
        &mut self,
        ticket: u64,
        work: impl FnOnce() -> Finished + Send + 'static,
        failed: impl FnOnce() -> Finished + Send + 'static,
    ) -> Result<(), Error> {
        let (bell, send) = (self.bell.clone(), self.send.clone());
        let job = move || {
            let finished =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| failed());
            // The receiver is gone only when the program ends.
            let _received = send.send((ticket, finished)).is_ok();
            bell.ring();
        };
        let thread = std::thread::Builder::new().name("job".to_owned()).stack_size(256 << 10);
        // The thread is detached: its answer is all that is waited for.
        let _thread =
            thread.spawn(job).map_err(|error| Error::generic(format!("cannot start a thread: {error}")))?;
        self.running += 1;
        Ok(())
    }

    /// What has become ready.
    pub(super) fn finished(&mut self) -> Vec<(u64, Finished)> {
        self.bell.silence();
        let finished: Vec<_> = self.receive.try_iter().collect();
        self.running -= finished.len();
        finished
    }
}

pub(super) fn too_many() -> Error {
    Error::generic("too many commands are running")
}

fn panicked() -> Error {
    Error::generic("the agent failed to carry out this command")
}
