//! What has arrived from the server and is not used up yet.

use super::{NbdClientError, Patience};
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Read at least this much at once, so that small replies come by the dozen.
const READ_BYTES: usize = 64 << 10;
/// The head of the next data chunk, read along with the end of a long one.
const NEXT_HEADER_BYTES: usize = 28;

/// One buffer, reused: a reply's head and payload lie in it without a gap, so payload is never copied.
#[derive(Debug, Default)]
pub(super) struct Received {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    /// What the decoder is to be shown.
    pub(super) fn shown(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Reads until at least `wanted` bytes are there, or patience ends.
    pub(super) fn fill(
        &mut self,
        stream: &mut UnixStream,
        wanted: usize,
        patience: &mut Patience<'_>,
    ) -> Result<(), NbdClientError> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        // Behind a long chunk no more is read than the next head: what else came along would have to be moved.
        let limit = READ_BYTES.max(wanted + NEXT_HEADER_BYTES);
        if self.buffer.len() < limit {
            self.buffer.resize(limit, 0);
        }
        while self.end < wanted {
            let began = Instant::now();
            match stream.read(&mut self.buffer[self.end..limit]) {
                Ok(0) => return Err(NbdClientError::Closed),
                Ok(read) => self.end += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(NbdClientError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
            if self.end < wanted {
                patience.waited(began.elapsed())?;
            }
        }
        Ok(())
    }
}
