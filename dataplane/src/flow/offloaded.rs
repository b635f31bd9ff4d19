//! Flows that the kernel carries: what it saw of them is added to their records whenever those are looked at.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::record::{Snapshot, Source};
use super::{FlowTable, Hit, State};
use crate::net::{Direction, Protocol};
use crate::offload::{Course, FlowTraffic, Level, Offload};

impl FlowTable {
    /// The same, with the kernel carrying what it can. It brings us the replies of all connections that go on.
    pub(crate) fn with_offload(mut self, offload: Option<Arc<Offload>>) -> Self {
        let Some(offload) = offload else { return self };
        self.offload = Some(Arc::clone(&offload));
        let is_open = |hit: &Hit| hit.fields().request.protocol == Protocol::Tcp && !hit.state().is_finished();
        for hit in (0..self.used() as u32).filter_map(|record| self.hit(record)).filter(is_open) {
            offload.hold(hit.record, hit.fields(), self.masquerade());
        }
        self
    }

    /// Has the kernel carry a TCP flow, unless its life is over; `is_answered`: the endpoint has accepted it.
    pub(crate) fn carry(&self, hit: &Hit, is_answered: bool) {
        let Some(offload) = &self.offload else { return };
        let _writer = self.lock();
        if offload.level(hit.record) == Level::Carried || self.now(hit).is_none_or(|now| now.state().is_finished()) {
            return;
        }
        let was_held = offload.level(hit.record) == Level::Held;
        let life = (hit.record, life_of(&hit.snapshot));
        if !offload.carry(life, hit.fields(), self.masquerade(), is_answered) && was_held {
            offload.hold(hit.record, hit.fields(), self.masquerade());
        }
    }

    /// How far a flow is the kernel's.
    pub(crate) fn offloaded(&self, hit: &Hit) -> Level {
        self.offload.as_ref().map_or(Level::None, |offload| offload.level(hit.record))
    }

    /// Takes in what the kernel saw lately: connections that closed, and what the last process' program saw.
    pub(crate) fn look_at_offloaded(&self) {
        let Some(offload) = &self.offload else { return };
        let of_life = |(record, life): (u32, u32)| {
            let snapshot = self.records.get(record as usize)?.read()?;
            (life_of(&snapshot) == life).then_some((record, snapshot))
        };
        if let Some(inherited) = offload.take_inherited() {
            for traffic in inherited.iter() {
                if let Some((record, snapshot)) = traffic.owner().and_then(of_life) {
                    let snapshot = self.advanced(record, snapshot, traffic.course());
                    self.absorb(offload, traffic, record, &snapshot);
                }
            }
        }
        for (record, snapshot) in offload.finished().filter_map(of_life) {
            let hit = Hit { snapshot: self.settled(record, snapshot), record, direction: Direction::Request };
            self.take_back(&hit);
        }
    }

    /// Has all packets of a flow come to us again: it is over but for the last of them.
    pub(super) fn take_back(&self, hit: &Hit) {
        let Some(offload) = &self.offload else { return };
        let _writer = self.lock();
        if offload.level(hit.record) != Level::Carried || self.now(hit).is_none() {
            return;
        }
        let (fields, masquerade) = (hit.fields(), self.masquerade());
        // Nothing but the program tells replies to the client's own address from others.
        let is_held = fields.source == Source::Preserved && offload.divert(fields, masquerade);
        if !is_held {
            offload.remove(fields, masquerade);
        }
        self.settled(hit.record, hit.snapshot);
        offload.release(hit.record, fields.endpoint_slot);
        if is_held {
            offload.set_held(hit.record);
        }
    }

    /// The kernel forgets a flow. Only for the holder of the lock.
    pub(super) fn end_offload(&self, snapshot: &Snapshot, record: u32) {
        let Some(offload) = &self.offload else { return };
        if offload.level(record) != Level::None {
            offload.remove(&snapshot.fields, self.masquerade());
            self.settled(record, *snapshot);
            offload.release(record, snapshot.fields.endpoint_slot);
        }
    }

    /// A record's flow as it is, with all that the kernel saw of it.
    pub(super) fn settled(&self, record: u32, snapshot: Snapshot) -> Snapshot {
        let Some((offload, traffic)) =
            self.offload.as_ref().and_then(|offload| Some((offload, offload.traffic(record)?)))
        else {
            return snapshot;
        };
        let snapshot = self.advanced(record, snapshot, traffic.course());
        if snapshot.state().is_finished() {
            offload.account(traffic, snapshot.fields.endpoint_slot);
        }
        self.absorb(offload, traffic, record, &snapshot);
        snapshot
    }

    /// Takes a flow to where the kernel saw it come.
    fn advanced(&self, record: u32, snapshot: Snapshot, course: Course) -> Snapshot {
        let step = |state| after(state, course);
        if step(snapshot.state()) == snapshot.state() {
            return snapshot;
        }
        let flow = &self.records[record as usize];
        let before = flow.advance(snapshot.meta, step);
        if before.is_some_and(|before| step(before).is_finished() && !before.is_finished()) {
            self.slots.flow_finished(snapshot.fields.endpoint_slot);
        }
        flow.read().filter(|now| life_of(now) == life_of(&snapshot)).unwrap_or(snapshot)
    }

    /// Adds to a record, and to the counters of its endpoint and Service port, what the kernel saw.
    fn absorb(&self, offload: &Offload, traffic: &FlowTraffic, record: u32, snapshot: &Snapshot) {
        for direction in [Direction::Request, Direction::Reply] {
            let Some(seen) = traffic.take(direction) else { continue };
            offload.add(seen.packets);
            self.records[record as usize].add(direction, &seen);
            // The last row of cells is nobody's: more than one thread adds here.
            let (row, at) = (self.slots.threads() - 1, direction.index());
            let endpoint = self.slots.endpoint(row, snapshot.fields.endpoint_slot);
            let port = self.slots.port(row, snapshot.fields.port_slot);
            for (bytes, packets) in [(&endpoint.bytes, &endpoint.packets), (&port.bytes, &port.packets)] {
                bytes[at].fetch_add(seen.bytes, Relaxed);
                packets[at].fetch_add(u64::from(seen.packets), Relaxed);
            }
        }
    }

    /// The hit's flow now, if its life goes on.
    fn now(&self, hit: &Hit) -> Option<Snapshot> {
        self.records[hit.record as usize].read().filter(|now| life_of(now) == life_of(&hit.snapshot))
    }
}

fn life_of(snapshot: &Snapshot) -> u32 {
    (snapshot.meta >> 32) as u32
}

/// The state of a connection that was seen to come so far.
fn after(state: State, course: Course) -> State {
    let opened = if state == State::Opening && course.is_open { State::Established } else { state };
    match (opened, course.fin) {
        (State::Opening | State::Established, [true, false]) => State::HalfClosedByClient,
        (State::Opening | State::Established, [false, true]) => State::HalfClosedByEndpoint,
        (State::Opening | State::Established, [true, true])
        | (State::HalfClosedByClient, [_, true])
        | (State::HalfClosedByEndpoint, [true, _]) => State::Closing,
        _ => opened,
    }
}
