//! A Service compiled for answers: record sets by port, endpoints by label. Made once for each change of the Service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ahash::AHashSet;

use super::spec::{NamedEndpoint, NamedPort, NamedService, Stands};

/// A Service as the zone has it.
#[derive(Debug)]
pub(super) struct Compiled {
    /// What it was made of.
    pub(super) spec: NamedService,
    /// Distinct endpoints, by label; equal labels are neighbours.
    pub(super) endpoints: Box<[Entry]>,
    /// What the plain name answers.
    pub(super) all: Arc<RecordSet>,
    /// What names of ports answer.
    pub(super) ports: Box<[PortSet]>,
}

/// A mention of an endpoint; its label is in lower case.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) label: Arc<str>,
    pub(super) address: IpAddr,
    pub(super) ports: Arc<[NamedPort]>,
}

/// What `_name._protocol` answers.
#[derive(Debug)]
pub(super) struct PortSet {
    pub(super) name: Box<str>,
    pub(super) protocol: Box<str>,
    pub(super) records: Arc<RecordSet>,
}

/// Records of a name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct RecordSet {
    pub(super) v4: Box<[Ipv4Addr]>,
    pub(super) v6: Box<[Ipv6Addr]>,
    /// Distinct targets with their port; no label is the Service's own name.
    pub(super) targets: Box<[(Option<Arc<str>>, u16)]>,
    /// Distinct addresses of the targets.
    pub(super) target_addresses: Box<[(Option<Arc<str>>, IpAddr)]>,
    /// Weight of every target.
    pub(super) weight: u16,
    /// Nothing at all: the name does not exist.
    pub(super) is_empty: bool,
}

impl Compiled {
    pub(super) fn new(spec: NamedService) -> Self {
        let mut endpoints: Vec<Entry> = spec.endpoints.iter().map(Entry::new).collect();
        endpoints.sort_by(|a, b| a.label.cmp(&b.label));
        let (pairs, own) = pairs(&spec);
        let mut all = RecordSet::new(pairs.iter().cloned());
        if let Some(own) = own {
            (all.v4, all.v6) = split(&own);
        }
        let all = Arc::new(all);
        let mut ports: Vec<PortSet> = Vec::new();
        for (_, _, port) in &pairs {
            if port.name.is_empty() || ports.iter().any(|set| *set.name == *port.name && set.protocol == port.protocol)
            {
                continue;
            }
            let same = |pair: &&Pair<'_>| pair.2.name == port.name && pair.2.protocol == port.protocol;
            let records = RecordSet::new(pairs.iter().filter(same).cloned());
            let records = if records == *all { Arc::clone(&all) } else { Arc::new(records) };
            ports.push(PortSet { name: port.name.clone(), protocol: port.protocol.clone(), records });
        }
        Self { endpoints: endpoints.into(), all, ports: ports.into(), spec }
    }

    /// What a port's name answers.
    pub(super) fn port(&self, name: &[u8], protocol: &[u8]) -> Option<&RecordSet> {
        let mut sets = self.ports.iter();
        sets.find(|set| set.name.as_bytes() == name && set.protocol.as_bytes() == protocol).map(|set| &*set.records)
    }

    /// What an endpoint's name answers.
    pub(super) fn endpoint(&self, label: &[u8]) -> RecordSet {
        let first = self.endpoints.partition_point(|entry| entry.label.as_bytes() < label);
        let same = self.endpoints[first..].iter().take_while(|entry| entry.label.as_bytes() == label);
        RecordSet::new(same.flat_map(|entry| entry.ports.iter().map(|port| (Some(&entry.label), entry.address, port))))
    }
}

impl Entry {
    fn new(endpoint: &NamedEndpoint) -> Self {
        let label = if endpoint.label.bytes().any(|byte| byte.is_ascii_uppercase()) {
            endpoint.label.to_ascii_lowercase().into()
        } else {
            Arc::clone(&endpoint.label)
        };
        Self { label, address: endpoint.address, ports: Arc::clone(&endpoint.ports) }
    }
}

/// A label, an address and a port that belong together.
type Pair<'s> = (Option<&'s Arc<str>>, IpAddr, &'s NamedPort);

/// Everything that the plain name stands for, repetitions included: weights are counted before those are dropped. And the
/// addresses it answers, where those are others.
fn pairs(spec: &NamedService) -> (Vec<Pair<'_>>, Option<Vec<IpAddr>>) {
    let of_endpoints = || {
        let endpoints = spec.endpoints.iter();
        endpoints.flat_map(|endpoint| endpoint.ports.iter().map(|port| (Some(&endpoint.label), endpoint.address, port)))
    };
    match &spec.stands {
        Stands::Addresses { addresses, ports } => {
            let pairs = ports.iter().flat_map(|port| addresses.iter().map(move |address| (None, *address, port)));
            (pairs.collect(), None)
        }
        Stands::Endpoints { instead } if instead.is_empty() => (of_endpoints().collect(), None),
        Stands::Endpoints { instead } => (of_endpoints().collect(), Some(instead.clone())),
        Stands::Name(_) | Stands::Nothing => (Vec::new(), None),
    }
}

fn split(addresses: &[IpAddr]) -> (Box<[Ipv4Addr]>, Box<[Ipv6Addr]>) {
    let v4 = addresses.iter().filter_map(|address| if let IpAddr::V4(it) = address { Some(*it) } else { None });
    let v6 = addresses.iter().filter_map(|address| if let IpAddr::V6(it) = address { Some(*it) } else { None });
    (v4.collect(), v6.collect())
}

impl RecordSet {
    fn new<'s>(pairs: impl Iterator<Item = Pair<'s>>) -> Self {
        let (mut count, mut addresses, mut known) = (0_usize, Vec::new(), AHashSet::new());
        let (mut targets, mut known_targets) = (Vec::new(), AHashSet::new());
        let (mut target_addresses, mut known_addresses) = (Vec::new(), AHashSet::new());
        for (label, address, port) in pairs {
            count += 1;
            if known.insert(address) {
                addresses.push(address);
            }
            let Some(number) = port.number else { continue };
            if known_targets.insert((label, number)) {
                targets.push((label.cloned(), number));
            }
            if known_addresses.insert((label, address)) {
                target_addresses.push((label.cloned(), address));
            }
        }
        let (v4, v6) = split(&addresses);
        let weight = u16::try_from(100 / count.max(1)).unwrap_or(1).max(1);
        let (targets, target_addresses) = (targets.into(), target_addresses.into());
        Self { v4, v6, targets, target_addresses, weight, is_empty: count == 0 }
    }
}
