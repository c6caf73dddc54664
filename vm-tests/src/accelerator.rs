//! Whether KVM truly runs a guest here: `/dev/kvm` can open on a machine whose guests then hang.

use crate::image::Image;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How QEMU runs the guest's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's own processor; proven by a boot of the real kernel on this machine.
    Kvm,
    /// QEMU's emulation: always works, about ten times slower.
    Tcg,
}

/// The probe's kernel must have reached its init within this time; on a working KVM it takes about one second.
const PROBE_TIME_MAX: Duration = Duration::from_secs(15);

impl Accelerator {
    /// The arguments that QEMU needs for it. TCG guests get every CPU feature that it emulates.
    #[must_use]
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// Multiplies a time that was chosen for KVM into one that an emulated guest on a busy machine can keep.
    #[must_use]
    pub fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Tcg => 6,
        }
    }
}

/// What guests run on: `STILLPOINT_ACCEL=kvm|tcg`, else KVM if a boot with it works, else TCG.
///
/// The answer of the probe (at most 15 s) is kept in the image's folder until the machine restarts.
///
/// # Panics
/// If `STILLPOINT_ACCEL` holds another word.
pub fn accelerator(image: &Image) -> Accelerator {
    static PROBED: OnceLock<Accelerator> = OnceLock::new();
    *PROBED.get_or_init(|| {
        let (accelerator, reason) = match std::env::var("STILLPOINT_ACCEL").as_deref() {
            Ok("kvm") => (Accelerator::Kvm, "asked for by STILLPOINT_ACCEL"),
            Ok("tcg") => (Accelerator::Tcg, "asked for by STILLPOINT_ACCEL"),
            Ok(other) => panic!("STILLPOINT_ACCEL is kvm or tcg, not {other}"),
            Err(_) if !Path::new("/dev/kvm").exists() => (Accelerator::Tcg, "there is no /dev/kvm"),
            Err(_) => remembered(image).unwrap_or_else(|| {
                let answer = if kvm_boots(image) {
                    (Accelerator::Kvm, "a guest booted with it")
                } else {
                    (Accelerator::Tcg, "/dev/kvm is there, but no guest boots with it")
                };
                remember(image, answer.0);
                answer
            }),
        };
        eprintln!("guests run on {accelerator:?}: {reason}");
        accelerator
    })
}

/// The running system's own id: a probe's answer holds until the machine restarts.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

fn remembered(image: &Image) -> Option<(Accelerator, &'static str)> {
    let text = std::fs::read_to_string(image.folder().join("kvm-probe")).ok()?;
    let answer = text.strip_prefix(&boot_id())?;
    match answer.trim() {
        "works" => Some((Accelerator::Kvm, "an earlier probe booted a guest with it")),
        "does not" => Some((Accelerator::Tcg, "an earlier probe of /dev/kvm booted no guest")),
        _ => None,
    }
}

fn remember(image: &Image, answer: Accelerator) {
    let word = if answer == Accelerator::Kvm { "works" } else { "does not" };
    let path = image.folder().join("kvm-probe");
    if let Err(error) = std::fs::write(&path, format!("{}{word}\n", boot_id())) {
        eprintln!("the probe's answer is not kept in {}: {error}", path.display());
    }
}

/// Boots the image's own kernel without disks, until its initrd says that it looks for them.
fn kvm_boots(image: &Image) -> bool {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-machine", "q35", "-m", "256", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(Accelerator::Kvm.arguments())
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.initrd())
        .args(["-append", "console=ttyS0 quiet panic=-1 stillpoint.probe"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let Ok(mut child) = crate::process::spawn(command) else {
        return false;
    };
    let Some(mut serial) = child.stdout.take() else {
        return false;
    };
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        // Ends with QEMU, which ends below; bytes that are no text show as no success.
        std::io::Read::read_to_string(&mut serial, &mut text).map(|_| text).unwrap_or_default()
    });
    let started = Instant::now();
    while started.elapsed() < PROBE_TIME_MAX && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(50));
    }
    // Both fail only if QEMU has ended by itself, which is what they are for.
    let _ended = child.kill().and_then(|()| child.wait());
    reader.join().is_ok_and(|text| text.contains("initrd: probed"))
}
