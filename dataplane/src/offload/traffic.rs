//! What the program saw of connections, in memory that it and we share.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::net::Direction;

/// What was seen of one direction of a flow. A cache line of its own: each direction is carried by another processor, as a rule.
#[repr(C, align(64))]
pub(super) struct Traffic {
    /// Since it was last asked for.
    pub(super) bytes: AtomicU64,
    /// When, in nanoseconds of the monotonic clock; 0: nothing yet. Until then an endpoint has not accepted the connection.
    pub(super) seen_ns: AtomicU64,
    /// Since it was last asked for.
    pub(super) packets: AtomicU32,
    /// The last acknowledgement number, in network order.
    pub(super) acknowledged: AtomicU32,
    /// A FIN was among them: 1.
    pub(super) fin: AtomicU32,
    /// Of requests only: directions with a FIN.
    pub(super) fins: AtomicU32,
    /// Of requests only: whose flow it is, number of the life in the upper half, of the record in the lower.
    pub(super) owner: AtomicU64,
}

/// Bytes of it.
pub(super) const DIRECTION: usize = size_of::<Traffic>();
const _: () = assert!(DIRECTION.is_power_of_two());

/// What was seen of a flow.
#[repr(C)]
pub(crate) struct FlowTraffic {
    pub(super) directions: [Traffic; 2],
}

/// What was seen of an endpoint's connections.
#[repr(C)]
pub(crate) struct Carried {
    /// Connections of which both ends were seen to close, and which are still counted as active.
    pub(crate) finished: AtomicU32,
    /// Connections that it accepted since this was last asked for.
    pub(crate) answered: AtomicU32,
}

/// What was seen of one direction of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Since it was last asked for.
    pub(crate) bytes: u64,
    pub(crate) packets: u32,
    /// Milliseconds of the monotonic clock.
    pub(crate) last_ms: u64,
    /// The last acknowledgement number; 0: none.
    pub(crate) acknowledged: u32,
}

/// How far a connection was seen to have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Course {
    /// Both ends have sent what opens it.
    pub(crate) is_open: bool,
    /// Which directions have seen a FIN.
    pub(crate) fin: [bool; 2],
}

impl FlowTraffic {
    /// Nothing of this flow was seen yet; `is_answered`: but that its endpoint accepted it.
    pub(super) fn begin(&self, record: u32, life: u32, is_answered: bool) {
        self.directions[0].owner.store(u64::from(life) << 32 | u64::from(record), Relaxed);
        for traffic in &self.directions {
            traffic.bytes.store(0, Relaxed);
            traffic.seen_ns.store(0, Relaxed);
            for word in [&traffic.packets, &traffic.acknowledged, &traffic.fin, &traffic.fins] {
                word.store(0, Relaxed);
            }
        }
        self.directions[Direction::Reply.index()].seen_ns.store(u64::from(is_answered), Relaxed);
    }

    /// Whether something was seen that was not asked for.
    pub(super) fn has_news(&self) -> bool {
        let mut directions = self.directions.iter();
        directions.any(|traffic| traffic.packets.load(Relaxed) != 0 || traffic.fin.load(Relaxed) != 0)
    }

    /// Whose it is: number of the record, and of its life.
    pub(crate) fn owner(&self) -> Option<(u32, u32)> {
        let owner = self.directions[0].owner.load(Relaxed);
        (owner != 0).then_some((owner as u32, (owner >> 32) as u32))
    }

    /// A FIN that the program did not see. Of two, the program counts the one that it sees last.
    pub(crate) fn note_fin(&self, direction: Direction) {
        if self.directions[direction.index()].fin.swap(1, Relaxed) == 0 {
            // Where this is the second, the record says so.
            let _ = self.directions[0].fins.compare_exchange(0, 1, Relaxed, Relaxed);
        }
    }

    /// How far the connection has come.
    pub(crate) fn course(&self) -> Course {
        let [request, reply] = &self.directions;
        let is_open = request.packets.load(Relaxed) != 0 && reply.seen_ns.load(Relaxed) != 0;
        Course { is_open, fin: [request, reply].map(|traffic| traffic.fin.load(Relaxed) != 0) }
    }

    /// What was seen of a direction since this was last asked for, if anything.
    pub(crate) fn take(&self, direction: Direction) -> Option<Seen> {
        let traffic = &self.directions[direction.index()];
        // Mostly there is nothing, and then nothing is written.
        if traffic.packets.load(Relaxed) == 0 {
            return None;
        }
        Some(Seen {
            packets: traffic.packets.swap(0, Relaxed),
            bytes: traffic.bytes.swap(0, Relaxed),
            last_ms: traffic.seen_ns.load(Relaxed) / 1_000_000,
            acknowledged: u32::from_be(traffic.acknowledged.load(Relaxed)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    #[test]
    fn a_fin_that_came_to_us_makes_the_programs_the_last() {
        let traffic = Region::<FlowTraffic>::heap(1);
        let [request, reply] = &traffic[0].directions;
        traffic[0].note_fin(Direction::Reply);
        traffic[0].note_fin(Direction::Reply);
        assert_eq!((request.fins.load(Relaxed), reply.fin.load(Relaxed)), (1, 1), "a repeated one counts once");
        // As the program does, before ours.
        traffic[0].begin(7, 1, true);
        request.fin.store(1, Relaxed);
        request.fins.store(1, Relaxed);
        traffic[0].note_fin(Direction::Reply);
        assert_eq!(request.fins.load(Relaxed), 1, "two mean that the program has seen the last");
        assert_eq!(traffic[0].course().fin, [true, true]);
    }
}
