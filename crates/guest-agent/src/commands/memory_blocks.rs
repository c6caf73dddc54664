//! `guest-get-memory-blocks`, `guest-set-memory-blocks` and `guest-get-memory-block-info`.

use guest_protocol::Error;
use guest_protocol::answers::{MemoryBlock, MemoryBlockInfo, MemoryBlockOutcome, MemoryBlockResponse};
use guest_protocol::arguments::MemoryBlockWish;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const FOLDER: &str = "/sys/devices/system/memory/";
/// Longest content of the files that are read here.
const FILE_BYTES_MAX: usize = 32;

/// The blocks that the kernel shows below `root`, which is `/` but in tests, in its order; none where it shows no blocks.
pub(super) fn blocks(root: &Path) -> Result<Vec<MemoryBlock>, Error> {
    let folder = match std::fs::read_dir(in_root(root, FOLDER)) {
        Ok(folder) => folder,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let words = crate::words(&error);
            return Err(Error::generic(format!("Can't open directory\"{FOLDER}\": {words}")));
        }
    };
    let names = folder.filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.to_owned()));
    let blocks: Result<Vec<_>, _> =
        names.filter_map(|name| number(&name)).map(|block| read(root, block)).collect();
    match blocks {
        Ok(blocks) if blocks.is_empty() => Err(Error::generic("guest reported zero memory blocks!")),
        blocks => blocks,
    }
}

/// Makes blocks what they are to be; each tells how it went.
pub(super) fn set(root: &Path, wishes: &[MemoryBlockWish]) -> Vec<MemoryBlockResponse> {
    wishes.iter().map(|wish| switch(root, *wish)).collect()
}

/// How large a block is.
pub(super) fn info(root: &Path) -> Result<MemoryBlockInfo, Error> {
    let folder =
        open(&in_root(root, FOLDER)).map_err(|errno| failed(&format!("Could not open '{FOLDER}'"), errno))?;
    let text = attribute(&folder, "block_size_bytes").map_err(|why| why.error("block_size_bytes"))?;
    // The kernel writes it in hexadecimal, without a prefix.
    let size = u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0);
    Ok(MemoryBlockInfo { size })
}

fn read(root: &Path, phys_index: u64) -> Result<MemoryBlock, Error> {
    let path = format!("{FOLDER}memory{phys_index}/");
    let folder =
        open(&in_root(root, &path)).map_err(|errno| failed(&format!("Could not open '{path}'"), errno))?;
    // Kernels that cannot switch blocks have no such files.
    let online = match attribute(&folder, "state") {
        Ok(state) => state.starts_with("online"),
        Err(Unread::Errno(_, Errno::NOENT)) => {
            return Ok(MemoryBlock { phys_index, online: true, can_offline: false });
        }
        Err(why) => return Err(why.error("state")),
    };
    let can_offline = match attribute(&folder, "removable") {
        Ok(removable) => !removable.starts_with('0'),
        Err(Unread::Errno(_, Errno::NOENT)) => false,
        Err(why) => return Err(why.error("removable")),
    };
    Ok(MemoryBlock { phys_index, online, can_offline })
}

fn switch(root: &Path, wish: MemoryBlockWish) -> MemoryBlockResponse {
    let (response, errno) = match try_switch(root, wish) {
        Ok(()) => (MemoryBlockOutcome::Success, None),
        Err((outcome, errno)) => (outcome, Some(errno)),
    };
    let error_code = errno.map(|errno| i64::from(errno.raw_os_error()));
    MemoryBlockResponse { phys_index: wish.phys_index, response, error_code }
}

fn try_switch(root: &Path, wish: MemoryBlockWish) -> Result<(), (MemoryBlockOutcome, Errno)> {
    use MemoryBlockOutcome::{NotFound, OperationFailed, OperationNotSupported};
    let or_failed = |missing: MemoryBlockOutcome| {
        move |errno: Errno| (if errno == Errno::NOENT { missing } else { OperationFailed }, errno)
    };
    open(&in_root(root, FOLDER)).map_err(or_failed(OperationNotSupported))?;
    // qemu-ga writes numbers beyond 63 bits as negative ones; no block has either.
    let path = format!("{FOLDER}memory{}/", wish.phys_index.cast_signed());
    let folder = open(&in_root(root, &path)).map_err(or_failed(NotFound))?;
    let is_online = match attribute(&folder, "state") {
        Ok(state) => state.starts_with("online"),
        // A block that has no switch is online.
        Err(Unread::Errno(_, Errno::NOENT)) if wish.online => return Ok(()),
        Err(Unread::Errno(_, errno)) => return Err(or_failed(OperationNotSupported)(errno)),
        Err(Unread::Empty) => return Err((OperationFailed, Errno::IO)),
    };
    if wish.online == is_online {
        return Ok(());
    }
    let state = if wish.online { "online" } else { "offline" };
    let file = rustix::fs::openat(&folder, "state", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    file.and_then(|file| rustix::io::pwrite(&file, state.as_bytes(), 0))
        .map(|_| ())
        .map_err(|errno| (OperationFailed, errno))
}

/// Why a file of sysfs was not read.
enum Unread {
    Errno(&'static str, Errno),
    Empty,
}

impl Unread {
    fn error(self, name: &str) -> Error {
        match self {
            Unread::Errno(call, errno) => failed(&format!("{call} sysfs file \"{name}\""), errno),
            Unread::Empty => Error::generic(format!("pread sysfs file \"{name}\": unexpected EOF")),
        }
    }
}

fn attribute(folder: &OwnedFd, name: &str) -> Result<String, Unread> {
    let file = rustix::fs::openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Unread::Errno("open", errno))?;
    let mut bytes = [0; FILE_BYTES_MAX];
    match rustix::io::pread(&file, &mut bytes, 0) {
        Ok(0) => Err(Unread::Empty),
        Ok(read) => Ok(String::from_utf8_lossy(&bytes[..read]).into_owned()),
        Err(errno) => Err(Unread::Errno("pread", errno)),
    }
}

fn number(name: &str) -> Option<u64> {
    name.strip_prefix("memory")?.parse().ok()
}

fn open(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn failed(what: &str, errno: Errno) -> Error {
    Error::generic(format!("{what}: {}", crate::words(&errno.into())))
}

fn in_root(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::{blocks, info, set};
    use guest_protocol::arguments::MemoryBlockWish;
    use serde_json::{Value, json};
    use std::path::Path;

    fn guest() -> tempfile::TempDir {
        let guest = tempfile::tempdir().expect("a folder");
        let folder = guest.path().join("sys/devices/system/memory");
        let file = |path: &str, text: &str| {
            let path = folder.join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("written");
        };
        file("block_size_bytes", "8000000\n");
        file("auto_online_blocks", "offline\n");
        file("memory0/state", "online\n");
        file("memory0/removable", "0\n");
        file("memory5/state", "online\n");
        file("memory5/removable", "1\n");
        file("memory32/state", "offline\n");
        file("memory32/removable", "1\n");
        file("memory33/state", "going-offline\n");
        file("memory40/phys_index", "00000028\n");
        guest
    }

    fn told(root: &Path) -> Vec<(u64, bool, bool)> {
        let blocks = blocks(root).expect("blocks");
        let mut told: Vec<_> =
            blocks.into_iter().map(|block| (block.phys_index, block.online, block.can_offline)).collect();
        told.sort_unstable();
        told
    }

    #[test]
    fn blocks_are_told_with_their_state() {
        let guest = guest();
        assert_eq!(
            told(guest.path()),
            [(0, true, false), (5, true, true), (32, false, true), (33, false, false), (40, true, false)]
        );
        assert_eq!(info(guest.path()).expect("a size").size, 128 << 20);
    }

    #[test]
    fn memory_that_was_plugged_into_a_recorded_guest_is_told() {
        let guest = crate::commands::recorded::Guest::recorded("q35");
        let told = told(guest.path());
        // 384 MiB of its own in blocks of 128, and 256 MiB that were plugged in beyond 4 GiB.
        assert_eq!(
            told,
            [(0, true, true), (1, true, true), (2, true, true), (32, false, true), (33, false, true)]
        );
        assert_eq!(info(guest.path()).expect("a size").size, 128 << 20);
    }

    #[test]
    fn a_guest_without_blocks_has_none_and_no_size_of_them() {
        let guest = tempfile::tempdir().expect("a folder");
        assert_eq!(blocks(guest.path()), Ok(Vec::new()));
        let error = info(guest.path()).expect_err("no size");
        assert_eq!(error.desc, "Could not open '/sys/devices/system/memory/': No such file or directory");
        std::fs::create_dir_all(guest.path().join("sys/devices/system/memory")).expect("a folder");
        assert_eq!(blocks(guest.path()).expect_err("no blocks").desc, "guest reported zero memory blocks!");
        let error = info(guest.path()).expect_err("no size");
        assert_eq!(error.desc, "open sysfs file \"block_size_bytes\": No such file or directory");
    }

    #[test]
    fn every_wish_tells_how_it_went() {
        let guest = guest();
        let set = |wishes: &[(u64, bool)]| -> Value {
            let wish = |&(phys_index, online): &(u64, bool)| MemoryBlockWish { phys_index, online };
            let wishes: Vec<_> = wishes.iter().map(wish).collect();
            serde_json::to_value(set(guest.path(), &wishes)).expect("plain")
        };
        assert_eq!(
            set(&[(5, false), (32, true), (0, true), (7, true), (40, true), (40, false), (u64::MAX, true)]),
            json!([
                {"phys-index": 5, "response": "success"},
                {"phys-index": 32, "response": "success"},
                {"phys-index": 0, "response": "success"},
                {"phys-index": 7, "response": "not-found", "error-code": 2},
                {"phys-index": 40, "response": "success"},
                {"phys-index": 40, "response": "operation-not-supported", "error-code": 2},
                {"phys-index": u64::MAX, "response": "not-found", "error-code": 2},
            ])
        );
        assert_eq!(told(guest.path())[1..3], [(5, false, true), (32, true, true)]);
        let folder = guest.path().join("sys/devices/system/memory");
        std::fs::remove_dir_all(&folder).expect("there");
        assert_eq!(
            set(&[(5, true)]),
            json!([{"phys-index": 5, "response": "operation-not-supported", "error-code": 2}])
        );
        std::fs::write(&folder, "").expect("written");
        assert_eq!(
            set(&[(5, true)]),
            json!([{"phys-index": 5, "response": "operation-failed", "error-code": 20}])
        );
    }
}
