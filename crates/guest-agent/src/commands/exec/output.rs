//! The pipes of a started program.

use crate::log;
use crate::poll::Poll;
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;

/// Most bytes moved at a time, so that one program's flood does not keep the loop from others.
const TURN_BYTES: usize = 256 << 10;
/// Most bytes that can lie in a pipe. Source: `/proc/sys/fs/pipe-max-size`.
const PIPE_BYTES_MAX: usize = 1 << 20;

/// What a program reads.
#[derive(Debug)]
pub(super) struct Input {
    pipe: OwnedFd,
    bytes: Vec<u8>,
    written: usize,
}

impl Input {
    /// Watches the pipe; nothing is returned where nothing is to be written.
    pub(super) fn new(pipe: OwnedFd, bytes: Vec<u8>, poll: &Poll, token: u64) -> Option<Input> {
        watch(&pipe, poll, token).then_some(Input { pipe, bytes, written: 0 })
    }

    /// Writes what the pipe takes; true when all is written or nobody reads.
    pub(super) fn write(&mut self) -> bool {
        while self.written < self.bytes.len() {
            match rustix::io::write(&self.pipe, &self.bytes[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Err(_) => return true,
            }
        }
        true
    }
}

/// What was kept of a stream.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) bytes: Vec<u8>,
    /// There was more.
    pub(super) truncated: bool,
}

/// What a program writes.
#[derive(Debug)]
pub(super) struct Output {
    pipe: Option<OwnedFd>,
    kept: Vec<u8>,
    truncated: bool,
    /// Most bytes that are kept at a time.
    bytes_max: usize,
    is_kept: bool,
}

impl Output {
    pub(super) fn new(pipe: OwnedFd, bytes_max: usize, poll: &Poll, token: u64) -> Option<Output> {
        watch(&pipe, poll, token).then_some(Output {
            pipe: Some(pipe),
            kept: Vec::new(),
            truncated: false,
            bytes_max,
            is_kept: true,
        })
    }

    /// Reads some, keeps what there is room for, and asks to be called again where there is more.
    pub(super) fn event(output: Option<&mut Output>, room: usize, poll: &Poll, token: u64) {
        let Some(output) = output else { return };
        output.read(TURN_BYTES, room);
        if let Some(pipe) = &output.pipe
            && let Err(error) = poll.rearm(pipe, token)
        {
            log!(Error, "cannot watch a program's output: {error}");
        }
    }

    /// Reads all that lies in the pipe.
    pub(super) fn drain(&mut self) {
        self.read(PIPE_BYTES_MAX, PIPE_BYTES_MAX);
    }

    /// From now on what is read is dropped.
    pub(super) fn stop_keeping(&mut self) {
        self.is_kept = false;
    }

    /// What was kept, and whether more was dropped. Both begin anew.
    pub(super) fn take(&mut self) -> Kept {
        Kept { bytes: std::mem::take(&mut self.kept), truncated: std::mem::take(&mut self.truncated) }
    }

    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }

    pub(super) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    fn read(&mut self, bytes_max: usize, room: usize) {
        let mut buffer = [0; 16 << 10];
        let (mut total, room) = (0, self.bytes_max.min(self.kept.len().saturating_add(room)));
        while let Some(pipe) = &self.pipe
            && total < bytes_max
        {
            match rustix::io::read(pipe, &mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(bytes) => {
                    total += bytes;
                    self.keep(&buffer[..bytes], room);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    /// Appends until there are `kept_max`.
    fn keep(&mut self, bytes: &[u8], kept_max: usize) {
        if !self.is_kept {
            return;
        }
        let room = kept_max.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        self.truncated |= bytes.len() > room;
    }
}

fn watch(pipe: &OwnedFd, poll: &Poll, token: u64) -> bool {
    let watched =
        rustix::io::ioctl_fionbio(pipe, true).map_err(io::Error::from).and_then(|()| poll.add(pipe, token));
    if let Err(error) = &watched {
        log!(Error, "cannot watch a program's pipe: {error}");
    }
    watched.is_ok()
}
