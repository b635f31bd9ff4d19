//! Flows that the kernel carries: what it saw of them is added to their records whenever those are looked at.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::record::{Snapshot, Source};
use super::table::Writer;
use super::{FlowTable, Hit, State};
use crate::net::Direction;
use crate::offload::{Course, FlowTraffic, Level, Offload};

impl FlowTable {
    /// The same, with the kernel carrying what it can. It brings us the replies of all connections that it carried for the last process.
    pub(crate) fn with_offload(mut self, offload: Option<Arc<Offload>>) -> Self {
        let Some(offload) = offload else { return self };
        self.offload = Some(Arc::clone(&offload));
        for (record, life) in offload.known_before() {
            if let Some(hit) = self.records.get(record as usize).and_then(|_| self.hit(record))
                && hit.snapshot.life() == life
                && !hit.state().is_finished()
            {
                offload.hold(record, hit.fields(), self.masquerade());
            }
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
        if offload.level(hit.record) == Level::Held || offload.hold(hit.record, hit.fields(), self.masquerade()) {
            offload.carry((hit.record, hit.snapshot.life()), is_answered);
        }
        match self.now(hit).map(|now| now.state()) {
            Some(State::HalfClosedByClient) => self.note_fin(hit, Direction::Request),
            Some(State::HalfClosedByEndpoint) => self.note_fin(hit, Direction::Reply),
            _ => {}
        }
    }

    /// A FIN of this hit came to us. Whoever sees the other one is to know that it was the last.
    pub(super) fn see_fin(&self, hit: &Hit) {
        if self.offloaded(hit) == Level::Carried {
            let _writer = self.lock();
            self.note_fin(hit, hit.direction);
        }
    }

    /// The same for the holder of the lock.
    fn note_fin(&self, hit: &Hit, direction: Direction) {
        let traffic = self.offload.as_ref().and_then(|offload| offload.traffic(hit.record));
        if let Some(traffic) = traffic.filter(|_| self.now(hit).is_some()) {
            traffic.note_fin(direction);
        }
    }

    /// Has the kernel bring us the replies of a TCP flow that has just begun.
    pub(crate) fn hold(&self, hit: &Hit) {
        let Some(offload) = &self.offload else { return };
        let _writer = self.lock();
        if offload.level(hit.record) == Level::None && self.now(hit).is_some() {
            offload.hold(hit.record, hit.fields(), self.masquerade());
        }
    }

    /// How far a flow is the kernel's.
    pub(crate) fn offloaded(&self, hit: &Hit) -> Level {
        self.offload.as_ref().map_or(Level::None, |offload| offload.level(hit.record))
    }

    /// Takes in what the kernel saw lately, and what the last process' program saw. Returns how many connections are over.
    pub(crate) fn look_at_offloaded(&self, now_ms: u64) -> usize {
        let Some(offload) = &self.offload else { return 0 };
        let of_life = |(record, life): (u32, u32)| {
            let snapshot = self.records.get(record as usize)?.read()?;
            (snapshot.life() == life).then_some((record, snapshot))
        };
        if let Some(inherited) = offload.take_inherited() {
            let _writer = self.lock();
            for traffic in inherited.iter() {
                if let Some((record, snapshot)) = traffic.owner().and_then(of_life) {
                    let snapshot = self.advanced(record, snapshot, traffic.course());
                    self.add(offload, traffic, record, &snapshot);
                }
            }
        }
        let mut over = 0;
        for owner in offload.seen() {
            let mut writer = self.lock();
            if let Some((record, snapshot)) = of_life(owner) {
                let snapshot = self.settled(record, snapshot);
                self.absorb(&mut writer, record, &snapshot);
                // The last acknowledgement is carried too.
                if snapshot.state().is_finished() && offload.rests(record, now_ms) {
                    self.take_back(&mut writer, record, &snapshot);
                    over += 1;
                }
            }
        }
        over
    }

    /// Has all packets of a flow that is over but for the last of them come to us.
    pub(super) fn take_back(&self, writer: &mut Writer, record: u32, snapshot: &Snapshot) {
        let Some(offload) = self.offload.as_ref().filter(|offload| offload.level(record) == Level::Carried) else {
            return;
        };
        let fields = &snapshot.fields;
        // Nothing but the program tells replies to the client's own address from others.
        let is_held = fields.source == Source::Preserved;
        match is_held {
            true => offload.divert(record),
            false => offload.remove(record),
        }
        self.absorb(writer, record, snapshot);
        offload.release(record, fields.endpoint_slot, is_held);
    }

    /// The kernel forgets a flow.
    pub(super) fn end_offload(&self, writer: &mut Writer, snapshot: &Snapshot, record: u32) {
        let Some(offload) = &self.offload else { return };
        if offload.level(record) != Level::None {
            offload.remove(record);
            self.settled(record, *snapshot);
            self.absorb(writer, record, snapshot);
            offload.release(record, snapshot.fields.endpoint_slot, false);
        }
    }

    /// A record's flow as far as the kernel saw it come.
    pub(super) fn settled(&self, record: u32, snapshot: Snapshot) -> Snapshot {
        let Some(offload) = &self.offload else { return snapshot };
        let Some(traffic) = offload.traffic(record) else { return snapshot };
        let course = traffic.course();
        if traffic.owner() != Some((record, snapshot.life())) {
            // The place has become another flow's meanwhile.
            return snapshot;
        }
        let snapshot = self.advanced(record, snapshot, course);
        if snapshot.state().is_finished() {
            offload.note_end(traffic, snapshot.fields.endpoint_slot);
        }
        snapshot
    }

    /// Takes a flow to where the kernel saw it come.
    fn advanced(&self, record: u32, snapshot: Snapshot, course: Course) -> Snapshot {
        let step = |state| after(state, course);
        if step(snapshot.state()) == snapshot.state() {
            return snapshot;
        }
        self.step(record, &snapshot, step);
        self.now(&Hit { record, snapshot, direction: Direction::Request }).unwrap_or(snapshot)
    }

    /// Adds what the kernel saw of a flow to its record, before that is asked.
    pub(super) fn catch_up(&self, hit: &Hit) {
        if self.offloaded(hit) == Level::Carried {
            self.caught_up(&mut self.lock(), hit);
        }
    }

    /// The same for the holder of the lock.
    pub(super) fn caught_up(&self, writer: &mut Writer, hit: &Hit) {
        if self.now(hit).is_some() {
            self.absorb(writer, hit.record, &hit.snapshot);
        }
    }

    /// Adds what the kernel saw to the record of a flow that lives. Only one may at a time.
    pub(super) fn absorb(&self, _: &mut Writer, record: u32, snapshot: &Snapshot) {
        if let Some(offload) = &self.offload
            && let Some(traffic) = offload.traffic(record)
        {
            self.add(offload, traffic, record, snapshot);
        }
    }

    fn add(&self, offload: &Offload, traffic: &FlowTraffic, record: u32, snapshot: &Snapshot) {
        for direction in [Direction::Request, Direction::Reply] {
            let Some(seen) = traffic.take(direction) else { continue };
            offload.add(seen.packets);
            self.records[record as usize].add(direction, &seen);
            // The last row of cells is for these alone.
            let (row, at) = (self.slots.threads() - 1, direction.index());
            let endpoint = self.slots.endpoint(row, snapshot.fields.endpoint_slot);
            let port = self.slots.port(row, snapshot.fields.port_slot);
            for (bytes, packets) in [(&endpoint.bytes, &endpoint.packets), (&port.bytes, &port.packets)] {
                bytes[at].fetch_add(seen.bytes, Relaxed);
                packets[at].fetch_add(u64::from(seen.packets), Relaxed);
            }
        }
    }
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
