//! The packs of one writer: frames are appended, full packs are put into the store.

use crate::Error;
use crate::frame_index::{Dedup, WindowKey};
use crate::frames::{Frames, node_of};
use object_store::PutPayload;
use repository_format::{
    Compressor, FrameAddress, FrameKind, LeaseId, Node, NodeAddress, PACK_BYTES_TARGET, PackName, seal_frame,
};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Shared by the threads of one writer.
pub(crate) struct Packs {
    frames: Arc<Frames>,
    lease: LeaseId,
    dedup: Dedup,
    state: Mutex<State>,
    put_ended: Condvar,
}

#[derive(Default)]
struct State {
    sequence: u32,
    open: Vec<u8>,
    /// Memory of packs that were put, for the next ones: never more than were open or in flight at once.
    spare: Vec<Vec<u8>>,
    /// Windows whose frames lie in the open pack.
    windows: Vec<(WindowKey, FrameAddress)>,
    /// Packs that are being put; the writer may still read its own nodes from them.
    in_flight: HashMap<PackName, PutPayload>,
    stored_bytes: u64,
    /// The first failure; every later call returns it.
    failed: Option<Error>,
}

/// A pack that is to be put.
struct Closed {
    name: PackName,
    bytes: PutPayload,
    windows: Vec<(WindowKey, FrameAddress)>,
}

impl Packs {
    pub(crate) fn new(frames: Arc<Frames>, lease: LeaseId, dedup: Dedup) -> Packs {
        Packs { frames, lease, dedup, state: Mutex::default(), put_ended: Condvar::new() }
    }

    /// Appends a frame. Every 32 MiB the calling thread puts the pack into the store before it returns.
    pub(crate) fn append(
        &self,
        kind: FrameKind,
        payload: &[u8],
        window: Option<WindowKey>,
    ) -> Result<FrameAddress, Error> {
        let mut state = self.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let name = PackName { lease: self.lease, sequence: state.sequence };
        if state.open.is_empty() {
            state.open = state.spare.pop().unwrap_or_default();
            state.open.reserve_exact(PACK_BYTES_TARGET + (256 << 10));
        }
        // Sealing under the lock costs 50 µs a frame, and saves a second copy of every frame.
        let address = seal_frame(&self.frames.keys, name, &mut state.open, kind, payload);
        state.windows.extend(window.map(|key| (key, address)));
        if state.open.len() >= PACK_BYTES_TARGET {
            let closed = close(&mut state, name);
            drop(state);
            self.put(closed)?;
        }
        Ok(address)
    }

    /// Puts what is open, and waits until every pack is durable. Returns the bytes of all packs.
    pub(crate) fn finish(&self) -> Result<u64, Error> {
        let mut state = self.lock();
        if state.failed.is_none() && !state.open.is_empty() {
            let name = PackName { lease: self.lease, sequence: state.sequence };
            let closed = close(&mut state, name);
            drop(state);
            self.put(closed)?;
            state = self.lock();
        }
        while !state.in_flight.is_empty() {
            state = self.put_ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failed {
            Some(error) => Err(error.clone()),
            None => Ok(state.stored_bytes),
        }
    }

    /// Where a window with the same content is already, if that may be referred to.
    pub(crate) fn find_window(&self, key: &WindowKey) -> Option<FrameAddress> {
        self.dedup.find(&*self.frames.objects, key)
    }

    /// The key of a window: a digest of its blocks' checksums.
    pub(crate) fn window_key(&self, checksums: &[u8]) -> WindowKey {
        self.dedup.window_key(checksums)
    }

    /// A node, also of a pack that is not in the store yet.
    pub(crate) fn node(&self, address: &NodeAddress, level: u8, first_block: u64) -> Result<Node, Error> {
        match self.own(&address.frame) {
            Some(sealed) => {
                node_of(&*self.frames.open_nodes(&address.frame, sealed)?, address, level, first_block)
            }
            None => self.frames.node(address, level, first_block),
        }
    }

    /// A data frame, also of a pack that is not in the store yet.
    pub(crate) fn data(&self, address: &FrameAddress) -> Result<Arc<Vec<u8>>, Error> {
        match self.own(address) {
            Some(mut sealed) => self.frames.open_data(address, &mut sealed).map(Arc::new),
            None => self.frames.data(address),
        }
    }

    /// Compresses and appends a node frame.
    pub(crate) fn append_nodes(&self, plaintext: &[u8]) -> Result<FrameAddress, Error> {
        self.append(FrameKind::Nodes, Compressor::default().compress(plaintext), None)
    }

    pub(crate) fn checksums(&self) -> &repository_format::Checksums {
        &self.frames.keys.checksums
    }

    /// The sealed bytes of a frame of ours that is still in memory.
    fn own(&self, address: &FrameAddress) -> Option<Vec<u8>> {
        if address.pack.lease != self.lease {
            return None;
        }
        let state = self.lock();
        let range = address.offset as usize..address.offset as usize + address.length as usize;
        if address.pack.sequence == state.sequence {
            return state.open.get(range).map(<[u8]>::to_vec);
        }
        let pack = state.in_flight.get(&address.pack)?.iter().next()?;
        pack.get(range).map(<[u8]>::to_vec)
    }

    fn put(&self, closed: Closed) -> Result<(), Error> {
        let put = self.frames.objects.put(&closed.name.object(), closed.bytes);
        let mut state = self.lock();
        if let Some(memory) = state.in_flight.remove(&closed.name).and_then(reclaim) {
            state.spare.push(memory);
        }
        if let Err(error) = &put {
            state.failed.get_or_insert_with(|| error.clone());
        }
        drop(state);
        self.put_ended.notify_all();
        if put.is_ok() {
            // Only now: an entry must never name a pack that the store does not have.
            self.dedup.remember(&closed.windows);
        }
        put
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A worker that panicked has reported its frame as failed; the state itself changes in whole steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close(state: &mut State, name: PackName) -> Closed {
    let bytes = std::mem::take(&mut state.open);
    state.stored_bytes += bytes.len() as u64;
    state.sequence += 1;
    let bytes = PutPayload::from(bytes);
    state.in_flight.insert(name, bytes.clone());
    Closed { name, bytes, windows: std::mem::take(&mut state.windows) }
}

/// The memory of a pack, emptied, if the store has let go of it. Fresh memory of this size costs a page fault for
/// every 4 KiB of each pack.
fn reclaim(pack: PutPayload) -> Option<Vec<u8>> {
    // A statement of its own: the iterator holds the memory as well, until the statement ends.
    let bytes = pack.into_iter().next()?;
    let mut memory = bytes.try_into_mut().ok()?;
    memory.clear();
    Some(memory.into())
}
