//! One flow as it lies in memory: fixed-size and plain, written whole by one thread, then read by any without a lock.
//!
//! Protocol: a record is *live* while its `meta` word says so. The writer, who holds the table's lock, fills the fields of
//! a record that is not live and publishes it by one store to `meta`; removing it is one store too, and each life has its
//! own number. A reader copies the fields between two loads of `meta` and believes them when life and liveness agree.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use crate::flow::{Address, FlowKey, State};
use crate::net::{Direction, Protocol};
use crate::packet::Translation;
use crate::table::{EndpointSlot, FrontendKind, PortSlot};

/// The source that the endpoint sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The client's own.
    Preserved,
    /// A node address: its place in the list of masquerade addresses, and the port.
    Masqueraded {
        /// Index into the masquerade addresses, at most 254.
        address: u8,
        /// Port of the reserved range.
        port: u16,
    },
}

/// What never changes in a flow's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowFields {
    /// The client's packets: client to frontend.
    pub request: FlowKey,
    /// Endpoint address.
    pub endpoint: Address,
    /// Endpoint port.
    pub endpoint_port: u16,
    /// The source that the endpoint sees.
    pub source: Source,
    /// Where the endpoint's counters are.
    pub endpoint_slot: EndpointSlot,
    /// Where the Service port's counters are.
    pub port_slot: PortSlot,
    /// Kind of frontend that was dialled.
    pub frontend: FrontendKind,
    /// When it opened, in seconds of the caller's clock.
    pub opened: u32,
}

impl FlowFields {
    /// Source address and port that the endpoint sees.
    pub fn source_seen(&self, masquerade: &[Address]) -> (Address, u16) {
        match self.source {
            Source::Preserved => (self.request.source, self.request.source_port),
            Source::Masqueraded { address, port } => (masquerade[usize::from(address)], port),
        }
    }

    /// The endpoint's packets: endpoint to the source it sees.
    pub fn reply(&self, masquerade: &[Address]) -> FlowKey {
        let (destination, destination_port) = self.source_seen(masquerade);
        FlowKey {
            source: self.endpoint,
            destination,
            source_port: self.endpoint_port,
            destination_port,
            protocol: self.request.protocol,
        }
    }

    /// The key of the packets of one direction.
    pub fn key(&self, direction: Direction, masquerade: &[Address]) -> FlowKey {
        match direction {
            Direction::Request => self.request,
            Direction::Reply => self.reply(masquerade),
        }
    }

    /// What packets of this direction leave with.
    pub fn translation(&self, direction: Direction, masquerade: &[Address]) -> Translation {
        let leaves_as = self.key(direction.reverse(), masquerade).reversed();
        Translation {
            source: leaves_as.source,
            source_port: leaves_as.source_port,
            destination: leaves_as.destination,
            destination_port: leaves_as.destination_port,
        }
    }
}

/// The record itself. 112 bytes; zeroed memory is a record that is not live.
#[repr(C)]
pub(crate) struct Record {
    /// From the lowest bit: live (1 bit), state (3), frontend kind (2), protocol (2), 1 + masquerade address or 0 when the
    /// source is preserved (8), unused (16), life number (32).
    meta: AtomicU64,
    client: [AtomicU64; 2],
    frontend: [AtomicU64; 2],
    endpoint: [AtomicU64; 2],
    /// Client, frontend, endpoint and masquerade port, 16 bits each, the first lowest.
    ports: AtomicU64,
    slots: [AtomicU32; 2],
    opened: AtomicU32,
    last_seen: AtomicU32,
    bytes: [AtomicU64; 2],
    packets: [AtomicU32; 2],
    /// Last acknowledgement number sent in each direction; 0 = none yet.
    acknowledged: [AtomicU32; 2],
}

const _: () = assert!(size_of::<Record>() == 112);

const LIVE: u64 = 1;
const STATE: u32 = 1;
const FRONTEND: u32 = 4;
const PROTOCOL: u32 = 6;
const SOURCE: u32 = 8;
const LIFE: u32 = 32;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// A consistent copy of a record: its life and what does not change in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Snapshot {
    pub(super) meta: u64,
    pub(super) fields: FlowFields,
}

impl Snapshot {
    pub(super) fn state(&self) -> State {
        state_of(self.meta)
    }
}

fn state_of(meta: u64) -> State {
    State::from_number((meta >> STATE) as u8 & 7).expect("only states are stored")
}

impl Record {
    /// Fills and publishes a record that is not live. Only for the holder of the table's lock.
    pub(super) fn publish(&self, fields: &FlowFields, state: State, now_ms: u32) {
        let store = |words: &[AtomicU64; 2], address: Address| {
            for (word, value) in words.iter().zip(address.words()) {
                word.store(value, Relaxed);
            }
        };
        store(&self.client, fields.request.source);
        store(&self.frontend, fields.request.destination);
        store(&self.endpoint, fields.endpoint);
        let (address, port) = match fields.source {
            Source::Preserved => (0, 0),
            Source::Masqueraded { address, port } => (u64::from(address) + 1, port),
        };
        let ports = [fields.request.source_port, fields.request.destination_port, fields.endpoint_port, port];
        self.ports.store(ports.iter().rev().fold(0, |all, port| all << 16 | u64::from(*port)), Relaxed);
        self.slots[0].store(fields.endpoint_slot.0, Relaxed);
        self.slots[1].store(fields.port_slot.0, Relaxed);
        self.opened.store(fields.opened, Relaxed);
        self.last_seen.store(now_ms, Relaxed);
        for direction in [0, 1] {
            self.bytes[direction].store(0, Relaxed);
            self.packets[direction].store(0, Relaxed);
            self.acknowledged[direction].store(0, Relaxed);
        }
        let protocol = PROTOCOLS.iter().position(|known| *known == fields.request.protocol).expect("all are listed");
        let life = (self.meta.load(Relaxed) >> LIFE).wrapping_add(1);
        let kind = (fields.frontend as u64) << FRONTEND | (protocol as u64) << PROTOCOL | address << SOURCE;
        let meta = life << LIFE | kind | (state as u64) << STATE | LIVE;
        self.meta.store(meta, Release);
    }

    /// Ends a record's life and returns its last state. Only for the holder of the table's lock.
    pub(super) fn retire(&self) -> State {
        let last = self.meta.fetch_and(!LIVE, Relaxed);
        // Fields written by a later life stay behind this store for readers that load `meta` again.
        fence(Release);
        state_of(last)
    }

    /// A consistent copy, or nothing when the record is not live or changed meanwhile.
    pub(super) fn read(&self) -> Option<Snapshot> {
        let meta = self.meta.load(Acquire);
        if meta & LIVE == 0 {
            return None;
        }
        let load = |words: &[AtomicU64; 2]| Address::from_words([words[0].load(Relaxed), words[1].load(Relaxed)]);
        let (client, frontend, endpoint) = (load(&self.client), load(&self.frontend), load(&self.endpoint));
        let ports = self.ports.load(Relaxed);
        let slots = [self.slots[0].load(Relaxed), self.slots[1].load(Relaxed)];
        let opened = self.opened.load(Relaxed);
        fence(Acquire);
        if same_life(self.meta.load(Relaxed), meta) {
            let port = |index: u32| (ports >> (16 * index)) as u16;
            let source = match (meta >> SOURCE) as u8 {
                0 => Source::Preserved,
                address => Source::Masqueraded { address: address - 1, port: port(3) },
            };
            let request = FlowKey {
                source: client,
                destination: frontend,
                source_port: port(0),
                destination_port: port(1),
                protocol: *PROTOCOLS.get(usize::from((meta >> PROTOCOL) as u8 & 3))?,
            };
            let fields = FlowFields {
                request,
                endpoint,
                endpoint_port: port(2),
                source,
                endpoint_slot: EndpointSlot(slots[0]),
                port_slot: PortSlot(slots[1]),
                frontend: *FrontendKind::ALL.get(usize::from((meta >> FRONTEND) as u8 & 3))?,
                opened,
            };
            return Some(Snapshot { meta, fields });
        }
        None
    }

    /// Moves this life of the record to another state and returns whether it did. It does not when another thread moved it
    /// too, or removed it: either knows better.
    pub(super) fn set_state(&self, seen: u64, state: State) -> bool {
        let next = seen & !(7 << STATE) | (state as u64) << STATE;
        next != seen && self.meta.compare_exchange(seen, next, Relaxed, Relaxed).is_ok()
    }

    /// Counts a packet.
    pub(super) fn count(&self, direction: Direction, bytes: usize, now_ms: u32) {
        if self.last_seen.load(Relaxed) != now_ms {
            self.last_seen.store(now_ms, Relaxed);
        }
        self.bytes[direction.index()].fetch_add(bytes as u64, Relaxed);
        self.packets[direction.index()].fetch_add(1, Relaxed);
    }

    /// Notes the acknowledgement number of a segment.
    pub(super) fn acknowledge(&self, direction: Direction, number: u32) {
        self.acknowledged[direction.index()].store(number, Relaxed);
    }

    /// The sequence number that the receiver of packets of this direction last asked for.
    pub(super) fn expected(&self, direction: Direction) -> Option<u32> {
        Some(self.acknowledged[direction.reverse().index()].load(Relaxed)).filter(|number| *number != 0)
    }

    /// Milliseconds since the last packet.
    pub(super) fn idle_ms(&self, now_ms: u32) -> u32 {
        now_ms.wrapping_sub(self.last_seen.load(Relaxed))
    }

    /// Bytes and packets by direction.
    pub(super) fn traffic(&self) -> ([u64; 2], [u32; 2]) {
        let load = |index: usize| (self.bytes[index].load(Relaxed), self.packets[index].load(Relaxed));
        let [request, reply] = [load(0), load(1)];
        ([request.0, reply.0], [request.1, reply.1])
    }
}

/// Whether two `meta` words are of one life, both live.
fn same_life(a: u64, b: u64) -> bool {
    a >> LIFE == b >> LIFE && a & b & LIVE != 0
}
