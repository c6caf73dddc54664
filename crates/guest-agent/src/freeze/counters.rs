//! What a block device has written: the proof that a file system without a freeze did not change.
//!
//! Flush, read, *(the point)*, flush again, read again: equal counters mean that nothing reached the disk in between
//! and nothing waited in memory to be written.

use super::gather::read_bounded;
use super::mountinfo::DeviceNumber;
use std::path::Path;

/// How often a device has been written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    writes: u64,
    sectors_written: u64,
    discards: u64,
}

/// Reads the counters of a device; `None` for one that has none.
pub fn counters(device: DeviceNumber) -> Option<Counters> {
    if device.major == 0 {
        return None;
    }
    let text = read_bounded(&Path::new("/sys/dev/block").join(device.to_string()).join("stat"), 4096).ok()?;
    parse(&String::from_utf8_lossy(&text))
}

/// Reads a device's `stat`. Source: Linux `Documentation/block/stat.rst`; discards are there since 4.18.
pub fn parse(text: &str) -> Option<Counters> {
    let fields: Vec<u64> = text.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Counters {
        writes: *fields.get(4)?,
        sectors_written: *fields.get(6)?,
        discards: fields.get(11).copied().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_writes_sectors_and_discards() {
        let text = "     100        1     2000       30       7        2       64       11        0       40       41        5        0        0        0        0        0\n";
        assert_eq!(parse(text), Some(Counters { writes: 7, sectors_written: 64, discards: 5 }));
        assert_eq!(parse("1 2 3"), None);
    }
}
