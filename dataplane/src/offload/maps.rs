//! What the program and we share beside flows: the ways of packets, and what was seen of them.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::flows::Flows;
use crate::bpf::{self, Map, MapKind};
use crate::flow::Address;
use crate::memory::Region;
use crate::table::Slots;

/// Most addresses with a known way.
const WAYS: u32 = 16_384;
/// Bytes of an Ethernet header without its type.
pub(super) const HARDWARE: usize = 12;

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

/// What was seen of one direction of a flow. A cache line of its own: each direction is carried by another processor, as a rule.
#[repr(C, align(64))]
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
    /// Of requests only: whose flow it is, number of the life in the upper half, of the record in the lower.
    pub(super) owner: AtomicU64,
}

/// Bytes of it.
pub(super) const DIRECTION: usize = size_of::<Traffic>();
const _: () = assert!(DIRECTION.is_power_of_two());

/// What was seen of a flow.
#[repr(C)]
pub(crate) struct FlowTraffic {
    pub(super) directions: [Traffic; 2],
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
    pub(super) flows: Flows,
    pub(super) ways: Map<[u8; 16], Way>,
    traffic_map: Map<u32, FlowTraffic>,
    endpoints_map: Map<u32, Carried>,
    pub(super) traffic: Region<FlowTraffic>,
    pub(super) endpoints: Arc<Region<Carried>>,
}

/// What the map is called that says what was seen of flows.
pub(super) const TRAFFIC: &str = "sluice_traffic";

impl Maps {
    /// For so many flows.
    pub(super) fn new(flows: u32) -> io::Result<Self> {
        let traffic_map = Map::new(MapKind::Array, flows, TRAFFIC)?;
        let endpoints_map = Map::new(MapKind::Array, Slots::CAPACITY, "sluice_endpoint")?;
        Ok(Self {
            flows: Flows::new(2 * flows)?,
            ways: Map::new(MapKind::Hash, WAYS, "sluice_ways")?,
            traffic: Region::of_kernel(traffic_map.descriptor(), flows as usize)?,
            endpoints: Arc::new(Region::of_kernel(endpoints_map.descriptor(), Slots::CAPACITY as usize)?),
            traffic_map,
            endpoints_map,
        })
    }

    /// The descriptors of the arrays of traffic, and of endpoints.
    pub(super) fn arrays(&self) -> [i32; 2] {
        [self.traffic_map.descriptor(), self.endpoints_map.descriptor()].map(AsRawFd::as_raw_fd)
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
