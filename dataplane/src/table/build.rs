//! Builds the next table from the last: only what a changed Service owns is touched.

use std::net::SocketAddr;
use std::sync::Arc;

use ahash::{AHashMap, AHashSet};

use super::{
    Endpoint, EndpointList, EndpointSlot, Endpoints, Frontend, FrontendKey, FrontendKind, Node, NodeSpec, PortSlot,
    PortSpec, RoutingTable, ServiceName, ServicePort, ServiceSpec, Slots,
};
use crate::net::Protocol;

/// Two Services want one frontend; the older keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The contested frontend.
    pub key: FrontendKey,
    /// Who keeps it.
    pub winner: ServiceName,
    /// Who goes without.
    pub loser: ServiceName,
}

/// A Service port across families and tables: whose counters these are.
#[derive(Clone, PartialEq, Eq, Hash)]
struct PortName(ServiceName, Arc<str>, Protocol);

/// Seniority of a claim: creation time, then name; none counts as youngest.
type Seniority = (i64, ServiceName);

/// Mutable state behind the snapshots. One owner, off the packet path.
pub struct TableBuilder {
    slots: Arc<Slots>,
    services: AHashMap<ServiceName, Owned>,
    claims: AHashMap<FrontendKey, Vec<(Seniority, Arc<Frontend>)>>,
    port_slots: Numbers<PortName>,
    endpoint_slots: Numbers<(PortName, SocketAddr)>,
    table: RoutingTable,
}

/// What a Service has in the current table.
struct Owned {
    spec: ServiceSpec,
    frontends: Vec<FrontendKey>,
}

impl TableBuilder {
    /// A builder of empty tables that counts in `slots`.
    pub fn new(slots: Arc<Slots>) -> Self {
        Self {
            slots,
            services: AHashMap::new(),
            claims: AHashMap::new(),
            port_slots: Numbers::default(),
            endpoint_slots: Numbers::default(),
            table: RoutingTable::default(),
        }
    }

    /// Where the counters are.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Replaces what is known of the node.
    pub fn set_node(&mut self, node: NodeSpec) {
        if *self.table.node.spec() != node {
            self.table.node = Arc::new(Node::new(node));
            self.table.host_version += 1;
        }
    }

    /// What is known of the node.
    pub fn node(&self) -> &NodeSpec {
        self.table.node.spec()
    }

    /// The services in force, in no order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceSpec> {
        self.services.values().map(|owned| &owned.spec)
    }

    /// Slot of a Service port that is in force.
    pub fn port_slot(&self, service: &ServiceName, port: &str, protocol: Protocol) -> Option<PortSlot> {
        self.port_slots.get(&PortName(service.clone(), port.into(), protocol)).map(PortSlot)
    }

    /// Slot of an endpoint of a Service port that is in force.
    pub fn endpoint_slot(
        &self,
        service: &ServiceName,
        port: &str,
        protocol: Protocol,
        endpoint: SocketAddr,
    ) -> Option<EndpointSlot> {
        let name = PortName(service.clone(), port.into(), protocol);
        self.endpoint_slots.get(&(name, endpoint)).map(EndpointSlot)
    }

    /// Puts a Service in place of what it had; an equal spec changes nothing. Returns whether something changed.
    pub fn set(&mut self, spec: ServiceSpec) -> bool {
        let old = match self.services.get(&spec.name) {
            Some(owned) if owned.spec == spec => return false,
            Some(_) => self.services.remove(&spec.name),
            None => None,
        };
        let seniority = (spec.created.unwrap_or(i64::MAX), spec.name.clone());
        // New claims and slots come first, so that what stays keeps its slot.
        let ports: Vec<Arc<ServicePort>> = spec.ports.iter().map(|port| self.port(&spec, port)).collect();
        let mut had = Vec::new();
        if let Some(old) = old {
            self.withdraw(&old, Some(&spec));
            had = old.frontends;
        }
        let mut frontends = Vec::new();
        for (port, built) in spec.ports.iter().zip(ports) {
            for (key, kind) in frontends_of(port) {
                let frontend = Arc::new(Frontend { key, kind, port: Arc::clone(&built) });
                self.claim(&seniority, frontend);
                frontends.push(key);
            }
        }
        if !self.outside(&had).eq(self.outside(&frontends)) {
            self.table.host_version += 1;
        }
        self.services.insert(spec.name.clone(), Owned { spec, frontends });
        true
    }

    /// Removes a Service. Returns whether it was there.
    pub fn remove(&mut self, name: &ServiceName) -> bool {
        let Some(old) = self.services.remove(name) else { return false };
        self.withdraw(&old, None);
        if self.outside(&old.frontends).next().is_some() {
            self.table.host_version += 1;
        }
        true
    }

    /// The table as it would be built now.
    pub fn current(&self) -> &RoutingTable {
        &self.table
    }

    /// Frontends that more than one Service claims, sorted.
    pub fn conflicts(&self) -> Vec<Conflict> {
        let mut conflicts: Vec<Conflict> = Vec::new();
        for (key, claims) in self.claims.iter().filter(|(_, claims)| claims.len() > 1) {
            let winner = &claims[0].0.1;
            for (loser, _) in claims.iter().skip(1).filter(|(seniority, _)| seniority.1 != *winner) {
                conflicts.push(Conflict { key: *key, winner: winner.clone(), loser: loser.1.clone() });
            }
        }
        conflicts.sort_by(|a, b| (a.key, &a.loser).cmp(&(b.key, &b.loser)));
        conflicts.dedup();
        conflicts
    }

    /// The next snapshot.
    pub fn build(&mut self) -> Arc<RoutingTable> {
        self.table.generation += 1;
        Arc::new(self.table.clone())
    }

    /// Gives slots that were retired before the last call, and whose endpoints have no flows, back for others. Call it now
    /// and then: between two calls every packet thread has seen a newer table.
    pub fn release_idle(&mut self) {
        let slots = &self.slots;
        self.endpoint_slots.release(|slot| {
            let idle = slots.active(EndpointSlot(slot)) == 0;
            if idle {
                slots.clear_endpoint(EndpointSlot(slot));
            }
            idle
        });
        self.port_slots.release(|slot| {
            slots.clear_port(PortSlot(slot));
            true
        });
    }

    fn port(&mut self, spec: &ServiceSpec, port: &PortSpec) -> Arc<ServicePort> {
        let name = PortName(spec.name.clone(), port.name.as_str().into(), port.protocol);
        let vips = if port.source_ranges_admit_vips { port.load_balancer_ips.clone() } else { Vec::new() };
        Arc::new(ServicePort {
            service: spec.name.clone(),
            name: Arc::clone(&name.1),
            protocol: port.protocol,
            number: port.number,
            family: port.family,
            slot: PortSlot(self.port_slots.intern(&name)),
            source_ranges: port.source_ranges.clone(),
            source_range_vips: vips,
            internal_policy: port.internal_policy,
            external_policy: port.external_policy,
            affinity: port.affinity,
            balancing: port.balancing,
            cluster: self.endpoints(&name, &port.cluster),
            local: self.endpoints(&name, &port.local),
            has_any_endpoint: port.has_any_endpoint,
        })
    }

    fn endpoints(&mut self, port: &PortName, list: &EndpointList) -> Endpoints {
        let mut slot = |address| EndpointSlot(self.endpoint_slots.intern(&(port.clone(), address)));
        let list_of =
            list.addresses.iter().map(|address| Endpoint { address: *address, slot: slot(*address) }).collect();
        Endpoints { list: list_of, why: list.why.as_str().into() }
    }

    /// Takes back what a Service had, except slots that `next` goes on using.
    fn withdraw(&mut self, old: &Owned, next: Option<&ServiceSpec>) {
        for key in &old.frontends {
            self.unclaim(*key, &old.spec.name);
        }
        let keep = next.map(slots_of).unwrap_or_default();
        for (port, endpoint) in slots_of(&old.spec).difference(&keep) {
            match endpoint {
                Some(address) => {
                    if let Some(slot) = self.endpoint_slots.retire(&(port.clone(), *address)) {
                        self.slots.end_epoch(EndpointSlot(slot));
                    }
                }
                None => {
                    self.port_slots.retire(port);
                }
            }
        }
    }

    /// Frontends on addresses outside the Service ranges.
    fn outside<'k>(&self, keys: &'k [FrontendKey]) -> impl Iterator<Item = &'k FrontendKey> {
        let node = Arc::clone(&self.table.node);
        keys.iter().filter(move |key| matches!(key, FrontendKey::Address(ip, ..) if !node.in_service_range(*ip)))
    }

    fn claim(&mut self, seniority: &Seniority, frontend: Arc<Frontend>) {
        let key = frontend.key;
        let claims = self.claims.entry(key).or_default();
        let at = claims.partition_point(|(other, _)| other <= seniority);
        claims.insert(at, (seniority.clone(), frontend));
        self.settle(key);
    }

    fn unclaim(&mut self, key: FrontendKey, service: &ServiceName) {
        if let Some(claims) = self.claims.get_mut(&key) {
            claims.retain(|(seniority, _)| seniority.1 != *service);
            if claims.is_empty() {
                self.claims.remove(&key);
            }
        }
        self.settle(key);
    }

    /// Makes the table hold the oldest claim of a frontend, or nothing.
    fn settle(&mut self, key: FrontendKey) {
        let next = self.claims.get(&key).map(|claims| Arc::clone(&claims[0].1));
        let is_cluster_ip = |frontend: &Arc<Frontend>| frontend.kind == FrontendKind::ClusterIp;
        let (was, is) = match next {
            Some(frontend) => {
                let is = is_cluster_ip(&frontend);
                (self.table.frontends.insert(key, frontend), is)
            }
            None => (self.table.frontends.remove(&key), false),
        };
        let FrontendKey::Address(address, ..) = key else { return };
        let was = was.as_ref().is_some_and(is_cluster_ip);
        let count = self.table.cluster_ips.get(&address).copied().unwrap_or(0) + u32::from(is) - u32::from(was);
        if count == 0 {
            self.table.cluster_ips.remove(&address);
        } else {
            self.table.cluster_ips.insert(address, count);
        }
    }
}

/// Every frontend of a port.
fn frontends_of(port: &PortSpec) -> impl Iterator<Item = (FrontendKey, FrontendKind)> {
    let address = |ip, kind| (FrontendKey::Address(ip, port.protocol, port.number), kind);
    let node_port = port.node_port.map(|number| {
        let key = FrontendKey::NodePort(port.family, port.protocol, number);
        (key, FrontendKind::NodePort)
    });
    std::iter::once(address(port.cluster_ip, FrontendKind::ClusterIp))
        .chain(port.load_balancer_ips.iter().map(move |ip| address(*ip, FrontendKind::LoadBalancer)))
        .chain(port.external_ips.iter().map(move |ip| address(*ip, FrontendKind::ExternalIp)))
        .chain(node_port)
}

/// Every slot a Service uses: its ports, and the endpoints that serve, in a list or not.
fn slots_of(spec: &ServiceSpec) -> AHashSet<(PortName, Option<SocketAddr>)> {
    let mut slots = AHashSet::new();
    for port in &spec.ports {
        let name = PortName(spec.name.clone(), port.name.as_str().into(), port.protocol);
        let lists = [&port.cluster.addresses, &port.local.addresses, &port.serving];
        slots.extend(lists.into_iter().flatten().map(|address| (name.clone(), Some(*address))));
        slots.insert((name, None));
    }
    slots
}

/// Numbers for names; a retired name keeps its number until it is released, and gets it back when it returns.
struct Numbers<K> {
    by_name: AHashMap<K, u32>,
    /// Retired names, and whether a release has met them before.
    retired: AHashMap<K, bool>,
    free: Vec<u32>,
    next: u32,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self { by_name: AHashMap::new(), retired: AHashMap::new(), free: Vec::new(), next: 1 }
    }
}

impl<K: Clone + Eq + std::hash::Hash> Numbers<K> {
    fn get(&self, name: &K) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    fn intern(&mut self, name: &K) -> u32 {
        self.retired.remove(name);
        if let Some(number) = self.by_name.get(name) {
            return *number;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        });
        self.by_name.insert(name.clone(), number);
        number
    }

    fn retire(&mut self, name: &K) -> Option<u32> {
        let number = self.get(name)?;
        self.retired.insert(name.clone(), false);
        Some(number)
    }

    fn release(&mut self, mut may: impl FnMut(u32) -> bool) {
        let (by_name, free) = (&mut self.by_name, &mut self.free);
        self.retired.retain(|name, met| {
            let Some(number) = by_name.get(name).copied() else { return false };
            let released = std::mem::replace(met, true) && may(number);
            if released {
                by_name.remove(name);
                free.push(number);
            }
            !released
        });
    }
}

#[cfg(test)]
mod tests;
