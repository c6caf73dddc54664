//! What interfaces have counted: `/proc/net/dev`.

use guest_protocol::answers::network::NetworkStatistics;
use std::collections::BTreeMap;

/// The counters of every interface of the table. Source: `dev_seq_printf_stats`, Linux `net/core/net-procfs.c`.
pub(super) fn parse(table: &str) -> BTreeMap<&str, NetworkStatistics> {
    table.lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<(&str, NetworkStatistics)> {
    let (name, numbers) = line.trim_start().split_once(':')?;
    let numbers: Vec<u64> =
        numbers.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    // What the host reads them into is signed.
    let number = |index: usize| numbers.get(index).map(|number| (*number).min(i64::MAX.unsigned_abs()));
    let statistics = NetworkStatistics {
        rx_bytes: number(0)?,
        rx_packets: number(1)?,
        rx_errs: number(2)?,
        rx_dropped: number(3)?,
        tx_bytes: number(8)?,
        tx_packets: number(9)?,
        tx_errs: number(10)?,
        tx_dropped: number(11)?,
    };
    (numbers.len() >= 16).then_some((name, statistics))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn lines_without_sixteen_numbers_are_passed_over() {
        let table = "Inter-|   Receive\n face |bytes\n  a: 1 2 3\n b:1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n c: x\n\n d: 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n";
        let parsed = parse(table);
        assert_eq!(parsed.keys().collect::<Vec<_>>(), [&"b", &"d"]);
        assert_eq!((parsed["b"].rx_bytes, parsed["b"].tx_bytes, parsed["b"].tx_dropped), (1, 9, 12));
        assert_eq!(parsed["d"].rx_bytes, i64::MAX.unsigned_abs());
    }
}
