//! `guest-get-time`.

use guest_protocol::Error;
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970, to the microsecond, as qemu-ga gives them.
pub(super) fn now() -> Result<i64, Error> {
    let too_far = || Error::generic("Failed to get time");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| too_far())?;
    i64::try_from(now.as_micros() * 1000).map_err(|_| too_far())
}
