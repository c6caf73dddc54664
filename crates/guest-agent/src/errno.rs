//! The system's errors in the words of GNU's C library, which hosts and their scripts match on.
//!
//! The agent is built with another C library, whose words for many errors differ. Nothing here depends on either.

use rustix::io::Errno;
use std::io;

/// What `strerror` of GNU's C library says.
pub fn words(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => of(number),
        None => error.to_string(),
    }
}

/// As `words`, of an error that a system call answered.
pub fn words_of(errno: Errno) -> String {
    of(errno.raw_os_error())
}

fn of(number: i32) -> String {
    match TABLE.iter().find(|(known, _)| *known == number) {
        Some((_, words)) => (*words).to_owned(),
        None => format!("Unknown error {number}"),
    }
}

/// Source: `errlist.h` of glibc, as `strerror` prints it in the C locale; the ones that a system call can answer here.
const TABLE: &[(i32, &str)] = &[
    (0, "Success"),
    (libc::EPERM, "Operation not permitted"),
    (libc::ENOENT, "No such file or directory"),
    (libc::ESRCH, "No such process"),
    (libc::EINTR, "Interrupted system call"),
    (libc::EIO, "Input/output error"),
    (libc::ENXIO, "No such device or address"),
    (libc::E2BIG, "Argument list too long"),
    (libc::ENOEXEC, "Exec format error"),
    (libc::EBADF, "Bad file descriptor"),
    (libc::ECHILD, "No child processes"),
    (libc::EAGAIN, "Resource temporarily unavailable"),
    (libc::ENOMEM, "Cannot allocate memory"),
    (libc::EACCES, "Permission denied"),
    (libc::EFAULT, "Bad address"),
    (libc::ENOTBLK, "Block device required"),
    (libc::EBUSY, "Device or resource busy"),
    (libc::EEXIST, "File exists"),
    (libc::EXDEV, "Invalid cross-device link"),
    (libc::ENODEV, "No such device"),
    (libc::ENOTDIR, "Not a directory"),
    (libc::EISDIR, "Is a directory"),
    (libc::EINVAL, "Invalid argument"),
    (libc::ENFILE, "Too many open files in system"),
    (libc::EMFILE, "Too many open files"),
    (libc::ENOTTY, "Inappropriate ioctl for device"),
    (libc::ETXTBSY, "Text file busy"),
    (libc::EFBIG, "File too large"),
    (libc::ENOSPC, "No space left on device"),
    (libc::ESPIPE, "Illegal seek"),
    (libc::EROFS, "Read-only file system"),
    (libc::EMLINK, "Too many links"),
    (libc::EPIPE, "Broken pipe"),
    (libc::EDOM, "Numerical argument out of domain"),
    (libc::ERANGE, "Numerical result out of range"),
    (libc::EDEADLK, "Resource deadlock avoided"),
    (libc::ENAMETOOLONG, "File name too long"),
    (libc::ENOLCK, "No locks available"),
    (libc::ENOSYS, "Function not implemented"),
    (libc::ENOTEMPTY, "Directory not empty"),
    (libc::ELOOP, "Too many levels of symbolic links"),
    (libc::ENODATA, "No data available"),
    (libc::EPROTO, "Protocol error"),
    (libc::EBADMSG, "Bad message"),
    (libc::EOVERFLOW, "Value too large for defined data type"),
    (libc::EUSERS, "Too many users"),
    (libc::ENOTSOCK, "Socket operation on non-socket"),
    (libc::EOPNOTSUPP, "Operation not supported"),
    (libc::EAFNOSUPPORT, "Address family not supported by protocol"),
    (libc::EADDRINUSE, "Address already in use"),
    (libc::EADDRNOTAVAIL, "Cannot assign requested address"),
    (libc::ENETDOWN, "Network is down"),
    (libc::ECONNRESET, "Connection reset by peer"),
    (libc::ENOBUFS, "No buffer space available"),
    (libc::ETIMEDOUT, "Connection timed out"),
    (libc::ECONNREFUSED, "Connection refused"),
    (libc::EHOSTDOWN, "Host is down"),
    (libc::ESTALE, "Stale file handle"),
    (libc::EUCLEAN, "Structure needs cleaning"),
    (libc::EREMOTEIO, "Remote I/O error"),
    (libc::EDQUOT, "Disk quota exceeded"),
    (libc::ENOMEDIUM, "No medium found"),
    (libc::EMEDIUMTYPE, "Wrong medium type"),
    (libc::ENOKEY, "Required key not available"),
];

#[cfg(test)]
mod tests {
    use super::{TABLE, of, words};
    use std::io;

    #[test]
    fn words_are_those_of_gnus_c_library() {
        for (number, words) in TABLE {
            // Tests are built with that library.
            if cfg!(target_env = "gnu") {
                let system = io::Error::from_raw_os_error(*number).to_string();
                assert_eq!(format!("{words} (os error {number})"), system);
            }
        }
        assert_eq!(of(9999), "Unknown error 9999");
        assert_eq!(words(&io::Error::other("another thing")), "another thing");
    }
}
