//! `guest-get-time` and `guest-set-time`.

use super::helper;
use crate::errno;
use guest_protocol::Error;
use rustix::time::{ClockId, Timespec, clock_settime};
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds since 1970 at the end of 2069, the last year that qemu-ga takes.
const SECONDS_MAX: i64 = 3_155_760_000;
/// Longest that `hwclock` may take. It waits for the next second of the hardware's clock, and no longer.
const HWCLOCK_MAX: Duration = Duration::from_secs(60);

/// Nanoseconds since 1970, to the microsecond, as qemu-ga gives them.
pub(super) fn now() -> Result<i64, Error> {
    let too_far = || Error::generic("Failed to get time");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| too_far())?;
    i64::try_from(now.as_micros() * 1000).map_err(|_| too_far())
}

/// Sets the system's clock and then the hardware's; or, without a time, the system's clock by the hardware's.
pub(super) fn set(time_ns: Option<i64>) -> Result<Value, Error> {
    if let Some(time_ns) = time_ns {
        clock_settime(ClockId::Realtime, to_the_microsecond(time_ns)?).map_err(|error| {
            Error::generic(format!("Failed to set time to guest: {}", errno::words_of(error)))
        })?;
    }
    let direction = if time_ns.is_some() { "-w" } else { "-s" };
    let action = "set hardware clock to system time";
    helper::run(&["/sbin/hwclock", direction], None, Some(HWCLOCK_MAX), action)?;
    Ok(json!({}))
}

fn to_the_microsecond(time_ns: i64) -> Result<Timespec, Error> {
    let seconds = time_ns / 1_000_000_000;
    if !(0..SECONDS_MAX).contains(&seconds) {
        return Err(Error::generic("Invalid time"));
    }
    Ok(Timespec { tv_sec: seconds, tv_nsec: time_ns % 1_000_000_000 / 1000 * 1000 })
}

#[cfg(test)]
mod tests {
    use super::to_the_microsecond;

    #[test]
    fn times_from_1970_to_2069_are_set_to_the_microsecond() {
        let set = |time_ns| {
            to_the_microsecond(time_ns).map(|time| (time.tv_sec, time.tv_nsec)).map_err(|error| error.desc)
        };
        assert_eq!(set(0), Ok((0, 0)));
        assert_eq!(set(1_700_000_000_123_456_789), Ok((1_700_000_000, 123_456_000)));
        assert_eq!(set(3_155_759_999_999_999_999), Ok((3_155_759_999, 999_999_000)));
        // The kernel refuses what lies before 1970 by less than a second.
        assert_eq!(set(-500_000_000), Ok((0, -500_000_000)));
        let words = Err("Invalid time".to_owned());
        assert_eq!(set(3_155_760_000_000_000_000), words);
        assert_eq!(set(-1_000_000_000), words);
        assert_eq!(set(i64::MIN), words);
    }
}
