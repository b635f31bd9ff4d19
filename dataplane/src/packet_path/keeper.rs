//! What a packet path does besides packets: lives of endpoints move on, flows of those that are gone are ended, silent ones
//! swept. Rounds of bounded work; time and the way out are arguments.

use std::sync::Arc;

use crate::decide::{NewFlow, Verdict};
use crate::packet::rewrite::TCP_CHECKSUM;
use crate::packet::view::Packet;
use crate::packet::{reply, vnet};
use crate::packet_path::held::Waiting;
use crate::packet_path::shared::Shared;
use crate::packet_path::worker::{Action, Worker};

/// A flow is looked at by the sweep once in this many sweeps.
const SWEEP_ROUNDS: usize = 4;
/// Milliseconds between sweeps.
const SWEEP_INTERVAL_MS: u64 = 1_000;
/// The same between looks at what the kernel carries, when so many connections were over at the last: the fewer it knows, the
/// fewer lie in memory that no cache has.
const BUSY_INTERVAL_MS: u64 = 50;
const BUSY: usize = 100;
/// Records swept under one hold of the flow table's lock.
const SWEEP_STEP: usize = 256;
/// Flows ended, and records looked at for them, in one round.
const END_FLOWS: usize = 4_096;
const END_RECORDS: usize = 262_144;

/// The state between two rounds.
pub struct Keeper {
    shared: Arc<Shared>,
    /// The record at which ending flows goes on.
    ending: Option<usize>,
    swept_ms: u64,
    looked_ms: u64,
    is_busy: bool,
    /// Opens flows for clients that waited.
    worker: Worker,
    frame: [u8; vnet::LEN + reply::LIMIT],
}

impl Keeper {
    /// Looks after what `shared` holds.
    pub fn new(shared: Arc<Shared>) -> Self {
        let thread = shared.settings.workers;
        let worker = Worker { holds: false, ..Worker::new(Arc::clone(&shared), thread) };
        Self {
            shared,
            ending: None,
            swept_ms: 0,
            looked_ms: 0,
            is_busy: false,
            worker,
            frame: [0; vnet::LEN + reply::LIMIT],
        }
    }

    /// One round. `send` takes frames: an offload header, then an IP packet. Returns whether there is more to do at once.
    pub fn round(&mut self, now_ms: u64, send: &mut dyn FnMut(&[u8])) -> bool {
        let flows_to_end = self.shared.slots.tick(now_ms);
        if flows_to_end && self.ending.is_none() {
            self.ending = Some(0);
        }
        if let Some(from) = self.ending {
            let frame = &mut self.frame;
            vnet::plain(&mut frame[..vnet::LEN]);
            let progress = self.shared.flows.end_gone(from, END_RECORDS, END_FLOWS, |reset| {
                let length = reply::reset(reset, &mut frame[vnet::LEN..]);
                send(&frame[..vnet::LEN + length]);
            });
            self.ending = progress.next;
        }
        if !self.shared.held.is_empty() {
            self.release(now_ms, send);
        }
        if now_ms.saturating_sub(self.swept_ms) >= SWEEP_INTERVAL_MS {
            self.swept_ms = now_ms;
            self.sweep(now_ms);
        }
        let interval = if self.is_busy { BUSY_INTERVAL_MS } else { SWEEP_INTERVAL_MS };
        if now_ms.saturating_sub(self.looked_ms) >= interval {
            self.looked_ms = now_ms;
            self.is_busy = self.shared.flows.look_at_offloaded(now_ms) >= BUSY;
        }
        self.ending.is_some()
    }

    /// Lets clients go on that waited for a first endpoint: to one, or to be refused.
    fn release(&mut self, now_ms: u64, send: &mut dyn FnMut(&[u8])) {
        let table = self.shared.table();
        let due = self.shared.held.take_due(now_ms, |key| {
            let flow = NewFlow { client: key.source.ip(), destination: key.destination(), protocol: key.protocol };
            matches!(table.decide(&flow).verdict, Verdict::Forward { .. })
        });
        for Waiting { syn, partial, .. } in due {
            let mut frame = vec![0; vnet::LEN + syn.len()];
            let (header, bytes) = frame.split_at_mut(vnet::LEN);
            bytes.copy_from_slice(&syn);
            // It was parsed when it came.
            let Ok(packet) = Packet::parse(bytes) else { continue };
            match partial {
                true => vnet::partial(header, packet.transport_at, TCP_CHECKSUM),
                false => vnet::plain(header),
            }
            match self.worker.handle(&mut frame, now_ms) {
                Action::Send => send(&frame),
                Action::Answer(length) => send(self.worker.answer(length)),
                Action::Discard => {}
            }
        }
    }

    fn sweep(&self, now_ms: u64) {
        let mut left = self.shared.flows.used().div_ceil(SWEEP_ROUNDS);
        while left > 0 {
            let step = left.min(SWEEP_STEP);
            self.shared.flows.sweep(now_ms, step);
            left -= step;
        }
        self.shared.affinity.sweep(now_ms);
    }
}
