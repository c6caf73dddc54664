//! Answers of `guest-file-*`. That of `guest-file-read` goes out in pieces: `crate::connection::Piece`.

use crate::connection::Piece;
use serde::{Deserialize, Serialize};

/// Answer of `guest-file-write`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWritten {
    /// Bytes written.
    pub count: u64,
    /// The end of the file was met.
    pub eof: bool,
}

/// Answer of `guest-file-seek`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePosition {
    /// Bytes from the beginning.
    pub position: u64,
    /// The end of the file was met.
    pub eof: bool,
}

/// How the answer of `guest-file-read` begins; base64 follows.
pub const FILE_READ_HEAD: &[u8] = b"{\"buf-b64\": \"";

/// One piece of the answer of `guest-file-read`.
#[derive(Debug)]
pub struct FilePiece {
    /// What is sent, in base64; the first piece begins with `FILE_READ_HEAD`.
    pub text: Vec<u8>,
    /// What stands in `count` if nothing follows.
    pub count: u64,
    /// Base64 of bytes that are counted but wait for others to fill a group.
    pub rest: String,
    /// The end of the file was met.
    pub eof: bool,
    /// Nothing follows.
    pub is_last: bool,
}

impl From<FilePiece> for Piece {
    fn from(piece: FilePiece) -> Piece {
        let tail = format!("{}\", \"count\": {}, \"eof\": {}}}", piece.rest, piece.count, piece.eof);
        Piece { text: piece.text, tail, is_last: piece.is_last }
    }
}
