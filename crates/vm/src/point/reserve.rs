//! What must stay free of the scratch's file system where the VM's own images grow on it.
//!
//! A scratch that runs full breaks the snapshot and not the guest's write. But a file system that is full is full for sparse and
//! qcow2 images too: the guest's next allocating write would fail there, or QEMU pause the VM. So the snapshot is broken while
//! there is still room for them.
//!
//! What is not seen: images and scratch on two file systems that draw on one pool (thin volumes, btrfs subvolumes, ZFS), images
//! that lie where only QEMU's own mount namespace shows them, quotas, and everything while the program is dead.

use rustix::fs::statvfs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most that must stay free, in bytes. Within [`LOOK`] a guest would have to dirty 4 GiB/s to use it up unseen, and taking the
/// filter out seldom lasts longer than that.
pub const RESERVE_BYTES_MAX: u64 = 1 << 30;
/// On a small file system one part in so many must stay free: as much as ext4 keeps for root, so nobody plans to use it.
pub const RESERVE_PARTS: u64 = 20;
/// How often the room is looked at while a snapshot may grow.
pub const LOOK: Duration = Duration::from_millis(250);

/// A file system at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Its size in bytes.
    pub total_bytes: u64,
    /// What anybody may still use of it, in bytes.
    pub free_bytes: u64,
}

/// Less is free than must stay free.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the scratch folder {} is on a file system with images of this VM, of which {} MiB are free, and {} MiB must stay free for the \
     guest's own writes", .folder.display(), .free_bytes >> 20, .reserve_bytes.div_ceil(1 << 20)
)]
pub struct Short {
    /// The scratch folder.
    pub folder: PathBuf,
    /// What is free, in bytes.
    pub free_bytes: u64,
    /// What must stay free, in bytes.
    pub reserve_bytes: u64,
}

/// A scratch folder that shares its file system with images of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserve {
    folder: PathBuf,
}

/// How many bytes must stay free of a file system of this size. Pure.
pub fn reserve_bytes(total_bytes: u64) -> u64 {
    (total_bytes / RESERVE_PARTS).min(RESERVE_BYTES_MAX)
}

/// Whether scratch on the file system with this number is in the way of an image on one of those. Pure.
pub fn is_shared(scratch: u64, mut images: impl Iterator<Item = u64>) -> bool {
    images.any(|image| image == scratch)
}

/// Whether scratch may grow on. Pure.
///
/// # Errors
/// `Short`.
pub fn judge(folder: &Path, room: Room) -> Result<(), Short> {
    let reserve_bytes = reserve_bytes(room.total_bytes);
    if room.free_bytes >= reserve_bytes {
        return Ok(());
    }
    Err(Short { folder: folder.to_owned(), free_bytes: room.free_bytes, reserve_bytes })
}

impl Reserve {
    /// Of scratch in this folder, for a VM that writes to these files; `None` where it is in nobody's way.
    ///
    /// # Errors
    /// The kernel's, about the folder. A file that is not found is passed over.
    pub fn of(folder: &Path, images: &[PathBuf]) -> io::Result<Option<Self>> {
        let scratch = std::fs::metadata(folder)?.dev();
        let files =
            images.iter().filter_map(|image| std::fs::metadata(image).ok().filter(|file| file.is_file()));
        Ok(is_shared(scratch, files.map(|file| file.dev())).then(|| Self { folder: folder.to_owned() }))
    }

    /// Looks how much is free now.
    ///
    /// # Errors
    /// `Short`. A file system that cannot be asked is passed over: whatever ails it, scratch will meet it, too.
    pub fn look(&self) -> Result<(), Short> {
        let Ok(facts) = statvfs(&self.folder) else { return Ok(()) };
        let bytes = |blocks: u64| blocks.saturating_mul(facts.f_frsize);
        let room = Room { total_bytes: bytes(facts.f_blocks), free_bytes: bytes(facts.f_bavail) };
        judge(&self.folder, room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twentieth_must_stay_free_and_at_most_one_gib() {
        for (total_bytes, reserve) in
            [(0, 0), (20 << 20, 1 << 20), (20 << 30, 1 << 30), (1 << 40, 1 << 30), (u64::MAX, 1 << 30)]
        {
            assert_eq!(reserve_bytes(total_bytes), reserve, "{total_bytes}");
        }
    }

    #[test]
    fn scratch_may_grow_down_to_the_reserve_and_the_message_says_what_is_missing() {
        let look = |free_bytes| judge(Path::new("/s"), Room { total_bytes: 200 << 20, free_bytes });
        assert_eq!(look(10 << 20), Ok(()));
        let short = look((10 << 20) - 1).unwrap_err();
        let words = short.to_string();
        assert!(
            words.contains("/s ") && words.contains(" 9 MiB are free") && words.contains(" 10 MiB must"),
            "{words}"
        );
    }

    #[test]
    fn only_a_file_system_that_also_holds_an_image_needs_it() {
        assert!(is_shared(1, [2, 1].into_iter()));
        assert!(!is_shared(1, [2, 3].into_iter()));
        assert!(!is_shared(1, std::iter::empty()));
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("d.raw");
        std::fs::write(&image, "").unwrap();
        let of = |image: &Path| Reserve::of(folder.path(), &[image.to_owned()]).unwrap();
        assert!(of(&image).is_some());
        for other in ["/proc/self/status", "/dev/null", "/no/such/file"] {
            assert_eq!(of(Path::new(other)), None, "{other}");
        }
    }
}
