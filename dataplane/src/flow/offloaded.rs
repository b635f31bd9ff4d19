//! Flows that the kernel carries: what it saw of them is added to their records whenever those are looked at.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::record::Snapshot;
use super::{FlowTable, Hit, State};
use crate::net::{Direction, Protocol};
use crate::offload::{Level, MOST_FLOWS, Offload};

impl FlowTable {
    /// The same, with the kernel carrying what it can. It brings us the replies of all connections that go on.
    pub(crate) fn with_offload(mut self, offload: Option<Arc<Offload>>) -> Self {
        self.offload = offload;
        if self.offload.is_some() {
            let of_tcp = |hit: &Hit| hit.fields().request.protocol == Protocol::Tcp;
            let records = 0..self.used().min(MOST_FLOWS) as u32;
            for hit in records.filter_map(|record| self.hit(record)).filter(of_tcp) {
                self.offload(&hit, Level::Held);
            }
        }
        self
    }

    /// Has the kernel bring us the replies of a TCP flow, or carry it, unless its life is over. Returns whether it does.
    pub(crate) fn offload(&self, hit: &Hit, level: Level) -> bool {
        let Some(offload) = &self.offload else { return false };
        let _writer = self.lock();
        let is_alive = self.records[hit.record as usize]
            .read()
            .is_some_and(|now| now.meta >> 32 == hit.snapshot.meta >> 32 && !now.state().is_finished());
        is_alive && offload.begin(hit.record, hit.fields(), self.masquerade(), level)
    }

    /// How far a flow is the kernel's.
    pub(crate) fn offloaded(&self, hit: &Hit) -> Level {
        self.offload.as_ref().map_or(Level::None, |offload| offload.level(hit.record))
    }

    /// Has all packets of a flow come to us again: it is over but for the last of them.
    pub(super) fn take_back(&self, hit: &Hit) {
        let Some(offload) = &self.offload else { return };
        if offload.level(hit.record) == Level::Carried {
            let _writer = self.lock();
            if self.records[hit.record as usize].read().is_some_and(|now| now.meta >> 32 == hit.snapshot.meta >> 32) {
                offload.stop(hit.record, hit.fields(), self.masquerade());
                self.absorb(offload, hit.record, &hit.snapshot);
            }
        }
    }

    /// The kernel forgets a flow. Only for the holder of the lock.
    pub(super) fn end_offload(&self, snapshot: &Snapshot, record: u32) {
        let Some(offload) = &self.offload else { return };
        let level = offload.level(record);
        if level != Level::None {
            offload.end(record, &snapshot.fields, self.masquerade());
        }
        if level == Level::Carried {
            self.absorb(offload, record, snapshot);
        }
    }

    /// A record's flow as it is, with all that the kernel saw of it.
    pub(super) fn settled(&self, record: u32, snapshot: Snapshot) -> Snapshot {
        let Some(offload) = self.offload.as_ref().filter(|offload| offload.level(record) == Level::Carried) else {
            return snapshot;
        };
        let mut snapshot = snapshot;
        if snapshot.state() == State::Opening && offload.has_seen(record, Direction::Request) {
            let open = |state| if state == State::Opening { State::Established } else { state };
            let flow = &self.records[record as usize];
            flow.advance(snapshot.meta, open);
            snapshot = flow.read().filter(|now| now.meta >> 32 == snapshot.meta >> 32).unwrap_or(snapshot);
        }
        self.absorb(offload, record, &snapshot);
        snapshot
    }

    /// Adds to a record, and to the counters of its endpoint and Service port, what the kernel saw.
    fn absorb(&self, offload: &Offload, record: u32, snapshot: &Snapshot) {
        for direction in [Direction::Request, Direction::Reply] {
            let seen = offload.take(record, direction);
            if seen.packets == 0 {
                continue;
            }
            self.records[record as usize].add(direction, &seen);
            // The last row of cells is nobody's: more than one thread adds here.
            let (row, at) = (self.slots.threads() - 1, direction.index());
            let endpoint = self.slots.endpoint(row, snapshot.fields.endpoint_slot);
            let port = self.slots.port(row, snapshot.fields.port_slot);
            for (bytes, packets) in [(&endpoint.bytes, &endpoint.packets), (&port.bytes, &port.packets)] {
                bytes[at].fetch_add(seen.bytes, Relaxed);
                packets[at].fetch_add(seen.packets, Relaxed);
            }
        }
    }
}
