//! The flow table: lookups without a lock, opening and ending flows under one, expiry by a slow sweep.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::drain::EndedCounters;
use super::index::{Entry, Index};
use super::record::{FlowFields, Record, Snapshot, Source};
use super::store::Header;
use super::{Address, FlowKey, State, Timeouts};
use crate::memory::Region;
use crate::net::{Direction, Family};
use crate::offload::{Level, Offload};
use crate::packet::view::Tcp;
use crate::table::{EndpointSlot, FrontendKind, PortSlot, Slots};

/// Bytes of memory that a flow takes: its record and its share of an index at most half full.
pub const MEMORY_PER_FLOW: usize = size_of::<Record>() + 16;

const _: () = assert!(MEMORY_PER_FLOW <= 128);

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
    pub(super) record: u32,
    pub(super) snapshot: Snapshot,
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
pub(super) struct Writer {
    pub(super) free: Vec<u32>,
    /// Records ever used: the sweep and the memory in use end here.
    pub(super) used: u32,
    pub(super) live: u32,
    pub(super) hand: u32,
}

/// All flows of the node.
pub struct FlowTable {
    pub(super) records: Region<Record>,
    pub(super) header: Arc<Region<Header>>,
    pub(super) index: Index,
    hasher: ahash::RandomState,
    writer: Mutex<Writer>,
    pub(super) evictions: AtomicU64,
    ended: EndedCounters,
    pub(super) slots: Arc<Slots>,
    pub(super) offload: Option<Arc<Offload>>,
    timeouts: Timeouts,
    /// All that records may name, also those of earlier processes.
    masquerade: Vec<Address>,
    /// Those that are ours now.
    masquerade_now: Vec<Address>,
    pub(super) ports: RangeInclusive<u16>,
}

/// Where and how flows are masqueraded.
#[derive(Clone, Debug)]
pub struct Masquerade {
    /// Node addresses that stand in for clients: the first of each family is used.
    pub addresses: Vec<Address>,
    /// Source ports.
    pub ports: RangeInclusive<u16>,
}

impl FlowTable {
    /// A table of the flows that lie in `records`, which `slots` counts. `addresses`: all masquerade addresses that records
    /// may name. Returns also how many flows were found, and how
    /// many records were dropped since they were not whole.
    pub(crate) fn new(
        records: Region<Record>,
        header: Arc<Region<Header>>,
        addresses: Vec<Address>,
        slots: Arc<Slots>,
        masquerade: Masquerade,
    ) -> (Self, (usize, usize)) {
        let table = Self {
            index: Index::new(records.len()),
            records,
            header,
            hasher: ahash::RandomState::new(),
            writer: Mutex::new(Writer { free: Vec::new(), used: 0, live: 0, hand: 0 }),
            evictions: AtomicU64::new(0),
            ended: EndedCounters::default(),
            slots,
            offload: None,
            timeouts: Timeouts::default(),
            masquerade: addresses,
            masquerade_now: masquerade.addresses,
            ports: masquerade.ports,
        };
        let found = table.recover();
        (table, found)
    }

    /// The masquerade addresses that flows may have, also those of earlier processes.
    pub fn masquerade(&self) -> &[Address] {
        &self.masquerade
    }

    /// The masquerade address that new flows of a family get.
    pub fn masquerade_of(&self, family: Family) -> Option<SourceChoice> {
        let address = self.masquerade_now.iter().find(|address| address.family() == family)?;
        let index = self.masquerade.iter().position(|other| other == address)?;
        Some(SourceChoice::Masquerade(index as u8))
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
            fields.source = self.choose_port(&mut writer, fields, address, now_ms as u32)?;
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
        self.catch_up(hit);
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
            self.catch_up(hit);
            let expected = record.expected(hit.direction);
            self.advance(hit, |state| state.after_tcp(hit.direction, tcp, expected));
        }
        if tcp.fin {
            self.see_fin(hit);
        }
    }

    /// Counts a datagram of the flow.
    pub fn see_datagram(&self, hit: &Hit, bytes: usize, now_ms: u64) {
        let record = &self.records[hit.record as usize];
        record.count(hit.direction, bytes, now_ms as u32);
        self.advance(hit, |state| state.after_datagram(hit.direction));
    }

    /// Ends what was silent for too long, looking at up to `most` records; the next call goes on where this one stopped.
    pub fn sweep(&self, now_ms: u64, most: usize) {
        let mut writer = self.lock();
        for _ in 0..most.min(writer.used as usize) {
            writer.hand = (writer.hand + 1) % writer.used;
            let record = writer.hand;
            if let Some(hit) = self.hit(record).inspect(|hit| self.caught_up(&mut writer, hit))
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

    pub(super) fn lock(&self) -> MutexGuard<'_, Writer> {
        // No code that runs under the lock panics half-way through a change.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hash(&self, key: &FlowKey) -> u64 {
        self.hasher.hash_one(key)
    }

    pub(super) fn probe(&self, key: &FlowKey) -> Option<Hit> {
        self.index.find(self.hash(key), |entry| {
            let snapshot = self.records[entry.record as usize].read()?;
            let same = snapshot.fields.key(entry.direction, &self.masquerade) == *key;
            let hit = || Hit {
                snapshot: self.settled(entry.record, snapshot),
                record: entry.record,
                direction: entry.direction,
            };
            same.then(hit)
        })
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    pub(super) fn ended_counters(&self) -> &EndedCounters {
        &self.ended
    }

    /// The acknowledgement numbers last sent with packets of this direction, and against it; 0 where none was.
    pub(super) fn last_acknowledged(&self, hit: &Hit, direction: Direction) -> (u32, u32) {
        let record = &self.records[hit.record as usize];
        let number = |direction: Direction| record.expected(direction.reverse()).unwrap_or(0);
        (number(direction), number(direction.reverse()))
    }

    /// Whether the endpoint has not been heard of.
    pub(super) fn is_unanswered(&self, hit: &Hit) -> bool {
        hit.state() == State::Opening && self.records[hit.record as usize].expected(Direction::Reply).is_none()
    }

    pub(super) fn hit(&self, record: u32) -> Option<Hit> {
        let snapshot = self.settled(record, self.records[record as usize].read()?);
        Some(Hit { record, snapshot, direction: Direction::Request })
    }

    pub(super) fn is_expired(&self, hit: &Hit, now_ms: u32) -> bool {
        let limit = self.timeouts.of(hit.state()).as_millis() as u32;
        let idle = self.records[hit.record as usize].idle_ms(now_ms);
        // A packet stamped after `now_ms` was read looks idle for almost 2^32 ms.
        idle > limit && idle < u32::MAX / 2
    }

    pub(super) fn end(&self, writer: &mut Writer, hit: &Hit) {
        let record = &self.records[hit.record as usize];
        let Some(now) = self.now(hit) else { return };
        let fields = &now.fields;
        self.end_offload(writer, &now, hit.record);
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

    /// Takes a flow one step on, and tells its endpoint when that finishes it. Returns the state before, if it changed.
    pub(super) fn advance(&self, hit: &Hit, step: impl Fn(State) -> State) -> Option<State> {
        let before = self.step(hit.record, &hit.snapshot, &step)?;
        if step(before).is_finished() && self.offloaded(hit) == Level::Carried {
            let mut writer = self.lock();
            // Its record may be another flow's by now.
            if self.now(hit).is_some() {
                self.take_back(&mut writer, hit.record, &hit.snapshot);
            }
        }
        Some(before)
    }

    /// The same but for what the kernel has of it.
    pub(super) fn step(&self, record: u32, snapshot: &Snapshot, step: impl Fn(State) -> State) -> Option<State> {
        let before = self.records[record as usize].advance(snapshot.meta, &step)?;
        if step(before).is_finished() && !before.is_finished() {
            self.slots.flow_finished(snapshot.fields.endpoint_slot);
        }
        Some(before)
    }

    /// The hit's flow now, if its life goes on.
    pub(super) fn now(&self, hit: &Hit) -> Option<Snapshot> {
        self.records[hit.record as usize].read().filter(|now| now.life() == hit.snapshot.life())
    }

    fn hash_of(&self, entry: Entry) -> u64 {
        let snapshot = self.records[entry.record as usize].read().expect("indexed records are live under the lock");
        self.hash(&snapshot.fields.key(entry.direction, &self.masquerade))
    }
}
