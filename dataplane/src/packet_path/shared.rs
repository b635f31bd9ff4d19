//! What the packet threads, the control side and the sweep share.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::flow::{Address, Ended, FlowTable, FlowView};
use crate::packet_path::drops::{Drop, Drops};
use crate::packet_path::opens::Opens;
use crate::select::{Affinity, Selection};
use crate::table::{EndpointSlot, RoutingTable, Slots};

/// Settings of a packet path, fixed for its life.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Packet threads, each with a TUN queue.
    pub workers: usize,
    /// Most flows.
    pub flow_capacity: usize,
    /// Node addresses that stand in for clients: the first of each family is used.
    pub masquerade_addresses: Vec<IpAddr>,
    /// Source ports that masqueraded flows have.
    pub masquerade_ports: RangeInclusive<u16>,
    /// Seed of endpoint selection.
    pub seed: u64,
    /// How long an endpoint that enters its list is new: it gets fewer flows under least-connections. Zero: never.
    pub slow_start: Duration,
    /// Failed opens in a row that eject an endpoint; 0 = none do.
    pub eject_after: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            workers: 1,
            flow_capacity: 1 << 20,
            masquerade_addresses: Vec::new(),
            masquerade_ports: 61000..=65534,
            seed: 0,
            slow_start: Duration::from_secs(10),
            eject_after: 5,
        }
    }
}

/// Shared state of a packet path.
pub struct Shared {
    /// Counters of Service ports and endpoints.
    pub slots: Arc<Slots>,
    pub(super) table: Arc<ArcSwap<RoutingTable>>,
    pub(super) flows: FlowTable,
    pub(super) affinity: Affinity,
    pub(super) opens: Opens,
    pub(super) drops: Box<[Drops]>,
    pub(super) settings: Settings,
}

impl Shared {
    /// State with an empty table: every Service address is left alone until the first [`Shared::publish`].
    pub fn new(settings: Settings) -> Arc<Self> {
        let slots = Arc::new(Slots::new(settings.workers));
        let masquerade: Vec<Address> = settings.masquerade_addresses.iter().take(255).map(|ip| (*ip).into()).collect();
        let ports = settings.masquerade_ports.clone();
        Arc::new(Self {
            flows: FlowTable::new(settings.flow_capacity, Arc::clone(&slots), masquerade, ports),
            affinity: Affinity::default(),
            opens: Opens::new(settings.flow_capacity),
            table: Arc::new(ArcSwap::from_pointee(RoutingTable::default())),
            drops: (0..settings.workers).map(|_| Drops::default()).collect(),
            slots,
            settings,
        })
    }

    /// Swaps the routing table; each thread uses it from its next packet on.
    pub fn publish(&self, table: Arc<RoutingTable>) {
        self.table.store(table);
    }

    /// The routing table in force.
    pub fn table(&self) -> Arc<RoutingTable> {
        self.table.load_full()
    }

    /// Every flow.
    pub fn flows(&self) -> impl Iterator<Item = FlowView> {
        self.flows.views(super::thread::now_ms())
    }

    /// Flows now.
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// Most flows.
    pub fn flow_capacity(&self) -> usize {
        self.flows.capacity()
    }

    /// Flows pushed out of a full table so far.
    pub fn evictions(&self) -> u64 {
        self.flows.evictions()
    }

    /// What selection goes by now.
    pub(super) fn selection<'s>(&'s self, now_ms: u64, avoid: &'s [EndpointSlot]) -> Selection<'s> {
        let slow_start_ms = self.settings.slow_start.as_millis() as u64;
        Selection { slots: &self.slots, now_ms, slow_start_ms, avoid }
    }

    /// Flows ended so far because their endpoints were gone.
    pub fn ended(&self) -> Ended {
        self.flows.ended()
    }

    /// Packets dropped so far, by reason label.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let total = |reason| self.drops.iter().map(|drops| drops.get(reason)).sum();
        Drop::ALL.into_iter().map(|reason| (reason.label(), total(reason))).collect()
    }
}
