//! One flow as it lies in memory: fixed-size and plain, written whole by one thread, then read by any without a lock, and
//! by the next process. [`life`](super::life) says how.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::life::{self, LIVE};
use crate::flow::{Address, FlowKey, State};
use crate::net::{Direction, Protocol};
use crate::offload::Seen;
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
    /// source is preserved (8), seal (16), life number (32). The seal is a checksum of all that does not change in a life.
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

const STATE: u32 = 1;
const FRONTEND: u32 = 4;
const PROTOCOL: u32 = 6;
const SOURCE: u32 = 8;
const SEAL: u32 = 16;
/// What of `meta` changes in a life, or is the seal itself.
const NOT_SEALED: u64 = LIVE | 7 << STATE | 0xffff << SEAL;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// A consistent copy of a record: its life and what does not change in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Snapshot {
    pub(super) meta: u64,
    pub(super) fields: FlowFields,
}

impl Snapshot {
    /// Number of the record's life.
    pub(super) fn life(&self) -> u32 {
        (self.meta >> 32) as u32
    }

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
        let kind = (fields.frontend as u64) << FRONTEND | (protocol as u64) << PROTOCOL | address << SOURCE;
        life::publish(&self.meta, |life| {
            let rest = kind | (state as u64) << STATE;
            rest | u64::from(self.seal(life | rest)) << SEAL
        });
    }

    /// Ends a record's life and returns its last state. Only for the holder of the table's lock.
    pub(super) fn retire(&self) -> State {
        state_of(life::retire(&self.meta))
    }

    /// Ends the life of a record that makes no sense.
    pub(super) fn forget(&self) {
        life::retire(&self.meta);
    }

    /// A consistent copy, or nothing when the record is not live or changed meanwhile.
    pub(super) fn read(&self) -> Option<Snapshot> {
        let load = |words: &[AtomicU64; 2]| Address::from_words([words[0].load(Relaxed), words[1].load(Relaxed)]);
        let (meta, (client, frontend, endpoint, ports, slots, opened)) = life::read(&self.meta, || {
            let addresses = (load(&self.client), load(&self.frontend), load(&self.endpoint));
            let slots = [self.slots[0].load(Relaxed), self.slots[1].load(Relaxed)];
            (addresses.0, addresses.1, addresses.2, self.ports.load(Relaxed), slots, self.opened.load(Relaxed))
        })?;
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
        Some(Snapshot { meta, fields })
    }

    /// Whether the record says it is live.
    pub(super) fn is_live(&self) -> bool {
        self.meta.load(Relaxed) & LIVE != 0
    }

    /// Whether the record is as it was published, but for what may change.
    pub(super) fn is_whole(&self) -> bool {
        let meta = self.meta.load(Relaxed);
        (meta >> SEAL) as u16 == self.seal(meta)
    }

    fn seal(&self, meta: u64) -> u16 {
        let [client, frontend, endpoint] = [&self.client, &self.frontend, &self.endpoint];
        let words = [client, frontend, endpoint].into_iter().flatten().chain([&self.ports]);
        let slots = self.slots.iter().chain([&self.opened]).map(|word| u64::from(word.load(Relaxed)));
        let mut bytes = [0; 88];
        let all = words.map(|word| word.load(Relaxed)).chain(slots).chain([meta & !NOT_SEALED]);
        for (to, word) in bytes.chunks_exact_mut(8).zip(all) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes);
        (crc ^ crc >> 16) as u16
    }

    /// Takes this life of the record one step on, from the state that it is in now: both ends may close at the same moment,
    /// seen by two threads, and neither step may be lost. Returns the state before, or nothing when the life is over or the
    /// state stays.
    pub(super) fn advance(&self, seen: u64, step: impl Fn(State) -> State) -> Option<State> {
        let next = |now: u64| now & !(7 << STATE) | (step(state_of(now)) as u64) << STATE;
        life::advance(&self.meta, seen, next).map(state_of)
    }

    /// Counts a packet.
    pub(super) fn count(&self, direction: Direction, bytes: usize, now_ms: u32) {
        if self.last_seen.load(Relaxed) != now_ms {
            self.last_seen.store(now_ms, Relaxed);
        }
        self.bytes[direction.index()].fetch_add(bytes as u64, Relaxed);
        self.packets[direction.index()].fetch_add(1, Relaxed);
    }

    /// Adds what the kernel saw of a direction.
    pub(super) fn add(&self, direction: Direction, seen: &Seen) {
        let index = direction.index();
        self.bytes[index].fetch_add(seen.bytes, Relaxed);
        self.packets[index].fetch_add(seen.packets, Relaxed);
        let is_later = |new: u32, old: u32| new.wrapping_sub(old) as i32 > 0;
        if is_later(seen.last_ms as u32, self.last_seen.load(Relaxed)) {
            self.last_seen.store(seen.last_ms as u32, Relaxed);
        }
        let acknowledged = self.acknowledged[index].load(Relaxed);
        if acknowledged == 0 || is_later(seen.acknowledged, acknowledged) {
            self.acknowledge(direction, seen.acknowledged);
        }
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
