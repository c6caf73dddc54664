//! Threads that compress and seal frames, and the way their results come back.

use crate::Error;
use crate::background::give_way;
use crate::frame_index::WindowKey;
use crate::packs::Packs;
use repository_format::{BLOCK_BYTES, Compressor, FRAME_BLOCKS_MAX, FrameAddress, FrameKind};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// At least two, so that one compresses while another waits for the store.
const THREADS_MIN: usize = 2;
/// Beyond this, reading the disk is slower than compressing it.
const THREADS_MAX: usize = 4;
/// Frames that wait for a thread: 2 MiB.
const QUEUE_FRAMES: usize = 16;

/// The threads of one writer.
pub(crate) struct Workers {
    jobs: Option<SyncSender<FrameJob>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn start(packs: &Arc<Packs>) -> Workers {
        let (jobs, queue) = sync_channel(QUEUE_FRAMES);
        let queue = Arc::new(Mutex::new(queue));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cores.clamp(THREADS_MIN, THREADS_MAX)).map(|_| {
            let (queue, packs) = (Arc::clone(&queue), Arc::clone(packs));
            std::thread::spawn(move || work(&queue, &packs))
        });
        Workers { jobs: Some(jobs), threads: threads.collect() }
    }

    /// Waits while the queue is full.
    pub(crate) fn submit(&self, job: FrameJob) {
        let jobs = self.jobs.as_ref().expect("only drop takes the queue away");
        // If all threads are gone, the job comes back, is dropped, and so reports its frame as failed.
        jobs.send(job).unwrap_or_else(drop);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            // A panic was reported with the frame during which it happened.
            thread.join().unwrap_or_default();
        }
    }
}

fn work(queue: &Mutex<Receiver<FrameJob>>, packs: &Packs) {
    give_way();
    let mut compressor = Compressor::default();
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut job) = job else { return };
        let payload = compressor.compress(&job.blocks);
        let appended = packs.append(FrameKind::Data, payload, job.window);
        job.finish(appended);
    }
}

/// A data frame to be made.
pub(crate) struct FrameJob {
    ticket: u64,
    blocks: Vec<u8>,
    window: Option<WindowKey>,
    results: Option<Arc<Results>>,
}

impl FrameJob {
    fn finish(&mut self, appended: Result<FrameAddress, Error>) {
        let Some(results) = self.results.take() else { return };
        let mut state = results.lock();
        state.unfinished -= 1;
        state.spare.push(std::mem::take(&mut self.blocks));
        match appended {
            Ok(address) => {
                state.stored_bytes += u64::from(address.length);
                state.addresses.insert(self.ticket, address);
            }
            Err(error) => {
                state.error.get_or_insert(error);
            }
        }
        drop(state);
        results.finished.notify_all();
    }
}

impl Drop for FrameJob {
    fn drop(&mut self) {
        let doing = "making a frame".to_string();
        self.finish(Err(Error::Store { doing, cause: Arc::from("its thread has ended") }));
    }
}

/// Where the frames of one disk writer ended up. Frames are known by their tickets until then.
#[derive(Default)]
pub(crate) struct Results {
    state: Mutex<ResultState>,
    finished: Condvar,
}

#[derive(Default)]
struct ResultState {
    tickets: u64,
    unfinished: u64,
    addresses: HashMap<u64, FrameAddress>,
    /// Memory of finished frames, for the next ones: never more than were in the queue and with the threads at once.
    spare: Vec<Vec<u8>>,
    stored_bytes: u64,
    error: Option<Error>,
}

impl Results {
    /// A job for a frame that has already been given its ticket.
    pub(crate) fn job(
        self: &Arc<Results>,
        ticket: u64,
        blocks: Vec<u8>,
        window: Option<WindowKey>,
    ) -> FrameJob {
        self.lock().unfinished += 1;
        FrameJob { ticket, blocks, window, results: Some(Arc::clone(self)) }
    }

    /// A number for a frame that does not exist yet.
    pub(crate) fn ticket(&self) -> u64 {
        let mut state = self.lock();
        state.tickets += 1;
        state.tickets
    }

    /// Empty memory for the blocks of a frame.
    pub(crate) fn memory(&self) -> Vec<u8> {
        let mut memory = self.lock().spare.pop().unwrap_or_default();
        memory.clear();
        memory.reserve_exact(FRAME_BLOCKS_MAX * BLOCK_BYTES);
        memory
    }

    /// Fails early, while a disk is still being read.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.lock().error.clone().map_or(Ok(()), Err)
    }

    /// Waits for all jobs; returns the addresses since the last call, and all bytes so far.
    pub(crate) fn wait(&self) -> Result<(HashMap<u64, FrameAddress>, u64), Error> {
        let mut state = self.lock();
        while state.unfinished > 0 {
            state = self.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.error {
            Some(error) => Err(error.clone()),
            None => Ok((std::mem::take(&mut state.addresses), state.stored_bytes)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ResultState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
