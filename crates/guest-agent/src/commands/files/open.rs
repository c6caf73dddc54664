//! Opening a file as fopen(3) does, with qemu-ga's rules for new ones.

use crate::note;
use guest_protocol::Error;
use guest_protocol::arguments::FileOpen;
use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What new files may be used for, whatever the umask.
const NEW: Mode = Mode::from_raw_mode(0o666);

/// An open file.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    /// Something was written that may not be on the disk yet.
    pub(super) is_dirty: bool,
}

pub(super) fn open(FileOpen { path, mode }: &FileOpen) -> Result<OpenFile, Error> {
    note!("guest-file-open called, filepath: {path}, mode: {mode}");
    let flags = flags(mode).ok_or_else(|| Error::generic(format!("invalid file open mode '{mode}'")))?;
    let failed = |what: &str, errno: Errno| {
        let words = crate::words(&errno.into());
        Error::generic(format!("failed to {what} '{path}' (mode: '{mode}'): {words}"))
    };
    let name = name(path);
    // FIFOs and terminals must not be waited for.
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // A new file gets its mode only if it is ours: one that was there keeps what it has.
    let (is_new, opened) = if flags.contains(OFlags::CREATE) {
        match rustix::fs::open(&name, flags | OFlags::EXCL, Mode::empty()) {
            Err(Errno::EXIST) => (false, rustix::fs::open(&name, flags - OFlags::CREATE, Mode::empty())),
            opened => (true, opened),
        }
    } else {
        (false, rustix::fs::open(&name, flags, Mode::empty()))
    };
    let file = opened.map_err(|errno| failed("open file", errno))?;
    if is_new && let Err(errno) = rustix::fs::fchmod(&file, NEW) {
        // It was ours a moment ago; if it is gone already, so much the better.
        let _gone = rustix::fs::unlink(&name).is_ok();
        return Err(failed("set permission 0666 on new file", errno));
    }
    if flags.contains(OFlags::APPEND) && !flags.contains(OFlags::RDWR) {
        // As with fopen(3), one tells where the next byte goes. Where there is no place, there is none to tell.
        let _moved = rustix::fs::seek(&file, SeekFrom::End(0)).is_ok();
    }
    Ok(OpenFile { file: file.into(), is_dirty: false })
}

/// qemu-ga's strings cannot hold a NUL and have the overlong pair C0 80 in its place, which names another file.
fn name(path: &str) -> PathBuf {
    let bytes = path.bytes().flat_map(|byte| if byte == 0 { vec![0xC0, 0x80] } else { vec![byte] });
    PathBuf::from(OsString::from_vec(bytes.collect()))
}

fn flags(mode: &str) -> Option<OFlags> {
    let plain = OFlags::CREATE;
    Some(match mode {
        "r" | "rb" => OFlags::RDONLY,
        "w" | "wb" => OFlags::WRONLY | plain | OFlags::TRUNC,
        "a" | "ab" => OFlags::WRONLY | plain | OFlags::APPEND,
        "r+" | "rb+" | "r+b" => OFlags::RDWR,
        "w+" | "wb+" | "w+b" => OFlags::RDWR | plain | OFlags::TRUNC,
        "a+" | "ab+" | "a+b" => OFlags::RDWR | plain | OFlags::APPEND,
        _ => return None,
    })
}
