//! `guest-network-get-interfaces` and `guest-network-get-route`.

mod addresses;
mod routes;
mod statistics;

pub(super) use routes::routes;

use crate::errno;
use addresses::{Address, Sockets};
use guest_protocol::Error;
use guest_protocol::answers::network::{IpAddress, IpAddressType, NetworkInterface};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

/// Most bytes of a table of the kernel that are read; a hundred thousand lines of each fit.
const TABLE_BYTES_MAX: u64 = 16 << 20;

/// Interfaces with their addresses, in the order of getifaddrs(3). `root` is where `/proc` is, `/` but in tests.
///
/// The counters of all are read at once: on a host of containers with hundreds of interfaces, reading them for each
/// is what took long.
pub(super) fn interfaces(root: &Path) -> Result<Vec<NetworkInterface>, Error> {
    let failed = |what: &'static str| {
        move |error: std::io::Error| Error::generic(format!("{what}: {}", errno::words(&error)))
    };
    let addresses = addresses::all().map_err(failed("getifaddrs failed"))?;
    let sockets = Sockets::new().map_err(failed("failed to create socket"))?;
    // Without the table there are no counters.
    let table = table(root, "proc/net/dev").unwrap_or_default();
    Ok(gather(addresses, |name| sockets.hardware_address(name), &statistics::parse(&table)))
}

fn gather(
    addresses: Vec<Address>,
    hardware_address: impl Fn(&str) -> Option<[u8; 6]>,
    statistics: &BTreeMap<&str, guest_protocol::answers::network::NetworkStatistics>,
) -> Vec<NetworkInterface> {
    let mut interfaces: Vec<NetworkInterface> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for Address { name, ip } in addresses {
        let place = *places.entry(name).or_insert_with_key(|name| {
            let hardware_address =
                hardware_address(name).map(|bytes| bytes.map(|byte| format!("{byte:02x}")).join(":"));
            interfaces.push(NetworkInterface {
                name: name.clone(),
                hardware_address,
                ..NetworkInterface::default()
            });
            interfaces.len() - 1
        });
        if let Some((ip, prefix)) = ip {
            let interface = &mut interfaces[place];
            interface.ip_addresses.push(IpAddress {
                ip_address: text(ip),
                ip_address_type: if ip.is_ipv4() { IpAddressType::Ipv4 } else { IpAddressType::Ipv6 },
                prefix,
            });
            interface.statistics = statistics.get(interface.name.as_str()).copied();
        }
    }
    interfaces
}

fn table(root: &Path, place: &str) -> std::io::Result<String> {
    let mut table = Vec::new();
    std::fs::File::open(root.join(place))?.take(TABLE_BYTES_MAX).read_to_end(&mut table)?;
    Ok(String::from_utf8_lossy(&table).into_owned())
}

/// As inet_ntop(3) of GNU's C library, which writes also the old addresses that contain one of version 4 with its dots.
fn text(ip: IpAddr) -> String {
    match ip {
        IpAddr::V6(ip) if ip.segments()[..6] == [0; 6] && ip.segments()[6] != 0 => {
            let [.., a, b, c, d] = ip.octets();
            format!("::{a}.{b}.{c}.{d}")
        }
        _ => ip.to_string(),
    }
}

/// An address of version 6 as the kernel's tables have it: 32 hexadecimal digits.
fn hexadecimal(digits: &str) -> Option<Ipv6Addr> {
    let bits = u128::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 32)?;
    Some(Ipv6Addr::from_bits(bits))
}

#[cfg(test)]
mod tests {
    use super::addresses::Address;
    use super::{gather, statistics, text};
    use serde_json::json;
    use std::net::IpAddr;

    #[test]
    fn addresses_are_gathered_by_interface_in_the_order_in_which_they_came() {
        let address = |name: &str, ip: Option<(&str, u32)>| Address {
            name: name.to_owned(),
            ip: ip.map(|(ip, prefix)| (ip.parse().expect("an address"), prefix)),
        };
        let addresses = vec![
            address("lo", None),
            address("eth0", None),
            address("tun9", None),
            address("lo", Some(("127.0.0.1", 8))),
            address("eth0", Some(("192.0.2.7", 24))),
            address("eth0:1", Some(("192.0.2.8", 32))),
            address("lo", Some(("::1", 128))),
            address("eth0", Some(("fe80::5054:ff:fe12:3456", 64))),
        ];
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n  tun9: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n";
        let mac = |name: &str| {
            (name != "tun9").then_some([0x52, 0x54, 0, 0x12, 0x34, u8::try_from(name.len()).unwrap_or(0)])
        };
        let interfaces = gather(addresses, mac, &statistics::parse(table));
        assert_eq!(
            json!(interfaces),
            json!([
                {"name": "lo", "hardware-address": "52:54:00:12:34:02", "ip-addresses": [
                    {"ip-address": "127.0.0.1", "ip-address-type": "ipv4", "prefix": 8},
                    {"ip-address": "::1", "ip-address-type": "ipv6", "prefix": 128}],
                 "statistics": {"rx-bytes": 1, "rx-packets": 2, "rx-errs": 3, "rx-dropped": 4,
                                "tx-bytes": 5, "tx-packets": 6, "tx-errs": 7, "tx-dropped": 8}},
                {"name": "eth0", "hardware-address": "52:54:00:12:34:04", "ip-addresses": [
                    {"ip-address": "192.0.2.7", "ip-address-type": "ipv4", "prefix": 24},
                    {"ip-address": "fe80::5054:ff:fe12:3456", "ip-address-type": "ipv6", "prefix": 64}]},
                {"name": "tun9"},
                {"name": "eth0:1", "hardware-address": "52:54:00:12:34:06", "ip-addresses": [
                    {"ip-address": "192.0.2.8", "ip-address-type": "ipv4", "prefix": 32}]},
            ])
        );
    }

    #[test]
    fn addresses_are_written_as_gnus_c_library_writes_them() {
        for written in
            ["::", "::1", "::abcd", "::127.0.0.1", "::ffff:10.0.0.1", "2001:db8::1:0:0:1", "1:0:2:3:4:5:6:7"]
        {
            assert_eq!(text(written.parse::<IpAddr>().expect("an address")), written);
        }
    }
}
