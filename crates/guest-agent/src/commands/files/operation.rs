//! What is done to an open file, but for reading.

use super::super::answer;
use super::open::OpenFile;
use crate::note;
use guest_protocol::answers::{FilePosition, FileWritten};
use guest_protocol::arguments::FileOperation;
use guest_protocol::json::Text;
use guest_protocol::{Error, base64};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde_json::{Value, json};
use std::io;
use std::os::fd::IntoRawFd;

/// Most bytes read at once, as in qemu-ga.
const READ_BYTES_MAX: i64 = 48 << 20;

/// What can be said before the file is there.
pub(super) fn check(operation: &FileOperation) -> Result<(), Error> {
    match operation {
        FileOperation::Read(count) if !(0..=READ_BYTES_MAX).contains(count) => Err(invalid_count(*count)),
        FileOperation::Seek { whence, .. } if !(0..=2).contains(whence) => {
            Err(Error::generic(format!("invalid whence code {whence}")))
        }
        _ => Ok(()),
    }
}

/// The memory that an operation holds while it waits, or more: a text counts as it was sent.
pub(super) fn bytes(operation: &FileOperation) -> usize {
    match operation {
        FileOperation::Write { text, .. } => text.len(),
        _ => 0,
    }
}

pub(super) fn carry_out(file: &mut OpenFile, handle: i64, operation: FileOperation) -> Result<Value, Error> {
    match operation {
        FileOperation::Write { text, count } => write(file, handle, text, count),
        FileOperation::Seek { offset, whence } => seek(file, offset, whence),
        FileOperation::Flush => flush(file),
        FileOperation::Read(_) | FileOperation::Close => unreachable!("these take the file"),
    }
}

/// Unlike a drop this tells what network file systems say at the last moment: that what was written did not get through.
pub(super) fn close(file: OpenFile) -> Result<Value, Error> {
    // SAFETY: the descriptor is ours, and is given up here.
    let result = unsafe { libc::close(file.file.into_raw_fd()) };
    if result == 0 {
        return Ok(json!({}));
    }
    let error = io::Error::last_os_error();
    Err(Error::generic(format!("failed to close handle: {}", crate::words(&error))))
}

fn write(file: &mut OpenFile, handle: i64, text: Text, count: Option<i64>) -> Result<Value, Error> {
    let bytes = base64::decode(text)?;
    let bytes = match count {
        None => &bytes[..],
        Some(count) => usize::try_from(count)
            .ok()
            .and_then(|wanted| bytes.get(..wanted))
            .ok_or_else(|| invalid_count(count))?,
    };
    let mut written = 0;
    while written < bytes.len() {
        match rustix::io::write(&file.file, &bytes[written..]) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(Errno::INTR) => {}
            // What is written is told; the next write meets the error again.
            Err(_) if written > 0 => break,
            Err(errno) => {
                note!("guest-file-write failed, handle: {handle}");
                return Err(failed("write to file", errno));
            }
        }
    }
    file.is_dirty |= written > 0;
    answer(&FileWritten { count: written as u64, eof: false })
}

fn seek(file: &OpenFile, offset: i64, whence: i64) -> Result<Value, Error> {
    let to = match whence {
        0 => u64::try_from(offset).map(SeekFrom::Start).map_err(|_| Errno::INVAL),
        1 => Ok(SeekFrom::Current(offset)),
        _ => Ok(SeekFrom::End(offset)),
    };
    let position = to.and_then(|to| rustix::fs::seek(&file.file, to));
    let position = position.map_err(|errno| failed("seek file", errno))?;
    answer(&FilePosition { position, eof: false })
}

/// Unlike in qemu-ga, what was written is on the disk when this is answered.
fn flush(file: &mut OpenFile) -> Result<Value, Error> {
    if file.is_dirty {
        match rustix::fs::fsync(&file.file) {
            // Pipes, sockets and some devices have nothing to wait for.
            Ok(()) | Err(Errno::INVAL | Errno::ROFS | Errno::OPNOTSUPP) => file.is_dirty = false,
            Err(errno) => return Err(failed("flush file", errno)),
        }
    }
    Ok(json!({}))
}

fn invalid_count(count: i64) -> Error {
    Error::generic(format!("value '{count}' is invalid for argument count"))
}

pub(super) fn failed(what: &str, errno: Errno) -> Error {
    Error::generic(format!("failed to {what}: {}", crate::words(&errno.into())))
}
