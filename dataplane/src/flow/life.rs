//! How a record is published, read and retired without a lock for readers: the protocol alone, over any atomic word.
//!
//! A record is *live* while its `meta` word says so. The writer, who holds the table's lock, fills the fields of a record
//! that is not live and publishes it by one store to `meta`; retiring it is one operation too, and each life has its own
//! number. A reader copies the fields between two loads of `meta` and believes them when life and liveness agree.

use std::sync::atomic::{AtomicU64, Ordering, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

/// The bit of a live record.
pub(super) const LIVE: u64 = 1;
/// The life number's lowest bit.
pub(super) const LIFE: u32 = 32;

/// An atomic word; the model check has its own.
pub(super) trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn replace(&self, seen: u64, next: u64) -> bool;
    fn fetch_and(&self, mask: u64) -> u64;
    fn fence(order: Ordering);
}

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    fn replace(&self, seen: u64, next: u64) -> bool {
        self.compare_exchange(seen, next, Relaxed, Relaxed).is_ok()
    }

    fn fetch_and(&self, mask: u64) -> u64 {
        self.fetch_and(mask, Relaxed)
    }

    fn fence(order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

/// Publishes a record that is not live. `fill` stores the fields and gives the rest of `meta`, knowing the life number in
/// its place. Only for the holder of the table's lock.
pub(super) fn publish<W: Word>(meta: &W, fill: impl FnOnce(u64) -> u64) {
    let life = (meta.load(Relaxed) >> LIFE).wrapping_add(1) << LIFE;
    let rest = fill(life);
    meta.store(life | rest | LIVE, Release);
}

/// Ends a record's life and returns its last `meta`. Only for the holder of the table's lock.
pub(super) fn retire<W: Word>(meta: &W) -> u64 {
    let last = meta.fetch_and(!LIVE);
    // Fields written by a later life stay behind this store for readers that load `meta` again.
    W::fence(Release);
    last
}

/// A consistent copy with the `meta` that it belongs to, or nothing when the record is not live or changed meanwhile.
pub(super) fn read<W: Word, T>(meta: &W, copy: impl FnOnce() -> T) -> Option<(u64, T)> {
    let before = meta.load(Acquire);
    if before & LIVE == 0 {
        return None;
    }
    let fields = copy();
    W::fence(Acquire);
    let after = meta.load(Relaxed);
    (before >> LIFE == after >> LIFE && after & LIVE != 0).then_some((before, fields))
}

/// Changes `meta` within a life, unless it changed meanwhile.
pub(super) fn change<W: Word>(meta: &W, seen: u64, next: u64) -> bool {
    next != seen && meta.replace(seen, next)
}
