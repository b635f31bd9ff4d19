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

/// Takes `meta` one step on within the life that was `seen`, from what it is now: of two threads that do so, neither step is
/// lost. Returns what it was before, or nothing when the life is over or there was nothing to change.
pub(super) fn advance<W: Word>(meta: &W, seen: u64, step: impl Fn(u64) -> u64) -> Option<u64> {
    loop {
        let now = meta.load(Relaxed);
        if now >> LIFE != seen >> LIFE || now & LIVE == 0 {
            return None;
        }
        let next = step(now);
        if next == now {
            return None;
        }
        if meta.replace(now, next) {
            return Some(now);
        }
    }
}

/// Every interleaving, and every value that relaxed loads may see, of the steps above (loom).
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use loom::sync::Mutex;
    use loom::sync::atomic::{AtomicU64 as LoomWord, fence};
    use loom::thread;

    use super::*;

    impl Word for LoomWord {
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
            fence(order);
        }
    }

    /// A state bit, and the life number as two fields.
    const FINISHED: u64 = 2;

    struct Small {
        meta: LoomWord,
        fields: [LoomWord; 2],
    }

    impl Small {
        /// In its first life.
        fn new() -> Arc<Self> {
            let small = Self { meta: LoomWord::new(0), fields: [LoomWord::new(0), LoomWord::new(0)] };
            small.publish();
            Arc::new(small)
        }

        fn publish(&self) {
            publish(&self.meta, |life| {
                self.fields.iter().for_each(|field| field.store(life >> LIFE, Relaxed));
                0
            });
        }

        /// Reads, and checks that what was read is of one life.
        fn read(&self) -> Option<u64> {
            let (meta, fields) = read(&self.meta, || [0, 1].map(|field: usize| self.fields[field].load(Relaxed)))?;
            assert_eq!(fields, [meta >> LIFE; 2], "a torn record");
            Some(meta)
        }
    }

    #[test]
    fn a_reader_never_sees_two_lives_in_one() {
        loom::model(|| {
            let record = Small::new();
            let reader = {
                let record = Arc::clone(&record);
                thread::spawn(move || record.read())
            };
            retire(&record.meta);
            record.publish();
            let seen = reader.join().unwrap().map(|meta| meta >> LIFE);
            assert!(matches!(seen, None | Some(1 | 2)));
            assert_eq!(record.read().map(|meta| meta >> LIFE), Some(2));
        });
    }

    /// A packet finishes a flow while the sweep ends it and another takes the record: its endpoint is told once, and the
    /// other flow is not touched.
    #[test]
    fn a_flow_finishes_once_and_only_itself() {
        loom::model(|| {
            let record = Small::new();
            let packet = {
                let record = Arc::clone(&record);
                thread::spawn(move || {
                    record.read().is_some_and(|meta| advance(&record.meta, meta, |now| now | FINISHED).is_some())
                })
            };
            let finished_before = retire(&record.meta) & FINISHED != 0;
            record.publish();
            let finished_by_packet = packet.join().unwrap();
            let now = record.meta.load(Relaxed);
            if now & FINISHED != 0 {
                // The packet came late enough to be of the second life.
                assert!(finished_by_packet && !finished_before);
            } else {
                assert_eq!(finished_by_packet, finished_before);
            }
            assert_eq!(now >> LIFE, 2);
        });
    }

    /// Two threads finish a flow: one of them does.
    #[test]
    fn only_one_thread_finishes_a_flow() {
        loom::model(|| {
            let record = Small::new();
            let finish = |record: &Small| {
                record.read().is_some_and(|meta| advance(&record.meta, meta, |now| now | FINISHED).is_some())
            };
            let other = {
                let record = Arc::clone(&record);
                thread::spawn(move || finish(&record))
            };
            let here = finish(&record);
            assert!(here != other.join().unwrap());
        });
    }

    /// Both ends close at the same moment, seen by two threads: both steps count, and one of them is the last.
    #[test]
    fn no_step_is_lost() {
        const STEPS: [u64; 2] = [4, 8];
        loom::model(|| {
            let record = Small::new();
            let step = |record: &Small, bit: u64| {
                let meta = record.read().expect("nobody ends it");
                let before = advance(&record.meta, meta, |now| now | bit).expect("nobody else sets the bit");
                (before | bit) & 12 == 12
            };
            let other = {
                let record = Arc::clone(&record);
                thread::spawn(move || step(&record, STEPS[1]))
            };
            let here = step(&record, STEPS[0]);
            assert!(here != other.join().unwrap());
            assert_eq!(record.meta.load(Relaxed) & 12, 12);
        });
    }

    /// A process asks for the file while the one that has it ends a flow and opens another, then looks whether it is
    /// wanted: never do two write, and the new one finds every record whole.
    #[test]
    fn a_file_has_one_writer_and_is_whole_when_it_changes_hands() {
        loom::model(|| {
            let (record, wanted, lock) = (Small::new(), Arc::new(LoomWord::new(0)), Arc::new(Mutex::new(())));
            let writers = Arc::new(LoomWord::new(0));
            let enter = |writers: &LoomWord| assert_eq!(writers.fetch_add(1, Relaxed), 0, "two writers");
            let held = lock.lock().unwrap();
            let next = {
                let (record, wanted, lock) = (Arc::clone(&record), Arc::clone(&wanted), Arc::clone(&lock));
                let writers = Arc::clone(&writers);
                thread::spawn(move || {
                    wanted.store(1, Ordering::SeqCst);
                    let _held = lock.lock().unwrap();
                    enter(&writers);
                    let found = record.read().map(|meta| meta >> LIFE);
                    retire(&record.meta);
                    record.publish();
                    writers.fetch_sub(1, Relaxed);
                    found
                })
            };
            enter(&writers);
            retire(&record.meta);
            if wanted.load(Ordering::SeqCst) == 0 {
                record.publish();
            }
            writers.fetch_sub(1, Relaxed);
            drop(held);
            assert!(matches!(next.join().unwrap(), None | Some(2)));
            assert!(matches!(record.read().map(|meta| meta >> LIFE), Some(2 | 3)));
        });
    }
}
