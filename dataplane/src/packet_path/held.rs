//! Clients that wait for a first endpoint: their SYNs, unanswered, until one is there or their time is up. Bounded.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;

use crate::flow::FlowKey;
use crate::table::PortSlot;

/// Clients that may wait at a time; more are refused at once.
const CAPACITY: usize = 8192;
/// Longest SYN that is kept, with its IP header.
const SYN_LIMIT: usize = 120;

/// How a SYN to a Service without endpoints is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meets {
    /// It waits, or did already.
    Waits,
    /// It may not: there are too many, or it is longer than a SYN should be.
    NoRoom,
}

/// What a Service port's waiting clients came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldTotals {
    /// Waiting now.
    pub waiting: u64,
    /// Waited so far, those that still do among them.
    pub held: u64,
    /// An endpoint came in time.
    pub released: u64,
    /// None did: they were refused.
    pub expired: u64,
}

/// A SYN that waits.
pub(super) struct Waiting {
    port: PortSlot,
    pub(super) syn: Box<[u8]>,
    /// Its checksum is for the kernel to finish.
    pub(super) partial: bool,
    deadline_ms: u64,
}

#[derive(Default)]
struct Clients {
    waiting: AHashMap<FlowKey, Waiting>,
    totals: AHashMap<PortSlot, HeldTotals>,
}

/// All that wait.
#[derive(Default)]
pub(super) struct Held {
    /// Spares packets of Services that have endpoints the lock.
    count: AtomicUsize,
    clients: Mutex<Clients>,
}

impl Held {
    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Relaxed) == 0
    }

    /// Takes a SYN in.
    pub(super) fn wait(
        &self,
        key: &FlowKey,
        port: PortSlot,
        (syn, partial): (&[u8], bool),
        hold: Duration,
        now_ms: u64,
    ) -> Meets {
        let clients = &mut *self.lock();
        if clients.waiting.contains_key(key) {
            return Meets::Waits;
        }
        if clients.waiting.len() >= CAPACITY || syn.len() > SYN_LIMIT {
            return Meets::NoRoom;
        }
        let deadline_ms = now_ms.saturating_add(hold.as_millis() as u64);
        clients.waiting.insert(*key, Waiting { port, syn: syn.into(), partial, deadline_ms });
        let totals = clients.totals.entry(port).or_default();
        totals.held += 1;
        totals.waiting += 1;
        self.count.store(clients.waiting.len(), Relaxed);
        Meets::Waits
    }

    /// A client that waited has an endpoint: its SYN came once more.
    pub(super) fn released(&self, key: &FlowKey) {
        if !self.is_empty() {
            let clients = &mut *self.lock();
            self.remove(clients, key, |totals| totals.released += 1);
        }
    }

    /// Takes out who has an endpoint now, as `is_served` says, and whose time is up.
    pub(super) fn take_due(&self, now_ms: u64, mut is_served: impl FnMut(&FlowKey) -> bool) -> Vec<Waiting> {
        let clients = &mut *self.lock();
        let mut due = Vec::new();
        for (key, waiting) in &clients.waiting {
            let served = is_served(key);
            if served || waiting.deadline_ms <= now_ms {
                due.push((*key, served));
            }
        }
        let count = |served: bool| {
            move |totals: &mut HeldTotals| if served { totals.released += 1 } else { totals.expired += 1 }
        };
        due.into_iter().filter_map(|(key, served)| self.remove(clients, &key, count(served))).collect()
    }

    /// What a Service port's waiting clients came to.
    pub(super) fn totals(&self, port: PortSlot) -> Option<HeldTotals> {
        self.lock().totals.get(&port).copied()
    }

    fn remove(&self, clients: &mut Clients, key: &FlowKey, count: impl Fn(&mut HeldTotals)) -> Option<Waiting> {
        let waiting = clients.waiting.remove(key)?;
        let totals = clients.totals.entry(waiting.port).or_default();
        totals.waiting = totals.waiting.saturating_sub(1);
        count(totals);
        self.count.store(clients.waiting.len(), Relaxed);
        Some(waiting)
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
