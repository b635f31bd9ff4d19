//! The maps that the program and we share, and the ways of packets, which are in one of them.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::flows::Flows;
use super::traffic::{Carried, FlowTraffic};
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
