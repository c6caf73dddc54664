//! The kernel's routes: `/proc/net/route` and `/proc/net/ipv6_route`.

use super::{hexadecimal, table, text};
use crate::errno;
use guest_protocol::Error;
use guest_protocol::answers::network::NetworkRoute;
use std::net::Ipv4Addr;
use std::path::Path;

/// All routes, those of version 4 first. `root` is where `/proc` is, `/` but in tests.
///
/// A kernel without one of the versions has no table of it, and the other's routes are told; qemu-ga tells an error then.
pub(crate) fn routes(root: &Path) -> Result<Vec<NetworkRoute>, Error> {
    let mut routes = Vec::new();
    let mut refused = None;
    for (place, parse) in [
        ("proc/net/route", parse_4 as fn(&str) -> Vec<NetworkRoute>),
        ("proc/net/ipv6_route", parse_6 as fn(&str) -> Vec<NetworkRoute>),
    ] {
        match table(root, place) {
            Ok(table) => routes.extend(parse(&table)),
            Err(error) => {
                refused =
                    Some(Error::generic(format!("Could not open '/{place}': {}", errno::words(&error))));
            }
        }
    }
    match refused {
        Some(refused) if routes.is_empty() => Err(refused),
        _ => Ok(routes),
    }
}

/// qemu-ga reads all numbers but the flags of version 4 as signed ones of 32 bits, also those whose highest bit is in use.
fn signed(number: u32) -> i64 {
    number.cast_signed().into()
}

/// Source: `fib_route_seq_show`, Linux `net/ipv4/fib_trie.c`: addresses are the bytes of memory as one number.
fn parse_4(table: &str) -> Vec<NetworkRoute> {
    let address = |digits: &str| {
        let bits = u32::from_str_radix(digits, 16).ok()?;
        Some(Ipv4Addr::from(bits.to_ne_bytes()).to_string())
    };
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |index: usize| Some(signed(fields.get(index)?.parse().ok()?));
        let text = |index: usize| address(fields.get(index)?);
        Some(NetworkRoute {
            iface: (*fields.first()?).to_owned(),
            destination: text(1)?,
            gateway: Some(text(2)?),
            flags: Some(u32::from_str_radix(fields.get(3)?, 16).ok()?.into()),
            refcnt: Some(number(4)?),
            used: Some(number(5)?),
            metric: number(6)?,
            mask: Some(text(7)?),
            mtu: Some(number(8)?),
            window: Some(number(9)?),
            irtt: Some(number(10)?),
            version: 4,
            ..NetworkRoute::default()
        })
    };
    // The first line is a heading.
    table.lines().skip(1).filter_map(route).collect()
}

/// Source: `rt6_info_route`, Linux `net/ipv6/route.c`.
fn parse_6(table: &str) -> Vec<NetworkRoute> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
        let signed = |index: usize| number(index).map(signed);
        let text = |index: usize| Some(text(hexadecimal(fields.get(index)?)?.into()));
        Some(NetworkRoute {
            destination: text(0)?,
            desprefixlen: Some(number(1)?.to_string()),
            source: Some(text(2)?),
            srcprefixlen: Some(number(3)?.to_string()),
            nexthop: Some(text(4)?),
            metric: signed(5)?,
            refcnt: Some(signed(6)?),
            used: Some(signed(7)?),
            flags: Some(signed(8)?.cast_unsigned()),
            iface: (*fields.get(9)?).to_owned(),
            version: 6,
            ..NetworkRoute::default()
        })
    };
    table.lines().filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::routes;
    use serde_json::{Value, json};
    use std::path::Path;

    /// Recorded in a guest with one interface.
    const RECORDED_4: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0202000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0002000A\t00000000\t0001\t0\t0\t4294967295\t00FFFFFF\t1400\t0\t0
";
    const RECORDED_6: &str = "\
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000002 00000400 00000004 00000000 00450003     eth0
fe800000000000005054 short
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 80200200       lo
";

    fn tell(root: &Path) -> Result<Value, String> {
        routes(root).map(|routes| json!(routes)).map_err(|error| error.desc)
    }

    fn put(root: &Path, place: &str, table: &str) {
        let path = root.join(place);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("created");
        std::fs::write(path, table).expect("written");
    }

    #[test]
    fn routes_of_both_versions_are_told() {
        let root = tempfile::tempdir().expect("a folder");
        put(root.path(), "proc/net/route", RECORDED_4);
        put(root.path(), "proc/net/ipv6_route", RECORDED_6);
        let zero = "::";
        assert_eq!(
            tell(root.path()),
            Ok(json!([
                {"iface": "eth0", "destination": "0.0.0.0", "gateway": "10.0.2.2", "mask": "0.0.0.0",
                 "metric": 100, "flags": 3, "refcnt": 0, "use": 0, "mtu": 0, "window": 0, "irtt": 0, "version": 4},
                {"iface": "eth0", "destination": "10.0.2.0", "gateway": "0.0.0.0", "mask": "255.255.255.0",
                 "metric": -1, "flags": 1, "refcnt": 0, "use": 0, "mtu": 1400, "window": 0, "irtt": 0, "version": 4},
                {"iface": "eth0", "destination": "fe80::", "desprefixlen": "64", "source": zero, "srcprefixlen": "0",
                 "nexthop": zero, "metric": 256, "refcnt": 1, "use": 0, "flags": 1, "version": 6},
                {"iface": "eth0", "destination": zero, "desprefixlen": "0", "source": zero, "srcprefixlen": "0",
                 "nexthop": "fe80::2", "metric": 1024, "refcnt": 4, "use": 0, "flags": 4_521_987, "version": 6},
                {"iface": "lo", "destination": zero, "desprefixlen": "0", "source": zero, "srcprefixlen": "0",
                 "nexthop": zero, "metric": -1, "refcnt": 1, "use": 0, "flags": 18_446_744_071_564_165_632u64, "version": 6},
            ]))
        );
    }

    #[test]
    fn a_kernel_without_version_6_tells_the_routes_of_version_4() {
        let root = tempfile::tempdir().expect("a folder");
        let words = "Could not open '/proc/net/ipv6_route': No such file or directory";
        assert_eq!(tell(root.path()), Err(words.to_owned()));
        put(root.path(), "proc/net/route", RECORDED_4);
        assert_eq!(tell(root.path()).map(|routes| routes.as_array().map(Vec::len)), Ok(Some(2)));
    }
}
