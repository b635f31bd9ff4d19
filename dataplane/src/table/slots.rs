//! Counters of Service ports and endpoints, in slots that packet threads reach by number without a lock.
//!
//! Each packet thread writes only its own cells, so counting shares no cache line between threads; cells take memory from the
//! first flow on, a page of them at a time. Live-flow counts, which selection reads, are shared but change only when a flow
//! opens or closes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use crate::memory::Region;
use crate::net::Direction;
use crate::offload::Carried;
use crate::table::FrontendKind;
use crate::table::directory::{Directory, Standing};

/// Slot number of an endpoint of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EndpointSlot(pub u32);

/// Slot number of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct PortSlot(pub u32);

/// Why an endpoint did not take a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Failure {
    /// It answered with a RST.
    Refused = 0,
    /// ICMP said that it cannot be reached.
    Unreachable = 1,
    /// It had not answered when the client sent its SYN again.
    Timeout = 2,
}

impl Failure {
    /// Every reason.
    pub const ALL: [Self; 3] = [Self::Refused, Self::Unreachable, Self::Timeout];

    /// Name as metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
        }
    }
}

/// What one thread counted for one endpoint. A cache line of its own.
#[repr(align(64))]
pub struct EndpointCounters {
    /// Flows opened.
    pub opened: AtomicU64,
    /// Bytes of IP packets, by direction.
    pub bytes: [AtomicU64; 2],
    /// Packets, by direction (a segmentation-offloaded packet counts once).
    pub packets: [AtomicU64; 2],
}

/// What one thread counted for one Service port. Cache lines of its own. Bytes and packets stand here too, since endpoints
/// come and go.
#[repr(align(64))]
pub struct PortCounters {
    /// Flows opened, by frontend kind.
    pub opened: [AtomicU64; 4],
    /// Flows refused for want of endpoints or by a rule.
    pub rejected: AtomicU64,
    /// Flows dropped by a rule.
    pub dropped: AtomicU64,
    /// Opens that an endpoint did not take, by [`Failure`].
    pub failed: [AtomicU64; 3],
    /// Opens moved to another endpoint.
    pub retried: AtomicU64,
    /// Bytes of IP packets, by direction.
    pub bytes: [AtomicU64; 2],
    /// Packets, by direction (a segmentation-offloaded packet counts once).
    pub packets: [AtomicU64; 2],
}

/// Sums over all threads for a Service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortTotals {
    /// Flows opened, by frontend kind.
    pub opened: [u64; 4],
    /// Flows refused for want of endpoints or by a rule.
    pub rejected: u64,
    /// Flows dropped by a rule.
    pub dropped: u64,
    /// Opens that an endpoint did not take, by [`Failure`].
    pub failed: [u64; 3],
    /// Opens moved to another endpoint.
    pub retried: u64,
    /// Bytes of IP packets, by direction.
    pub bytes: [u64; 2],
    /// Packets, by direction.
    pub packets: [u64; 2],
}

/// Sums over all threads for an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Flows opened.
    pub opened: u64,
    /// Bytes of IP packets, by direction.
    pub bytes: [u64; 2],
    /// Packets, by direction.
    pub packets: [u64; 2],
}

struct ThreadSlots {
    endpoints: Region<EndpointCounters>,
    ports: Region<PortCounters>,
}

/// All slots. Shared by the packet threads, the table builder and whoever reads counters.
pub struct Slots {
    threads: Box<[ThreadSlots]>,
    /// What packets must know of their endpoints, as numbers of [`Standing`]: read by all, seldom written, 16 in a cache line.
    standings: Region<AtomicU32>,
    /// What the kernel saw of endpoints, where it carries connections.
    carried: OnceLock<Arc<Region<Carried>>>,
    pub(super) directory: Directory,
}

impl Slots {
    /// Number of endpoints, and of Service ports, that fit.
    pub const CAPACITY: u32 = 1 << 20;

    /// Slots for this many counting threads, on the heap.
    pub fn new(threads: usize) -> Self {
        let count = Self::CAPACITY as usize;
        let header = Arc::new(Region::heap(1));
        Self::over(threads, Directory::new(Region::heap(count), Region::heap(count), Region::heap(count), header))
    }

    /// Slots with this shared part.
    pub(crate) fn over(threads: usize, directory: Directory) -> Self {
        let count = Self::CAPACITY as usize;
        let thread = || ThreadSlots { endpoints: Region::heap(count), ports: Region::heap(count) };
        let threads = (0..threads).map(|_| thread()).collect();
        let slots = Self { threads, standings: Region::heap(count), carried: OnceLock::new(), directory };
        slots.recover();
        slots
    }

    /// From now on the kernel carries connections, and says so here. Once only.
    pub(crate) fn carry_with(&self, carried: Arc<Region<Carried>>) {
        // There is one program.
        let _ = self.carried.set(carried);
    }

    pub(super) fn carried(&self, slot: EndpointSlot) -> Option<&Carried> {
        self.carried.get().map(|carried| &carried[slot.0 as usize])
    }

    /// Number of counting threads.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// The cells of one thread for an endpoint.
    pub fn endpoint(&self, thread: usize, slot: EndpointSlot) -> &EndpointCounters {
        &self.threads[thread].endpoints[slot.0 as usize]
    }

    /// The cells of one thread for a Service port.
    pub fn port(&self, thread: usize, slot: PortSlot) -> &PortCounters {
        &self.threads[thread].ports[slot.0 as usize]
    }

    /// Flows open on the endpoint now; closing ones do not count.
    pub fn active(&self, slot: EndpointSlot) -> u32 {
        // It may be taken off before it is added: both are told of at the same moment.
        let finished = self.carried(slot).map_or(0, |carried| (carried.finished.load(Relaxed) as i32).max(0) as u32);
        self.entry(slot).active.load(Relaxed).saturating_sub(finished)
    }

    /// Flow records of the endpoint, those of closing flows too.
    pub fn held(&self, slot: EndpointSlot) -> u32 {
        self.entry(slot).held.load(Relaxed)
    }

    /// A flow opened on the endpoint.
    pub fn flow_opened(&self, slot: EndpointSlot) {
        self.entry(slot).active.fetch_add(1, Relaxed);
        self.entry(slot).held.fetch_add(1, Relaxed);
    }

    /// A flow of the endpoint is closing, or is about to be forgotten without having closed.
    pub fn flow_finished(&self, slot: EndpointSlot) {
        self.entry(slot).active.fetch_sub(1, Relaxed);
    }

    /// The record of a finished flow is free again.
    pub fn flow_forgotten(&self, slot: EndpointSlot) {
        self.entry(slot).held.fetch_sub(1, Relaxed);
    }

    /// Next position in the range of masquerade ports towards an endpoint.
    pub fn next_source_port(&self, slot: EndpointSlot) -> u32 {
        self.entry(slot).source_ports.fetch_add(1, Relaxed)
    }

    /// Next round-robin position of a Service port.
    pub fn next_turn(&self, slot: PortSlot) -> u32 {
        self.directory.ports[slot.0 as usize].cursor.fetch_add(1, Relaxed)
    }

    /// Sums for an endpoint.
    pub fn endpoint_totals(&self, slot: EndpointSlot) -> Totals {
        let mut sum = Totals::default();
        for cells in self.threads.iter().map(|thread| &thread.endpoints[slot.0 as usize]) {
            sum.opened += cells.opened.load(Relaxed);
            for direction in [Direction::Request, Direction::Reply].map(Direction::index) {
                sum.bytes[direction] += cells.bytes[direction].load(Relaxed);
                sum.packets[direction] += cells.packets[direction].load(Relaxed);
            }
        }
        sum
    }

    /// Sums for a Service port.
    pub fn port_totals(&self, slot: PortSlot) -> PortTotals {
        let mut sum = PortTotals::default();
        for cells in self.threads.iter().map(|thread| &thread.ports[slot.0 as usize]) {
            for kind in FrontendKind::ALL.map(|kind| kind as usize) {
                sum.opened[kind] += cells.opened[kind].load(Relaxed);
            }
            sum.rejected += cells.rejected.load(Relaxed);
            sum.dropped += cells.dropped.load(Relaxed);
            sum.retried += cells.retried.load(Relaxed);
            for (sum, cell) in sum.failed.iter_mut().zip(&cells.failed) {
                *sum += cell.load(Relaxed);
            }
            for direction in [Direction::Request, Direction::Reply].map(Direction::index) {
                sum.bytes[direction] += cells.bytes[direction].load(Relaxed);
                sum.packets[direction] += cells.packets[direction].load(Relaxed);
            }
        }
        sum
    }

    /// What a packet must know of the endpoint.
    pub(crate) fn standing(&self, slot: EndpointSlot) -> Standing {
        Standing::from_number(self.standings[slot.0 as usize].load(Relaxed))
    }

    /// Tells packets what they must know of the endpoint.
    pub(super) fn set_standing(&self, slot: EndpointSlot, standing: Standing) {
        self.standings[slot.0 as usize].store(standing as u32, Relaxed);
    }

    pub(super) fn clear_cells(&self, slot: EndpointSlot) {
        for cells in self.threads.iter().map(|thread| &thread.endpoints[slot.0 as usize]) {
            for cell in std::iter::once(&cells.opened).chain(&cells.bytes).chain(&cells.packets) {
                cell.store(0, Relaxed);
            }
        }
        self.set_standing(slot, Standing::Serves);
    }

    /// Zeroes a Service port's cells before the slot serves another one.
    pub(super) fn clear_port(&self, slot: PortSlot) {
        self.assign_port(slot, 0);
        for cells in self.threads.iter().map(|thread| &thread.ports[slot.0 as usize]) {
            let traffic = cells.bytes.iter().chain(&cells.packets);
            for cell in cells
                .opened
                .iter()
                .chain([&cells.rejected, &cells.dropped, &cells.retried])
                .chain(&cells.failed)
                .chain(traffic)
            {
                cell.store(0, Relaxed);
            }
        }
    }
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slots").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}
