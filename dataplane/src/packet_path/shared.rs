//! What the packet threads, the control side and the sweep share.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::flow::{
    Ended, FlowFile, FlowFileError, FlowTable, FlowView, Header, Hold, MAX_RECORDS, Masquerade, Recovery, Store,
};
use crate::memory::Region;
use crate::offload::Offload;
use crate::packet_path::drops::{Drop, Drops};
use crate::packet_path::fragments::Fragments;
use crate::packet_path::held::{Held, HeldTotals};
use crate::packet_path::names::Names;
use crate::packet_path::opens::Opens;
use crate::packet_path::ways::Ways;
use crate::select::{Affinity, Selection};
use crate::table::{Directory, EndpointSlot, PortSlot, RoutingTable, Slots};

/// Settings of a packet path, fixed for its life.
#[derive(Clone)]
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
    /// Where packets leave that are sent straight on a link; without it the kernel routes all.
    pub ways: Option<Arc<Ways>>,
    /// What has the kernel carry connections; only with `ways`.
    pub offload: Option<Arc<Offload>>,
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
            ways: None,
            offload: None,
        }
    }
}

/// A count that one thread makes, in a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct Count(pub(super) AtomicU64);

/// Shared state of a packet path.
pub struct Shared {
    /// Counters of Service ports and endpoints.
    pub slots: Arc<Slots>,
    pub(super) table: Arc<ArcSwap<RoutingTable>>,
    pub(super) flows: FlowTable,
    pub(super) affinity: Affinity,
    pub(super) opens: Opens,
    pub(super) fragments: Fragments,
    pub(super) held: Held,
    pub(super) drops: Box<[Drops]>,
    pub(super) on_links: Box<[Count]>,
    pub(super) settings: Settings,
    pub(super) names: OnceLock<Names>,
    header: Arc<Region<Header>>,
    hold: Hold,
    recovery: Recovery,
}

impl Shared {
    /// State with an empty table: new flows wait for the first [`Shared::publish`]. It is gone with the process.
    pub fn new(settings: Settings) -> Arc<Self> {
        let capacity = settings.flow_capacity.clamp(1, MAX_RECORDS);
        Self::over(Store::heap(capacity), settings)
    }

    /// State that the next process takes over, and that this one takes over from the last: its flows go on, by the
    /// endpoints they have, even before the first table is published. Waits for a process that has the file to let go;
    /// open the TUN link before, so that packets wait for us meanwhile.
    pub fn open(settings: Settings, file: &FlowFile) -> Result<Arc<Self>, FlowFileError> {
        let capacity = settings.flow_capacity.clamp(1, MAX_RECORDS);
        Ok(Self::over(Store::open(file, capacity)?, settings))
    }

    fn over(store: Store, settings: Settings) -> Arc<Self> {
        let header = || Arc::clone(&store.header);
        let masquerade = Masquerade {
            addresses: settings.masquerade_addresses.iter().map(|ip| (*ip).into()).collect(),
            ports: settings.masquerade_ports.clone(),
        };
        let addresses = store.masquerade(&masquerade.addresses);
        let directory = Directory::new(store.endpoints, store.uids, store.ports, header());
        // The keeper counts too, and what the kernel carried is counted apart.
        let slots = Arc::new(Slots::over(settings.workers + 2, directory));
        if let Some(offload) = &settings.offload {
            slots.carry_with(offload.endpoints());
        }
        let affinity = Affinity::over(store.affinities, header());
        let flows = FlowTable::new(store.records, header(), addresses, Arc::clone(&slots), masquerade);
        let (flows, (found, dropped)) = flows;
        Arc::new(Self {
            flows: flows.with_offload(settings.offload.clone()),
            affinity,
            opens: Opens::new(settings.flow_capacity),
            fragments: Fragments::new(),
            held: Held::default(),
            table: Arc::new(ArcSwap::from_pointee(RoutingTable::default())),
            drops: (0..=settings.workers).map(|_| Drops::default()).collect(),
            on_links: (0..=settings.workers).map(|_| Count::default()).collect(),
            slots,
            settings,
            names: OnceLock::new(),
            header: store.header,
            hold: store.hold,
            recovery: Recovery { flows: found, dropped, ..store.recovery },
        })
    }

    /// From now on questions to Services whose endpoint is the responder are answered by the packet threads. Once only.
    pub fn answer_names(&self, names: Names) {
        // A second answerer would be of another responder, and there is one.
        let _ = self.names.set(names);
    }

    /// What was found at start.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// Whether another process wants, or has, what this one had: the packet path stops by itself.
    pub fn is_superseded(&self) -> bool {
        self.hold.is_wanted(&self.header[0])
    }

    /// Hands over: nothing is written from now on. No packet thread may run.
    pub(super) fn release(&self) {
        self.slots.release();
        self.hold.release();
    }

    /// Swaps the routing table; each thread uses it from its next packet on.
    pub fn publish(&self, table: Arc<RoutingTable>) {
        self.table.store(table);
    }

    /// The routing table in force.
    pub fn table(&self) -> Arc<RoutingTable> {
        self.table.load_full()
    }

    /// Packet threads.
    pub fn workers(&self) -> usize {
        self.settings.workers
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

    /// What clients that wait for an endpoint of this Service port came to; nothing when none ever did.
    pub fn held(&self, port: PortSlot) -> Option<HeldTotals> {
        self.held.totals(port)
    }

    /// Flows ended so far because their endpoints were gone.
    pub fn ended(&self) -> Ended {
        self.flows.ended()
    }

    /// Packets sent straight on a link so far.
    pub fn sent_on_links(&self) -> u64 {
        self.on_links.iter().map(|count| count.0.load(Relaxed)).sum()
    }

    /// Counts what the kernel carried until now: counters are behind it by up to a second otherwise.
    pub fn count_offloaded(&self) {
        self.flows.look_at_offloaded(super::thread::now_ms());
    }

    /// Packets that the kernel carried so far, and connections that it carries now; nothing without [`Settings::offload`].
    pub fn offloaded(&self) -> Option<(u64, u64)> {
        self.settings.offload.as_ref().map(|offload| offload.totals())
    }

    /// Packets dropped so far, by reason label.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let total = |reason| self.drops.iter().map(|drops| drops.get(reason)).sum();
        Drop::ALL.into_iter().map(|reason| (reason.label(), total(reason))).collect()
    }
}
