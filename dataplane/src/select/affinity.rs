//! ClientIP affinity: a client's new flows to a Service port go where its last one went, while that endpoint is allowed.
//!
//! Asked once a flow, so a lock is no matter. The timeout slides with each new flow, not with packets, as in kube-proxy.
//! Entries lie where the next process finds them; the index over them is built again.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;

use crate::flow::{Address, Header};
use crate::memory::Region;
use crate::table::{Endpoint, EndpointSlot, PortSlot, Slots};

/// Most clients remembered; one more is forgotten until the sweep has made room.
pub(crate) const AFFINITIES: usize = 1 << 20;
/// Entries swept at once.
const SWEEP: usize = 1 << 15;

/// What is remembered of a client. Zero is nothing.
#[repr(C)]
pub(crate) struct AffinityEntry {
    client: [AtomicU64; 2],
    /// Identity of the endpoint.
    endpoint: AtomicU64,
    used_ms: AtomicU64,
    timeout_ms: AtomicU64,
    port: AtomicU32,
    /// Checksum of the rest, never 0; 0 while the entry is not in use or being written.
    seal: AtomicU32,
}

const _: () = assert!(size_of::<AffinityEntry>() == 48);

impl AffinityEntry {
    fn write(&self, port: PortSlot, client: Address, endpoint: u64, used_ms: u64, timeout_ms: u64) {
        self.seal.store(0, Relaxed);
        std::sync::atomic::fence(Release);
        for (word, value) in self.client.iter().zip(client.words()) {
            word.store(value, Relaxed);
        }
        self.endpoint.store(endpoint, Relaxed);
        self.used_ms.store(used_ms, Relaxed);
        self.timeout_ms.store(timeout_ms, Relaxed);
        self.port.store(port.0, Relaxed);
        self.seal.store(self.checksum(), Release);
    }

    fn checksum(&self) -> u32 {
        let words = [&self.client[0], &self.client[1], &self.endpoint, &self.used_ms, &self.timeout_ms];
        let mut bytes = [0; 48];
        let all = words.map(|word| word.load(Relaxed)).into_iter().chain([u64::from(self.port.load(Relaxed))]);
        for (to, word) in bytes.chunks_exact_mut(8).zip(all) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        crc32c::crc32c(&bytes).max(1)
    }

    fn key(&self) -> (PortSlot, Address) {
        let client = Address::from_words([self.client[0].load(Relaxed), self.client[1].load(Relaxed)]);
        (PortSlot(self.port.load(Relaxed)), client)
    }

    fn is_stale(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.used_ms.load(Relaxed)) > self.timeout_ms.load(Relaxed)
    }
}

#[derive(Default)]
struct Index {
    clients: AHashMap<(PortSlot, Address), u32>,
    free: Vec<u32>,
    used: u32,
    hand: u32,
}

/// What is remembered of clients.
pub struct Affinity {
    entries: Region<AffinityEntry>,
    header: Arc<Region<Header>>,
    index: Mutex<Index>,
}

impl Affinity {
    /// What lies in this memory.
    pub(crate) fn over(entries: Region<AffinityEntry>, header: Arc<Region<Header>>) -> Self {
        let mut index = Index { used: header[0].affinities_used.load(Relaxed), ..Index::default() };
        for (number, entry) in entries.iter().enumerate().take(index.used as usize) {
            if entry.seal.load(Relaxed) == entry.checksum()
                && index.clients.insert(entry.key(), number as u32).is_none()
            {
                continue;
            }
            entry.seal.store(0, Relaxed);
            index.free.push(number as u32);
        }
        Self { entries, header, index: Mutex::new(index) }
    }

    /// The position in `list` of the endpoint that the client had, if it is remembered and still in it.
    pub fn recall(
        &self,
        port: PortSlot,
        client: Address,
        list: &[Endpoint],
        slots: &Slots,
        now_ms: u64,
    ) -> Option<usize> {
        let index = self.lock();
        let entry = &self.entries[*index.clients.get(&(port, client))? as usize];
        if entry.is_stale(now_ms) {
            return None;
        }
        let identity = entry.endpoint.load(Relaxed);
        list.iter().position(|endpoint| slots.identity(endpoint.slot) == identity)
    }

    /// Remembers where a flow of the client was opened.
    pub fn remember(
        &self,
        port: PortSlot,
        client: Address,
        endpoint: EndpointSlot,
        slots: &Slots,
        timeout: Duration,
        now_ms: u64,
    ) {
        let mut index = self.lock();
        let known = index.clients.get(&(port, client)).copied();
        let Some(number) = known.or_else(|| self.take(&mut index)) else { return };
        self.entries[number as usize].write(port, client, slots.identity(endpoint), now_ms, timeout.as_millis() as u64);
        index.clients.insert((port, client), number);
    }

    /// Forgets what is stale among some entries; the next call goes on where this one stopped.
    pub fn sweep(&self, now_ms: u64) {
        let mut index = self.lock();
        for _ in 0..SWEEP.min(index.used as usize) {
            index.hand = (index.hand + 1) % index.used;
            let (number, entry) = (index.hand, &self.entries[index.hand as usize]);
            if entry.seal.load(Relaxed) != 0 && entry.is_stale(now_ms) {
                entry.seal.store(0, Relaxed);
                index.clients.remove(&entry.key());
                index.free.push(number);
            }
        }
    }

    fn take(&self, index: &mut Index) -> Option<u32> {
        if let Some(number) = index.free.pop() {
            return Some(number);
        }
        let used = index.used as usize;
        if used == self.entries.len() || self.entries.reserve(used + 1).is_err() {
            return None;
        }
        index.used += 1;
        self.header[0].affinities_used.store(index.used, Relaxed);
        Some(index.used - 1)
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
