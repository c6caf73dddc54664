//! Block status: what a context says about stretches of the disk.

use crate::bytes::Bytes;
use crate::error::ProtocolError;

/// A stretch of the disk about which a context says the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never 0.
    pub length: u64,
    /// The context's own flags: [`crate::allocation`], [`crate::bitmap`].
    pub flags: u32,
}

impl Extent {
    /// The first byte behind it.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// The extents of one BLOCK_STATUS chunk, clipped to what was asked: a server may tell more than that.
///
/// They begin at the request's offset, follow each other, and may end before the request does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusExtents<'b> {
    descriptors: &'b [u8],
    offset: u64,
    end: u64,
}

impl<'b> StatusExtents<'b> {
    /// Checks all descriptors once, so that going through them later cannot fail.
    pub(crate) fn new(descriptors: &'b [u8], offset: u64, end: u64) -> Result<Self, ProtocolError> {
        if descriptors.is_empty() || !descriptors.len().is_multiple_of(8) {
            return Err(ProtocolError::Malformed("block status"));
        }
        if descriptors.chunks_exact(8).any(|descriptor| descriptor[..4] == [0; 4]) {
            return Err(ProtocolError::EmptyExtent);
        }
        Ok(Self { descriptors, offset, end })
    }
}

impl Iterator for StatusExtents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        if self.offset >= self.end {
            return None;
        }
        let mut bytes = Bytes(self.descriptors);
        let (length, flags) = (bytes.u32()?, bytes.u32()?);
        self.descriptors = bytes.0;
        let extent =
            Extent { offset: self.offset, length: u64::from(length).min(self.end - self.offset), flags };
        self.offset = extent.end();
        Some(extent)
    }
}
