//! Compiled zone files. Source: RFC 9636.

use super::Local;
use super::rule::Rule;

const HEADER_BYTES: usize = 44;

/// What holds at `now`, in seconds since 1970; nothing if the file is damaged.
pub(super) fn at(file: &[u8], now: i64) -> Option<Local> {
    let first = Block::parse(file, 4)?;
    if file.get(4) == Some(&0) {
        return first.at(now);
    }
    // A later version repeats all of it with times of 64 bits, and a rule for the time after.
    let rest = file.get(first.bytes..)?;
    let block = Block::parse(rest, 8)?;
    let last = block.transitions().last();
    if last.is_none_or(|(time, _)| now >= time) {
        let footer = rest.get(block.bytes..)?.strip_prefix(b"\n")?;
        let footer = &footer[..footer.iter().position(|byte| *byte == b'\n')?];
        if !footer.is_empty() {
            return Rule::parse(std::str::from_utf8(footer).ok()?)?.at(now);
        }
    }
    block.at(now)
}

/// One version's data.
struct Block<'f> {
    width: usize,
    times: &'f [u8],
    kinds: &'f [u8],
    types: &'f [u8],
    names: &'f [u8],
    bytes: usize,
}

impl<'f> Block<'f> {
    fn parse(file: &'f [u8], width: usize) -> Option<Block<'f>> {
        let header = file.get(..HEADER_BYTES)?;
        if !header.starts_with(b"TZif") {
            return None;
        }
        let count = |index: usize| {
            let at = 20 + 4 * index;
            usize::try_from(u32::from_be_bytes(header[at..at + 4].try_into().ok()?)).ok()
        };
        let [is_ut, is_standard, leap, time, kind, name] =
            [count(0)?, count(1)?, count(2)?, count(3)?, count(4)?, count(5)?];
        let mut at = HEADER_BYTES;
        let mut take = |bytes: usize| {
            let taken = file.get(at..at.checked_add(bytes)?)?;
            at += bytes;
            Some(taken)
        };
        let times = take(time.checked_mul(width)?)?;
        let kinds = take(time)?;
        let types = take(kind.checked_mul(6)?)?;
        let names = take(name)?;
        take(leap.checked_mul(width + 4)?)?;
        take(is_standard)?;
        take(is_ut)?;
        Some(Block { width, times, kinds, types, names, bytes: at })
    }

    fn transitions(&self) -> impl DoubleEndedIterator<Item = (i64, u8)> {
        let times = self.times.chunks_exact(self.width).map(|time| match time.try_into() {
            Ok(wide) => i64::from_be_bytes(wide),
            Err(_) => time.try_into().map_or(0, i32::from_be_bytes).into(),
        });
        let kinds: Vec<_> = times.zip(self.kinds.iter().copied()).collect();
        kinds.into_iter()
    }

    /// Before the first transition the first type holds.
    fn at(&self, now: i64) -> Option<Local> {
        let kind = self.transitions().rev().find(|(time, _)| *time <= now).map_or(0, |(_, kind)| kind);
        let kind = self.types.chunks_exact(6).nth(kind.into())?;
        let name = self.names.get(usize::from(kind[5])..)?.split(|byte| *byte == 0).next()?;
        Some(Local {
            offset: i32::from_be_bytes(kind[..4].try_into().ok()?),
            zone: String::from_utf8_lossy(name).into_owned(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::at;

    /// A header with these counts, and what follows it.
    fn block(version: u8, counts: [u32; 6], data: &[&[u8]]) -> Vec<u8> {
        let mut block = b"TZif".to_vec();
        block.push(version);
        block.extend([0; 15]);
        counts.iter().for_each(|count| block.extend(count.to_be_bytes()));
        data.iter().for_each(|part| block.extend(*part));
        block
    }

    /// A file without transitions, but with this rule.
    pub(crate) fn version_2(rule: &str) -> Vec<u8> {
        let kind: &[u8] = &[0, 0, 0, 0, 0, 0];
        let mut file = block(b'2', [0, 0, 0, 0, 1, 4], &[kind, b"UTC\0"]);
        file.extend(block(b'2', [0, 0, 0, 0, 1, 4], &[kind, b"UTC\0"]));
        file.extend(format!("\n{rule}\n").bytes());
        file
    }

    fn zone(file: &[u8], now: i64) -> Option<(String, i32)> {
        at(file, now).map(|local| (local.zone, local.offset))
    }

    #[test]
    fn version_1_has_transitions_of_32_bits() {
        let times = [1000i32.to_be_bytes(), 2000i32.to_be_bytes()].concat();
        let types = [&3600i32.to_be_bytes()[..], &[0, 0], &7200i32.to_be_bytes()[..], &[1, 4]].concat();
        let file = block(0, [0, 0, 0, 2, 2, 9], &[&times, &[1, 0], &types, b"CET\0CEST\0"]);
        assert_eq!(zone(&file, 999), Some(("CET".to_owned(), 3600)));
        assert_eq!(zone(&file, 1000), Some(("CEST".to_owned(), 7200)));
        assert_eq!(zone(&file, 2000), Some(("CET".to_owned(), 3600)));
    }

    #[test]
    fn later_versions_have_transitions_of_64_bits_and_a_rule_for_the_time_after() {
        let kind: &[u8] = &[0, 0, 0, 0, 0, 0];
        let mut file = block(b'2', [0, 0, 0, 0, 1, 4], &[kind, b"UTC\0"]);
        let types =
            [&(-17_762i32).to_be_bytes()[..], &[0, 0], &(-18_000i32).to_be_bytes()[..], &[0, 4]].concat();
        let times = (-2_717_650_800i64).to_be_bytes();
        file.extend(block(b'2', [0, 0, 0, 1, 2, 8], &[&times, &[1], &types, b"LMT\0EST\0"]));
        file.extend(b"\nEST5EDT,M3.2.0,M11.1.0\n");
        assert_eq!(zone(&file, -3_000_000_000), Some(("LMT".to_owned(), -17_762)));
        assert_eq!(zone(&file, 1_700_000_000), Some(("EST".to_owned(), -18_000)));
        assert_eq!(zone(&file, 1_690_000_000), Some(("EDT".to_owned(), -14_400)));
    }

    #[test]
    fn a_damaged_file_says_nothing() {
        let file = version_2("CET-1");
        assert_eq!(zone(&file, 0), Some(("CET".to_owned(), 3600)));
        for length in 0..file.len() {
            assert_eq!(zone(&file[..length], 0), None, "cut to {length}");
        }
        assert_eq!(zone(&[0xFF; 200], 0), None);
        let mut huge = version_2("CET-1");
        huge[20..44].fill(0xFF);
        assert_eq!(zone(&huge, 0), None);
    }

    #[test]
    fn zones_of_this_machine_are_read_as_date_reads_them() {
        for (name, now) in
            [("Europe/Berlin", 1_690_000_000), ("America/New_York", 4_100_000_000), ("Asia/Kolkata", 0)]
        {
            let Ok(file) = std::fs::read(format!("/usr/share/zoneinfo/{name}")) else { continue };
            let date = std::process::Command::new("date")
                .env("TZ", name)
                .args(["-d", &format!("@{now}"), "+%Z %z"])
                .output()
                .expect("date runs");
            let local = at(&file, now).expect("a zone");
            let (hours, minutes) = (local.offset.abs() / 3600, local.offset.abs() / 60 % 60);
            let sign = if local.offset < 0 { '-' } else { '+' };
            let told = format!("{} {sign}{hours:02}{minutes:02}\n", local.zone);
            assert_eq!(told, String::from_utf8_lossy(&date.stdout), "{name} at {now}");
        }
    }
}
