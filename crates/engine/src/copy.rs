//! Reads one disk at the point over NBD and stores what changed.

use crate::blocks::Assembler;
use crate::pieces::{self, Piece};
use crate::watch::{Cancel, Watch};
use nbd::BASE_ALLOCATION;
use repository::{DiskRoot, DiskStats, DiskWriter};
use std::path::Path;
use std::time::Duration;
use vm::nbd_client::{Chunk, NbdClient, NbdClientError, ReadOptions};
use vm::point::DiskExport;

/// Longest wait for one reply. Scratch and disk may be slow, but QEMU answers.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// `base:allocation`: reads as zeroes. Source: NBD protocol, "Metadata contexts", `NBD_STATE_ZERO`.
const STATE_ZERO: u32 = 2;
/// `qemu:dirty-bitmap:…`: written since the bitmap began. Source: QEMU `docs/interop/nbd.txt`.
const STATE_DIRTY: u32 = 1;

/// Why a disk could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Reading the point failed; with a full or slow scratch this is how a broken snapshot shows.
    #[error("the disk cannot be read as it was at the point: {0}")]
    Read(#[from] NbdClientError),
    /// The repository failed.
    #[error("{0}")]
    Store(#[from] repository::Error),
    /// Not every byte that was asked for arrived.
    #[error("QEMU's NBD server left out parts of what was asked for")]
    Incomplete,
}

/// How far the copy of all disks is.
pub(crate) struct Tally<'w> {
    pub(crate) watch: &'w dyn Watch,
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// A disk at the point, with the plan of what to read.
pub(crate) struct Source {
    client: NbdClient,
    size_bytes: u64,
    pieces: Vec<Piece>,
    /// Unread parts are as in the parent; otherwise they are zero.
    increment: bool,
}

impl Source {
    /// Connects and asks what has to be read.
    pub(crate) fn open(socket: &Path, export: &DiskExport) -> Result<Self, CopyError> {
        let context = export.changed_context.as_deref().unwrap_or(BASE_ALLOCATION);
        let mut client = NbdClient::connect(socket, &export.export, &[context], REPLY_TIMEOUT)?;
        let size_bytes = client.size_bytes();
        let extents = client.extents(context, 0..size_bytes)?;
        let increment = export.changed_context.is_some();
        let wanted = extents.iter().filter(|extent| {
            if increment { extent.flags & STATE_DIRTY != 0 } else { extent.flags & STATE_ZERO == 0 }
        });
        let wanted = wanted.map(|extent| extent.offset..extent.end());
        let pieces = if increment {
            pieces::changes(wanted, size_bytes)
        } else {
            pieces::whole_disk(wanted, size_bytes)
        };
        Ok(Self { client, size_bytes, pieces, increment })
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn read_bytes(&self) -> u64 {
        pieces::read_bytes(&self.pieces)
    }

    /// Reads and stores. Returns the disk's root, and what was stored.
    pub(crate) fn store(
        mut self,
        mut disk: DiskWriter<'_>,
        tally: &mut Tally<'_>,
        cancel: &Cancel,
    ) -> Result<(DiskRoot, DiskStats), CopyError> {
        if !self.increment {
            for piece in &self.pieces {
                if let Piece::Zero(range) = piece {
                    disk.zero(range.start, range.end - range.start)?;
                }
            }
        }
        let reads = self.pieces.iter().filter_map(|piece| match piece {
            Piece::Read(range) => Some(range.clone()),
            Piece::Zero(_) => None,
        });
        let flag = cancel.flag();
        let options = ReadOptions { cancel: Some(&*flag), ..ReadOptions::default() };
        let mut blocks = Assembler::new(self.size_bytes);
        self.client.read_pipelined(reads, options, |offset, chunk| {
            let (length, bytes) = match chunk {
                Chunk::Data(bytes) => (bytes.len() as u64, Some(bytes)),
                Chunk::Hole(length) => (length, None),
            };
            blocks.take(offset, length, bytes, |offset, length, bytes| match bytes {
                Some(bytes) => disk.write(offset, bytes),
                None => disk.zero(offset, length),
            })?;
            tally.done_bytes += length;
            tally.watch.progress(tally.done_bytes, tally.total_bytes);
            Ok::<(), CopyError>(())
        })?;
        if !blocks.is_complete() {
            return Err(CopyError::Incomplete);
        }
        Ok(disk.finish()?)
    }
}
