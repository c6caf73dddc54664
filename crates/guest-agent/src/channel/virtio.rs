//! The virtio-serial port.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where udev puts a link under the name of each port.
const NAMES: &str = "/dev/virtio-ports";
/// Where the kernel tells the names.
const CLASS: &str = "/sys/class/virtio-ports";

/// Opens the port. Where nobody makes links by name, as in a container or an image without udev, the kernel is asked which
/// device has it.
/// # Errors
/// When it is not there, or another agent has it (EBUSY).
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let opened = open_device(path);
    let name = path.strip_prefix(NAMES).ok().and_then(Path::to_str);
    match (opened, name) {
        (Err(Errno::NOENT), Some(name)) => {
            let device = device(Path::new(CLASS), name).ok_or(Errno::NOENT)?;
            Ok(open_device(&Path::new("/dev").join(device))?)
        }
        (opened, _) => Ok(opened?),
    }
}

fn open_device(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The device that the kernel gave to the port of this name.
fn device(class: &Path, name: &str) -> Option<PathBuf> {
    let ports = std::fs::read_dir(class).ok()?;
    ports.flatten().find_map(|port| {
        let named = std::fs::read_to_string(port.path().join("name")).ok()?;
        (named.trim_end_matches('\n') == name).then(|| port.file_name().into())
    })
}

#[cfg(test)]
mod tests {
    use super::device;

    #[test]
    fn d34_a_port_is_found_by_its_name_where_nobody_made_a_link() {
        let class = tempfile::tempdir().expect("a folder");
        for (device, name) in [("vport1p1", "com.redhat.spice.0\n"), ("vport2p3", "org.qemu.guest_agent.0\n")]
        {
            std::fs::create_dir(class.path().join(device)).expect("a folder");
            std::fs::write(class.path().join(device).join("name"), name).expect("a file");
        }
        std::fs::create_dir(class.path().join("vport0p0")).expect("a port without a name");
        assert_eq!(device(class.path(), "org.qemu.guest_agent.0"), Some("vport2p3".into()));
        assert_eq!(device(class.path(), "org.qemu.guest_agent"), None);
        assert_eq!(device(&class.path().join("nope"), "org.qemu.guest_agent.0"), None);
    }
}
