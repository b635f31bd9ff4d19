//! The flow table: lookups without a lock, opening and ending flows under one, expiry by a slow sweep.
//!
//! Full table: an expired, closing or long unanswered flow near the sweep's hand makes room; when there is none the new
//! flow is refused. An established flow is never pushed out.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::drain::EndedCounters;
use super::index::{Entry, Index, MAX_RECORDS};
use super::record::{FlowFields, Record, Snapshot, Source};
use super::{Address, FlowKey, State, Timeouts};
use crate::memory::zeroed;
use crate::net::Direction;
use crate::packet::view::Tcp;
use crate::table::{EndpointSlot, FrontendKind, PortSlot, Slots};

/// Bytes of memory that a flow takes: its record and its share of an index at most half full.
pub const MEMORY_PER_FLOW: usize = size_of::<Record>() + 16;

const _: () = assert!(MEMORY_PER_FLOW <= 128);

/// Records looked at for a victim when the table is full.
const VICTIM_SEARCH: usize = 64;
/// Unanswered opens idle for this many milliseconds may be pushed out of a full table.
const UNANSWERED_VICTIM_MS: u32 = 5_000;

/// No room for another flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Every record holds a flow that may not be pushed out.
    #[error("the flow table is full")]
    Table,
    /// Every masquerade port towards this endpoint is in use.
    #[error("no masquerade port is free for this endpoint")]
    Ports,
    /// Another flow has the same packets: the client reaches this endpoint by another frontend from the same port.
    #[error("another flow has the same addresses and ports")]
    Collision,
    /// Another thread has just opened this very flow.
    #[error("the flow exists")]
    Exists,
}

/// A flow to open.
#[derive(Clone, Copy, Debug)]
pub struct NewFlowRecord {
    /// Key of the client's packets.
    pub request: FlowKey,
    /// Endpoint.
    pub endpoint: SocketAddr,
    /// Counters of the endpoint.
    pub endpoint_slot: EndpointSlot,
    /// Counters of the Service port.
    pub port_slot: PortSlot,
    /// Kind of frontend.
    pub frontend: FrontendKind,
    /// First state.
    pub state: State,
}

/// Which source the endpoint is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceChoice {
    /// The client's own.
    Preserve,
    /// This masquerade address (index), with a free port.
    Masquerade(u8),
}

/// A flow that a packet belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Hit {
    record: u32,
    snapshot: Snapshot,
    /// Direction of the packet.
    pub direction: Direction,
}

impl Hit {
    /// What does not change in the flow.
    pub fn fields(&self) -> &FlowFields {
        &self.snapshot.fields
    }

    /// State when the packet came.
    pub fn state(&self) -> State {
        self.snapshot.state()
    }
}

/// How far a flow that is being opened has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpeningProgress {
    /// Packets of the client.
    pub requests: u32,
    /// Whether the endpoint has sent anything.
    pub is_answered: bool,
    /// Milliseconds since the last packet.
    pub idle_ms: u32,
    /// The sequence number that the endpoint will ask for: one more than the SYN's.
    pub expected: u32,
}

/// What only the holder of the lock changes.
struct Writer {
    free: Vec<u32>,
    /// Records ever used: the sweep and the memory in use end here.
    used: u32,
    live: u32,
    hand: u32,
}

/// All flows of the node.
pub struct FlowTable {
    records: Box<[Record]>,
    index: Index,
    hasher: ahash::RandomState,
    writer: Mutex<Writer>,
    evictions: AtomicU64,
    ended: EndedCounters,
    slots: Arc<Slots>,
    timeouts: Timeouts,
    masquerade: Vec<Address>,
    ports: RangeInclusive<u16>,
}

impl FlowTable {
    /// A table for at most `capacity` flows (at most about four million). `masquerade`: node addresses that stand in for
    /// clients, at most 255, with these source `ports`.
    pub fn new(capacity: usize, slots: Arc<Slots>, masquerade: Vec<Address>, ports: RangeInclusive<u16>) -> Self {
        let capacity = capacity.clamp(1, MAX_RECORDS);
        Self {
            records: zeroed(capacity),
            index: Index::new(capacity),
            hasher: ahash::RandomState::new(),
            writer: Mutex::new(Writer { free: Vec::new(), used: 0, live: 0, hand: 0 }),
            evictions: AtomicU64::new(0),
            ended: EndedCounters::default(),
            slots,
            timeouts: Timeouts::default(),
            masquerade,
            ports,
        }
    }

    /// The masquerade addresses.
    pub fn masquerade(&self) -> &[Address] {
        &self.masquerade
    }

    /// The reserved range of source ports.
    pub fn masquerade_ports(&self) -> &RangeInclusive<u16> {
        &self.ports
    }

    /// Flows now.
    pub fn len(&self) -> usize {
        self.lock().live as usize
    }

    /// Whether there is no flow.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most flows.
    pub fn capacity(&self) -> usize {
        self.records.len()
    }

    /// Flows pushed out of a full table so far.
    pub fn evictions(&self) -> u64 {
        self.evictions.load(Relaxed)
    }

    /// The flow of a packet with this key. Takes no lock unless there is none at first sight.
    pub fn find(&self, key: &FlowKey) -> Option<Hit> {
        self.probe(key).or_else(|| {
            // An entry may have moved past us while another flow was removed.
            let _writer = self.lock();
            self.probe(key)
        })
    }

    /// Opens a flow.
    pub fn open(&self, new: &NewFlowRecord, source: SourceChoice, now_ms: u64) -> Result<Hit, Full> {
        let mut writer = self.lock();
        if self.probe(&new.request).is_some() {
            return Err(Full::Exists);
        }
        let mut fields = FlowFields {
            request: new.request,
            endpoint: new.endpoint.ip().into(),
            endpoint_port: new.endpoint.port(),
            source: Source::Preserved,
            endpoint_slot: new.endpoint_slot,
            port_slot: new.port_slot,
            frontend: new.frontend,
            opened: (now_ms / 1000) as u32,
        };
        if let SourceChoice::Masquerade(address) = source {
            fields.source = self.choose_port(&mut writer, fields, address)?;
        } else if let Some(other) = self.probe(&fields.reply(&self.masquerade)) {
            if !other.state().is_finished() {
                return Err(Full::Collision);
            }
            self.end(&mut writer, &other);
        }
        let record = self.take_record(&mut writer, now_ms as u32)?;
        self.records[record as usize].publish(&fields, new.state, now_ms as u32);
        for direction in [Direction::Request, Direction::Reply] {
            let hash = self.hash(&fields.key(direction, &self.masquerade));
            self.index.insert(hash, Entry { record, direction });
        }
        writer.live += 1;
        self.slots.flow_opened(fields.endpoint_slot);
        let snapshot = self.records[record as usize].read().expect("published above, under the lock");
        Ok(Hit { record, snapshot, direction: Direction::Request })
    }

    /// Ends the flow of a hit, unless its life is over already.
    pub fn close(&self, hit: &Hit) {
        let mut writer = self.lock();
        self.end(&mut writer, hit);
    }

    /// How far a flow that is being opened has come.
    pub fn opening(&self, hit: &Hit, now_ms: u64) -> OpeningProgress {
        let record = &self.records[hit.record as usize];
        let [requests, replies] = record.traffic().1;
        OpeningProgress {
            requests,
            is_answered: replies > 0,
            idle_ms: record.idle_ms(now_ms as u32),
            expected: record.expected(Direction::Request).unwrap_or(0),
        }
    }

    /// Counts a TCP segment of the flow and moves its state.
    pub fn see_tcp(&self, hit: &Hit, tcp: &Tcp, bytes: usize, now_ms: u64) {
        let record = &self.records[hit.record as usize];
        record.count(hit.direction, bytes, now_ms as u32);
        if tcp.ack {
            record.acknowledge(hit.direction, tcp.acknowledgement);
        }
        let state = hit.state();
        if state == State::Opening && tcp.syn {
            // What the other end is about to ask for: enough to reset a connection that is not established yet.
            record.acknowledge(hit.direction.reverse(), tcp.sequence.wrapping_add(1));
        }
        if tcp.rst || tcp.fin || state == State::Opening {
            let next = state.after_tcp(hit.direction, tcp, record.expected(hit.direction));
            self.move_to(hit, next);
        }
    }

    /// Counts a datagram of the flow.
    pub fn see_datagram(&self, hit: &Hit, bytes: usize, now_ms: u64) {
        let record = &self.records[hit.record as usize];
        record.count(hit.direction, bytes, now_ms as u32);
        self.move_to(hit, hit.state().after_datagram(hit.direction));
    }

    /// Ends what was silent for too long, looking at up to `most` records; the next call goes on where this one stopped.
    pub fn sweep(&self, now_ms: u64, most: usize) {
        let mut writer = self.lock();
        for _ in 0..most.min(writer.used as usize) {
            writer.hand = (writer.hand + 1) % writer.used;
            let record = writer.hand;
            if let Some(hit) = self.hit(record)
                && self.is_expired(&hit, now_ms as u32)
            {
                self.end(&mut writer, &hit);
            }
        }
    }

    /// Records in use or used before: how much there is to sweep.
    pub fn used(&self) -> usize {
        self.lock().used as usize
    }

    /// Records in use or used before.
    pub(super) fn records(&self) -> &[Record] {
        &self.records[..self.used()]
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        // No code that runs under the lock panics half-way through a change.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hash(&self, key: &FlowKey) -> u64 {
        self.hasher.hash_one(key)
    }

    fn probe(&self, key: &FlowKey) -> Option<Hit> {
        self.index.find(self.hash(key), |entry| {
            let snapshot = self.records[entry.record as usize].read()?;
            let same = snapshot.fields.key(entry.direction, &self.masquerade) == *key;
            same.then_some(Hit { record: entry.record, snapshot, direction: entry.direction })
        })
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    pub(super) fn ended_counters(&self) -> &EndedCounters {
        &self.ended
    }

    /// The same life of the flow as it is now, unless it is over.
    pub(super) fn again(&self, hit: &Hit) -> Option<Hit> {
        let now = self.hit(hit.record)?;
        (now.snapshot.meta >> 32 == hit.snapshot.meta >> 32).then_some(Hit { direction: hit.direction, ..now })
    }

    /// The acknowledgement numbers last sent with packets of this direction, and against it; 0 where none was.
    pub(super) fn last_acknowledged(&self, hit: &Hit, direction: Direction) -> (u32, u32) {
        let record = &self.records[hit.record as usize];
        let number = |direction: Direction| record.expected(direction.reverse()).unwrap_or(0);
        (number(direction), number(direction.reverse()))
    }

    pub(super) fn hit(&self, record: u32) -> Option<Hit> {
        let snapshot = self.records[record as usize].read()?;
        Some(Hit { record, snapshot, direction: Direction::Request })
    }

    fn is_expired(&self, hit: &Hit, now_ms: u32) -> bool {
        let limit = self.timeouts.of(hit.state()).as_millis() as u32;
        let idle = self.records[hit.record as usize].idle_ms(now_ms);
        // A packet stamped after `now_ms` was read looks idle for almost 2^32 ms.
        idle > limit && idle < u32::MAX / 2
    }

    fn end(&self, writer: &mut Writer, hit: &Hit) {
        let record = &self.records[hit.record as usize];
        let Some(now) = record.read().filter(|now| now.meta >> 32 == hit.snapshot.meta >> 32) else { return };
        let fields = &now.fields;
        for direction in [Direction::Request, Direction::Reply] {
            let hash = self.hash(&fields.key(direction, &self.masquerade));
            self.index.remove(hash, Entry { record: hit.record, direction }, |entry| self.hash_of(entry));
        }
        if !record.retire().is_finished() {
            self.slots.flow_finished(fields.endpoint_slot);
        }
        writer.free.push(hit.record);
        writer.live -= 1;
        self.slots.flow_forgotten(fields.endpoint_slot);
    }

    /// Moves a flow to another state, unless somebody else has just done so.
    pub(super) fn move_to(&self, hit: &Hit, next: State) -> bool {
        let moved = self.records[hit.record as usize].set_state(hit.snapshot.meta, next);
        if moved && next.is_finished() && !hit.state().is_finished() {
            self.slots.flow_finished(hit.fields().endpoint_slot);
        }
        moved
    }

    fn hash_of(&self, entry: Entry) -> u64 {
        let snapshot = self.records[entry.record as usize].read().expect("indexed records are live under the lock");
        self.hash(&snapshot.fields.key(entry.direction, &self.masquerade))
    }

    fn take_record(&self, writer: &mut Writer, now_ms: u32) -> Result<u32, Full> {
        if let Some(record) = writer.free.pop() {
            return Ok(record);
        }
        if (writer.used as usize) < self.records.len() {
            writer.used += 1;
            return Ok(writer.used - 1);
        }
        for _ in 0..VICTIM_SEARCH {
            writer.hand = (writer.hand + 1) % writer.used;
            if let Some(hit) = self.hit(writer.hand)
                && self.may_push_out(&hit, now_ms)
            {
                self.end(writer, &hit);
                self.evictions.fetch_add(1, Relaxed);
                return writer.free.pop().ok_or(Full::Table);
            }
        }
        Err(Full::Table)
    }

    fn may_push_out(&self, hit: &Hit, now_ms: u32) -> bool {
        let idle = self.records[hit.record as usize].idle_ms(now_ms);
        match hit.state() {
            State::Closing | State::Reset => true,
            State::Opening | State::Unreplied => idle > UNANSWERED_VICTIM_MS,
            State::Established | State::HalfClosedByClient | State::HalfClosedByEndpoint | State::Replied => {
                self.is_expired(hit, now_ms)
            }
        }
    }

    /// A free port of the reserved range towards the endpoint, in turn, so that a port rests as long as possible before
    /// it is used again; when all are taken, that of a closing flow.
    fn choose_port(&self, writer: &mut Writer, fields: FlowFields, address: u8) -> Result<Source, Full> {
        let (first, last) = (u32::from(*self.ports.start()), u32::from(*self.ports.end()));
        let count = last - first + 1;
        let mut closing = None;
        for _ in 0..count {
            let turn = self.slots.next_source_port(fields.endpoint_slot) % count;
            let source = Source::Masqueraded { address, port: (first + turn) as u16 };
            match self.probe(&FlowFields { source, ..fields }.reply(&self.masquerade)) {
                None => return Ok(source),
                Some(other) if closing.is_none() && other.state().is_finished() => closing = Some((source, other)),
                Some(_) => {}
            }
        }
        let (source, other) = closing.ok_or(Full::Ports)?;
        self.end(writer, &other);
        Ok(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Protocol;

    fn new_flow(client: u16, endpoint: u8) -> NewFlowRecord {
        let request = FlowKey {
            source: Address::from_v4([10, 0, 0, 1]),
            destination: Address::from_v4([10, 96, 0, 1]),
            source_port: client,
            destination_port: 80,
            protocol: Protocol::Tcp,
        };
        NewFlowRecord {
            request,
            endpoint: SocketAddr::from(([10, 1, 0, endpoint], 8080)),
            endpoint_slot: EndpointSlot(u32::from(endpoint)),
            port_slot: PortSlot(1),
            frontend: FrontendKind::ClusterIp,
            state: State::Opening,
        }
    }

    /// Threads open, find and close flows of their own while all share one small, crowded index: what a thread opened it
    /// finds, in both directions, and nothing it closed.
    #[test]
    fn threads_never_see_each_others_flows() {
        let slots = Arc::new(Slots::new(1));
        let masquerade = vec![Address::from_v4([192, 168, 0, 1])];
        let table = FlowTable::new(256, Arc::clone(&slots), masquerade, 61000..=61999);
        std::thread::scope(|scope| {
            for thread in 0..4u16 {
                let table = &table;
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(u64::from(thread));
                    let mut mine: Vec<(NewFlowRecord, Hit)> = Vec::new();
                    for round in 0..20_000u16 {
                        if mine.len() < 50 && rng.bool() {
                            let new = new_flow(thread << 14 | round & 0x3fff, rng.u8(1..4));
                            let source = if rng.bool() { SourceChoice::Preserve } else { SourceChoice::Masquerade(0) };
                            mine.push((new, table.open(&new, source, 0).expect("there is room")));
                        } else if !mine.is_empty() {
                            let (new, hit) = mine.swap_remove(rng.usize(..mine.len()));
                            let found = table.find(&new.request).expect("it is open");
                            assert_eq!(found.fields(), hit.fields());
                            let reply = table.find(&hit.fields().reply(table.masquerade())).expect("replies find it");
                            assert_eq!((reply.fields(), reply.direction), (hit.fields(), Direction::Reply));
                            table.close(&hit);
                            assert!(table.find(&new.request).is_none());
                        }
                    }
                    mine.iter().for_each(|(_, hit)| table.close(hit));
                });
            }
        });
        assert!(table.is_empty());
        assert!((1..4).all(|slot| slots.active(EndpointSlot(slot)) == 0));
    }
}
