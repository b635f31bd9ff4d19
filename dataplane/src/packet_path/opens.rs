//! What is kept of connections that are being opened, to open them at another endpoint: bounded, and only for a while.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::flow::FlowKey;
use crate::table::EndpointSlot;

/// Times that a connection is moved to another endpoint.
pub(super) const MOVES: usize = 2;
/// Masquerade ports that are tried towards one endpoint besides the first.
const PORTS: usize = 32;
/// Bytes of the longest SYN that is kept: an IPv6 header and a TCP header with all its options, and some more.
const SYN_LIMIT: usize = 120;
/// Connections kept at most. A newer one takes an older one's place, which then is not retried.
const CAPACITY: usize = 8192;

/// One connection that is being opened.
pub(super) struct Open {
    key: Option<FlowKey>,
    tried: [EndpointSlot; MOVES + 1],
    tries: usize,
    syn: [u8; SYN_LIMIT],
    length: usize,
    /// The SYN's checksum is for the kernel to finish.
    partial: bool,
    /// Masquerade ports that were tried besides the first.
    ports: usize,
}

impl Open {
    const NONE: Self = Self {
        key: None,
        tried: [EndpointSlot(0); MOVES + 1],
        tries: 0,
        syn: [0; SYN_LIMIT],
        length: 0,
        partial: false,
        ports: 0,
    };

    /// Endpoints it was sent to; nothing once it may not be moved any more.
    pub(super) fn tried(&self) -> Option<&[EndpointSlot]> {
        (self.tries <= MOVES).then(|| &self.tried[..self.tries])
    }

    /// Notes that it was sent to one more.
    pub(super) fn try_at(&mut self, endpoint: EndpointSlot) {
        if let Some(place) = self.tried.get_mut(self.tries) {
            *place = endpoint;
            self.tries += 1;
        }
    }

    /// Notes that one more masquerade port is tried; `false` once it were too many.
    pub(super) fn try_port(&mut self) -> bool {
        self.ports += 1;
        self.ports <= PORTS && self.length > 0
    }

    /// The client's SYN as it came, and whether its checksum is partial. Empty when it was too long to keep.
    pub(super) fn syn(&self) -> (&[u8], bool) {
        (&self.syn[..self.length], self.partial)
    }
}

/// The connections that are being opened now.
pub(super) struct Opens {
    places: Box<[Mutex<Open>]>,
    hasher: ahash::RandomState,
}

impl Opens {
    /// Places enough for a table of this many flows.
    pub(super) fn new(flows: usize) -> Self {
        let places = flows.clamp(1, CAPACITY);
        Self { places: (0..places).map(|_| Mutex::new(Open::NONE)).collect(), hasher: ahash::RandomState::new() }
    }

    /// Keeps the SYN of a new connection.
    pub(super) fn keep(&self, key: &FlowKey, endpoint: EndpointSlot, syn: &[u8], partial: bool) {
        let mut open = self.lock(key);
        let length = if syn.len() <= SYN_LIMIT { syn.len() } else { 0 };
        *open = Open { key: Some(*key), length, partial, ..Open::NONE };
        open.syn[..length].copy_from_slice(&syn[..length]);
        open.try_at(endpoint);
    }

    /// What was kept of a connection.
    pub(super) fn find(&self, key: &FlowKey) -> Option<MutexGuard<'_, Open>> {
        Some(self.lock(key)).filter(|open| open.key == Some(*key))
    }

    fn lock(&self, key: &FlowKey) -> MutexGuard<'_, Open> {
        let place = self.hasher.hash_one(key) as usize % self.places.len();
        self.places[place].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
