//! The listening vsock socket: the host connects to the guest's number (CID) and a port.

use super::listener::{BACKLOG, Listener};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::os::fd::AsRawFd;

/// `AF_VSOCK`, as addresses carry it.
#[expect(clippy::cast_possible_truncation, reason = "it is 40")]
const FAMILY: libc::sa_family_t = libc::AF_VSOCK as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "a struct of 16 bytes")]
const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// Where to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    cid: u32,
    port: u32,
}

impl Address {
    /// Reads `CID:PORT`. 4294967295 is any.
    pub(super) fn read(text: &str) -> Result<Address, String> {
        let numbers = text.split_once(':').and_then(|(cid, port)| {
            let number =
                |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
            Some(Address { cid: number(cid)?, port: number(port)? })
        });
        numbers.ok_or_else(|| format!("'{text}' is no vsock address, which is CID:PORT"))
    }
}

/// Listens.
/// # Errors
/// When there is no vsock in this kernel, or the port is taken.
pub(super) fn listen(address: Address) -> io::Result<Listener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    // SAFETY: a struct of plain integers, for which zero is a value.
    let mut place: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    place.svm_family = FAMILY;
    (place.svm_cid, place.svm_port) = (address.cid, address.port);
    // SAFETY: the kernel reads that many bytes of a struct of that size. rustix has no address of this family.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const place).cast(), LENGTH) } != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(Listener::new(socket))
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn an_address_is_two_numbers() {
        assert_eq!(Address::read("3:1234"), Ok(Address { cid: 3, port: 1234 }));
        assert_eq!(Address::read("4294967295:1"), Ok(Address { cid: u32::MAX, port: 1 }));
        for text in ["", "3", "3:", ":3", "3:x", "-1:3", "+1:3", "4294967296:1", "1:2:3"] {
            assert!(Address::read(text).is_err(), "{text}");
        }
    }
}
