//! Who holds which value of a pool: explicit values win, made-up ones come from a fixed hash and stay where they are.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;

use ahash::AHashMap;
use sluice_dataplane::table::ServiceName;
use xxhash_rust::xxh3::xxh3_64;

/// What a value is made up for: a part of a Service, such as one of its ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Holder {
    pub(crate) service: ServiceName,
    pub(crate) part: String,
}

/// Values in use.
#[derive(Debug)]
pub(crate) struct Allocator<V> {
    explicit: AHashMap<V, BTreeSet<ServiceName>>,
    claims: AHashMap<ServiceName, BTreeSet<V>>,
    taken: AHashMap<V, Holder>,
    held: BTreeMap<Holder, V>,
    /// Of an earlier run: wanted again, unless it is taken.
    remembered: BTreeMap<Holder, V>,
}

impl<V> Default for Allocator<V> {
    fn default() -> Self {
        let (explicit, claims, taken) = (AHashMap::new(), AHashMap::new(), AHashMap::new());
        Self { explicit, claims, taken, held: BTreeMap::new(), remembered: BTreeMap::new() }
    }
}

impl<V: Copy + Eq + Hash + Ord> Allocator<V> {
    /// Says which values a Service has explicitly now. Returns the Services that lose a made-up one by it.
    pub(crate) fn claim(&mut self, service: &ServiceName, values: BTreeSet<V>) -> Vec<ServiceName> {
        for value in self.claims.remove(service).into_iter().flatten() {
            if let Some(services) = self.explicit.get_mut(&value) {
                services.remove(service);
                if services.is_empty() {
                    self.explicit.remove(&value);
                }
            }
        }
        let mut losers = Vec::new();
        for value in &values {
            self.explicit.entry(*value).or_default().insert(service.clone());
            if let Some(holder) = self.taken.remove(value) {
                self.held.remove(&holder);
                losers.push(holder.service);
            }
        }
        if !values.is_empty() {
            self.claims.insert(service.clone(), values);
        }
        losers
    }

    /// Gives back all made-up values of a Service but those for `parts`.
    pub(crate) fn keep_only(&mut self, service: &ServiceName, parts: &[String]) {
        let from = Holder { service: service.clone(), part: String::new() };
        let held = self.held.range(from..).take_while(|(holder, _)| holder.service == *service);
        let given_up: Vec<Holder> =
            held.map(|(holder, _)| holder).filter(|holder| !parts.contains(&holder.part)).cloned().collect();
        for holder in given_up {
            if let Some(value) = self.held.remove(&holder) {
                self.taken.remove(&value);
            }
        }
    }

    /// Hands out what was remembered, before anybody else can get it.
    pub(crate) fn restore(&mut self, holder: &Holder, fits: impl Fn(V) -> bool) {
        if self.held.contains_key(holder) {
            return;
        }
        if let Some(value) = self.remembered.remove(holder).filter(|value| fits(*value) && self.is_free(*value)) {
            self.take(holder.clone(), value);
        }
    }

    /// The value held, or the first free candidate.
    pub(crate) fn allocate(&mut self, holder: Holder, candidates: impl IntoIterator<Item = V>) -> Option<V> {
        if let Some(value) = self.held.get(&holder) {
            return Some(*value);
        }
        let value = candidates.into_iter().find(|value| self.is_free(*value))?;
        self.take(holder, value);
        Some(value)
    }

    /// Every made-up value.
    pub(crate) fn held(&self) -> &BTreeMap<Holder, V> {
        &self.held
    }

    /// Values of an earlier run.
    pub(crate) fn remember(&mut self, values: BTreeMap<Holder, V>) {
        self.remembered = values;
    }

    fn is_free(&self, value: V) -> bool {
        !self.taken.contains_key(&value) && !self.explicit.contains_key(&value)
    }

    fn take(&mut self, holder: Holder, value: V) {
        self.taken.insert(value, holder.clone());
        self.held.insert(holder, value);
    }
}

/// Every offset of a pool of `size`, beginning at a place that only the holder decides: the same in every process and
/// version. The lowest offsets, which people like to choose by hand, come last.
pub(crate) fn probe(holder: &Holder, size: u128) -> impl Iterator<Item = u128> + use<> {
    let reserved = if size < 64 { 0 } else { (size / 16).clamp(16, 256) };
    let count = size - reserved;
    let hash = u128::from(xxh3_64(format!("{}:{}", holder.service, holder.part).as_bytes()));
    let upper = (0..count).map(move |step| reserved + (hash + step) % count);
    upper.chain(0..reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(name: &str) -> Holder {
        Holder { service: ServiceName::new("default", name), part: String::new() }
    }

    #[test]
    fn probing_meets_every_offset_once() {
        for size in [0, 1, 2, 63, 64, 1000] {
            let mut offsets: Vec<u128> = probe(&holder("a"), size).collect();
            offsets.sort_unstable();
            assert_eq!(offsets, (0..size).collect::<Vec<_>>(), "{size}");
        }
    }

    #[test]
    fn the_hash_is_fixed() {
        assert_eq!(probe(&holder("a"), 65534).next(), Some(19_971));
    }

    #[test]
    fn collisions_go_on_to_the_next_and_holders_stay() {
        let mut pool = Allocator::default();
        assert_eq!(pool.allocate(holder("a"), [1, 2, 3]), Some(1));
        assert_eq!(pool.allocate(holder("b"), [1, 2, 3]), Some(2));
        assert_eq!(pool.allocate(holder("a"), [3]), Some(1));
        pool.keep_only(&holder("a").service, &[]);
        assert_eq!(pool.allocate(holder("b"), [1, 2, 3]), Some(2));
        assert_eq!(pool.allocate(holder("c"), [2, 1]), Some(1));
        assert_eq!(pool.allocate(holder("d"), [1, 2]), None);
    }

    #[test]
    fn explicit_values_move_the_holder() {
        let mut pool = Allocator::default();
        pool.allocate(holder("a"), [1, 2]);
        assert_eq!(pool.claim(&holder("x").service, BTreeSet::from([1, 7])), [holder("a").service]);
        assert_eq!(pool.allocate(holder("a"), [1, 2]), Some(2));
        assert!(pool.claim(&holder("x").service, BTreeSet::new()).is_empty());
        assert_eq!(pool.allocate(holder("b"), [1]), Some(1));
    }

    #[test]
    fn what_was_remembered_is_wanted_again_unless_it_is_taken_or_out_of_range() {
        let mut pool = Allocator::default();
        pool.remember(BTreeMap::from([(holder("a"), 5), (holder("b"), 6), (holder("c"), 99)]));
        pool.claim(&holder("x").service, BTreeSet::from([6]));
        for (name, expected) in [("a", 5), ("b", 1), ("c", 2)] {
            pool.restore(&holder(name), |value| value < 10);
            assert_eq!(pool.allocate(holder(name), [1, 2]), Some(expected), "{name}");
        }
    }
}
