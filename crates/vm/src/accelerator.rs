//! What runs a twin's instructions: KVM where it really runs a guest, QEMU's own translation (TCG) elsewhere.
//!
//! That `/dev/kvm` opens says little: inside some virtual machines it does, and a guest's every exit takes
//! milliseconds, so that a stock guest seems to hang (seen: the firmware and this payload took 17 s under KVM, 0.4 s
//! under TCG), or the CPU model that a twin gets makes QEMU abort. So the probe runs what a twin would run: stock
//! firmware, that CPU model, a boot sector that enters 64-bit mode and makes 2,000 exits; all within a few seconds.

use crate::machine::Accelerator;
use crate::twin::user::User;
use rustix::fs::{Access, access};
use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Overrides the choice: `tcg` or `kvm`.
pub const ENVIRONMENT: &str = "STILLPOINT_ACCEL";
/// Longest probe. A working KVM takes about 0.2 s.
const PROBE_LIMIT: Duration = Duration::from_secs(3);
/// QEMU's exit status when the payload writes 0x10 to `isa-debug-exit`: `0x10 << 1 | 1`.
const PAYLOAD_EXIT: i32 = 33;

/// A boot sector's code: page tables for the first 2 MiB at 0x1000, PAE, EFER.LME, paging on, far jump to 64-bit
/// code; there 2,000 writes to port 0x80, then 0x10 to port 0x501.
const PAYLOAD: [u8; 131] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0xbf, 0x00, 0x10, 0xb9, 0x00, 0x18, 0xf3, 0xab, 0xc7, 0x06,
    0x00, 0x10, 0x03, 0x20, 0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, 0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, 0x66,
    0x0f, 0x01, 0x16, 0x57, 0x7c, 0x66, 0xb8, 0x20, 0x00, 0x00, 0x00, 0x0f, 0x22, 0xe0, 0x66, 0xb8, 0x00,
    0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01,
    0x0f, 0x30, 0x66, 0xb8, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0x70, 0x7c, 0x00, 0x00,
    0x08, 0x00, 0x0f, 0x00, 0x60, 0x7c, 0x00, 0x00, 0x0f, 0x1f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00, 0xb9, 0xd0, 0x07, 0x00, 0x00, 0xe6, 0x80,
    0xe2, 0xfc, 0x66, 0xba, 0x01, 0x05, 0xb0, 0x10, 0xee, 0xf4, 0xeb, 0xfd,
];

/// An accelerator, and why it was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The accelerator.
    pub accelerator: Accelerator,
    /// A sentence for people.
    pub why: String,
}

/// A choice that cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("{ENVIRONMENT} is {0:?}, but only tcg and kvm are known")]
pub struct UnknownAccelerator(pub String);

/// Chooses for a twin that will run as `user`. The probe takes at most a few seconds; keep the answer.
///
/// # Errors
/// If the environment names an unknown accelerator.
pub fn choose(qemu: &Path, user: Option<User>) -> Result<Choice, UnknownAccelerator> {
    let setting = std::env::var_os(ENVIRONMENT).map(|value| value.to_string_lossy().into_owned());
    let (accelerator, why) = match wanted(setting.as_deref())? {
        Some(accelerator) => (accelerator, format!("{ENVIRONMENT} says so")),
        None => match probe_kvm(qemu, user) {
            Ok(took) => (Accelerator::Kvm, format!("KVM ran a guest in {} ms", took.as_millis())),
            Err(reason) => (Accelerator::Tcg, reason),
        },
    };
    Ok(Choice { accelerator, why })
}

fn wanted(setting: Option<&str>) -> Result<Option<Accelerator>, UnknownAccelerator> {
    match setting {
        None | Some("") => Ok(None),
        Some("tcg") => Ok(Some(Accelerator::Tcg)),
        Some("kvm") => Ok(Some(Accelerator::Kvm)),
        Some(other) => Err(UnknownAccelerator(other.to_owned())),
    }
}

/// Runs a tiny guest under KVM; answers how long it took, or why KVM is not to be used.
///
/// # Errors
/// A sentence for people.
pub fn probe_kvm(qemu: &Path, user: Option<User>) -> Result<Duration, String> {
    if access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).is_err() {
        return Err("/dev/kvm is missing or not open to us".to_owned());
    }
    match run_payload(qemu, "kvm", user, PROBE_LIMIT) {
        Ok((took, Some(status))) if status.code() == Some(PAYLOAD_EXIT) => Ok(took),
        Ok((_, Some(status))) => Err(format!("KVM does not run a tiny guest (QEMU ended with {status})")),
        Ok((_, None)) => Err(format!("KVM does not run a tiny guest within {} s", PROBE_LIMIT.as_secs())),
        Err(error) => Err(format!("KVM could not be probed: {error}")),
    }
}

/// Runs the payload; the status is absent if it did not end in time.
fn run_payload(
    qemu: &Path,
    accelerator: &str,
    user: Option<User>,
    limit: Duration,
) -> io::Result<(Duration, Option<ExitStatus>)> {
    let folder = tempfile::Builder::new().prefix("stillpoint-probe-").tempdir()?;
    let sector = folder.path().join("sector");
    std::fs::write(&sector, boot_sector())?;
    let mut command = Command::new(qemu);
    command
        .args(["-accel", accelerator, "-cpu", crate::twin::CPU, "-machine", "pc", "-m", "16"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-net", "none"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=2", "-boot", "c", "-blockdev"])
        .arg(serde_json::json!({ "driver": "raw", "node-name": "d", "file": { "driver": "file", "filename": sector } }).to_string())
        .args(["-device", "ide-hd,drive=d"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(user) = user {
        for path in [folder.path(), &sector] {
            user.give(path)?;
        }
        user.run_as(&mut command);
    }
    let began = Instant::now();
    let status = wait(&mut command.spawn()?, began + limit)?;
    Ok((began.elapsed(), status))
}

fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..PAYLOAD.len()].copy_from_slice(&PAYLOAD);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_decides_if_it_is_one_of_two_words() {
        assert_eq!(wanted(Some("tcg")).unwrap(), Some(Accelerator::Tcg));
        assert_eq!(wanted(Some("kvm")).unwrap(), Some(Accelerator::Kvm));
        assert_eq!((wanted(None).unwrap(), wanted(Some("")).unwrap()), (None, None));
        assert!(wanted(Some("KVM")).is_err());
    }

    #[test]
    fn the_payload_runs_where_translation_runs_it() {
        let (_, status) = run_payload(
            Path::new("qemu-system-x86_64"),
            "tcg",
            User::unprivileged(),
            Duration::from_secs(60),
        )
        .unwrap();
        assert_eq!(status.and_then(|status| status.code()), Some(PAYLOAD_EXIT));
    }

    #[test]
    fn a_probe_ends_in_time_whatever_kvm_does() {
        for user in [User::unprivileged(), None] {
            let began = Instant::now();
            let outcome = probe_kvm(Path::new("qemu-system-x86_64"), user);
            println!("{outcome:?}");
            assert!(began.elapsed() < PROBE_LIMIT + Duration::from_secs(5));
        }
        let missing = probe_kvm(Path::new("/no/such/qemu"), None);
        assert!(missing.is_err(), "{missing:?}");
    }
}
