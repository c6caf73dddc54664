//! Bounded caches of what was read and verified.

use repository_format::{FrameAddress, NodeFrame};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// 512 frames: a disk whose blocks lie scattered over as many old snapshots still reads each frame once.
const DATA_BYTES_MAX: usize = 64 << 20;
/// Addresses of more than 2 GiB of data.
const NODE_BYTES_MAX: usize = 16 << 20;

/// What readers and writers of a repository share.
pub(crate) struct Caches {
    pub(crate) data: Cache<Vec<u8>>,
    pub(crate) nodes: Cache<NodeFrame>,
}

impl Default for Caches {
    fn default() -> Caches {
        Caches { data: Cache::new(DATA_BYTES_MAX), nodes: Cache::new(NODE_BYTES_MAX) }
    }
}

impl fmt::Debug for Caches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Caches")
    }
}

/// The most recently used values, up to a number of bytes.
pub(crate) struct Cache<T> {
    bytes_max: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    entries: HashMap<FrameAddress, Slot<T>>,
    bytes: usize,
    clock: u64,
}

struct Slot<T> {
    value: Arc<T>,
    bytes: usize,
    used_at: u64,
}

impl<T> Cache<T> {
    fn new(bytes_max: usize) -> Cache<T> {
        Cache { bytes_max, state: Mutex::new(State { entries: HashMap::new(), bytes: 0, clock: 0 }) }
    }

    pub(crate) fn get(&self, address: &FrameAddress) -> Option<Arc<T>> {
        // A panic elsewhere cannot leave the map half-changed in a way that matters: values are verified already.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let slot = state.entries.get_mut(address)?;
        slot.used_at = clock;
        Some(Arc::clone(&slot.value))
    }

    pub(crate) fn insert(&self, address: FrameAddress, value: Arc<T>, bytes: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let slot = Slot { value, bytes, used_at: state.clock };
        state.bytes += bytes;
        if let Some(old) = state.entries.insert(address, slot) {
            state.bytes -= old.bytes;
        }
        // A scan of some hundred entries costs less than opening one frame.
        while state.bytes > self.bytes_max && state.entries.len() > 1 {
            let oldest =
                state.entries.iter().min_by_key(|(_, slot)| slot.used_at).map(|(address, _)| *address);
            if let Some(old) = oldest.and_then(|address| state.entries.remove(&address)) {
                state.bytes -= old.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use repository_format::{Identifier, LeaseId, PackName};

    #[test]
    fn forgets_what_was_used_longest_ago() {
        let cache = Cache::new(20);
        let pack = PackName { lease: LeaseId(Identifier::from_bytes([0; 16])), sequence: 0 };
        let at = |offset| FrameAddress { pack, offset, length: 1 };
        cache.insert(at(1), Arc::new(1), 10);
        cache.insert(at(2), Arc::new(2), 10);
        assert_eq!(cache.get(&at(1)).as_deref(), Some(&1));
        cache.insert(at(3), Arc::new(3), 10);
        assert_eq!([1, 2, 3].map(|offset| cache.get(&at(offset)).is_some()), [true, false, true]);
    }
}
