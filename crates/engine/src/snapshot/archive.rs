//! A run's side towards the repository: the disks as they are read, what boots them, and the manifest at last.

use super::SnapshotError;
use super::facts::{Facts, disk_facts};
use crate::copy::{Source, Tally};
use crate::definition::BootFile;
use crate::watch::{Cancel, Watch};
use crate::{definition, now_ms};
use repository::{Manifest, Part, Role, SnapshotId, Writer};
use snapshot::receipt::{CopyEvidence, CopyMethod, Receipt};
use snapshot::{Request, Verdict};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use vm::point::DiskExport;
use vm::point::reserve::LOOK;

/// What will be a snapshot.
pub(super) struct Archive<'a> {
    request: &'a Request,
    watch: &'a dyn Watch,
    cancel: &'a Cancel,
    pub(super) facts: Facts,
    parts: Vec<Part>,
    definition: serde_json::Value,
    /// Until they are kept.
    variables: Vec<BootFile>,
    /// Until the seal.
    writer: Option<Writer>,
    pub(super) sealed: Option<(SnapshotId, Manifest)>,
}

impl<'a> Archive<'a> {
    pub(super) fn new(
        request: &'a Request,
        watch: &'a dyn Watch,
        cancel: &'a Cancel,
        facts: Facts,
        writer: Writer,
        definition: definition::Kept,
    ) -> Self {
        let definition::Kept { parts, json, variables, .. } = definition;
        let (definition, writer) = (json, Some(writer));
        Self { request, watch, cancel, facts, parts, definition, variables, writer, sealed: None }
    }

    /// Keeps the firmware's variables, which must not be older than the disks. Why one was not kept goes into the receipt
    /// only, for it was judged already; that they can be read was seen before the run began.
    pub(super) fn keep_variables(&mut self, receipt: &mut Receipt) -> Result<(), SnapshotError> {
        let writer = self.writer.as_ref().expect("it is there until the seal");
        let (parts, reasons) = definition::keep_variables(&std::mem::take(&mut self.variables), writer)?;
        self.parts.extend(parts);
        receipt.reasons.extend(reasons);
        Ok(())
    }

    /// Reads and stores the wanted disks, each by its export, and notes how in the receipt. `bitmaps` are those that
    /// begin with this snapshot.
    ///
    /// Gives way meanwhile: applications that have just been thawed need the processors more than a snapshot does. `meanwhile`
    /// is called at once and then every [`LOOK`] until all is over.
    pub(super) fn store(
        &mut self,
        socket: &Path,
        exports: &[DiskExport],
        bitmaps: &[Option<&str>],
        receipt: &mut Receipt,
        mut meanwhile: impl FnMut(),
    ) -> Result<(), SnapshotError> {
        let (stores, ended) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let storing = scope.spawn(move || {
                // Dropped at the end, whatever the end is.
                let _stores = stores;
                repository::give_way();
                self.store_all(socket, exports, bitmaps, receipt)
            });
            loop {
                meanwhile();
                if ended.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
            storing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn store_all(
        &mut self,
        socket: &Path,
        exports: &[DiskExport],
        bitmaps: &[Option<&str>],
        receipt: &mut Receipt,
    ) -> Result<(), SnapshotError> {
        let failed = |disk: &str| {
            let disk = disk.to_owned();
            move |source| SnapshotError::Copy { disk, source }
        };
        let mut sources = Vec::new();
        for (export, wanted) in exports.iter().zip(&self.facts.wanted) {
            let source = Source::open(socket, export).map_err(failed(&wanted.disk.name))?;
            sources.push(source);
        }
        let total_bytes = sources.iter().map(Source::read_bytes).sum();
        let mut tally = Tally { watch: self.watch, done_bytes: 0, total_bytes };
        let writer = self.writer.as_ref().expect("it is there until the seal");
        for ((source, wanted), bitmap) in sources.into_iter().zip(&self.facts.wanted).zip(bitmaps) {
            let name = &wanted.disk.name;
            let size_bytes = source.size_bytes();
            let disk = writer.disk(size_bytes, wanted.parent.as_ref())?;
            let (root, stats) = source.store(disk, &mut tally, self.cancel).map_err(failed(name))?;
            let method = match (&wanted.base, &wanted.parent) {
                (Some(_), _) => CopyMethod::Bitmap,
                (None, Some(_)) => CopyMethod::Compared,
                (None, None) => CopyMethod::Full,
            };
            if let Some(evidence) = receipt.disks.iter_mut().find(|disk| disk.name == *name) {
                evidence.copy = Some(CopyEvidence {
                    method,
                    read_bytes: stats.read_bytes,
                    changed_bytes: stats.changed_bytes,
                    stored_bytes: stats.stored_bytes,
                });
            }
            let facts = disk_facts(&wanted.disk, *bitmap);
            self.parts.push(Part { name: name.clone(), role: Role::Disk, size_bytes, root, facts });
        }
        Ok(())
    }

    /// Writes the manifest: from here on the snapshot exists.
    pub(super) fn seal(&mut self, receipt: &Receipt, verdict: &Verdict) -> Result<(), SnapshotError> {
        let manifest = Manifest {
            vm: self.request.vm.clone(),
            parent: self.facts.parent,
            created_at_ms: receipt.point.as_ref().map_or_else(now_ms, |point| point.at_ms),
            description: self.request.description.clone(),
            level: verdict.level.to_string(),
            parts: std::mem::take(&mut self.parts),
            definition: std::mem::take(&mut self.definition),
            receipt: serde_json::to_value(receipt).expect("a receipt has no key that is not text"),
        };
        let writer = self.writer.take().expect("it is sealed once");
        let id = writer.commit(manifest.clone())?;
        self.sealed = Some((id, manifest));
        Ok(())
    }

    /// The names of the disks that are stored.
    pub(super) fn disks(&self) -> Vec<String> {
        self.facts.wanted.iter().map(|wanted| wanted.disk.name.clone()).collect()
    }
}
