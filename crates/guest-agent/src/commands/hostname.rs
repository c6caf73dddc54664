//! `guest-get-host-name`.

use guest_protocol::answers::system::HostName;

/// The name that the kernel has now.
pub(super) fn host_name() -> HostName {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    HostName { host_name: name }
}
