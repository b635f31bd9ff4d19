//! What a flow is found by, in either direction.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::net::{Family, Protocol};

/// An IPv4 or IPv6 address in 16 bytes; IPv4 as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2), which no wire carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Address(u128);

const V4_PREFIX: u128 = 0xffff_0000_0000;

impl Address {
    /// From four bytes.
    pub fn from_v4(bytes: [u8; 4]) -> Self {
        Self(V4_PREFIX | u128::from(u32::from_be_bytes(bytes)))
    }

    /// From sixteen bytes.
    pub fn from_v6(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    /// From two words, high one first.
    pub fn from_words(words: [u64; 2]) -> Self {
        Self((u128::from(words[0]) << 64) | u128::from(words[1]))
    }

    /// As two words, high one first.
    pub fn words(self) -> [u64; 2] {
        [(self.0 >> 64) as u64, self.0 as u64]
    }

    /// Whether it is an IPv4 address.
    pub fn is_v4(self) -> bool {
        self.0 >> 32 == V4_PREFIX >> 32
    }

    /// Family.
    pub fn family(self) -> Family {
        if self.is_v4() { Family::V4 } else { Family::V6 }
    }

    /// Sixteen bytes in network order; an IPv4 address is the last four.
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The last four bytes.
    pub fn v4(self) -> [u8; 4] {
        (self.0 as u32).to_be_bytes()
    }

    /// The address as the standard library's type.
    pub fn ip(self) -> IpAddr {
        match self.family() {
            Family::V4 => IpAddr::V4(Ipv4Addr::from(self.v4())),
            Family::V6 => IpAddr::V6(Ipv6Addr::from(self.0)),
        }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::from_v4(address.octets()),
            IpAddr::V6(address) => Self::from_v6(address.octets()),
        }
    }
}

/// What a packet of a flow has in its headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl FlowKey {
    /// The key of packets the other way.
    pub fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// Source address and port.
    pub fn source(&self) -> SocketAddr {
        SocketAddr::new(self.source.ip(), self.source_port)
    }

    /// Destination address and port.
    pub fn destination(&self) -> SocketAddr {
        SocketAddr::new(self.destination.ip(), self.destination_port)
    }
}
