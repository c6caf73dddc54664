//! Sizes, times and ages as people read them.

use std::fmt::{self, Display};

/// Bytes in binary units: `1.5 GiB`.
pub(crate) struct Bytes(pub(crate) u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut unit = 0;
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let mut value = self.0 as f64;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = match unit {
            0 => format!("{} B", self.0),
            _ if value < 10.0 => format!("{value:.1} {}", UNITS[unit]),
            _ => format!("{value:.0} {}", UNITS[unit]),
        };
        f.pad(&text)
    }
}

/// Milliseconds: `12 ms`, `3.4 s`, `2 min 5 s`.
pub(crate) struct Millis(pub(crate) u64);

impl Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0;
        let text = match ms {
            0..1000 => format!("{ms} ms"),
            1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
            _ => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        };
        f.pad(&text)
    }
}

/// An instant in the local time zone, from milliseconds since 1970.
pub(crate) fn instant(ms: u64) -> String {
    let time = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(
        || format!("{ms} ms"),
        |time| {
            time.to_zoned_datetime(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %Z").to_string()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(4096).to_string(), "4.0 KiB");
        assert_eq!(Bytes(3 << 30).to_string(), "3.0 GiB");
        assert_eq!(Bytes(478 << 20).to_string(), "478 MiB");
        assert_eq!(Millis(999).to_string(), "999 ms");
        assert_eq!(Millis(1050).to_string(), "1.0 s");
        assert_eq!(Millis(125_000).to_string(), "2 min 5 s");
    }
}
