//! Reading frames: fetched, opened, verified, cached.

use crate::cache::Caches;
use crate::{Error, Objects};
use repository_format::{
    BLOCK_BYTES, FRAME_BLOCKS_MAX, FormatError, FrameAddress, FrameKind, Keys, NODE_FRAME_BYTES_MAX, Node,
    NodeAddress, NodeFrame, decompress, open_frame,
};
use std::sync::Arc;

/// 8 MiB. A range whose blocks lie scattered over more frames would push them out of the cache before they are used.
const PREFETCH_FRAMES_MAX: usize = 64;
/// Bytes between two frames that are read rather than skipped by a request of their own.
const GAP_BYTES: u32 = 64 << 10;

/// A store, its keys, and what was read lately.
#[derive(Debug)]
pub(crate) struct Frames {
    pub(crate) objects: Arc<dyn Objects>,
    pub(crate) keys: Keys,
    pub(crate) caches: Caches,
}

impl Frames {
    /// The blocks of a data frame.
    pub(crate) fn data(&self, address: &FrameAddress) -> Result<Arc<Vec<u8>>, Error> {
        if let Some(blocks) = self.caches.data.get(address) {
            return Ok(blocks);
        }
        let blocks = Arc::new(self.open_data(address, &mut self.fetch(address)?)?);
        self.caches.data.insert(*address, Arc::clone(&blocks), blocks.len());
        Ok(blocks)
    }

    /// Brings data frames into the cache, those that lie close together with one request. What fails here fails
    /// again, and is told, when the frame itself is asked for.
    pub(crate) fn prefetch(&self, mut wanted: Vec<FrameAddress>) {
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|address| self.caches.data.get(address).is_none());
        wanted.truncate(PREFETCH_FRAMES_MAX);
        for group in wanted.chunk_by(|a, b| a.pack == b.pack && b.offset - a.offset <= a.length + GAP_BYTES) {
            let (first, last) = (&group[0], &group[group.len() - 1]);
            let range = u64::from(first.offset)..u64::from(last.offset) + u64::from(last.length);
            if group.len() < 2 {
                continue;
            }
            let Ok(mut bytes) = self.objects.get_range(&first.pack.object(), range) else { continue };
            for address in group {
                let start = (address.offset - first.offset) as usize;
                // Decrypted where it is. Of frames that overlap, which no writer makes, only the first opens here.
                let Some(sealed) = bytes.get_mut(start..start + address.length as usize) else { continue };
                if let Ok(blocks) = self.open_data(address, sealed) {
                    let length = blocks.len();
                    self.caches.data.insert(*address, Arc::new(blocks), length);
                }
            }
        }
    }

    /// Opens a data frame that was fetched. `sealed` then holds nothing to be used.
    pub(crate) fn open_data(&self, address: &FrameAddress, sealed: &mut [u8]) -> Result<Vec<u8>, Error> {
        let opened = open_frame(&self.keys, address, FrameKind::Data, sealed)
            .and_then(|payload| decompress(payload, FRAME_BLOCKS_MAX * BLOCK_BYTES))
            .and_then(|blocks| match blocks.len() {
                0 => Err(FormatError::Compression),
                length if length.is_multiple_of(BLOCK_BYTES) => Ok(blocks),
                _ => Err(FormatError::Compression),
            });
        opened.map_err(|cause| damaged(address, cause))
    }

    /// A node that is at rest in the store.
    pub(crate) fn node(&self, address: &NodeAddress, level: u8, first_block: u64) -> Result<Node, Error> {
        let frame = match self.caches.nodes.get(&address.frame) {
            Some(frame) => frame,
            None => self.open_nodes(&address.frame, self.fetch(&address.frame)?)?,
        };
        node_of(&frame, address, level, first_block)
    }

    /// Opens a node frame that was fetched, and keeps it.
    pub(crate) fn open_nodes(
        &self,
        address: &FrameAddress,
        mut sealed: Vec<u8>,
    ) -> Result<Arc<NodeFrame>, Error> {
        let opened = open_frame(&self.keys, address, FrameKind::Nodes, &mut sealed)
            .and_then(|payload| decompress(payload, NODE_FRAME_BYTES_MAX))
            .and_then(|plaintext| Ok(NodeFrame::decode(&plaintext)?));
        let frame = Arc::new(opened.map_err(|cause| damaged(address, cause))?);
        self.caches.nodes.insert(*address, Arc::clone(&frame), frame.bytes());
        Ok(frame)
    }

    fn fetch(&self, address: &FrameAddress) -> Result<Vec<u8>, Error> {
        let start = u64::from(address.offset);
        self.objects.get_range(&address.pack.object(), start..start + u64::from(address.length))
    }
}

/// A node of an open frame, if it is the one for this place of a tree.
pub(crate) fn node_of(
    frame: &NodeFrame,
    address: &NodeAddress,
    level: u8,
    first_block: u64,
) -> Result<Node, Error> {
    let node = frame.node(address.index).and_then(|node| node.expect_at(level, first_block).map(|()| node));
    node.map_err(|cause| damaged(&address.frame, cause.into()))
}

fn damaged(address: &FrameAddress, cause: FormatError) -> Error {
    Error::Damaged { object: format!("{} at {}", address.pack.object(), address.offset), cause }
}
