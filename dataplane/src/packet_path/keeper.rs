//! What a packet path does besides packets: lives of endpoints move on, flows of those that are gone are ended, silent ones
//! swept. Rounds of bounded work; time and the way out are arguments.

use std::sync::Arc;

use crate::packet::{reply, vnet};
use crate::packet_path::shared::Shared;

/// A flow is looked at by the sweep once in this many sweeps.
const SWEEP_ROUNDS: usize = 4;
/// Milliseconds between sweeps.
const SWEEP_INTERVAL_MS: u64 = 1_000;
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
    frame: [u8; vnet::LEN + reply::LIMIT],
}

impl Keeper {
    /// Looks after what `shared` holds.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, ending: None, swept_ms: 0, frame: [0; vnet::LEN + reply::LIMIT] }
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
        if now_ms.saturating_sub(self.swept_ms) >= SWEEP_INTERVAL_MS {
            self.swept_ms = now_ms;
            self.sweep(now_ms);
        }
        self.ending.is_some()
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
