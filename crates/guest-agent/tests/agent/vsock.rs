//! The vsock channel, as far as this kernel goes: a guest's kernel knows vsock, and one with `vsock_loopback` lets a
//! process connect to its own machine.

use crate::guest::{Agent, Client, until};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Ports from here on are these tests' own.
pub(crate) const PORT: u32 = 0x5350_0000;

fn skip(what: &str, error: &io::Error) {
    writeln!(io::stderr(), "SKIPPED: {what}: {error}").expect("a standard error");
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just created.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

type Call = unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn at(socket: &OwnedFd, call: Call, cid: u32, port: u32) -> io::Result<()> {
    // SAFETY: a struct of plain integers.
    let mut place: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    place.svm_family = u16::try_from(libc::AF_VSOCK).expect("small");
    (place.svm_cid, place.svm_port) = (cid, port);
    let length = u32::try_from(size_of_val(&place)).expect("small");
    // SAFETY: the address is a live local of that length.
    match unsafe { call(socket.as_raw_fd(), (&raw const place).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A listening socket at any CID, or none, told.
pub(crate) fn listener(port: u32) -> Option<OwnedFd> {
    let listening = socket().and_then(|socket| {
        at(&socket, libc::bind, libc::VMADDR_CID_ANY, port)?;
        rustix::net::listen(&socket, 4)?;
        Ok(socket)
    });
    listening.map_err(|error| skip("no vsock in this kernel", &error)).ok()
}

/// A client over the kernel's loopback, or none, told.
pub(crate) fn connect(port: u32) -> Option<Client> {
    let connected = socket().and_then(|socket| {
        at(&socket, libc::connect, libc::VMADDR_CID_LOCAL, port)?;
        // std has no vsock streams; reading, writing and time limits are the same system calls.
        Ok(Client::new(UnixStream::from(socket)))
    });
    connected.map_err(|error| skip("no vsock_loopback in this kernel, so nobody connects", &error)).ok()
}

#[test]
fn the_agent_listens_at_a_vsock_port_and_serves_there() {
    if listener(PORT + 2).is_none() {
        return;
    }
    let address = format!("{}:{}", libc::VMADDR_CID_ANY, PORT + 2);
    let mut agent = Agent::start_without_wait(&["-m", "vsock-listen", "-p", &address]);
    until("the port is taken", || {
        assert!(agent.is_running(), "{}", agent.log());
        let taken = socket().and_then(|socket| at(&socket, libc::bind, libc::VMADDR_CID_ANY, PORT + 2));
        taken.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    });
    let (Some(mut first), Some(mut second)) = (connect(PORT + 2), connect(PORT + 2)) else { return };
    first.send(r#"{"execute": "guest-"#);
    assert_eq!(second.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
    drop(first);
    assert_eq!(second.ask(r#"{"execute":"guest-ping"}"#), r#"{"return": {}}"#);
}

#[test]
fn a_vsock_address_that_is_none_ends_the_start() {
    let mut agent = Agent::start_without_wait(&["-m", "vsock-listen", "-p", "3"]);
    assert_eq!(agent.ends().code(), Some(1));
    assert!(agent.log().contains("'3' is no vsock address, which is CID:PORT"), "{}", agent.log());
}
