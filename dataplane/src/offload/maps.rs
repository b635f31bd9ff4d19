//! What the program and we share: flows, the ways of packets, and what was seen of them.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::bpf::{self, Map, MapKind};
use crate::flow::{Address, FlowKey};
use crate::memory::Region;
use crate::net::Direction;
use crate::packet::Translation;
use crate::packet::checksum::Change;
use crate::table::{EndpointSlot, Slots};

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

/// [`Flow::to_us`]: the program carries it; all come to us; and the flow is over, so that the same packets may be of a connection
/// that is none of ours.
pub(super) const CARRIED: u32 = 0;
pub(super) const TO_US: u32 = 1;
pub(super) const OVER: u32 = 2;

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
    /// Where they are counted: the place, and the direction's part of it.
    pub(super) traffic: u32,
    pub(super) direction: u32,
    /// Where their endpoint is.
    pub(super) endpoint: u32,
    /// Whether all of them come to us.
    pub(super) to_us: u32,
}

impl Flow {
    /// One that is not carried.
    pub(super) fn new(key: &FlowKey, to: &Translation, endpoint: EndpointSlot, to_us: u32) -> Self {
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
            traffic: 0,
            direction: 0,
            endpoint: endpoint.0,
            to_us,
        }
    }

    /// The same, carried and counted here.
    pub(super) fn carried(self, traffic: u32, direction: Direction) -> Self {
        Self { traffic, direction: (direction.index() * DIRECTION) as u32, to_us: CARRIED, ..self }
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
    /// Packets go straight to the other end of the link: 1.
    pub(super) to_peer: u32,
}

/// What was seen of one direction of a flow.
#[repr(C)]
pub(super) struct Traffic {
    /// Since it was last asked for.
    pub(super) bytes: AtomicU64,
    /// When, in nanoseconds of the monotonic clock; 0: nothing yet. Until then an endpoint has not accepted the connection.
    pub(super) seen_ns: AtomicU64,
    /// Since it was last asked for.
    pub(super) packets: AtomicU32,
    /// The last acknowledgement number, in network order.
    pub(super) acknowledged: AtomicU32,
    /// A FIN was among them: 1.
    pub(super) fin: AtomicU32,
    /// Of requests only: directions with a FIN.
    pub(super) fins: AtomicU32,
}

/// Bytes of it.
pub(super) const DIRECTION: usize = size_of::<Traffic>();
const _: () = assert!(DIRECTION.is_power_of_two());

/// What was seen of a flow.
#[repr(C)]
pub(crate) struct FlowTraffic {
    pub(super) directions: [Traffic; 2],
    /// Whose it is: number of the life in the upper half, of the record in the lower.
    pub(super) owner: AtomicU64,
}

/// What was seen of an endpoint's connections.
#[repr(C)]
pub(crate) struct Carried {
    /// Connections of which both ends were seen to close, and which are still counted as active.
    pub(crate) finished: AtomicU32,
    /// Connections that it accepted since this was last asked for.
    pub(crate) answered: AtomicU32,
}

/// The maps.
pub(super) struct Maps {
    pub(super) flows: Map<Key, Flow>,
    pub(super) ways: Map<[u8; 16], Way>,
    traffic_map: Map<u32, FlowTraffic>,
    endpoints_map: Map<u32, Carried>,
    pub(super) traffic: Region<FlowTraffic>,
    pub(super) endpoints: Arc<Region<Carried>>,
}

/// The maps as a program names them.
pub(super) struct Descriptors {
    pub(super) flows: i32,
    pub(super) ways: i32,
    pub(super) traffic: i32,
    pub(super) endpoints: i32,
}

/// What the map is called that says what was seen of flows.
pub(super) const TRAFFIC: &str = "sluice_traffic";

impl Maps {
    /// For so many flows.
    pub(super) fn new(flows: u32) -> io::Result<Self> {
        let traffic_map = Map::new(MapKind::Array, flows, TRAFFIC)?;
        let endpoints_map = Map::new(MapKind::Array, Slots::CAPACITY, "sluice_endpoint")?;
        Ok(Self {
            flows: Map::new(MapKind::Hash, 2 * flows, "sluice_flows")?,
            ways: Map::new(MapKind::Hash, WAYS, "sluice_ways")?,
            traffic: Region::of_kernel(traffic_map.descriptor(), flows as usize)?,
            endpoints: Arc::new(Region::of_kernel(endpoints_map.descriptor(), Slots::CAPACITY as usize)?),
            traffic_map,
            endpoints_map,
        })
    }

    pub(super) fn descriptors(&self) -> Descriptors {
        Descriptors {
            flows: self.flows.descriptor().as_raw_fd(),
            ways: self.ways.descriptor().as_raw_fd(),
            traffic: self.traffic_map.descriptor().as_raw_fd(),
            endpoints: self.endpoints_map.descriptor().as_raw_fd(),
        }
    }
}

/// What an earlier program of ours saw of flows.
pub(super) fn traffic_of(program: &OwnedFd) -> io::Result<Region<FlowTraffic>> {
    for number in bpf::maps_of(program)? {
        let map = bpf::map(number)?;
        let (name, value_size, entries) = bpf::map_info(&map)?;
        if name == TRAFFIC && value_size as usize == size_of::<FlowTraffic>() {
            return Region::of_kernel(&map, entries as usize);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "it has no such map"))
}

/// An address as maps have it.
pub(super) fn address(address: IpAddr) -> [u8; 16] {
    Address::from(address).bytes()
}
