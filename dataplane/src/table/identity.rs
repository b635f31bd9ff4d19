//! Who a Service port and an endpoint are, across tables and processes; and the slot numbers they have.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ahash::{AHashMap, AHashSet, RandomState};
use hashbrown::HashTable;
use xxhash_rust::xxh3::Xxh3;

use super::{ServiceName, Uid};
use crate::net::Protocol;

/// A Service port across families and tables: whose counters these are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PortName {
    /// Service.
    pub service: ServiceName,
    /// Port name, empty when unnamed.
    pub port: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
}

/// An endpoint of a Service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointName {
    /// Service port; all its endpoints have one copy of its name.
    pub port: Arc<PortName>,
    /// Address and port.
    pub address: SocketAddr,
    /// Who has the address.
    pub uid: Uid,
}

/// An address as IPv6 has it.
pub(super) fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// Names that are the same in every process.
pub(super) trait Identity: Clone + Eq + std::hash::Hash {
    /// A hash that is never zero and never changes, from release to release.
    fn identity(&self) -> u64;
}

impl PortName {
    fn feed(&self, hash: &mut Xxh3) {
        for part in [&self.service.namespace, &self.service.name, &self.port] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.update(&[self.protocol as u8]);
    }
}

impl Identity for PortName {
    fn identity(&self) -> u64 {
        let mut hash = Xxh3::new();
        self.feed(&mut hash);
        hash.digest().max(1)
    }
}

impl Identity for EndpointName {
    fn identity(&self) -> u64 {
        let mut hash = Xxh3::new();
        self.port.feed(&mut hash);
        hash.update(&mapped(self.address.ip()).octets());
        hash.update(&self.address.port().to_le_bytes());
        hash.update(&self.uid.0.to_le_bytes());
        hash.digest().max(1)
    }
}

/// Names and their numbers, from 1: each name is there once, and finding one by name costs four bytes more.
struct Names<K> {
    by_number: Vec<Option<K>>,
    numbers: HashTable<u32>,
    hashing: RandomState,
}

impl<K: Identity> Names<K> {
    fn get(&self, name: &K) -> Option<u32> {
        let is_it = |number: &u32| self.by_number[*number as usize].as_ref() == Some(name);
        self.numbers.find(self.hashing.hash_one(name), is_it).copied()
    }

    /// Gives a name a number that no other name has. One that it had before is nobody's now.
    fn insert(&mut self, name: K, number: u32) {
        self.remove(&name);
        let index = number as usize;
        if index >= self.by_number.capacity() {
            // Not twice as much each time: of a quarter of a million names, the half of that may stay empty.
            self.by_number.reserve_exact(index + 1 + (index / 16).max(64) - self.by_number.len());
        }
        if index >= self.by_number.len() {
            self.by_number.resize_with(index + 1, || None);
        }
        let hash = self.hashing.hash_one(&name);
        self.by_number[index] = Some(name);
        let (names, hashing) = (&self.by_number, &self.hashing);
        let hash_of = |other: &u32| names[*other as usize].as_ref().map_or(0, |name| hashing.hash_one(name));
        self.numbers.insert_unique(hash, number, hash_of);
    }

    fn remove(&mut self, name: &K) {
        let names = &self.by_number;
        let is_it = |number: &u32| names[*number as usize].as_ref() == Some(name);
        if let Ok(entry) = self.numbers.find_entry(self.hashing.hash_one(name), is_it) {
            let (number, _) = entry.remove();
            self.by_number[number as usize] = None;
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&K, u32)> {
        (0..).zip(&self.by_number).filter_map(|(number, name)| Some((name.as_ref()?, number)))
    }
}

/// Numbers for names; a retired name keeps its number until it is released, and gets it back when it returns.
pub(super) struct Numbers<K> {
    names: Names<K>,
    /// Retired names, and whether a release has met them before.
    retired: AHashMap<K, bool>,
    /// Numbers whose names mean others now, and whether a release has met them before.
    orphans: AHashMap<u32, bool>,
    /// Numbers of the last process, by identity, whose names have not come back yet, and whether a release has met them
    /// before.
    recovered: AHashMap<u64, (u32, bool)>,
    /// Names that were there have come back by now: the others are as good as retired.
    synced: bool,
    free: Vec<u32>,
    next: u32,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self {
            names: Names { by_number: Vec::new(), numbers: HashTable::new(), hashing: RandomState::new() },
            retired: AHashMap::new(),
            orphans: AHashMap::new(),
            recovered: AHashMap::new(),
            synced: false,
            free: Vec::new(),
            next: 1,
        }
    }
}

impl<K: Identity> Numbers<K> {
    /// Goes on with the numbers of the last process; those that are spent are for nobody any more.
    pub(super) fn recover(numbers: &[(u64, u32)], is_spent: impl Fn(u32) -> bool) -> Self {
        let mut all = Self::default();
        for (identity, number) in numbers {
            let entry = (*number, false);
            let orphan = if is_spent(*number) { Some(entry) } else { all.recovered.insert(*identity, entry) };
            all.orphans.extend(orphan);
            all.next = all.next.max(number + 1);
        }
        let taken: AHashSet<u32> = numbers.iter().map(|(_, number)| *number).collect();
        all.free = (1..all.next).rev().filter(|number| !taken.contains(number)).collect();
        all
    }

    /// Numbers of the last process whose names have not come back: from now on they are retired.
    pub(super) fn synced(&mut self) -> Vec<u32> {
        self.synced = true;
        self.recovered.values().map(|(number, _)| *number).collect()
    }

    pub(super) fn get(&self, name: &K) -> Option<u32> {
        self.names.get(name)
    }

    /// Every name that has a number, retired or not.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, u32)> {
        self.names.iter()
    }

    /// Names that are retired and have a number.
    pub(super) fn retired(&self) -> impl Iterator<Item = &K> {
        self.retired.keys()
    }

    /// The number of a name. A name that has none, or whose number `is_spent`, gets another, which `assign` is told.
    pub(super) fn intern(&mut self, name: &K, is_spent: impl Fn(u32) -> bool, assign: impl FnOnce(u32, u64)) -> u32 {
        self.retired.remove(name);
        match self.get(name) {
            Some(number) if !is_spent(number) => return number,
            Some(number) => self.orphans.insert(number, false),
            None => None,
        };
        let known = self.recovered.remove(&name.identity()).map(|(number, _)| number);
        self.orphans.extend(known.filter(|number| is_spent(*number)).map(|number| (number, false)));
        let known = known.filter(|number| !is_spent(*number));
        let number = known.or_else(|| self.free.pop()).unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
        assign(number, name.identity());
        self.names.insert(name.clone(), number);
        number
    }

    pub(super) fn retire(&mut self, name: &K) -> Option<u32> {
        let number = self.get(name)?;
        self.retired.insert(name.clone(), false);
        Some(number)
    }

    /// Frees retired numbers that were met by the last release too and that `may` lets go.
    pub(super) fn release(&mut self, mut may: impl FnMut(u32) -> bool) {
        let (names, free) = (&mut self.names, &mut self.free);
        let mut frees = |number: u32, met: &mut bool| {
            let released = std::mem::replace(met, true) && may(number);
            if released {
                free.push(number);
            }
            released
        };
        self.retired.retain(|name, met| {
            let Some(number) = names.get(name) else { return false };
            let released = frees(number, met);
            if released {
                names.remove(name);
            }
            !released
        });
        self.orphans.retain(|number, met| !frees(*number, met));
        if self.synced {
            self.recovered.retain(|_, (number, met)| !frees(*number, met));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(port: &str, address: &str, uid: u64) -> EndpointName {
        let port = PortName { service: ServiceName::new("ns", "a"), port: port.into(), protocol: Protocol::Tcp };
        EndpointName { port: port.into(), address: address.parse().unwrap(), uid: Uid(uid) }
    }

    #[test]
    fn identities_never_change_and_tell_endpoints_apart() {
        // A change of these figures makes every flow file in the field forget its endpoints.
        assert_eq!(endpoint("http", "10.0.0.1:80", 7).identity(), 6_495_893_640_776_637_427);
        assert_eq!(endpoint("http", "10.0.0.1:80", 7).port.identity(), 3_798_890_126_734_533_971);
        let others = [
            endpoint("http", "10.0.0.1:80", 8),
            endpoint("http", "10.0.0.1:81", 7),
            endpoint("http", "10.0.0.2:80", 7),
            endpoint("https", "10.0.0.1:80", 7),
        ];
        assert!(others.iter().all(|other| other.identity() != endpoint("http", "10.0.0.1:80", 7).identity()));
    }

    #[test]
    fn a_spent_number_is_another_name_s_only_when_released() {
        let (name, mut numbers) = (endpoint("", "10.0.0.1:80", 0), Numbers::default());
        let first = numbers.intern(&name, |_| false, |_, _| {});
        assert_eq!(numbers.intern(&name, |_| false, |_, _| panic!("it has one")), first);
        let second = numbers.intern(&name, |number| number == first, |_, _| {});
        assert_ne!(second, first);
        let other = endpoint("", "10.0.0.2:80", 0);
        assert!(![first, second].contains(&numbers.intern(&other, |_| false, |_, _| {})));
        (0..2).for_each(|_| numbers.release(|number| number == first));
        assert_eq!(numbers.intern(&endpoint("", "10.0.0.3:80", 0), |_| false, |_, _| {}), first);
        assert_eq!(numbers.get(&name), Some(second));
    }
}
