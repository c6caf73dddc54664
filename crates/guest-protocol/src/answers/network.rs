//! The answers about the network: interfaces and routes.

use serde::{Deserialize, Serialize};

/// One interface in `guest-network-get-interfaces`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkInterface {
    /// Name, or the label of an address.
    pub name: String,
    /// Six bytes in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware_address: Option<String>,
    /// Absent where it has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ip_addresses: Vec<IpAddress>,
    /// Only of interfaces with an address, as in qemu-ga.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<NetworkStatistics>,
}

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IpAddress {
    /// As inet_ntop(3) writes it.
    pub ip_address: String,
    /// Which IP.
    pub ip_address_type: IpAddressType,
    /// Bits of the network.
    pub prefix: u32,
}

/// Which IP an address is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpAddressType {
    /// Version 4.
    Ipv4,
    /// Version 6.
    Ipv6,
}

/// What an interface has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkStatistics {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bad packets received.
    pub rx_errs: u64,
    /// Packets received and dropped.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets that could not be sent.
    pub tx_errs: u64,
    /// Packets dropped before they were sent.
    pub tx_dropped: u64,
}

/// One route in `guest-network-get-route`; which members there are depends on the version of IP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRoute {
    /// Interface.
    pub iface: String,
    /// Network, without its length.
    pub destination: String,
    /// Lower is preferred.
    pub metric: i64,
    /// 4: next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// 4: netmask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
    /// 4: initial round-trip time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub irtt: Option<i64>,
    /// The kernel's flags of a route; of 32 bits, and with all higher ones set where the highest of them is (version 6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flags: Option<u64>,
    /// References.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refcnt: Option<i64>,
    /// Look-ups.
    #[serde(rename = "use", default, skip_serializing_if = "Option::is_none")]
    pub used: Option<i64>,
    /// 4: TCP window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<i64>,
    /// 4: largest packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i64>,
    /// 6: bits of the destination, in decimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desprefixlen: Option<String>,
    /// 6: source network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// 6: bits of the source, in decimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub srcprefixlen: Option<String>,
    /// 6: next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nexthop: Option<String>,
    /// 4 or 6.
    pub version: i64,
}
