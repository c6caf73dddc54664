//! Verifying snapshots: every manifest, node and block is read and checked.

use crate::frame_index::forget;
use crate::frames::Frames;
use crate::objects::list_ids;
use crate::{Error, Repository};
use repository_format::{
    BLOCK_BYTES, DiskRoot, FANOUT, FrameAddress, Leaf, ManifestFile, Node, NodeAddress, SnapshotId,
    level_for, node_blocks,
};
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Arc, PoisonError};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Damage beyond this is counted, not listed.
const DAMAGE_LISTED_MAX: usize = 4096;
/// Nodes remembered as sound, so that what snapshots share is read once: 100 MiB. Beyond, it is read again.
const SOUND_NODES_MAX: usize = 1 << 20;
/// Leaves that wait for a thread.
const QUEUE_LEAVES: usize = 32;

/// What `verify` found.
#[derive(Debug, Clone, Default)]
pub struct VerifyReport {
    /// Snapshots looked at.
    pub snapshots: u64,
    /// Bytes of their disks, as large as a VM sees them.
    pub bytes: u64,
    /// At most 4096 places.
    pub damage: Vec<Damage>,
    /// All places.
    pub damage_total: u64,
}

/// One damaged place.
#[derive(Debug, Clone)]
pub struct Damage {
    /// The snapshot that needs it.
    pub snapshot: SnapshotId,
    /// The part's name; `None` for the manifest.
    pub part: Option<String>,
    /// First damaged byte of the part. More may be damaged behind it.
    pub offset: Option<u64>,
    /// What was noticed.
    pub cause: Error,
}

impl Repository {
    /// Reads and checks everything of one snapshot, or of all. `progress` hears bytes done and in all. After damage
    /// this host's index of known data is forgotten: it would lead later snapshots to what is damaged.
    ///
    /// # Errors
    /// `NoSuchSnapshot`, and the store's; damage is no error but in the report.
    pub fn verify(
        &self,
        only: Option<&SnapshotId>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<VerifyReport, Error> {
        let ids = match only {
            Some(id) => vec![*id],
            None => list_ids::<SnapshotId>(self.objects(), "manifests")?,
        };
        let mut report = VerifyReport::default();
        let mut files = Vec::new();
        for id in ids {
            match self.visible_file(id) {
                Ok(file) => files.push(file),
                // Deleted or revoked since it was listed.
                Err(Error::NoSuchSnapshot { .. }) if only.is_none() => continue,
                Err(cause) if matches!(cause, Error::Missing { .. }) || self.concerns_one_object(&cause) => {
                    report.add(Damage { snapshot: id, part: None, offset: None, cause });
                }
                Err(error) => return Err(error),
            }
            report.snapshots += 1;
        }
        report.bytes =
            files.iter().flat_map(|file| &file.manifest.parts).map(|part| part.root.size_bytes).sum();
        let mut run = Run { frames: &self.frames, report, progress, done: 0, sound: HashSet::new() };
        files.iter().for_each(|file| run.snapshot(file));
        let report = run.report;
        if report.damage_total > 0
            && let Some(folder) = &self.cache_folder
        {
            forget(folder);
        }
        Ok(report)
    }
}

impl VerifyReport {
    fn add(&mut self, damage: Damage) {
        self.damage_total += 1;
        if self.damage.len() < DAMAGE_LISTED_MAX {
            self.damage.push(damage);
        }
    }
}

struct Run<'r> {
    frames: &'r Arc<Frames>,
    report: VerifyReport,
    progress: &'r mut dyn FnMut(u64, u64),
    done: u64,
    sound: HashSet<NodeAddress>,
}

/// Something wrong, and where on the disk.
type Finding = (u64, Error);

impl Run<'_> {
    fn snapshot(&mut self, file: &ManifestFile) {
        for part in &file.manifest.parts {
            for (offset, cause) in self.disk(&part.root) {
                let part = Some(part.name.clone());
                self.report.add(Damage { snapshot: file.snapshot, part, offset: Some(offset), cause });
            }
        }
    }

    /// Walks a tree on this thread and checks the blocks of its leaves on others.
    fn disk(&mut self, root: &DiskRoot) -> Vec<Finding> {
        let size_bytes = root.size_bytes;
        let Some(level) = level_for(size_bytes) else { return vec![(0, Error::DiskTooLarge { size_bytes })] };
        let (leaves, queue) = sync_channel::<Box<Leaf>>(QUEUE_LEAVES);
        let queue = Mutex::new(queue);
        let (report, findings) = channel();
        let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
        let frames = Arc::clone(self.frames);
        let walked = std::thread::scope(|scope| {
            for _ in 0..threads {
                let (report, frames, queue) = (report.clone(), &frames, &queue);
                scope.spawn(move || {
                    while let Some(leaf) = next(queue) {
                        // The receiver outlives the threads.
                        check_leaf(frames, &leaf)
                            .into_iter()
                            .for_each(|finding| report.send(finding).unwrap_or(()));
                    }
                });
            }
            let mut walk = Walk { run: self, leaves, size_bytes, findings: Vec::new() };
            walk.node(root.node, level, 0);
            // Dropping the walk's sender ends the threads.
            walk.findings
        });
        drop(report);
        let mut all: Vec<Finding> = walked.into_iter().chain(findings).collect();
        if !all.is_empty() {
            // Which nodes are above the damage is not known here; the next snapshot that shares them must hear of it.
            self.sound.clear();
        }
        all.sort_by_key(|(offset, _)| *offset);
        all
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.report.bytes);
    }
}

fn next(queue: &Mutex<Receiver<Box<Leaf>>>) -> Option<Box<Leaf>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

struct Walk<'w, 'r> {
    run: &'w mut Run<'r>,
    leaves: SyncSender<Box<Leaf>>,
    size_bytes: u64,
    findings: Vec<Finding>,
}

impl Walk<'_, '_> {
    fn node(&mut self, address: Option<NodeAddress>, level: u8, first_block: u64) {
        let start = first_block * BLOCK;
        let bytes = self.size_bytes.min(start + node_blocks(level) * BLOCK).saturating_sub(start);
        let Some(address) = address else { return self.run.advance(bytes) };
        if self.run.sound.contains(&address) {
            return self.run.advance(bytes);
        }
        match self.run.frames.node(&address, level, first_block) {
            Err(cause) => {
                self.findings.push((start, cause));
                self.run.advance(bytes);
            }
            Ok(Node::Leaf(leaf)) => {
                // Threads end only after this sender is dropped.
                self.leaves.send(leaf).unwrap_or_default();
                self.run.advance(bytes);
            }
            Ok(Node::Inner(inner)) => {
                for slot in 0..FANOUT {
                    self.node(inner.children[slot], level - 1, inner.child_first_block(slot));
                }
            }
        }
        if self.run.sound.len() < SOUND_NODES_MAX {
            self.run.sound.insert(address);
        }
    }
}

/// Each frame that a leaf cannot use, once.
fn check_leaf(frames: &Frames, leaf: &Leaf) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    let mut bad: HashSet<FrameAddress> = HashSet::new();
    for (block, entry) in (leaf.first_block..).zip(&leaf.blocks) {
        let Some(entry) = entry else { continue };
        if bad.contains(&entry.frame) {
            continue;
        }
        let offset = block * BLOCK;
        let start = usize::from(entry.index) * BLOCK_BYTES;
        let checked = frames.data(&entry.frame).and_then(|frame| {
            let block = frame.get(start..start + BLOCK_BYTES).and_then(|block| block.try_into().ok());
            match block {
                Some(block) if frames.keys.checksums.of(block) == entry.checksum => Ok(()),
                _ => Err(Error::WrongBlock { offset }),
            }
        });
        if let Err(cause) = checked {
            bad.insert(entry.frame);
            findings.push((offset, cause));
        }
    }
    findings
}
