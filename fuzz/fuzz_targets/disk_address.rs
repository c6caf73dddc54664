//! Folders of sysfs, from whose names it is read where a disk is plugged in. What a kernel writes is read back as it was.
#![no_main]

use arbitrary::Arbitrary;
use guest_agent::commands::disks::address::{ccw_address, pci_address, scsi_address};
use guest_protocol::answers::{CcwAddress, PciAddress};
use libfuzzer_sys::fuzz_target;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

#[derive(Arbitrary, Debug)]
enum Input {
    Folder(Vec<u8>),
    Pci { domain: u32, bus: u8, slot: u8, function: u8, below: String },
    Scsi { address: [u32; 4], below: String },
    Ccw { css: u8, ssid: u8, subchannel: u16, device: u16 },
}

fn names(folder: &Path) -> Vec<&str> {
    folder.iter().filter_map(|name| name.to_str()).collect()
}

fuzz_target!(|input: Input| match input {
    Input::Folder(bytes) => {
        let folder = Path::new(OsStr::from_bytes(&bytes));
        let _read = (pci_address(folder), scsi_address(folder), ccw_address(&names(folder)));
    }
    Input::Pci { domain, bus, slot, function, below } => {
        let written = format!("/sys/devices/pci0000:00/{domain:04x}:{bus:02x}:{slot:02x}.{function:x}");
        let [domain, bus, slot, function] = [domain, bus.into(), slot.into(), function.into()].map(i64::from);
        let read = PciAddress { domain, bus, slot, function };
        assert_eq!(pci_address(Path::new(&written)), Some(read));
        let _below = pci_address(&Path::new(&written).join(below.trim_start_matches('/')));
    }
    Input::Scsi { address, below } => {
        let [host, channel, target, lun] = address;
        let written = format!("/sys/devices/virtual/host{host}/{host}:{channel}:{target}:{lun}/block");
        assert_eq!(scsi_address(Path::new(&written)), Some(address.map(i64::from)));
        let _below = scsi_address(&Path::new(&written).join(below.trim_start_matches('/')));
    }
    Input::Ccw { css, ssid, subchannel, device } => {
        let channel = format!("{css:x}.{ssid:x}");
        let written = format!(
            "/sys/devices/css{css:x}/{channel}.{subchannel:04x}/{channel}.{device:04x}/virtio0/block"
        );
        let read = CcwAddress {
            cssid: css.into(),
            ssid: ssid.into(),
            subchno: subchannel.into(),
            devno: device.into(),
        };
        assert_eq!(ccw_address(&names(Path::new(&written))), Some(read));
    }
});
