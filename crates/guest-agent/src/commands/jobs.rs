//! Work that may wait for a disk or another program, each in a thread of its own.
//!
//! A thread that worked on a file takes up more such work if there is any within a moment: a transfer is thousands of
//! pieces, and each would cost a thread. Other threads are not used again, since a job may have changed what its thread may
//! do.

use super::Reply;
use super::files::Done;
use crate::poll::Bell;
use guest_protocol::Error;
use serde_json::Value;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most jobs at once: a dead disk must not collect threads without end.
const JOBS_MAX: usize = 16;
/// Most jobs that wait for one of these places. A host may send as many requests at once as it may have unanswered.
const WAITING_MAX: usize = 1024;

/// How long a thread that worked on a file waits for more.
const LINGER: Duration = Duration::from_millis(100);

type Answer = Result<Value, Error>;
type Task = Box<dyn FnOnce() + Send>;

/// What a job brings.
#[derive(Debug)]
pub(super) enum Finished {
    /// The answer.
    Answer(Answer),
    /// What was done to a file.
    File(Done),
}

/// What thread a job takes.
#[derive(Clone, Copy, Debug)]
enum Place {
    Own,
    File,
}

/// Jobs that run, and answers that wait to be taken.
pub(super) struct Jobs {
    running: usize,
    /// By ticket, jobs that wait for a place.
    waiting: VecDeque<(u64, Place, Task)>,
    /// No job begins now.
    is_held: bool,
    file_threads: Arc<FileThreads>,
    bell: Arc<Bell>,
    send: Sender<(u64, Finished)>,
    receive: Receiver<(u64, Finished)>,
}

impl Jobs {
    pub(super) fn new() -> io::Result<Jobs> {
        let (send, receive) = channel();
        let file_threads = Arc::new(FileThreads::default());
        let bell = Arc::new(Bell::new()?);
        Ok(Jobs { running: 0, waiting: VecDeque::new(), is_held: false, file_threads, bell, send, receive })
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Makes the loop look at what has become ready.
    pub(super) fn ring(&self) {
        self.bell.ring();
    }

    /// While held, what is asked for waits: a guest that is frozen is left alone.
    pub(super) fn hold(&mut self, is_held: bool) {
        self.is_held = is_held;
    }

    /// Begins a job, or lets it wait; its answer comes later, under the ticket.
    pub(super) fn start(&mut self, ticket: u64, work: impl FnOnce() -> Answer + Send + 'static) -> Reply {
        let failed = || Finished::Answer(Err(panicked()));
        let task = self.task(ticket, || Finished::Answer(work()), failed, None);
        match self.begin_or_wait(ticket, Place::Own, Box::new(task)) {
            Ok(()) => Reply::Later,
            Err(error) => Reply::Now(Err(error)),
        }
    }

    /// Begins work on a file, or lets it wait.
    /// # Errors
    /// When there is neither a thread to be had nor a place to wait; what the work held is gone then.
    pub(super) fn start_on_file(
        &mut self,
        ticket: u64,
        handle: i64,
        work: impl FnOnce() -> Done + Send + 'static,
    ) -> Result<(), Error> {
        let failed = move || Finished::File(Done::lost(handle, panicked()));
        let task = self.task(ticket, || Finished::File(work()), failed, Some(self.file_threads.clone()));
        self.begin_or_wait(ticket, Place::File, Box::new(task))
    }

    /// Goes on with work on a file, whatever else is running: each client hears one answer at a time.
    /// # Errors
    /// When there is no thread to be had; what the work held is gone then.
    pub(super) fn go_on_with_file(
        &mut self,
        ticket: u64,
        handle: i64,
        work: impl FnOnce() -> Done + Send + 'static,
    ) -> Result<(), Error> {
        let failed = move || Finished::File(Done::lost(handle, panicked()));
        let task = self.task(ticket, || Finished::File(work()), failed, Some(self.file_threads.clone()));
        self.begin(Place::File, Box::new(task))
    }

    /// Begins what waited, as far as there are places.
    pub(super) fn begin_waiting(&mut self) {
        while !self.is_held
            && self.running < JOBS_MAX
            && let Some((ticket, place, task)) = self.waiting.pop_front()
        {
            if let Err(error) = self.begin(place, task) {
                // It did not run, so nobody else answers. Counted as one that did.
                self.running += 1;
                let _received = self.send.send((ticket, Finished::Answer(Err(error)))).is_ok();
                self.bell.ring();
            }
        }
    }

    fn begin_or_wait(&mut self, ticket: u64, place: Place, task: Task) -> Result<(), Error> {
        if !self.is_held && self.running < JOBS_MAX {
            return self.begin(place, task);
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(Error::generic("too many commands are running"));
        }
        self.waiting.push_back((ticket, place, task));
        Ok(())
    }

    fn begin(&mut self, place: Place, task: Task) -> Result<(), Error> {
        let begun = match place {
            Place::Own => thread(task),
            Place::File => FileThreads::begin(&self.file_threads, task),
        };
        begun.map_err(|error| Error::generic(format!("cannot start a thread: {error}")))?;
        self.running += 1;
        Ok(())
    }

    fn task(
        &self,
        ticket: u64,
        work: impl FnOnce() -> Finished + Send + 'static,
        failed: impl FnOnce() -> Finished + Send + 'static,
        lingers: Option<Arc<FileThreads>>,
    ) -> impl FnOnce() + Send + 'static {
        let (bell, send) = (self.bell.clone(), self.send.clone());
        move || {
            let finished =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| failed());
            // Before the loop hears of it: what it then asks for is for this thread, not for a new one.
            if let Some(threads) = lingers {
                threads.lock().threads += 1;
            }
            // The receiver is gone only when the program ends.
            let _received = send.send((ticket, finished)).is_ok();
            bell.ring();
        }
    }

    /// What has become ready.
    pub(super) fn finished(&mut self) -> Vec<(u64, Finished)> {
        self.bell.silence();
        let finished: Vec<_> = self.receive.try_iter().collect();
        self.running -= finished.len();
        finished
    }
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").field("running", &self.running).field("waiting", &self.waiting.len()).finish()
    }
}

/// Starts a detached thread: its answer is all that is waited for.
fn thread(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("job".to_owned()).stack_size(256 << 10).spawn(work).map(|_detached| ())
}

/// Threads that work on files, and linger.
#[derive(Default)]
struct FileThreads {
    waiting: Mutex<Waiting>,
    work: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// Threads that wait, or are about to.
    threads: usize,
    /// Never more than threads that wait.
    tasks: VecDeque<Task>,
}

impl std::fmt::Debug for FileThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileThreads").finish_non_exhaustive()
    }
}

impl FileThreads {
    /// Hands a task to a thread that waits, or else to a new one.
    fn begin(this: &Arc<FileThreads>, task: Task) -> io::Result<()> {
        let mut waiting = this.lock();
        if waiting.threads > waiting.tasks.len() {
            waiting.tasks.push_back(task);
            this.work.notify_one();
            return Ok(());
        }
        drop(waiting);
        let this = Arc::clone(this);
        thread(move || {
            let mut next = Some(task);
            while let Some(task) = next {
                task();
                next = this.wait();
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // A panic cannot come between taking the lock and letting it go.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a thread that has counted itself among those that wait.
    fn wait(&self) -> Option<Task> {
        let waited = self.work.wait_timeout_while(self.lock(), LINGER, |waiting| waiting.tasks.is_empty());
        let (mut waiting, _) = waited.unwrap_or_else(PoisonError::into_inner);
        waiting.threads -= 1;
        waiting.tasks.pop_front()
    }
}

fn panicked() -> Error {
    Error::generic("the agent failed to carry out this command")
}
