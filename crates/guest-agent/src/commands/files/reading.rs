//! `guest-file-read`: a file's bytes, piece by piece, so that an answer of 64 MiB is never whole in memory.

use super::open::OpenFile;
use super::operation::failed;
use super::{Answer, Done};
use crate::note;
use base64_simd::{AsOut as _, STANDARD};
use guest_protocol::answers::{FILE_READ_HEAD, FilePiece};
use rustix::io::Errno;

/// Bytes read for one piece, at least and at most: an eighth of what is asked for, since each piece costs the way to the
/// thread and back, and a host that asks for much expects it to cost memory.
const PIECE_BYTES: (u64, u64) = (120 << 10, 240 << 10);
/// Bytes read at a time, into the thread's own stack. A multiple of 3, as is what a piece holds of them.
const CHUNK_BYTES: usize = 30 << 10;

/// A file being read.
#[derive(Debug)]
pub(super) struct Reading {
    file: OpenFile,
    /// Bytes still to be read.
    left: u64,
    /// Chunks that make a piece.
    chunks: u64,
    /// Bytes that were read.
    count: u64,
    /// The latest of them, which wait for others to fill a group of three.
    rest: Vec<u8>,
    is_begun: bool,
}

impl Reading {
    /// A reading of `count` bytes, which is not negative.
    pub(super) fn new(file: OpenFile, count: i64) -> Reading {
        let left = u64::try_from(count).unwrap_or(0);
        let chunks = (left / 8).clamp(PIECE_BYTES.0, PIECE_BYTES.1) / CHUNK_BYTES as u64;
        Reading { file, left, chunks, count: 0, rest: Vec::new(), is_begun: false }
    }

    pub(super) fn into_file(self) -> OpenFile {
        self.file
    }

    pub(super) fn next_piece(mut self, handle: i64, memory: Vec<u8>) -> Done {
        let head = if std::mem::replace(&mut self.is_begun, true) { &[] } else { FILE_READ_HEAD };
        let room = self.left.min(self.chunks * CHUNK_BYTES as u64) + self.rest.len() as u64;
        let base64 = room.div_ceil(3) * 4;
        let bytes = head.len() + usize::try_from(base64).unwrap_or(0);
        // What is in it will be written over; new memory is zeroed by the kernel.
        let mut text = if memory.len() >= bytes { memory } else { vec![0; bytes] };
        text[..head.len()].copy_from_slice(head);
        let mut filled = head.len();
        let mut chunk = [0; CHUNK_BYTES + 2];
        let mut end = End::No;
        for _ in 0..self.chunks {
            let kept = self.rest.len();
            chunk[..kept].copy_from_slice(&self.rest);
            let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            let read;
            (read, end) = self::read(&self.file, &mut chunk[kept..kept + wanted]);
            self.left -= read as u64;
            self.count += read as u64;
            let is_last = self.left == 0 || !matches!(end, End::No);
            let whole = if is_last { kept + read } else { (kept + read) / 3 * 3 };
            // The room is exactly what padded base64 takes.
            filled += STANDARD.encode(&chunk[..whole], text[filled..].as_out()).len();
            self.rest.clear();
            self.rest.extend_from_slice(&chunk[whole..kept + read]);
            if is_last {
                break;
            }
        }
        if let End::Error(errno) = end
            && self.count == 0
        {
            note!("guest-file-read failed, handle: {handle}");
            return Done::new(handle, self.file, Err(failed("read file", errno)));
        }
        text.truncate(filled);
        let is_last = self.left == 0 || !matches!(end, End::No);
        let piece = FilePiece {
            text,
            count: self.count,
            rest: STANDARD.encode_to_string(&self.rest),
            eof: matches!(end, End::OfFile),
            is_last,
        };
        let (file, more) = if is_last { (Some(self.file), None) } else { (None, Some(self)) };
        Done { handle: Some(handle), file, answer: Answer::Piece(piece.into(), more) }
    }
}

/// Why there was no more.
enum End {
    /// There may be more.
    No,
    OfFile,
    /// The next read meets it again, so what was read before it can be told.
    Error(Errno),
}

fn read(file: &OpenFile, bytes: &mut [u8]) -> (usize, End) {
    let mut read = 0;
    while read < bytes.len() {
        match rustix::io::read(&file.file, &mut bytes[read..]) {
            Ok(0) => return (read, End::OfFile),
            Ok(more) => read += more,
            Err(Errno::INTR) => {}
            Err(errno) => return (read, End::Error(errno)),
        }
    }
    (read, End::No)
}
