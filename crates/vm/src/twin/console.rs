//! The end of what a twin's guest writes to its serial console, kept in memory.

use crate::unix;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How much of the console is kept, in bytes.
const TAIL_BYTES_MAX: usize = 64 << 10;
/// How long QEMU, which listens already, may take to let us in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the console until the twin ends or this is dropped.
#[derive(Debug, Default)]
pub(super) struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    reader: Option<(UnixStream, JoinHandle<()>)>,
}

impl Console {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Begins to read.
    pub(super) fn follow(&mut self, socket: &Path) -> io::Result<()> {
        let stream = unix::connect(socket, Instant::now() + CONNECT_TIMEOUT)?;
        let mut reading = stream.try_clone()?;
        let tail = Arc::clone(&self.tail);
        let thread = std::thread::Builder::new().name("console".to_owned()).spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reading.read(&mut bytes) {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend(&bytes[..count]);
                let beyond = tail.len().saturating_sub(TAIL_BYTES_MAX);
                tail.drain(..beyond);
            }
        })?;
        self.reader = Some((stream, thread));
        Ok(())
    }

    pub(super) fn tail(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some((stream, thread)) = self.reader.take() {
            // The reader wakes up and ends; if the twin closed it already, it has ended.
            stream.shutdown(Shutdown::Both).ok();
            thread.join().ok();
        }
    }
}
