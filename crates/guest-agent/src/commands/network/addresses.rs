//! What the kernel knows of interfaces and their addresses, as the C library asks it.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

/// An interface, or one of its addresses with the bits of its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// Of the interface, or the label of an address.
    pub(super) name: String,
    pub(super) ip: Option<(IpAddr, u32)>,
}

/// First all interfaces, then all addresses.
pub(super) fn all() -> io::Result<Vec<Address>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: the pointer is to a live local, and is read only after success.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut addresses = Vec::new();
    let mut next = list.cast_const();
    // SAFETY: each entry is alive until the list is freed below, and its name is a C string.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: as above.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        // SAFETY: both are null, or of an entry that is alive.
        let ip = unsafe { (ip(entry.ifa_addr), ip(entry.ifa_netmask)) };
        let ip = ip.0.map(|address| (address, ip.1.map_or(0, ones)));
        addresses.push(Address { name, ip });
        next = entry.ifa_next;
    }
    // SAFETY: the list came from getifaddrs and is freed once; nothing points into it any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(addresses)
}

/// # Safety
/// `address` is null or points to a socket address as long as its family says.
unsafe fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: the caller's promise; the family tells the type, and C libraries align them all.
    unsafe {
        match i32::from(address.as_ref()?.sa_family) {
            libc::AF_INET => {
                let address = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()).into())
            }
            libc::AF_INET6 => {
                let address = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(address.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

fn ones(mask: IpAddr) -> u32 {
    match mask {
        IpAddr::V4(mask) => mask.to_bits().count_ones(),
        IpAddr::V6(mask) => mask.to_bits().count_ones(),
    }
}

/// One socket to ask about all interfaces.
#[derive(Debug)]
pub(super) struct Sockets(OwnedFd);

impl Sockets {
    pub(super) fn new() -> io::Result<Sockets> {
        // A unix socket will do, also on a kernel without the internet.
        Ok(Sockets(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?))
    }

    /// The first six bytes of it, zeros for an interface that has none; nothing if there is no such interface any more.
    pub(super) fn hardware_address(&self, name: &str) -> Option<[u8; 6]> {
        // SAFETY: all zeros is an `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        let room = request.ifr_name.len() - 1;
        for (place, byte) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *place = libc::c_char::from_ne_bytes([byte]);
        }
        // SAFETY: the kernel reads and writes one `ifreq`, which is alive; afterwards the union holds an address.
        unsafe {
            if libc::ioctl(self.0.as_raw_fd(), libc::SIOCGIFHWADDR as _, &raw mut request) != 0 {
                return None;
            }
            let bytes = request.ifr_ifru.ifru_hwaddr.sa_data;
            Some(std::array::from_fn(|index| u8::from_ne_bytes(bytes[index].to_ne_bytes())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Sockets, all};

    #[test]
    fn the_loopback_interface_has_an_address_of_zeros() {
        let sockets = Sockets::new().expect("a socket");
        assert_eq!(sockets.hardware_address("lo"), Some([0; 6]));
        assert_eq!(sockets.hardware_address("nope"), None);
        assert!(all().expect("a list").iter().any(|address| address.name == "lo" && address.ip.is_none()));
    }
}
