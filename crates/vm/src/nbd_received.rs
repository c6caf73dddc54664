//! What has arrived from an NBD peer and is not used up yet, for both ends.

/// Read at least this much at once, so that small messages come by the dozen.
const READ_BYTES: usize = 64 << 10;
/// The head of the next data chunk, read along with the end of a long one.
const NEXT_HEAD_BYTES: usize = 28;

/// One buffer, reused: a message's head and payload lie in it without a gap, so payload is never copied.
#[derive(Debug, Default)]
pub(crate) struct Received {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    /// What the decoder is to be shown.
    pub(crate) fn shown(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// So many bytes of what was shown are done with.
    pub(crate) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Where to read into, until `wanted` bytes can be shown; call [`Received::arrived`] then.
    ///
    /// Behind a long message no more is read than the next head: what else came along would have to be moved.
    pub(crate) fn room(&mut self, wanted: usize) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let limit = READ_BYTES.max(wanted + NEXT_HEAD_BYTES);
        if self.buffer.len() < limit {
            self.buffer.resize(limit, 0);
        }
        &mut self.buffer[self.end..limit]
    }

    /// So many bytes were read into the room.
    pub(crate) fn arrived(&mut self, bytes: usize) {
        self.end += bytes;
    }
}
