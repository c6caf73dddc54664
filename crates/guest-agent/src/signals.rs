//! Signals as something to read: the loop hears of them like of anything else.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Signals that the loop takes care of.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

/// What the signals that arrived ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// To end (SIGTERM, SIGINT, SIGHUP).
    pub end: bool,
    /// To look after children (SIGCHLD).
    pub reap: bool,
}

impl Signals {
    /// Diverts the signals of the calling thread and of all that it starts later. Call it before any is started.
    /// So do the programs that they start, which must call `let_all_through` before.
    /// # Errors
    /// When the kernel has no room.
    pub fn new() -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set before it is read, and all pointers are to live locals.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD] {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            set.assume_init()
        };
        // SAFETY: the set is initialised and the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: the set is initialised; −1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and nobody else has it.
        Ok(Signals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Takes the signals that have arrived.
    pub fn take(&self) -> Asked {
        let mut asked = Asked::default();
        loop {
            let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
            let size = size_of::<libc::signalfd_siginfo>();
            // SAFETY: the kernel writes at most `size` bytes into a struct of that size, all of plain integers.
            let (read, info) = unsafe {
                (libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size), info.assume_init())
            };
            if usize::try_from(read) != Ok(size) {
                return asked;
            }
            if i32::try_from(info.ssi_signo) == Ok(libc::SIGCHLD) {
                asked.reap = true;
            } else {
                asked.end = true;
            }
        }
    }
}

/// Undoes the diversion, in a forked child before it becomes another program: one that SIGTERM never reaches could only be
/// killed. Async-signal-safe.
pub fn let_all_through() {
    let mut none = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set before it is read; the old mask is not asked for.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
