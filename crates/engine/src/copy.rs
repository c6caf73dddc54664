//! Reads one disk at the point over NBD and stores what changed.

use crate::blocks::Assembler;
use crate::pieces::{self, Piece};
use crate::watch::{Cancel, Watch};
use nbd::BASE_ALLOCATION;
use repository::{DiskRoot, DiskStats, DiskWriter};
use std::ops::Range;
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

/// How much of a disk is planned at once. In blocks of 4 KiB that is 100 MiB of memory at worst, and even in sectors no
/// more extents than one answer may hold, however many a busy disk has in all. A multiple of the block.
const PART_BYTES: u64 = 8 << 30;
/// Pieces that are kept from the first look until the copy: 24 MiB, for all parts together. The plan of a disk with
/// more is made again, part by part, while it is copied.
const PIECES_KEPT_MAX: usize = 1 << 20;

/// Requests under way while a disk is copied, and the length of each. As fast as more of them, since storing takes longer than
/// reading; more would only make QEMU, whose thread serves the guest's own writes too, read in bursts.
const IN_FLIGHT: usize = 2;
const REQUEST_BYTES: u32 = 256 << 10;

/// Of an increment's disk the filter need not keep what is not read, and is told so in multiples of this many bytes. Each stretch costs
/// a request, and a busy disk has small gaps without number, whose keeping costs little. A multiple of the filter's own block
/// (64 KiB): QEMU 7.2 dies of a discard that begins or ends within one.
const UNREAD_UNIT_BYTES: u64 = 1 << 20;

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
    context: String,
    size_bytes: u64,
    read_bytes: u64,
    part_bytes: u64,
    /// The whole plan, if it is small.
    plan: Option<Vec<Piece>>,
    /// Unread parts are as in the parent; otherwise they are zero.
    increment: bool,
}

impl Source {
    /// Connects and asks what has to be read.
    pub(crate) fn open(socket: &Path, export: &DiskExport) -> Result<Self, CopyError> {
        Self::open_within(socket, export, PART_BYTES, PIECES_KEPT_MAX)
    }

    fn open_within(
        socket: &Path,
        export: &DiskExport,
        part_bytes: u64,
        pieces_kept_max: usize,
    ) -> Result<Self, CopyError> {
        let context = export.changed_context.clone().unwrap_or_else(|| BASE_ALLOCATION.to_owned());
        let client = NbdClient::connect(socket, &export.export, &[&context], REPLY_TIMEOUT)?;
        let size_bytes = client.size_bytes();
        let increment = export.changed_context.is_some();
        let plan = Some(Vec::new());
        let mut source = Self { client, context, size_bytes, read_bytes: 0, part_bytes, plan, increment };
        for part in parts(size_bytes, part_bytes) {
            let pieces = source.plan_part(&part)?;
            if increment {
                let unread = pieces::unread(&pieces, &part, UNREAD_UNIT_BYTES);
                // Where the server knows no discards, the filter keeps everything: that costs scratch and time, and nothing else.
                source.client.discard(unread)?;
            }
            source.read_bytes += pieces::read_bytes(&pieces);
            let kept = source.plan.take().filter(|plan| plan.len() + pieces.len() <= pieces_kept_max);
            source.plan = kept.map(|mut plan| {
                plan.extend(pieces);
                plan
            });
        }
        Ok(source)
    }

    /// Asked twice, it may name zeroes differently, but never wrongly: both answers are about the point.
    fn plan_part(&mut self, part: &Range<u64>) -> Result<Vec<Piece>, CopyError> {
        let extents = self.client.extents(&self.context, part.clone())?;
        let increment = self.increment;
        let wanted = extents.iter().filter(|extent| {
            if increment { extent.flags & STATE_DIRTY != 0 } else { extent.flags & STATE_ZERO == 0 }
        });
        let wanted = wanted.map(|extent| extent.offset..extent.end());
        Ok(if increment { pieces::changes(wanted, part) } else { pieces::full(wanted, part) })
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Reads and stores. Returns the disk's root, and what was stored.
    pub(crate) fn store(
        mut self,
        mut disk: DiskWriter<'_>,
        tally: &mut Tally<'_>,
        cancel: &Cancel,
    ) -> Result<(DiskRoot, DiskStats), CopyError> {
        if let Some(plan) = self.plan.take() {
            self.store_pieces(&plan, &mut disk, tally, cancel)?;
        } else {
            for part in parts(self.size_bytes, self.part_bytes) {
                let pieces = self.plan_part(&part)?;
                self.store_pieces(&pieces, &mut disk, tally, cancel)?;
            }
        }
        Ok(disk.finish()?)
    }

    fn store_pieces(
        &mut self,
        pieces: &[Piece],
        disk: &mut DiskWriter<'_>,
        tally: &mut Tally<'_>,
        cancel: &Cancel,
    ) -> Result<(), CopyError> {
        // Of an increment only what is read is planned.
        for piece in pieces {
            if let Piece::Zero(range) = piece {
                disk.zero(range.start, range.end - range.start)?;
            }
        }
        let reads = pieces.iter().filter_map(|piece| match piece {
            Piece::Read(range) => Some(range.clone()),
            Piece::Zero(_) => None,
        });
        let flag = cancel.flag();
        let options =
            ReadOptions { in_flight: IN_FLIGHT, request_bytes: REQUEST_BYTES, cancel: Some(&*flag) };
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
        if blocks.is_complete() { Ok(()) } else { Err(CopyError::Incomplete) }
    }
}

/// A disk, cut into parts of this length; the last may be shorter.
fn parts(size_bytes: u64, part_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let count = size_bytes.div_ceil(part_bytes);
    (0..count).map(move |number| number * part_bytes..size_bytes.min((number + 1) * part_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::Unwatched;
    use repository::{Manifest, Options, Repository, Secret};
    use std::io;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;
    use vm::nbd_server::{BlockSource, NbdServer, ServerOptions};

    const BLOCK: usize = 4096;

    /// Every second block holds data, the others are zero; the last is half a block.
    struct Scattered(Vec<u8>);

    impl Scattered {
        fn new(blocks: usize) -> Self {
            let byte =
                |at: usize| if at / BLOCK % 2 == 1 { u8::try_from(at / BLOCK % 250 + 1) } else { Ok(0) };
            Self((0..blocks * BLOCK - BLOCK / 2).map(|at| byte(at).expect("a byte")).collect())
        }
    }

    impl BlockSource for Scattered {
        fn size_bytes(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            let at = usize::try_from(offset).expect("a small disk");
            buf.copy_from_slice(&self.0[at..at + buf.len()]);
            Ok(())
        }

        fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<(u64, bool)>> {
            let block = BLOCK as u64;
            let mut extents = Vec::new();
            let mut at = offset;
            while at < offset + length && extents.len() < max {
                let end = (at / block + 1) * block;
                extents.push((end - at, (at / block).is_multiple_of(2)));
                at = end;
            }
            Ok(extents)
        }
    }

    #[test]
    fn a_disk_with_more_extents_than_are_kept_is_read_part_by_part_and_whole() {
        // The server refuses a folder that others may enter.
        let private = std::fs::Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().permissions(private).tempdir().expect("a folder");
        let secret = Secret::Passphrase("correct horse battery staple".to_owned().into());
        let place = folder.path().join("repository");
        Repository::init(&place, &secret).expect("a repository");
        let options = Options { cache: Some(folder.path().join("cache")) };
        let repository = Repository::open_with(&place, &secret, &options).expect("a repository");
        let content = Scattered::new(64).0;
        let socket = folder.path().join("nbd");
        let exports = vec![("disk".to_owned(), Arc::new(Scattered::new(64)) as _)];
        let _server = NbdServer::start(&socket, exports, ServerOptions::default()).expect("it serves");
        let export = DiskExport {
            disk: "d".to_owned(),
            export: "disk".to_owned(),
            changed_context: None,
            size_bytes: content.len() as u64,
        };
        // Kept whole; planned again in parts that fit, and that do not fit the data's places.
        for (part_bytes, pieces_kept_max, kept) in
            [(PART_BYTES, PIECES_KEPT_MAX, true), (8 * BLOCK as u64, 20, false), (5 * BLOCK as u64, 0, false)]
        {
            let source = Source::open_within(&socket, &export, part_bytes, pieces_kept_max).expect("a plan");
            assert_eq!(source.plan.is_some(), kept);
            assert_eq!(source.read_bytes(), (32 * BLOCK - BLOCK / 2) as u64);
            let mut tally = Tally { watch: &Unwatched, done_bytes: 0, total_bytes: source.read_bytes() };
            let writer = repository.begin().expect("a writer");
            let disk = writer.disk(source.size_bytes(), None).expect("a disk");
            let (root, _) = source.store(disk, &mut tally, &Cancel::default()).expect("it is stored");
            assert_eq!(tally.done_bytes, tally.total_bytes);
            let manifest = Manifest {
                vm: "db1".to_owned(),
                parent: None,
                created_at_ms: 0,
                description: None,
                level: "crash".to_owned(),
                parts: vec![],
                definition: serde_json::Value::Null,
                receipt: serde_json::Value::Null,
            };
            writer.commit(manifest).expect("committed");
            let mut read = vec![0xa5; content.len()];
            repository.disk(&root).read_at(0, &mut read).expect("it reads");
            assert!(read == content, "parts of {part_bytes} bytes");
        }
    }

    #[test]
    fn a_part_has_no_more_extents_than_one_answer_may_hold() {
        assert!(PART_BYTES / 512 <= vm::nbd_client::EXTENTS_MAX as u64);
        assert_eq!(parts(0, 4).count(), 0);
        assert_eq!(parts(10, 4).collect::<Vec<_>>(), [0..4, 4..8, 8..10]);
    }
}
