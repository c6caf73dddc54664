//! Disks of a snapshot, served read-only over NBD on a private socket.

use crate::watch::Watch;
use repository::DiskReader;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use vm::nbd_server::BlockSource;

/// A disk of a snapshot as the NBD server wants it.
#[derive(Debug)]
pub struct SnapshotDisk {
    disk: DiskReader,
    read_bytes: AtomicU64,
}

impl SnapshotDisk {
    /// Serves this disk.
    pub fn new(disk: DiskReader) -> Self {
        Self { disk, read_bytes: AtomicU64::new(0) }
    }

    /// Bytes read so far.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that are no hole.
    ///
    /// # Errors
    /// The repository's.
    pub fn data_bytes(&self) -> Result<u64, repository::Error> {
        self.disk.data_ranges().map(|range| range.map(|range| range.end - range.start)).sum()
    }

    /// Tells how far a reader that reads each byte of data once has come.
    pub(crate) fn tell(&self, watch: &dyn Watch, total_bytes: u64) {
        watch.progress(self.read_bytes().min(total_bytes), total_bytes);
    }
}

impl BlockSource for SnapshotDisk {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buf).map_err(io::Error::other)?;
        self.read_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64, max: usize) -> io::Result<Vec<(u64, bool)>> {
        let mut extents = self.disk.extents(offset, length).map_err(io::Error::other)?;
        extents.truncate(max);
        Ok(extents)
    }
}
