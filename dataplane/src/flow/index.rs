//! The index of the flow table: open addressing over 32-bit entries, read without a lock.
//!
//! An entry is 1 + record number (22 bits), the direction whose key it stands for (1 bit) and a tag of the hash (9 bits).
//! Entries move when one is removed, so a reader may miss one; whoever misses looks again under the table's lock.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::memory::Region;
use crate::net::Direction;

const NUMBER_BITS: u32 = 22;
const NUMBER: u32 = (1 << NUMBER_BITS) - 1;
const DIRECTION: u32 = 1 << NUMBER_BITS;

/// Most records an index can number.
pub(crate) const MAX_RECORDS: usize = NUMBER as usize - 1;

pub(super) struct Index {
    entries: Region<AtomicU32>,
    mask: usize,
}

/// What an entry stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) record: u32,
    pub(super) direction: Direction,
}

impl Index {
    /// An index that is at most half full with this many records, each under two keys.
    pub(super) fn new(records: usize) -> Self {
        let size = (records * 4).next_power_of_two();
        Self { entries: Region::scattered(size), mask: size - 1 }
    }

    /// The first entry under this hash that `matches` accepts.
    pub(super) fn find<T>(&self, hash: u64, mut matches: impl FnMut(Entry) -> Option<T>) -> Option<T> {
        let mut at = self.home(hash);
        for _ in 0..self.entries.len() {
            let word = self.entries[at].load(Acquire);
            if word == 0 {
                return None;
            }
            if tag(word) == tag_of(hash)
                && let Some(found) = matches(decode(word))
            {
                return Some(found);
            }
            at = (at + 1) & self.mask;
        }
        None
    }

    /// Adds an entry. Only for the holder of the table's lock; there is room by construction.
    pub(super) fn insert(&self, hash: u64, entry: Entry) {
        let mut at = self.home(hash);
        while self.entries[at].load(Relaxed) != 0 {
            at = (at + 1) & self.mask;
        }
        self.entries[at].store(encode(hash, entry), Release);
    }

    /// Removes an entry and closes the gap. `hash_of` gives the hash of any entry. Only for the holder of the lock.
    pub(super) fn remove(&self, hash: u64, entry: Entry, hash_of: impl Fn(Entry) -> u64) {
        let mut at = self.home(hash);
        let word = encode(hash, entry);
        loop {
            match self.entries[at].load(Relaxed) {
                0 => return,
                found if found == word => break,
                _ => at = (at + 1) & self.mask,
            }
        }
        // Backward shift (Knuth, TAOCP 6.4, algorithm R): what probed past the gap moves into it.
        let mut gap = at;
        loop {
            at = (at + 1) & self.mask;
            let next = self.entries[at].load(Relaxed);
            if next == 0 {
                break;
            }
            let home = self.home(hash_of(decode(next)));
            if at.wrapping_sub(home) & self.mask >= at.wrapping_sub(gap) & self.mask {
                self.entries[gap].store(next, Release);
                gap = at;
            }
        }
        self.entries[gap].store(0, Release);
    }

    fn home(&self, hash: u64) -> usize {
        hash as usize & self.mask
    }
}

fn tag_of(hash: u64) -> u32 {
    (hash >> 55) as u32
}

fn tag(word: u32) -> u32 {
    word >> (NUMBER_BITS + 1)
}

fn encode(hash: u64, entry: Entry) -> u32 {
    let direction = if entry.direction == Direction::Reply { DIRECTION } else { 0 };
    tag_of(hash) << (NUMBER_BITS + 1) | direction | (entry.record + 1)
}

fn decode(word: u32) -> Entry {
    let direction = if word & DIRECTION == 0 { Direction::Request } else { Direction::Reply };
    Entry { record: (word & NUMBER) - 1, direction }
}
