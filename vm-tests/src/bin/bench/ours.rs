//! Snapshots as a user takes them, with their cost and sizes.

use crate::cost::Cost;
use crate::idle_vm::{DISK, IdleVm, compare, words};
use serde_json::Value;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use vm_tests::{Stillpoint, snapshot_id};

pub(crate) const MIB: f64 = (1 << 20) as f64;
const VM: &str = "bench";

/// What a snapshot says about its only disk, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) read: u64,
    pub(crate) changed: u64,
    pub(crate) stored: u64,
}

/// A snapshot that was taken.
pub(crate) struct Taken {
    pub(crate) id: String,
    pub(crate) sizes: Sizes,
    pub(crate) cost: Cost,
    /// The repository's growth on disk, everything included.
    pub(crate) grown_bytes: u64,
    pub(crate) phases: String,
}

/// A new repository that knows the VM.
pub(crate) fn repository(vm: &IdleVm) -> Result<Stillpoint, String> {
    let stillpoint = Stillpoint::new()?;
    stillpoint.run(&["vm", "add", VM, "--qmp", &vm.path("qmp").to_string_lossy()])?.success()?;
    Ok(stillpoint)
}

/// Takes a snapshot at crash level: nobody runs in the guest who could be asked for more.
pub(crate) fn snapshot(stillpoint: &Stillpoint, vm: &IdleVm) -> Result<Taken, String> {
    let before = folder_bytes(&stillpoint.repository())?;
    let (said, cost) =
        Cost::of(vm.pid(), || stillpoint.run(&["snapshot", VM, "--want", "crash"])?.success())?;
    let grown_bytes = folder_bytes(&stillpoint.repository())? - before;
    let bytes = |name: &str| said["disks"][0][name].as_u64().ok_or_else(|| format!("no {name} in {said}"));
    let sizes = Sizes {
        read: bytes("read_bytes")?,
        changed: bytes("changed_bytes")?,
        stored: bytes("stored_bytes")?,
    };
    Ok(Taken {
        id: snapshot_id(&said)?.to_owned(),
        sizes,
        cost,
        grown_bytes,
        phases: phases(&said["phases_ms"]),
    })
}

/// Restores a snapshot to a raw file beside the repository and compares it with the VM's disk.
pub(crate) fn restore(stillpoint: &Stillpoint, vm: &IdleVm, id: &str) -> Result<Cost, String> {
    let target = stillpoint.path("restored");
    let disk = format!("{DISK}={}", target.display());
    let ((), cost) =
        Cost::of(vm.pid(), || stillpoint.run(&["restore", id, "--disk", &disk])?.success().map(|_| ()))?;
    compare(vm, &target)?;
    std::fs::remove_file(&target).map_err(words)?;
    Ok(cost)
}

impl fmt::Display for Sizes {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [read, changed, stored] = [self.read, self.changed, self.stored].map(|bytes| bytes as f64 / MIB);
        write!(to, "{read:.1} MiB read, {changed:.1} changed, {stored:.1} stored")
    }
}

pub(crate) fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

fn phases(phases: &Value) -> String {
    let words = phases.as_object().into_iter().flatten().map(|(name, ms)| format!("{name} {ms}"));
    words.collect::<Vec<_>>().join(", ")
}

/// Bytes of all files below, by their lengths.
fn folder_bytes(folder: &Path) -> Result<u64, String> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).map_err(words)? {
        let entry = entry.map_err(words)?;
        let about = entry.metadata().map_err(words)?;
        bytes += if about.is_dir() { folder_bytes(&entry.path())? } else { about.len() };
    }
    Ok(bytes)
}

/// Bytes that a file takes on its disk.
pub(crate) fn allocated_bytes(file: &Path) -> Result<u64, String> {
    // Written but not yet synced, some file systems do not count it.
    std::fs::File::open(file).and_then(|file| file.sync_all()).map_err(words)?;
    Ok(std::fs::metadata(file).map_err(words)?.blocks() * 512)
}
