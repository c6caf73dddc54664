//! A twin's command line, built from a typed description. Pure.
//!
//! Nothing of a stored definition reaches it as text but the kernel's command line (one argument of its own) and a
//! disk's serial number (a JSON string). Every path is made here, inside one private folder.

use crate::disks::Bus;
use crate::machine::Accelerator;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// CPU model of every twin: all that the accelerator offers. A stored model may not exist on this host.
pub const CPU: &str = "max";
/// Most vCPUs. Source: QEMU's limit for Q35 without extended interrupt modes.
pub const CPUS_MAX: u32 = 255;
/// Least memory, in bytes.
pub const MEMORY_BYTES_MIN: u64 = 32 << 20;
/// Most disks: PCI slots of a machine without bridges, less our own devices.
pub const DISKS_MAX: usize = 20;
/// Longest kernel command line, in bytes. Source: `COMMAND_LINE_SIZE` of x86.
pub const APPEND_BYTES_MAX: usize = 2047;
/// Longest serial number, in bytes. Source: the limit of QEMU's `scsi-hd`.
pub const SERIAL_BYTES_MAX: usize = 36;
/// IDE places that both machine families have.
const IDE_DISKS_MAX: usize = 4;

/// Family of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// PCI Express.
    Q35,
    /// PCI.
    Pc,
}

/// A machine type that a twin may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its family.
    pub family: Family,
    /// Its version; absent: this QEMU's newest.
    pub version: Option<(u8, u8)>,
}

impl Machine {
    /// Reads a machine type such as `pc-q35-7.2`, `pc-i440fx-7.2`, `q35` or `pc`; anything else is refused.
    pub fn parse(text: &str) -> Option<Self> {
        let (family, version) = match text {
            "q35" => (Family::Q35, None),
            "pc" => (Family::Pc, None),
            _ => {
                let (family, version) = text
                    .strip_prefix("pc-q35-")
                    .map(|version| (Family::Q35, version))
                    .or_else(|| text.strip_prefix("pc-i440fx-").map(|version| (Family::Pc, version)))?;
                let (major, minor) = version.split_once('.')?;
                let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
                if !digits(major) || !digits(minor) {
                    return None;
                }
                (family, Some((major.parse().ok()?, minor.parse().ok()?)))
            }
        };
        Some(Self { family, version })
    }

    fn name(self) -> String {
        match (self.family, self.version) {
            (Family::Q35, None) => "q35".to_owned(),
            (Family::Pc, None) => "pc".to_owned(),
            (Family::Q35, Some((major, minor))) => format!("pc-q35-{major}.{minor}"),
            (Family::Pc, Some((major, minor))) => format!("pc-i440fx-{major}.{minor}"),
        }
    }
}

/// How a twin starts. The files are in the twin's folder, under the names of [`Files`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TwinBoot {
    /// The machine's built-in BIOS, from the first disk.
    Bios,
    /// Firmware code and variables in flash.
    Firmware,
    /// A kernel.
    Kernel {
        /// There is an initial file system.
        initrd: bool,
        /// Kernel command line.
        append: String,
    },
}

/// One disk of a twin: an overlay in the twin's folder over an NBD export on the twin's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinDisk {
    /// NBD export that holds what the snapshot holds.
    pub export: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// How the guest reaches it.
    pub bus: Bus,
    /// Serial number that the guest sees.
    pub serial: Option<String>,
}

/// A twin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinSpec {
    /// Machine type.
    pub machine: Machine,
    /// What runs its instructions.
    pub accelerator: Accelerator,
    /// vCPUs.
    pub cpus: u32,
    /// Memory in bytes; rounded up to whole MiB.
    pub memory_bytes: u64,
    /// How it starts.
    pub boot: TwinBoot,
    /// Its disks, in the order of the original.
    pub disks: Vec<TwinDisk>,
}

/// Why a twin cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// vCPUs.
    #[error("a twin needs 1 to {CPUS_MAX} vCPUs, not {0}")]
    Cpus(u32),
    /// Memory.
    #[error("a twin needs at least {MEMORY_BYTES_MIN} bytes of memory, not {0}")]
    Memory(u64),
    /// Disks.
    #[error("a twin can have 1 to {DISKS_MAX} disks (and {IDE_DISKS_MAX} on IDE), not {0}")]
    Disks(usize),
    /// Kernel command line.
    #[error("the kernel's command line has more than {APPEND_BYTES_MAX} bytes, or a NUL")]
    Append,
    /// Folder.
    #[error("the twin's folder {0:?} must be an absolute, short UTF-8 path without a comma")]
    Folder(PathBuf),
}

/// Where a twin's files are: all in one private folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    folder: PathBuf,
}

impl Files {
    /// The files of a twin in this folder.
    ///
    /// # Errors
    /// `Folder`.
    pub fn new(folder: &Path) -> Result<Self, SpecError> {
        // A comma would end the path within an option. The longest name in it is that of a socket.
        let fits = folder.to_str().is_some_and(|path| path.len() <= 90 && !path.contains(','));
        if !fits || !folder.is_absolute() {
            return Err(SpecError::Folder(folder.to_owned()));
        }
        Ok(Self { folder: folder.to_owned() })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
    /// Kernel; we write it before the start.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("kernel")
    }
    /// Initial file system; we write it before the start.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }
    /// Firmware code; we write it before the start.
    pub fn firmware_code(&self) -> PathBuf {
        self.folder.join("code.fd")
    }
    /// Firmware variables; we write them before the start, the twin changes its copy.
    pub fn firmware_variables(&self) -> PathBuf {
        self.folder.join("variables.fd")
    }
    /// The NBD socket on which the snapshot is served; it must be there before the start.
    pub fn nbd(&self) -> PathBuf {
        self.folder.join("nbd")
    }
    /// Overlay of a disk; made at the start.
    pub fn overlay(&self, number: usize) -> PathBuf {
        self.folder.join(format!("disk-{number}.qcow2"))
    }
    /// The twin's monitor.
    pub fn monitor(&self) -> PathBuf {
        self.folder.join("qmp")
    }
    /// The twin's agent channel.
    pub fn agent(&self) -> PathBuf {
        self.folder.join("agent")
    }
    /// The twin's serial console.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console")
    }
    /// What QEMU itself says.
    pub fn log(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }
}

/// QEMU's arguments for a twin.
///
/// # Errors
/// See [`SpecError`].
pub fn arguments(spec: &TwinSpec, files: &Files) -> Result<Vec<String>, SpecError> {
    check(spec)?;
    let accelerator = match spec.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg,thread=multi",
    };
    let mut line = Line::default();
    line.words("-name stillpoint-twin -nodefaults -no-user-config -display none");
    line.words("-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    line.two("-machine", &machine(spec));
    line.two("-accel", accelerator);
    line.two("-cpu", CPU);
    line.two("-smp", &spec.cpus.to_string());
    line.two("-m", &format!("{}M", spec.memory_bytes.div_ceil(1 << 20)));
    boot(spec, files, &mut line);
    line.socket("monitor", &files.monitor());
    line.two("-mon", "chardev=monitor,mode=control");
    line.socket("console", &files.console());
    line.two("-serial", "chardev:console");
    line.socket("agent", &files.agent());
    line.device(json!({ "driver": "virtio-serial-pci" }));
    line.device(json!({ "driver": "virtserialport", "chardev": "agent", "name": "org.qemu.guest_agent.0" }));
    line.words("-object rng-builtin,id=rng");
    line.device(json!({ "driver": "virtio-rng-pci", "rng": "rng" }));
    if spec.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
        line.device(json!({ "driver": "virtio-scsi-pci", "id": "scsi" }));
    }
    let mut ide = 0;
    for (number, disk) in spec.disks.iter().enumerate() {
        line.disk(number, disk, files, spec.machine.family, &mut ide);
    }
    Ok(line.0)
}

fn check(spec: &TwinSpec) -> Result<(), SpecError> {
    if !(1..=CPUS_MAX).contains(&spec.cpus) {
        return Err(SpecError::Cpus(spec.cpus));
    }
    if spec.memory_bytes < MEMORY_BYTES_MIN {
        return Err(SpecError::Memory(spec.memory_bytes));
    }
    let ide = spec.disks.iter().filter(|disk| disk.bus == Bus::Ide).count();
    if !(1..=DISKS_MAX).contains(&spec.disks.len()) || ide > IDE_DISKS_MAX {
        return Err(SpecError::Disks(spec.disks.len()));
    }
    match &spec.boot {
        TwinBoot::Kernel { append, .. } if append.len() > APPEND_BYTES_MAX || append.contains('\0') => {
            Err(SpecError::Append)
        }
        _ => Ok(()),
    }
}

fn machine(spec: &TwinSpec) -> String {
    let name = spec.machine.name();
    match spec.boot {
        TwinBoot::Firmware => format!("{name},pflash0=code,pflash1=variables"),
        TwinBoot::Bios | TwinBoot::Kernel { .. } => name,
    }
}

fn boot(spec: &TwinSpec, files: &Files, line: &mut Line) {
    match &spec.boot {
        TwinBoot::Bios => (),
        TwinBoot::Firmware => {
            for (node, path, read_only) in
                [("code", files.firmware_code(), true), ("variables", files.firmware_variables(), false)]
            {
                line.blockdev(json!({
                    "driver": "raw", "node-name": node, "read-only": read_only,
                    "file": { "driver": "file", "filename": text(&path), "read-only": read_only },
                }));
            }
        }
        TwinBoot::Kernel { initrd, append } => {
            line.two("-kernel", &text(&files.kernel()));
            if *initrd {
                line.two("-initrd", &text(&files.initrd()));
            }
            line.two("-append", append);
        }
    }
}

/// [`Files::new`] has checked that its folder is UTF-8, and we name the rest.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[derive(Debug, Default)]
struct Line(Vec<String>);

impl Line {
    fn words(&mut self, words: &str) {
        self.0.extend(words.split(' ').map(str::to_owned));
    }

    fn two(&mut self, option: &str, value: &str) {
        self.0.extend([option.to_owned(), value.to_owned()]);
    }

    fn socket(&mut self, id: &str, path: &Path) {
        self.two("-chardev", &format!("socket,id={id},path={},server=on,wait=off", text(path)));
    }

    // JSON, because there no value can end an option.
    fn device(&mut self, device: Value) {
        self.two("-device", &device.to_string());
    }

    fn blockdev(&mut self, node: Value) {
        self.two("-blockdev", &node.to_string());
    }

    fn disk(&mut self, number: usize, disk: &TwinDisk, files: &Files, family: Family, ide: &mut usize) {
        let (node, base) = (format!("disk{number}"), format!("base{number}"));
        self.blockdev(json!({
            "driver": "raw", "node-name": base, "read-only": true,
            "file": {
                "driver": "nbd", "read-only": true, "export": disk.export,
                "server": { "type": "unix", "path": text(&files.nbd()) },
            },
        }));
        self.blockdev(json!({
            "driver": "qcow2", "node-name": node, "backing": base, "discard": "unmap",
            // An overlay is thrown away with its twin, and need not survive the host.
            "cache": { "no-flush": true },
            "file": {
                "driver": "file", "filename": text(&files.overlay(number)), "discard": "unmap",
                "cache": { "no-flush": true },
            },
        }));
        let mut device = json!({ "id": format!("d{number}"), "drive": node, "bootindex": number + 1 });
        let driver = match disk.bus {
            Bus::VirtioBlk | Bus::Other => "virtio-blk-pci",
            Bus::Nvme => "nvme",
            Bus::Scsi => {
                device["bus"] = "scsi.0".into();
                "scsi-hd"
            }
            Bus::Ide => {
                // Q35 has one disk a port; PC has two.
                let (bus, unit) = match family {
                    Family::Q35 => (*ide, 0),
                    Family::Pc => (*ide / 2, *ide % 2),
                };
                *ide += 1;
                device["bus"] = format!("ide.{bus}").into();
                device["unit"] = unit.into();
                "ide-hd"
            }
        };
        device["driver"] = driver.into();
        let printable = |serial: &&String| {
            serial.len() <= SERIAL_BYTES_MAX
                && serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
        };
        match disk.serial.as_ref().filter(printable) {
            Some(serial) => device["serial"] = serial.as_str().into(),
            // An NVMe device must have one.
            None if disk.bus == Bus::Nvme => device["serial"] = format!("stillpoint-{number}").into(),
            None => (),
        }
        self.device(device);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(boot: TwinBoot, disks: &[(Bus, &str)]) -> TwinSpec {
        TwinSpec {
            machine: Machine { family: Family::Q35, version: Some((7, 2)) },
            accelerator: Accelerator::Tcg,
            cpus: 2,
            memory_bytes: (512 << 20) - 1,
            boot,
            disks: disks
                .iter()
                .map(|(bus, serial)| TwinDisk {
                    export: "e".into(),
                    size_bytes: 1 << 20,
                    bus: *bus,
                    serial: Some((*serial).to_owned()).filter(|serial| !serial.is_empty()),
                })
                .collect(),
        }
    }

    fn line(spec: &TwinSpec) -> Vec<String> {
        arguments(spec, &Files::new(Path::new("/run/twin")).unwrap()).unwrap()
    }

    fn values(line: &[String], option: &str) -> Vec<String> {
        line.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].clone()).collect()
    }

    fn devices(spec: &TwinSpec) -> Vec<Value> {
        values(&line(spec), "-device").iter().map(|device| serde_json::from_str(device).unwrap()).collect()
    }

    #[test]
    fn a_twin_is_closed_in() {
        let line = line(&spec(TwinBoot::Bios, &[(Bus::VirtioBlk, "A")]));
        for option in ["-nodefaults", "-no-user-config"] {
            assert!(line.iter().any(|word| word == option), "{option}");
        }
        assert_eq!(
            values(&line, "-sandbox"),
            ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        );
        for option in
            ["-netdev", "-nic", "-net", "-drive", "-virtfs", "-fsdev", "-vga", "-vnc", "-spice", "-usb"]
        {
            assert!(!line.iter().any(|word| word == option), "{option}");
        }
        assert_eq!(values(&line, "-m"), ["512M"]);
        assert_eq!(values(&line, "-machine"), ["pc-q35-7.2"]);
    }

    #[test]
    fn every_path_lies_in_the_twins_folder() {
        let append = "root=/dev/vda console=ttyS0";
        let boot = TwinBoot::Kernel { initrd: true, append: append.to_owned() };
        let line = line(&spec(boot, &[(Bus::VirtioBlk, "A"), (Bus::Scsi, "B")]));
        assert_eq!(values(&line, "-append"), [append]);
        let paths = line
            .iter()
            .filter(|word| *word != append)
            .flat_map(|word| word.match_indices("/").map(move |(at, _)| &word[at..]));
        let mut count = 0;
        for path in paths.filter(|path| path.starts_with("/run")) {
            assert!(path.starts_with("/run/twin/"), "{path}");
            count += 1;
        }
        assert_eq!(count, 9, "kernel, initrd, three sockets, two overlays, twice the NBD socket");
        let absolute =
            line.iter().filter(|word| *word != append).map(|word| word.matches('/').count()).sum::<usize>();
        assert_eq!(absolute, 27, "three slashes a path, and no other path");
    }

    #[test]
    fn what_a_definition_says_cannot_end_an_option() {
        let evil = r#"x","drive":"y,file=/etc/shadow"#;
        let mut spec = spec(
            TwinBoot::Kernel { initrd: false, append: "a -drive file=/etc/shadow".into() },
            &[(Bus::VirtioBlk, evil)],
        );
        spec.disks[0].export = "e\",\"x\":\"".into();
        let line = line(&spec);
        assert_eq!(values(&line, "-append"), ["a -drive file=/etc/shadow"]);
        assert!(!line.iter().any(|word| word == "-drive"));
        let disk = devices(&spec).pop().unwrap();
        assert_eq!((disk["serial"].as_str(), disk["drive"].as_str()), (Some(evil), Some("disk0")));
    }

    #[test]
    fn each_disk_keeps_bus_and_serial() {
        let buses = [
            (Bus::VirtioBlk, "S0"),
            (Bus::Scsi, "S1"),
            (Bus::Ide, "S2"),
            (Bus::Ide, ""),
            (Bus::Nvme, ""),
            (Bus::Other, "not\u{7}printable"),
        ];
        let mut q35 = spec(TwinBoot::Bios, &buses);
        let show = |spec: &TwinSpec| -> Vec<String> {
            let disks = devices(spec).into_iter().filter(|device| device.get("drive").is_some());
            let part = |disk: &Value, name: &str| match &disk[name] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            disks
                .map(|disk| ["driver", "bus", "unit", "serial"].map(|name| part(&disk, name)).join(" "))
                .collect()
        };
        assert_eq!(
            show(&q35),
            [
                "virtio-blk-pci null null S0",
                "scsi-hd scsi.0 null S1",
                "ide-hd ide.0 0 S2",
                "ide-hd ide.1 0 null",
                "nvme null null stillpoint-4",
                "virtio-blk-pci null null null",
            ]
        );
        q35.machine.family = Family::Pc;
        assert_eq!(show(&q35)[2..4], ["ide-hd ide.0 0 S2", "ide-hd ide.0 1 null"]);
    }

    #[test]
    fn firmware_comes_from_the_folder_and_only_its_variables_are_written() {
        let line = line(&spec(TwinBoot::Firmware, &[(Bus::VirtioBlk, "")]));
        assert_eq!(values(&line, "-machine"), ["pc-q35-7.2,pflash0=code,pflash1=variables"]);
        let nodes: Vec<Value> =
            values(&line, "-blockdev").iter().map(|node| serde_json::from_str(node).unwrap()).collect();
        assert_eq!((&nodes[0]["node-name"], &nodes[0]["read-only"]), (&json!("code"), &json!(true)));
        assert_eq!((&nodes[1]["node-name"], &nodes[1]["read-only"]), (&json!("variables"), &json!(false)));
    }

    #[test]
    fn only_known_machines_are_built() {
        let parse = |text: &str| Machine::parse(text).map(Machine::name);
        for known in ["q35", "pc", "pc-q35-7.2", "pc-i440fx-10.0"] {
            assert_eq!(parse(known).as_deref(), Some(known));
        }
        for unknown in [
            "",
            "virt",
            "microvm",
            "pc-q35-7",
            "pc-q35-7.2,accel=kvm",
            "pc-q35-+7.2",
            "pc-q35-7.2.1",
            "q35,x=y",
            "pc-q35-999.1",
        ] {
            assert_eq!(parse(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = spec(TwinBoot::Bios, &[(Bus::VirtioBlk, "")]);
        let files = Files::new(Path::new("/run/twin")).unwrap();
        let check = |change: fn(&mut TwinSpec)| {
            let mut spec = good.clone();
            change(&mut spec);
            arguments(&spec, &files).unwrap_err()
        };
        assert_eq!(check(|spec| spec.cpus = 0), SpecError::Cpus(0));
        assert_eq!(check(|spec| spec.memory_bytes = 1), SpecError::Memory(1));
        assert_eq!(check(|spec| spec.disks.clear()), SpecError::Disks(0));
        assert_eq!(check(|spec| spec.disks = vec![spec.disks[0].clone(); 21]), SpecError::Disks(21));
        let long =
            |spec: &mut TwinSpec| spec.boot = TwinBoot::Kernel { initrd: false, append: "a".repeat(2048) };
        assert_eq!(check(long), SpecError::Append);
        for folder in ["relative", "/with,comma", "/too/long/".repeat(10).as_str()] {
            assert!(matches!(Files::new(Path::new(folder)), Err(SpecError::Folder(_))), "{folder}");
        }
    }
}
