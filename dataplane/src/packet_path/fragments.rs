//! What becomes of the later fragments of a packet, which have no ports: what became of the first. The kernel, which has had
//! the packet as a whole before it came to us, sends them in order. Bounded, and only for a while.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::flow::{Address, FlowKey};
use crate::packet::view::Packet;

/// Packets kept at most. A newer one takes an older one's place.
const CAPACITY: usize = 1024;
/// Milliseconds after its first fragment in which the others come. Then the sender may use its number again.
const PATIENCE_MS: u64 = 2_000;

/// What is done with the fragments of a packet.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fate {
    /// They go the way of this flow's packets.
    Flow(FlowKey),
    /// They are none of ours.
    Pass,
}

/// Sender, receiver, protocol and number.
type Whole = (Address, Address, u8, u32);

struct Kept {
    whole: Whole,
    fate: Fate,
    since_ms: u64,
}

/// The packets of which fragments may come.
pub(super) struct Fragments {
    places: Box<[Mutex<Option<Kept>>]>,
    hasher: ahash::RandomState,
}

impl Fragments {
    pub(super) fn new() -> Self {
        Self { places: (0..CAPACITY).map(|_| Mutex::new(None)).collect(), hasher: ahash::RandomState::new() }
    }

    /// Keeps what becomes of a packet, when it is a first fragment.
    pub(super) fn keep(&self, packet: &Packet, fate: Fate, now_ms: u64) {
        if let Some(whole) = whole(packet) {
            *self.lock(&whole) = Some(Kept { whole, fate, since_ms: now_ms });
        }
    }

    /// What became of the first fragment of this packet.
    pub(super) fn find(&self, packet: &Packet, now_ms: u64) -> Option<Fate> {
        let whole = whole(packet)?;
        let place = self.lock(&whole);
        let kept = place.as_ref().filter(|kept| kept.whole == whole)?;
        (now_ms.saturating_sub(kept.since_ms) <= PATIENCE_MS).then_some(kept.fate)
    }

    fn lock(&self, whole: &Whole) -> MutexGuard<'_, Option<Kept>> {
        let place = self.hasher.hash_one(whole) as usize % self.places.len();
        self.places[place].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn whole(packet: &Packet) -> Option<Whole> {
    let part = packet.fragment?;
    Some((packet.source, packet.destination, part.protocol, part.id))
}
