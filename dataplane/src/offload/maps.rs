//! What the program and we share: flows, the ways of packets, and what was seen of them.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::bpf::{Map, MapKind};
use crate::flow::{Address, FlowKey};
use crate::memory::Region;
use crate::packet::Translation;
use crate::packet::checksum::Change;

/// Most addresses with a known way.
const WAYS: u32 = 16_384;
/// Bytes of an Ethernet header without its type.
pub(super) const HARDWARE: usize = 12;

/// A TCP flow's packets of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Key {
    pub(super) source: [u8; 16],
    pub(super) destination: [u8; 16],
    pub(super) source_port: [u8; 2],
    pub(super) destination_port: [u8; 2],
}

impl From<&FlowKey> for Key {
    fn from(key: &FlowKey) -> Self {
        Self {
            source: key.source.bytes(),
            destination: key.destination.bytes(),
            source_port: key.source_port.to_be_bytes(),
            destination_port: key.destination_port.to_be_bytes(),
        }
    }
}

/// What becomes of them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Flow {
    pub(super) source: [u8; 16],
    pub(super) destination: [u8; 16],
    pub(super) source_port: [u8; 2],
    pub(super) destination_port: [u8; 2],
    /// What the change of addresses, and that of ports, does to a checksum: sums of words as they lie in memory, of 16 bits.
    pub(super) address_change: u32,
    pub(super) port_change: u32,
    /// Where they are counted.
    pub(super) traffic: u32,
    /// All of them come to us: 1.
    pub(super) to_us: u32,
}

impl Flow {
    pub(super) fn new(key: &FlowKey, to: &Translation, traffic: u32, to_us: bool) -> Self {
        let (mut addresses, mut ports) = (Change::default(), Change::default());
        addresses.replace(&key.source.bytes(), &to.source.bytes());
        addresses.replace(&key.destination.bytes(), &to.destination.bytes());
        ports.replace_word(key.source_port, to.source_port);
        ports.replace_word(key.destination_port, to.destination_port);
        let in_memory = |change: Change| u32::from(u16::from_ne_bytes(change.folded().to_be_bytes()));
        Self {
            source: to.source.bytes(),
            destination: to.destination.bytes(),
            source_port: to.source_port.to_be_bytes(),
            destination_port: to.destination_port.to_be_bytes(),
            address_change: in_memory(addresses),
            port_change: in_memory(ports),
            traffic,
            to_us: u32::from(to_us),
        }
    }
}

/// How packets to an address leave.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Way {
    /// Nanoseconds of the monotonic clock; not used from then on.
    pub(super) until_ns: u64,
    pub(super) link: u32,
    pub(super) mtu: u32,
    pub(super) header: [u8; HARDWARE],
    pub(super) gap: u32,
}

/// What was seen of one direction of a flow since it was last looked at.
#[derive(Default)]
#[repr(C)]
pub(crate) struct Traffic {
    pub(super) bytes: AtomicU64,
    pub(super) packets: AtomicU64,
    /// Nanoseconds of the monotonic clock.
    pub(super) seen_ns: AtomicU64,
    /// The last acknowledgement number, in network order.
    pub(super) acknowledged: AtomicU32,
    gap: AtomicU32,
}

/// The maps.
pub(super) struct Maps {
    pub(super) flows: Map<Key, Flow>,
    pub(super) ways: Map<[u8; 16], Way>,
    traffic_map: Map<u32, Traffic>,
    /// Two for each flow: of its requests, and of its replies.
    pub(super) traffic: Region<Traffic>,
}

/// The maps as a program names them.
pub(super) struct Descriptors {
    pub(super) flows: i32,
    pub(super) ways: i32,
    pub(super) traffic: i32,
}

impl Maps {
    /// For so many flows.
    pub(super) fn new(flows: u32) -> io::Result<Self> {
        let traffic_map = Map::new(MapKind::Array, 2 * flows, "sluice_traffic")?;
        Ok(Self {
            flows: Map::new(MapKind::Hash, 2 * flows, "sluice_flows")?,
            ways: Map::new(MapKind::Hash, WAYS, "sluice_ways")?,
            traffic: Region::of_kernel(traffic_map.descriptor(), 2 * flows as usize)?,
            traffic_map,
        })
    }

    pub(super) fn descriptors(&self) -> Descriptors {
        Descriptors {
            flows: self.flows.descriptor().as_raw_fd(),
            ways: self.ways.descriptor().as_raw_fd(),
            traffic: self.traffic_map.descriptor().as_raw_fd(),
        }
    }
}

/// An address as maps have it.
pub(super) fn address(address: IpAddr) -> [u8; 16] {
    Address::from(address).bytes()
}
