//! What all threads, and the next process, share of an endpoint: who it is, where in its life, how many flows it has.
//!
//! Lives change under one lock, which no packet thread takes. What packets must know of them ([`Standing`]) lies apart,
//! where nothing else is written.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;

use super::event::{LifeChange, LifeEvent};
use super::lifecycle::{Cause, Condition, Deadline, DrainTimeout, Life};
use super::slots::{EndpointSlot, PortSlot, Slots};
use super::spec::Uid;
use crate::flow::Header;
use crate::memory::Region;

/// An endpoint's entry: one cache line; zero is a slot that nobody has.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct EndpointEntry {
    /// Hash of Service port, address and uid; 0 = free.
    pub(super) identity: AtomicU64,
    /// Packed [`Life`].
    pub(super) life: AtomicU64,
    /// Drain timeout in milliseconds; `u64::MAX` = never.
    pub(super) drain_timeout: AtomicU64,
    /// When it began to drain, in milliseconds; 0 = it does not, or the clock was not read yet.
    pub(super) drains_since: AtomicU64,
    /// When it entered its list, in milliseconds; 0 = the clock was not read yet.
    pub(super) entered: AtomicU64,
    /// It gets no new flows until then, in milliseconds.
    pub(super) ejected_until: AtomicU64,
    /// Flows that are open now.
    pub(super) active: AtomicU32,
    /// Flow records, of closing flows too: the slot is not free while there are any.
    pub(super) held: AtomicU32,
    /// Masquerade ports tried so far: the next one is tried first.
    pub(super) source_ports: AtomicU32,
    /// Failed opens since the last success.
    pub(super) failures: AtomicU16,
    /// Ejections since the last success.
    pub(super) ejections: AtomicU16,
}

/// A Service port's entry; zero is a slot that nobody has.
#[derive(Default)]
#[repr(C)]
pub(crate) struct PortEntry {
    /// Hash of its name; 0 = free.
    pub(super) identity: AtomicU64,
    /// Round-robin position.
    pub(super) cursor: AtomicU32,
    unused: AtomicU32,
}

const _: () = assert!(size_of::<EndpointEntry>() == 64 && size_of::<PortEntry>() == 16);

/// What a packet must know of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub(crate) enum Standing {
    /// Its flows go on.
    Serves = 0,
    /// UDP flows end at their next packet.
    NoDatagrams = 1,
    /// No flow goes on.
    Gone = 2,
}

impl Standing {
    pub(super) fn of(life: Option<Life>) -> Self {
        match life {
            Some(Life::Gone(_)) => Self::Gone,
            Some(life) if life.keeps_datagrams() => Self::Serves,
            Some(_) => Self::NoDatagrams,
            None => Self::Serves,
        }
    }

    pub(super) fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Serves,
            1 => Self::NoDatagrams,
            _ => Self::Gone,
        }
    }
}

/// Events kept for who asks late; older ones are dropped.
const EVENTS: usize = 4096;

/// What the lock guards.
#[derive(Default)]
struct Watch {
    /// Endpoints that drain or are gone, and whether there is nothing to tell of their flows: they had none, or their end
    /// was told.
    leaving: AHashMap<EndpointSlot, bool>,
    /// Endpoints that entered their list since the last look at the clock.
    entered: Vec<EndpointSlot>,
    /// Another process has the entries now: nothing may be written.
    released: bool,
    events: VecDeque<LifeEvent>,
}

impl Watch {
    fn tell(&mut self, slot: EndpointSlot, change: LifeChange, flows: u32) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(LifeEvent { slot, change, flows });
    }
}

/// Entries by slot number.
pub(crate) struct Directory {
    pub(super) endpoints: Region<EndpointEntry>,
    /// Who the endpoints are, besides their addresses.
    pub(super) uids: Region<AtomicU64>,
    pub(super) ports: Region<PortEntry>,
    header: Arc<Region<Header>>,
    watch: Mutex<Watch>,
}

/// Slot numbers that the last process had given away, by identity.
#[derive(Default)]
pub(super) struct Recovered {
    pub(super) endpoints: Vec<(u64, u32)>,
    pub(super) ports: Vec<(u64, u32)>,
}

impl Directory {
    pub(crate) fn new(
        endpoints: Region<EndpointEntry>,
        uids: Region<AtomicU64>,
        ports: Region<PortEntry>,
        header: Arc<Region<Header>>,
    ) -> Self {
        Self { endpoints, uids, ports, header, watch: Mutex::default() }
    }

    /// What the last process left.
    pub(super) fn recovered(&self) -> Recovered {
        let used = |word: &AtomicU32| word.load(Relaxed).min(Slots::CAPACITY) as usize;
        let identities = |words: &mut dyn Iterator<Item = &AtomicU64>| {
            let words = words.map(|word| word.load(Relaxed)).enumerate();
            words.filter(|(_, identity)| *identity != 0).map(|(slot, identity)| (identity, slot as u32)).collect()
        };
        let endpoints = self.endpoints[..used(&self.header[0].endpoints_used)].iter();
        let ports = self.ports[..used(&self.header[0].ports_used)].iter();
        Recovered {
            endpoints: identities(&mut endpoints.map(|entry| &entry.identity)),
            ports: identities(&mut ports.map(|entry| &entry.identity)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watch> {
        // Nothing that runs under the lock panics half-way through a change.
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// Where an endpoint is in its life; none for a slot that nobody has.
    pub fn life(&self, slot: EndpointSlot) -> Option<Life> {
        Life::unpack(self.entry(slot).life.load(Relaxed))
    }

    /// Since when an endpoint drains, in milliseconds of the packet path's clock.
    pub fn drains_since(&self, slot: EndpointSlot) -> Option<u64> {
        Some(self.entry(slot).drains_since.load(Relaxed)).filter(|since| *since != 0)
    }

    /// Endpoints that drain, and those that are gone but have flows to be ended.
    pub fn leaving(&self) -> Vec<EndpointSlot> {
        self.directory.lock().leaving.keys().copied().collect()
    }

    /// What happened since the last call; the oldest is lost when nobody asks for long.
    pub fn take_events(&self) -> Vec<LifeEvent> {
        self.directory.lock().events.drain(..).collect()
    }

    /// Takes in what the last process left of lives: nobody may use the slots yet.
    pub(super) fn recover(&self) {
        let mut watch = self.directory.lock();
        for (_, slot) in self.directory.recovered().endpoints {
            let (slot, entry) = (EndpointSlot(slot), &self.directory.endpoints[slot as usize]);
            entry.active.store(0, Relaxed);
            entry.held.store(0, Relaxed);
            let life = self.life(slot);
            self.set_standing(slot, Standing::of(life));
            if life.is_some_and(leaves) {
                watch.leaving.insert(slot, true);
            }
            if entry.entered.load(Relaxed) == 0 {
                watch.entered.push(slot);
            }
        }
    }

    /// Whether somebody has the endpoint's slot, and the port's is one. A port's may be nobody's: the Service is gone, and
    /// its endpoints drain.
    pub(crate) fn exists(&self, endpoint: EndpointSlot, port: PortSlot) -> bool {
        let endpoint = self.directory.endpoints.get(endpoint.0 as usize);
        endpoint.is_some_and(|entry| entry.identity.load(Relaxed) != 0) && port.0 < Self::CAPACITY
    }

    /// Who an endpoint is, the same in every process; 0 for a slot that nobody has.
    pub(crate) fn identity(&self, slot: EndpointSlot) -> u64 {
        self.entry(slot).identity.load(Relaxed)
    }

    /// Who has the slot, besides its address.
    pub(super) fn uid(&self, slot: EndpointSlot) -> Uid {
        Uid(self.directory.uids[slot.0 as usize].load(Relaxed))
    }

    /// From now on nothing is written: another process has it all.
    pub(crate) fn release(&self) {
        self.directory.lock().released = true;
    }

    /// Gives a slot to an endpoint.
    pub(super) fn assign_endpoint(&self, slot: EndpointSlot, identity: u64, uid: Uid) {
        let watch = self.directory.lock();
        if !watch.released {
            self.directory.uids[slot.0 as usize].store(uid.0, Relaxed);
            // What has an identity has its uid, whenever the process ends.
            self.entry(slot).identity.store(identity, Release);
            self.directory.header[0].endpoints_used.fetch_max(slot.0 + 1, Relaxed);
        }
    }

    /// Gives a slot to a Service port; 0: to nobody.
    pub(super) fn assign_port(&self, slot: PortSlot, identity: u64) {
        let watch = self.directory.lock();
        if !watch.released {
            self.directory.ports[slot.0 as usize].identity.store(identity, Relaxed);
            self.directory.header[0].ports_used.fetch_max(slot.0 + 1, Relaxed);
        }
    }

    /// Takes in what the slices, and the operator, say of an endpoint.
    pub(super) fn see(&self, slot: EndpointSlot, condition: Condition, drain: Option<Deadline>, timeout: DrainTimeout) {
        let timeout = match timeout {
            DrainTimeout::After(timeout) => timeout.as_millis() as u64,
            DrainTimeout::Never => u64::MAX,
        };
        let mut watch = self.directory.lock();
        if watch.released {
            return;
        }
        self.entry(slot).drain_timeout.store(timeout, Relaxed);
        let life = self.life(slot).unwrap_or(Life::Present { condition, drain });
        self.become_now(&mut watch, slot, life.seen(condition, drain));
    }

    /// The endpoint enters its list: it is new.
    pub(crate) fn enter(&self, slot: EndpointSlot) {
        let mut watch = self.directory.lock();
        if !watch.released {
            self.entry(slot).entered.store(0, Relaxed);
            watch.entered.push(slot);
        }
    }

    /// Whether the endpoint has been in a list for long enough for the clock to know.
    pub(super) fn has_entered(&self, slot: EndpointSlot) -> bool {
        self.entry(slot).entered.load(Relaxed) != 0
    }

    /// Notes an event for whoever asks.
    pub(super) fn tell(&self, slot: EndpointSlot, change: LifeChange) {
        self.directory.lock().tell(slot, change, self.active(slot));
    }

    /// An endpoint that left and drains has its address no more: it is gone.
    pub(super) fn end_left(&self, slot: EndpointSlot) {
        let mut watch = self.directory.lock();
        if !watch.released && matches!(self.life(slot), Some(Life::Left { .. })) {
            self.become_now(&mut watch, slot, Life::Gone(Cause::Terminated));
        }
    }

    /// The endpoint is in its slices no more.
    pub(super) fn leave(&self, slot: EndpointSlot) {
        let mut watch = self.directory.lock();
        let Some(life) = self.life(slot).filter(|_| !watch.released) else { return };
        let timeout = match self.entry(slot).drain_timeout.load(Relaxed) {
            u64::MAX => DrainTimeout::Never,
            timeout => DrainTimeout::After(Duration::from_millis(timeout)),
        };
        self.become_now(&mut watch, slot, life.left(timeout));
    }

    /// Moves lives on. Returns whether an endpoint is gone that still has flows.
    pub(crate) fn tick(&self, now_ms: u64) -> bool {
        let mut watch = self.directory.lock();
        if watch.released {
            return false;
        }
        for slot in std::mem::take(&mut watch.entered) {
            self.entry(slot).entered.store(now_ms.max(1), Relaxed);
        }
        let mut flows_to_end = false;
        let leaving: Vec<(EndpointSlot, bool)> = watch.leaving.iter().map(|(slot, told)| (*slot, *told)).collect();
        for (slot, told) in leaving {
            let (entry, Some(life)) = (self.entry(slot), self.life(slot)) else { continue };
            let _ = entry.drains_since.compare_exchange(0, now_ms, Relaxed, Relaxed);
            let life = life.tick(now_ms);
            self.become_now(&mut watch, slot, life);
            let flows = self.active(slot);
            if flows == 0 && !told {
                let after = now_ms.saturating_sub(entry.drains_since.load(Relaxed));
                watch.tell(slot, LifeChange::Drained { after: Duration::from_millis(after) }, 0);
            }
            watch.leaving.insert(slot, flows == 0);
            flows_to_end |= flows > 0 && matches!(life, Life::Gone(_));
        }
        flows_to_end
    }

    /// Zeroes an endpoint's cells before the slot serves another endpoint. No flow may hold the slot.
    pub(super) fn clear_endpoint(&self, slot: EndpointSlot) {
        let mut watch = self.directory.lock();
        if watch.released {
            return;
        }
        watch.leaving.remove(&slot);
        let entry = self.entry(slot);
        entry.identity.store(0, Relaxed);
        for word in [&entry.life, &entry.drains_since, &entry.entered, &entry.ejected_until] {
            word.store(0, Relaxed);
        }
        entry.failures.store(0, Relaxed);
        entry.ejections.store(0, Relaxed);
        self.has_answered(slot);
        self.clear_cells(slot);
    }

    fn become_now(&self, watch: &mut Watch, slot: EndpointSlot, life: Life) {
        let entry = self.entry(slot);
        let before = Life::unpack(entry.life.swap(life.pack(), Relaxed));
        self.set_standing(slot, Standing::of(Some(life)));
        if before == Some(life) {
            return;
        }
        let listed = watch.leaving.contains_key(&slot);
        let leaves = leaves(life);
        if leaves != listed {
            entry.drains_since.store(0, Relaxed);
        }
        if leaves && !listed {
            watch.leaving.insert(slot, self.active(slot) == 0);
        } else if !leaves {
            watch.leaving.remove(&slot);
        }
        // That the clock was read is no news.
        if before.map(|before| before.name()) != Some(life.name()) {
            watch.tell(slot, LifeChange::Became(life), self.active(slot));
        }
    }

    pub(super) fn entry(&self, slot: EndpointSlot) -> &EndpointEntry {
        &self.directory.endpoints[slot.0 as usize]
    }
}

fn leaves(life: Life) -> bool {
    life.drains() || matches!(life, Life::Gone(_))
}
