//! `guest-file-read`: a file's bytes, piece by piece, so that an answer of 64 MiB is never whole in memory.

use super::open::OpenFile;
use super::operation::failed;
use super::{Answer, Done};
use crate::note;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest_protocol::answers::{FILE_READ_HEAD, FilePiece};
use rustix::io::Errno;

/// Bytes read for one piece: few enough to be little memory, enough to be worth a thread. A multiple of 3, so that the
/// base64 of the pieces can be put together.
const PIECE_BYTES: usize = 3 * (80 << 10);

/// A file being read.
#[derive(Debug)]
pub(super) struct Reading {
    file: OpenFile,
    /// Bytes still to be read.
    left: u64,
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
        Reading { file, left, count: 0, rest: Vec::new(), is_begun: false }
    }

    pub(super) fn into_file(self) -> OpenFile {
        self.file
    }

    pub(super) fn next_piece(mut self, handle: i64) -> Done {
        let mut bytes = std::mem::take(&mut self.rest);
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(PIECE_BYTES - bytes.len());
        let kept = bytes.len();
        bytes.resize(kept + wanted, 0);
        let (read, end) = read(&self.file, &mut bytes[kept..]);
        bytes.truncate(kept + read);
        if let End::Error(errno) = end
            && self.count + read as u64 == 0
        {
            note!("guest-file-read failed, handle: {handle}");
            return Done::new(handle, self.file, Err(failed("read file", errno)));
        }
        self.left -= read as u64;
        self.count += read as u64;
        let is_last = self.left == 0 || !matches!(end, End::No);
        let whole = if is_last { bytes.len() } else { bytes.len() / 3 * 3 };
        let mut text = Vec::new();
        if !std::mem::replace(&mut self.is_begun, true) {
            text.extend_from_slice(FILE_READ_HEAD);
        }
        encode(&bytes[..whole], &mut text);
        self.rest = bytes[whole..].to_vec();
        let piece = FilePiece {
            text,
            count: self.count,
            rest: STANDARD.encode(&self.rest),
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

fn encode(bytes: &[u8], text: &mut Vec<u8>) {
    let before = text.len();
    text.resize(before + bytes.len().div_ceil(3) * 4, 0);
    // The room is exactly what padded base64 takes.
    let written = STANDARD.encode_slice(bytes, &mut text[before..]).unwrap_or(0);
    text.truncate(before + written);
}
