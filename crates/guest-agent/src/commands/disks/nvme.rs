//! What an NVMe disk tells of its health: log page 02h.
//!
//! Source: NVM Express base specification, "SMART / Health Information"; `linux/nvme_ioctl.h`.

use guest_protocol::answers::NvmeSmart;
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsRawFd;
use std::path::Path;

const LOG_BYTES: usize = 512;

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct Passthrough {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_bytes: u32,
    data_bytes: u32,
    words_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

const GET_LOG_PAGE: u8 = 0x02;
const EVERY_NAMESPACE: u32 = 0xFFFF_FFFF;
const HEALTH: u32 = 0x02;
/// The event that a controller may have raised about the log stays raised.
const RETAIN_EVENT: u32 = 1 << 15;
/// `NVME_IOCTL_ADMIN_CMD`: `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const ADMIN: u32 = 0xC048_4E41;
/// A controller that does not answer is not waited for longer.
const TIMEOUT_MS: u32 = 5_000;

/// Asks the disk; nothing where it does not answer, or nobody may ask.
pub(super) fn smart(node: &Path) -> Option<NvmeSmart> {
    let disk =
        rustix::fs::open(node, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut log = [0u8; LOG_BYTES];
    let words = u32::try_from(LOG_BYTES / 4 - 1).unwrap_or(0);
    let mut command = Passthrough {
        opcode: GET_LOG_PAGE,
        namespace: EVERY_NAMESPACE,
        address: log.as_mut_ptr().expose_provenance() as u64,
        data_bytes: u32::try_from(LOG_BYTES).unwrap_or(0),
        words_10_15: [HEALTH | RETAIN_EVENT | words << 16, 0, 0, 0, 0, 0],
        timeout_ms: TIMEOUT_MS,
        ..Passthrough::default()
    };
    // SAFETY: the command is the kernel's structure, and the log that it points to is as long as it says and outlives
    // the call.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), ADMIN as _, &raw mut command) };
    (result == 0).then(|| understand(&log))
}

fn understand(log: &[u8; LOG_BYTES]) -> NvmeSmart {
    let byte = |at: usize| u64::from(log[at]);
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&log[at..at + 8]);
        u64::from_le_bytes(word)
    };
    NvmeSmart {
        critical_warning: byte(0),
        temperature: u64::from(u16::from_le_bytes([log[1], log[2]])),
        available_spare: byte(3),
        available_spare_threshold: byte(4),
        percentage_used: byte(5),
        data_units_read_lo: word(32),
        data_units_read_hi: word(40),
        data_units_written_lo: word(48),
        data_units_written_hi: word(56),
        host_read_commands_lo: word(64),
        host_read_commands_hi: word(72),
        host_write_commands_lo: word(80),
        host_write_commands_hi: word(88),
        controller_busy_time_lo: word(96),
        controller_busy_time_hi: word(104),
        power_cycles_lo: word(112),
        power_cycles_hi: word(120),
        power_on_hours_lo: word(128),
        power_on_hours_hi: word(136),
        unsafe_shutdowns_lo: word(144),
        unsafe_shutdowns_hi: word(152),
        media_errors_lo: word(160),
        media_errors_hi: word(168),
        number_of_error_log_entries_lo: word(176),
        number_of_error_log_entries_hi: word(184),
    }
}

#[cfg(test)]
mod tests {
    use super::{LOG_BYTES, Passthrough, understand};
    use serde_json::json;

    #[test]
    fn the_command_is_as_long_as_its_number_says() {
        assert_eq!(size_of::<Passthrough>(), 0x48);
    }

    #[test]
    fn the_log_of_a_disk_is_understood() {
        let mut log = [0u8; LOG_BYTES];
        log[0] = 0x04;
        log[1..3].copy_from_slice(&323u16.to_le_bytes());
        log[3..6].copy_from_slice(&[100, 10, 3]);
        for (nth, at) in (32..192).step_by(8).enumerate() {
            log[at..at + 8].copy_from_slice(&(nth as u64 + 1).to_le_bytes());
        }
        let told = serde_json::to_value(understand(&log)).expect("plain numbers");
        let told = |name: &str| told[name].clone();
        assert_eq!([told("critical-warning"), told("temperature")], [json!(4), json!(323)]);
        assert_eq!([told("available-spare"), told("available-spare-threshold")], [json!(100), json!(10)]);
        assert_eq!(told("percentage-used"), 3);
        assert_eq!([told("data-units-read-lo"), told("data-units-read-hi")], [json!(1), json!(2)]);
        assert_eq!([told("power-cycles-lo"), told("power-on-hours-hi")], [json!(11), json!(14)]);
        assert_eq!(told("number-of-error-log-entries-hi"), 20);
    }
}
