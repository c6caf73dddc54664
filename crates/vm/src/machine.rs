//! What a VM is made of, asked from its monitor: the drives and the definition that a twin needs.

use crate::disks::{self, DeviceFacts, Drives};
use crate::monitor::{Monitor, MonitorError};
use crate::unix::Peer;
use qmp::block::{Device, Node, QueryBlock, QueryNamedBlockNodes};
use qmp::machine::{QueryCpusFast, QueryKvm, QueryMemorySizeSummary, QueryName, QueryUuid};
use qmp::pci::{self, QueryPci};
use qmp::qom::{QomGet, QomList};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Deepest object path that is climbed in search of a PCI device.
const CLIMB_MAX: usize = 16;

/// What a VM is made of besides its disks. Kept with a snapshot; file names are for reading now, never for a twin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Name given to QEMU, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// UUID, if one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Machine type with its version, e.g. `pc-q35-7.2`.
    pub machine: String,
    /// Accelerator.
    pub accelerator: Accelerator,
    /// CPU model, e.g. `max`; empty if it could not be read.
    pub cpu_model: String,
    /// vCPUs now.
    pub cpus: u32,
    /// Memory at start and plugged in since, in bytes.
    pub memory_bytes: u64,
    /// How it starts.
    pub boot: Boot,
    /// QEMU's version when it was read; for people.
    pub qemu_version: String,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// The kernel's.
    Kvm,
    /// QEMU's own translation (or, on other systems, something else).
    #[default]
    Tcg,
}

/// How a VM starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Kernel file given to QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Initial file system given to QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// Firmware flash chips, lowest first; none: the machine's built-in BIOS.
    #[serde(default)]
    pub flash: Vec<Flash>,
}

/// A firmware flash chip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flash {
    /// File that holds it.
    pub file: String,
    /// Format as QEMU was told.
    pub format: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// The guest cannot write it: code; otherwise variables.
    pub read_only: bool,
}

impl Flash {
    /// Its file holds what the guest sees, byte for byte: the one form that a twin takes.
    pub fn is_plain(&self) -> bool {
        matches!(self.format.as_str(), "raw" | "file" | "host_device")
    }
}

/// Asks for the drives and decides which count.
///
/// # Errors
/// Those of the monitor.
pub fn drives(monitor: &mut Monitor) -> Result<Drives, MonitorError> {
    let devices = monitor.run(&QueryBlock {})?;
    let buses = monitor.run(&QueryPci {}).unwrap_or_default();
    let mut facts = BTreeMap::new();
    for qdev in devices.iter().filter_map(|device| device.qdev.as_ref()) {
        facts.insert(qdev.clone(), device_facts(monitor, &buses, qdev)?);
    }
    let mut drives = disks::decide(&devices, &facts);
    for layer in drives.disks.iter_mut().flat_map(|disk| &mut disk.layers) {
        layer.file = absolute(&layer.file, monitor.peer());
    }
    Ok(drives)
}

/// A file as another process would name it; QEMU may have been given it relative to its own folder. What is not found
/// there stays relative, and must not be opened: in our own folder it would be another file.
fn absolute(file: &str, qemu: Option<Peer>) -> String {
    let folder = qemu.and_then(|qemu| std::fs::read_link(format!("/proc/{}/cwd", qemu.pid)).ok());
    let found = folder.map(|folder| folder.join(file)).filter(|path| path.is_file());
    found.and_then(|path| path.to_str().map(str::to_owned)).unwrap_or_else(|| file.to_owned())
}

/// The files that a VM may write to, of all that it has open.
pub fn written_files(nodes: &[Node], qemu: Option<Peer>) -> Vec<PathBuf> {
    let files = nodes.iter().filter(|node| node.drv == "file" && !node.ro);
    files.map(|node| absolute(&node.file, qemu).into()).collect()
}

/// Asks for every node of the block graph.
///
/// # Errors
/// Those of the monitor.
pub fn nodes(monitor: &mut Monitor) -> Result<Vec<Node>, MonitorError> {
    monitor.run(&QueryNamedBlockNodes { flat: true })
}

/// Asks what the VM is made of.
///
/// # Errors
/// Those of the monitor.
pub fn definition(monitor: &mut Monitor) -> Result<Definition, MonitorError> {
    let machine = text(monitor, "/machine", "type")?;
    let cpus = monitor.run(&QueryCpusFast {})?;
    let cpu_type = match cpus.first() {
        Some(cpu) => text(monitor, &cpu.qom_path, "type")?,
        None => String::new(),
    };
    let memory = monitor.run(&QueryMemorySizeSummary {})?;
    let uuid = monitor.run(&QueryUuid {})?.uuid;
    let devices = monitor.run(&QueryBlock {})?;
    let qemu = monitor.peer();
    Ok(Definition {
        name: monitor.run(&QueryName {})?.name,
        uuid: Some(uuid).filter(|uuid| uuid.bytes().any(|byte| !matches!(byte, b'0' | b'-'))),
        machine: machine.strip_suffix("-machine").unwrap_or(&machine).to_owned(),
        accelerator: if monitor.run(&QueryKvm {})?.enabled { Accelerator::Kvm } else { Accelerator::Tcg },
        cpu_model: cpu_model(&cpu_type).to_owned(),
        cpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        memory_bytes: memory.base_memory.saturating_add(memory.plugged_memory),
        boot: Boot {
            kernel: given(monitor, "kernel")?.map(|file| absolute(&file, qemu)),
            initrd: given(monitor, "initrd")?.map(|file| absolute(&file, qemu)),
            append: given(monitor, "append")?,
            flash: flash(&devices, qemu),
        },
        qemu_version: monitor.greeting().version.clone(),
    })
}

/// `max` from `max-x86_64-cpu`.
fn cpu_model(kind: &str) -> &str {
    kind.strip_suffix("-cpu").and_then(|model| model.rsplit_once('-')).map_or("", |(model, _)| model)
}

fn flash(devices: &[Device], qemu: Option<Peer>) -> Vec<Flash> {
    let mut chips: Vec<_> = devices
        .iter()
        .filter_map(|device| {
            let chip = device.qdev.as_ref()?.strip_prefix("/machine/system.flash")?;
            let node = device.inserted.as_ref()?;
            let size_bytes = node.image.virtual_size;
            let (file, format) = (absolute(&node.file, qemu), node.drv.clone());
            Some((chip, Flash { file, format, size_bytes, read_only: node.ro }))
        })
        .collect();
    chips.sort_by_key(|(chip, _)| *chip);
    chips.into_iter().map(|(_, flash)| flash).collect()
}

/// A machine property that is set; other machines than PCs lack some.
fn given(monitor: &mut Monitor, property: &str) -> Result<Option<String>, MonitorError> {
    Ok(Some(text(monitor, "/machine", property)?).filter(|text| !text.is_empty()))
}

/// A property as text; empty if there is no such property.
fn text(monitor: &mut Monitor, path: &str, property: &str) -> Result<String, MonitorError> {
    match monitor.run(&QomGet { path: path.to_owned(), property: property.to_owned() }) {
        Ok(Value::String(text)) => Ok(text),
        Ok(_) | Err(MonitorError::Failed { .. }) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// A property that is on; false if there is no such property.
fn flag(monitor: &mut Monitor, path: &str, property: &str) -> Result<bool, MonitorError> {
    match monitor.run(&QomGet { path: path.to_owned(), property: property.to_owned() }) {
        Ok(value) => Ok(value == Value::Bool(true)),
        Err(MonitorError::Failed { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn device_facts(monitor: &mut Monitor, buses: &[pci::Bus], qdev: &str) -> Result<DeviceFacts, MonitorError> {
    let path = disks::device_path(qdev);
    let properties = properties(monitor, &path)?;
    let has = |name: &str| properties.contains(name);
    let kind = text(monitor, &path, "type")?;
    let serial = if has("serial") { text(monitor, &path, "serial")? } else { String::new() };
    let carrier = carrier(monitor, buses, &path)?;
    let scsi_commands = has("scsi") && flag(monitor, &path, "scsi")?;
    Ok(DeviceFacts { path, kind, serial, pci: carrier.pci, io_thread: carrier.io_thread, scsi_commands })
}

fn properties(monitor: &mut Monitor, path: &str) -> Result<BTreeSet<String>, MonitorError> {
    match monitor.run(&QomList { path: path.to_owned() }) {
        Ok(properties) => Ok(properties.into_iter().map(|property| property.name).collect()),
        Err(MonitorError::Failed { .. }) => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

/// What carries a disk's device.
#[derive(Debug, Default)]
struct Carrier {
    pci: Option<String>,
    io_thread: bool,
}

/// Climbs from a device over its bus to the PCI device that carries it.
fn carrier(monitor: &mut Monitor, buses: &[pci::Bus], path: &str) -> Result<Carrier, MonitorError> {
    let mut path = path.to_owned();
    let mut carrier = Carrier::default();
    for _ in 0..CLIMB_MAX {
        let properties = properties(monitor, &path)?;
        let has = |name: &str| properties.contains(name);
        if has("iothread") && !text(monitor, &path, "iothread")?.is_empty() {
            carrier.io_thread = true;
        }
        // Several threads for one device: a list that is empty or null when unused.
        if has("iothread-vq-mapping") {
            let get = QomGet { path: path.clone(), property: "iothread-vq-mapping".to_owned() };
            let list = monitor.run(&get).unwrap_or_default();
            carrier.io_thread |= list.as_array().is_some_and(|list| !list.is_empty());
        }
        let parent_bus = if has("parent_bus") { text(monitor, &path, "parent_bus")? } else { String::new() };
        if has("legacy-addr") {
            let address = text(monitor, &path, "legacy-addr")?;
            carrier.pci = bus_number(buses, &parent_bus).map(|bus| format!("0000:{bus:02x}:{address}"));
            break;
        }
        // A device hangs on a bus; a bus is a child of the device that makes it.
        let from = if parent_bus.is_empty() { path } else { parent_bus };
        match from.rsplit_once('/') {
            Some((parent, _)) if parent.len() > "/machine".len() => path = parent.to_owned(),
            _ => break,
        }
    }
    Ok(carrier)
}

/// Number of a PCI bus, from its path in the object tree: 0 for the root's, else that behind its bridge.
fn bus_number(buses: &[pci::Bus], path: &str) -> Option<u64> {
    let (owner, _) = path.rsplit_once('/')?;
    match owner.strip_prefix("/machine/peripheral/") {
        Some(bridge) => buses.iter().find_map(|bus| secondary(&bus.devices, bridge)),
        None if owner.starts_with("/machine/peripheral-anon/") => None,
        None => Some(0),
    }
}

fn secondary(devices: &[pci::Device], id: &str) -> Option<u64> {
    devices.iter().find_map(|device| {
        let bridge = device.pci_bridge.as_ref()?;
        if device.qdev_id == id { Some(bridge.bus.secondary) } else { secondary(&bridge.devices, id) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_model_is_cut_out_of_its_type() {
        assert_eq!(cpu_model("max-x86_64-cpu"), "max");
        assert_eq!(cpu_model("Skylake-Client-v1-x86_64-cpu"), "Skylake-Client-v1");
        assert_eq!(cpu_model("strange"), "");
    }

    #[test]
    fn only_flash_without_an_image_format_is_plain() {
        let flash = |format: &str| Flash { format: format.to_owned(), ..Flash::default() };
        assert!(flash("raw").is_plain() && flash("file").is_plain());
        assert!(!flash("qcow2").is_plain() && !flash("").is_plain());
    }

    #[test]
    fn buses_behind_bridges_are_found_by_the_bridges_id() {
        let text = r#"[{"bus": 0, "devices": [{"qdev_id": "rp1", "bus": 0, "slot": 1, "pci_bridge":
            {"bus": {"number": 0, "secondary": 3}, "devices": [{"qdev_id": "rp2", "pci_bridge": {"bus": {"secondary": 4}}}]}}]}]"#;
        let buses: Vec<pci::Bus> = serde_json::from_str(text).unwrap();
        assert_eq!(bus_number(&buses, "/machine/q35/pcie.0"), Some(0));
        assert_eq!(bus_number(&buses, "/machine/peripheral/rp1/rp1"), Some(3));
        assert_eq!(bus_number(&buses, "/machine/peripheral/rp2/rp2"), Some(4));
        assert_eq!(bus_number(&buses, "/machine/peripheral-anon/device[1]/bus"), None);
    }
}
