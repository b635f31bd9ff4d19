//! Ends the flows of endpoints that are gone: TCP connections by a RST to both ends, the rest by forgetting them.
//!
//! A RST counts only with exactly the sequence number that its receiver expects (RFC 5961 §3.2): the last acknowledgement
//! number that it sent. Where that is behind by data it had not acknowledged yet, it answers with a challenge, and the
//! flow, kept as *reset* for a while, answers that with the right number.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{FlowKey, FlowTable, Hit, State};
use crate::net::{Direction, Protocol};
use crate::table::Life;
use crate::table::lifecycle::Cause;

/// A RST for one end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// Its addresses and ports: from the other end as the receiver knows it, to the receiver.
    pub key: FlowKey,
    /// The sequence number that the receiver expects.
    pub sequence: u32,
    /// What the receiver has sent and the other end has seen.
    pub acknowledgement: u32,
}

/// Flows ended so far, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// TCP, reset: the endpoint was terminating and left its slices.
    pub terminated: u64,
    /// TCP, reset: the drain deadline passed.
    pub deadline: u64,
    /// UDP, SCTP, and TCP connections that nobody had answered yet: forgotten.
    pub forgotten: u64,
}

#[derive(Default)]
pub(super) struct EndedCounters {
    terminated: AtomicU64,
    deadline: AtomicU64,
    forgotten: AtomicU64,
}

/// How far a pass over the table went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The record to go on with; none when the pass is over.
    pub next: Option<usize>,
    /// Flows ended.
    pub ended: usize,
}

impl FlowTable {
    /// Ends flows of endpoints that are gone, from record number `from` on: at most `flows` flows among `records` records.
    /// Takes the table's lock only to forget a flow, never to reset a connection.
    pub fn end_gone(&self, from: usize, records: usize, flows: usize, mut send: impl FnMut(&Reset)) -> Progress {
        let (used, mut ended) = (self.used(), 0);
        let stop = used.min(from + records);
        for record in from..stop {
            if ended == flows {
                return Progress { next: Some(record), ended };
            }
            if let Some(hit) = self.hit(record as u32)
                && let Some(Life::Gone(cause)) = self.slots().life(hit.fields().endpoint_slot)
            {
                ended += usize::from(self.end_one(hit, cause, &mut send));
            }
        }
        Progress { next: (stop < used).then_some(stop), ended }
    }

    /// Flows ended so far because their endpoints were gone.
    pub fn ended(&self) -> Ended {
        let ended = self.ended_counters();
        Ended {
            terminated: ended.terminated.load(Relaxed),
            deadline: ended.deadline.load(Relaxed),
            forgotten: ended.forgotten.load(Relaxed),
        }
    }

    /// The RST for the end that sends packets of this direction.
    pub fn reset_for(&self, hit: &Hit, receiver: Direction) -> Reset {
        let key = hit.fields().key(receiver, self.masquerade()).reversed();
        let (sequence, acknowledgement) = self.last_acknowledged(hit, receiver);
        Reset { key, sequence, acknowledgement }
    }

    fn end_one(&self, hit: Hit, cause: Cause, send: &mut impl FnMut(&Reset)) -> bool {
        let counters = self.ended_counters();
        // A client that nobody answered asks again in a second: then another endpoint may be there.
        if hit.fields().request.protocol != Protocol::Tcp || self.is_unanswered(&hit) {
            self.close(&hit);
            counters.forgotten.fetch_add(1, Relaxed);
            return true;
        }
        if self.advance(&hit, |_| State::Reset).is_none_or(State::is_finished) {
            return false;
        }
        for receiver in [Direction::Request, Direction::Reply] {
            send(&self.reset_for(&hit, receiver));
        }
        let counter = match cause {
            Cause::Terminated => &counters.terminated,
            Cause::Deadline => &counters.deadline,
        };
        counter.fetch_add(1, Relaxed);
        true
    }
}
