//! Work that may wait for a disk or another program, each in a thread of its own.

use super::Reply;
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

/// Jobs that run, and answers that wait to be taken.
#[derive(Debug)]
pub(super) struct Jobs {
    running: usize,
    bell: Arc<Bell>,
    send: Sender<(u64, Answer)>,
    receive: Receiver<(u64, Answer)>,
}

impl Jobs {
    pub(super) fn new() -> io::Result<Jobs> {
        let (send, receive) = channel();
        Ok(Jobs { running: 0, bell: Arc::new(Bell::new()?), send, receive })
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Begins a job; its answer comes later, under the ticket.
    pub(super) fn start(&mut self, ticket: u64, work: impl FnOnce() -> Answer + Send + 'static) -> Reply {
        if self.running >= JOBS_MAX {
            return Reply::Now(Err(Error::generic("too many commands are running")));
        }
        let (bell, send) = (self.bell.clone(), self.send.clone());
        let job = move || {
            let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
                .unwrap_or_else(|_| Err(Error::generic("the agent failed to carry out this command")));
            // The receiver is gone only when the program ends.
            let _received = send.send((ticket, answer)).is_ok();
            bell.ring();
        };
        match std::thread::Builder::new().name("job".to_owned()).stack_size(256 << 10).spawn(job) {
            Ok(_detached) => {
                self.running += 1;
                Reply::Later
            }
            Err(error) => Reply::Now(Err(Error::generic(format!("cannot start a thread: {error}")))),
        }
    }

    /// Answers that have become ready.
    pub(super) fn finished(&mut self) -> Vec<(u64, Answer)> {
        self.bell.silence();
        let finished: Vec<_> = self.receive.try_iter().collect();
        self.running -= finished.len();
        finished
    }
}
