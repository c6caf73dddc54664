//! `guest-get-diskstats`, `guest-get-cpustats` and `guest-get-load`.

use guest_protocol::Error;
use guest_protocol::answers::{CpuStatistics, DiskCounts, DiskStatistics, LinuxCpuStatistics, Load};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Most bytes read of a table: 65,536 block devices of 256 bytes.
const TABLE_BYTES_MAX: u64 = 16 << 20;

/// What each block device did, in the kernel's order.
pub(super) fn disks(root: &Path) -> Result<Vec<DiskStatistics>, Error> {
    Ok(read(root, "/proc/diskstats")?.lines().filter_map(disk).collect())
}

/// Where the time of each processor went, in the kernel's order.
pub(super) fn cpus(root: &Path) -> Result<Vec<CpuStatistics>, Error> {
    let ticks_a_second = rustix::param::clock_ticks_per_second();
    let table = read(root, "/proc/stat")?;
    Ok(table
        .lines()
        .map_while(|line| cpu(line, ticks_a_second))
        .flatten()
        .map(CpuStatistics::Linux)
        .collect())
}

/// How many tasks ran or waited for a disk, on average.
pub(super) fn load(root: &Path) -> Result<Load, Error> {
    let unknown = || Error::generic("cannot query load average");
    let text = read(root, "/proc/loadavg").map_err(|_| unknown())?;
    let mut averages = text.split_whitespace().map_while(|average| average.parse().ok());
    let mut next = || averages.next().ok_or_else(unknown);
    Ok(Load { load1m: next()?, load5m: next()?, load15m: next()? })
}

fn read(root: &Path, path: &str) -> Result<String, Error> {
    let mut text = Vec::new();
    File::open(root.join(path.trim_start_matches('/')))
        .and_then(|file| file.take(TABLE_BYTES_MAX).read_to_end(&mut text))
        .map_err(|error| Error::generic(format!("Could not open '{path}': {}", crate::words(&error))))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Source: `Documentation/admin-guide/iostats.rst`. Kernels before 2.6.25 had four numbers for a partition; 4.18 added
/// discards, 5.5 flushes.
fn disk(line: &str) -> Option<DiskStatistics> {
    let mut words = line.split_whitespace();
    let (major, minor) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let name = words.next()?.to_owned();
    let counts: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
    let mut stats = DiskCounts::default();
    if counts.len() < 4 {
        return None;
    }
    if let [read_ios, read_sectors, write_ios, write_sectors] = counts[..] {
        (stats.read_ios, stats.read_sectors) = (Some(read_ios), Some(read_sectors));
        (stats.write_ios, stats.write_sectors) = (Some(write_ios), Some(write_sectors));
    }
    if let [read_ios, read_merges, read_sectors, read_ticks, rest @ ..] = counts.as_slice()
        && let [write_ios, write_merges, write_sectors, write_ticks, ios_pgr, total, weight, ..] = rest
    {
        (stats.read_ios, stats.read_merges) = (Some(*read_ios), Some(*read_merges));
        (stats.read_sectors, stats.read_ticks) = (Some(*read_sectors), Some(*read_ticks));
        (stats.write_ios, stats.write_merges) = (Some(*write_ios), Some(*write_merges));
        (stats.write_sectors, stats.write_ticks) = (Some(*write_sectors), Some(*write_ticks));
        (stats.ios_pgr, stats.total_ticks, stats.weight_ticks) =
            (Some(*ios_pgr), Some(*total), Some(*weight));
    }
    if let [ios, merges, sectors, ticks, ..] = counts.get(11..).unwrap_or_default() {
        (stats.discard_ios, stats.discard_merges) = (Some(*ios), Some(*merges));
        (stats.discard_sectors, stats.discard_ticks) = (Some(*sectors), Some(*ticks));
    }
    if let [ios, ticks, ..] = counts.get(15..).unwrap_or_default() {
        (stats.flush_ios, stats.flush_ticks) = (Some(*ios), Some(*ticks));
    }
    Some(DiskStatistics { name, major, minor, stats })
}

/// `Some(None)` where a line is about something else; `None` where the table cannot be understood from here on.
fn cpu(line: &str, ticks_a_second: u64) -> Option<Option<LinuxCpuStatistics>> {
    let mut words = line.split_whitespace();
    let number = words.next().and_then(|word| word.strip_prefix("cpu")).filter(|number| !number.is_empty());
    let Some(number) = number else { return Some(None) };
    let milliseconds = |ticks: u64| {
        u64::try_from(u128::from(ticks) * 1000 / u128::from(ticks_a_second.max(1))).unwrap_or(u64::MAX)
    };
    let times: Vec<u64> = words.map_while(|word| word.parse().ok()).map(milliseconds).collect();
    let &[user, nice, system, idle, ref rest @ ..] = times.as_slice() else { return None };
    let nth = |at: usize| rest.get(at).copied();
    Some(Some(LinuxCpuStatistics {
        cpu: number.parse().unwrap_or(0),
        user,
        nice,
        system,
        idle,
        iowait: nth(0),
        irq: nth(1),
        softirq: nth(2),
        steal: nth(3),
        guest: nth(4),
        guestnice: nth(5),
    }))
}

#[cfg(test)]
mod tests {
    use super::{cpus, disks, load};
    use serde_json::{Value, json};
    use std::path::Path;

    fn guest(path: &str, text: &str) -> tempfile::TempDir {
        let guest = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(guest.path().join("proc")).expect("a folder");
        std::fs::write(guest.path().join(path), text).expect("written");
        guest
    }

    #[test]
    fn disks_tell_as_much_as_their_kernel_knows() {
        let text = concat!(
            "   8       0 sda 10 11 12 13 14 15 16 17 18 19 20\n",
            "   8       1 sda1 21 22 23 24\n",
            " 253       0 dm-0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15\n",
            " 259       0 nvme0n1 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n",
            "   7       0 loop0 1 2 3\n",
            "   7       1 loop1 1 2 3 4 5\n",
        );
        let guest = guest("proc/diskstats", text);
        let disks = serde_json::to_value(disks(guest.path()).expect("a table")).expect("plain");
        let first = json!({
            "read-ios": 10, "read-merges": 11, "read-sectors": 12, "read-ticks": 13, "write-ios": 14,
            "write-merges": 15, "write-sectors": 16, "write-ticks": 17, "ios-pgr": 18, "total-ticks": 19,
            "weight-ticks": 20
        });
        assert_eq!(disks[0], json!({"name": "sda", "major": 8, "minor": 0, "stats": first}));
        let old = json!({"read-ios": 21, "read-sectors": 22, "write-ios": 23, "write-sectors": 24});
        assert_eq!(disks[1]["stats"], old);
        let discards = |disk: &Value| {
            ["discard-ios", "discard-merges", "discard-sectors", "discard-ticks", "flush-ios", "flush-ticks"]
                .map(|name| disk["stats"][name].as_u64())
        };
        assert_eq!(discards(&disks[2]), [Some(12), Some(13), Some(14), Some(15), None, None]);
        assert_eq!(discards(&disks[3]), [Some(12), Some(13), Some(14), Some(15), Some(16), Some(17)]);
        assert_eq!(disks[4], json!({"name": "loop1", "major": 7, "minor": 1, "stats": {}}));
        assert_eq!(disks.as_array().map(Vec::len), Some(5));
    }

    #[test]
    fn processors_tell_milliseconds() {
        let text = concat!(
            "cpu  9 9 9 9 9 9 9 9 9 9\n",
            "cpu0 100 2 3 4 5 6 7 8 9 10\n",
            "cpu12 1 2 3 4 5\n",
            "intr 5\n",
        );
        let guest = guest("proc/stat", text);
        let cpus = serde_json::to_value(cpus(guest.path()).expect("a table")).expect("plain");
        // The kernel's ticks are hundredths of a second on every machine that we know.
        assert_eq!(
            cpus,
            json!([
                {"type": "linux", "cpu": 0, "user": 1000, "nice": 20, "system": 30, "idle": 40, "iowait": 50,
                 "irq": 60, "softirq": 70, "steal": 80, "guest": 90, "guestnice": 100},
                {"type": "linux", "cpu": 12, "user": 10, "nice": 20, "system": 30, "idle": 40, "iowait": 50},
            ])
        );
    }

    #[test]
    fn load_is_told_as_it_is() {
        let guest = guest("proc/loadavg", "0.06 1.25 12.00 2/345 678\n");
        let load = serde_json::to_value(load(guest.path()).expect("a load")).expect("plain");
        assert_eq!(load, json!({"load1m": 0.06, "load5m": 1.25, "load15m": 12.0}));
    }

    #[test]
    fn a_guest_without_proc_says_so() {
        let missing = Path::new("/nope");
        assert_eq!(
            disks(missing).expect_err("missing").desc,
            "Could not open '/proc/diskstats': No such file or directory"
        );
        assert_eq!(
            cpus(missing).expect_err("missing").desc,
            "Could not open '/proc/stat': No such file or directory"
        );
        assert_eq!(load(missing).expect_err("missing").desc, "cannot query load average");
    }
}
