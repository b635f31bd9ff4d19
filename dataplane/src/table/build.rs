//! Builds the next table from the last: only what a changed Service owns is touched.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ahash::{AHashMap, AHashSet};

use super::holders::Holders;
use super::identity::{EndpointName, Numbers, PortName};
use super::{
    Endpoint, EndpointList, EndpointSlot, EndpointSpec, Endpoints, Frontend, FrontendKey, FrontendKind, Life, Node,
    NodeSpec, PortSlot, PortSpec, RoutingTable, ServiceName, ServicePort, ServiceSpec, Slots, Uid,
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

/// Seniority of a claim: creation time, then name; none counts as youngest.
type Seniority = (i64, ServiceName);

/// Mutable state behind the snapshots. One owner, off the packet path.
pub struct TableBuilder {
    slots: Arc<Slots>,
    services: AHashMap<ServiceName, Owned>,
    claims: AHashMap<FrontendKey, Vec<(Seniority, Arc<Frontend>)>>,
    port_slots: Numbers<PortName>,
    endpoint_slots: Numbers<EndpointName>,
    table: RoutingTable,
    holders: Holders,
}

/// What a Service has in the current table.
struct Owned {
    spec: ServiceSpec,
    frontends: Box<[FrontendKey]>,
    /// Endpoints that are in a list, sorted.
    listed: Box<[EndpointSlot]>,
}

impl TableBuilder {
    /// A builder of empty tables that counts in `slots`, where endpoints of the last process have theirs.
    pub fn new(slots: Arc<Slots>) -> Self {
        let recovered = slots.directory.recovered();
        let is_gone = |slot| matches!(slots.life(EndpointSlot(slot)), Some(Life::Gone(_)));
        Self {
            port_slots: Numbers::recover(&recovered.ports, |_| false),
            endpoint_slots: Numbers::recover(&recovered.endpoints, is_gone),
            slots,
            services: AHashMap::new(),
            holders: Holders::default(),
            claims: AHashMap::new(),
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
        self.port_slots.get(&port_name(service, port, protocol)).map(PortSlot)
    }

    /// Slot of an endpoint of a Service port that is in force.
    pub fn endpoint_slot(
        &self,
        service: &ServiceName,
        port: &str,
        protocol: Protocol,
        endpoint: SocketAddr,
    ) -> Option<EndpointSlot> {
        let ports = &self.services.get(service)?.spec.ports;
        let mut same = ports.iter().filter(|spec| spec.name == port && spec.protocol == protocol);
        let endpoint = same.find_map(|spec| endpoints_of(spec).find(|other| other.address == endpoint))?;
        let name = endpoint_name(port_name(service, port, protocol).into(), &endpoint);
        self.endpoint_slots.get(&name).map(EndpointSlot)
    }

    /// Every endpoint that has a slot: those in force, and those that left and have flows or had until recently.
    pub fn endpoints(&self) -> impl Iterator<Item = (&EndpointName, EndpointSlot)> {
        self.endpoint_slots.iter().map(|(name, slot)| (name, EndpointSlot(slot)))
    }

    /// Puts a Service in place of what it had; an equal spec changes nothing. Returns whether something changed.
    pub fn set(&mut self, mut spec: ServiceSpec) -> bool {
        let old = match self.services.get(&spec.name) {
            Some(owned) if owned.spec == spec => return false,
            Some(_) => self.services.remove(&spec.name),
            None => None,
        };
        spec.shrink();
        let seniority = (spec.created.unwrap_or(i64::MAX), spec.name.clone());
        // New claims and slots come first, so that what stays keeps its slot.
        let ports: Vec<Arc<ServicePort>> = spec.ports.iter().map(|port| self.port(&spec, port)).collect();
        let listed = listed(&ports);
        let was_listed = old.as_ref().map(|old| &old.listed);
        for slot in &listed {
            // After a restart nothing is known of the last lists: who was in one then is not new.
            let is_new =
                was_listed.map_or(!self.slots.has_entered(*slot), |before| before.binary_search(slot).is_err());
            if is_new {
                self.slots.enter(*slot);
            }
        }
        let mut had = Box::default();
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
        self.services.insert(spec.name.clone(), Owned { spec, frontends: frontends.into(), listed });
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

    /// Says that all there is was set: endpoints of the last process that did not come back have left meanwhile, and drain
    /// or are gone. Call it once, after the first full sync and before the first table is published.
    pub fn synced(&mut self) {
        for slot in self.endpoint_slots.synced() {
            self.slots.leave(EndpointSlot(slot));
        }
        self.port_slots.synced();
        for (name, slot) in self.endpoint_slots.iter() {
            if matches!(self.slots.life(EndpointSlot(slot)), Some(Life::Present { .. })) {
                self.holders.arrives(name, &self.slots);
            }
        }
    }

    /// Tells where the flows of the last process go: an endpoint of its that does not come back has no name here, but when
    /// somebody else has its address, now or later, it is gone. Call it once, before the first Service is set.
    pub fn inherit(&mut self, flows: impl Iterator<Item = (IpAddr, EndpointSlot)>) {
        flows.for_each(|(ip, slot)| self.holders.note(ip, slot));
    }

    /// Gives slots that were retired before the last call, and whose endpoints have no flows, back for others. Call it now
    /// and then: between two calls every packet thread has seen a newer table.
    pub fn release_idle(&mut self) {
        let slots = &self.slots;
        self.endpoint_slots.release(|slot| {
            let idle = slots.held(EndpointSlot(slot)) == 0;
            if idle {
                slots.clear_endpoint(EndpointSlot(slot));
            }
            idle
        });
        self.holders.prune(slots);
        // A Service that is gone may have endpoints that drain: their flows count on its ports. They are retired as it is.
        let names = self.endpoint_slots.retired().map(|name| &name.port);
        let in_use: AHashSet<u32> = names.filter_map(|port| self.port_slots.get(port)).collect();
        self.port_slots.release(|slot| {
            let idle = !in_use.contains(&slot);
            if idle {
                slots.clear_port(PortSlot(slot));
            }
            idle
        });
    }

    fn port(&mut self, spec: &ServiceSpec, port: &PortSpec) -> Arc<ServicePort> {
        let name = Arc::new(port_name(&spec.name, &port.name, port.protocol));
        let slots = &self.slots;
        let slot = PortSlot(self.port_slots.intern(
            &name,
            |_| false,
            |slot, identity| slots.assign_port(PortSlot(slot), identity),
        ));
        let mut endpoints = AHashMap::new();
        for endpoint in endpoints_of(port) {
            endpoints.insert(endpoint.address, self.endpoint(&name, port, &endpoint));
        }
        let vips = if port.source_ranges_admit_vips { port.load_balancer_ips.clone() } else { Vec::new() };
        Arc::new(ServicePort {
            service: spec.name.clone(),
            name: Arc::clone(&name.port),
            protocol: port.protocol,
            number: port.number,
            family: port.family,
            slot,
            source_ranges: port.source_ranges.clone(),
            source_range_vips: vips,
            internal_policy: port.internal_policy,
            external_policy: port.external_policy,
            affinity: port.affinity,
            balancing: port.balancing,
            retry: port.retry,
            hold: port.hold,
            cluster: pick(&endpoints, &port.cluster),
            local: pick(&endpoints, &port.local),
            has_any_endpoint: port.has_any_endpoint,
        })
    }

    /// Gives an endpoint a slot and takes in what is known of its life. One that was gone begins another life.
    fn endpoint(&mut self, port: &Arc<PortName>, spec: &PortSpec, endpoint: &EndpointSpec) -> Endpoint {
        let (slots, name) = (&self.slots, endpoint_name(Arc::clone(port), endpoint));
        self.holders.arrives(&name, slots);
        let is_gone = |slot| matches!(slots.life(EndpointSlot(slot)), Some(Life::Gone(_)));
        let assign = |slot, identity| slots.assign_endpoint(EndpointSlot(slot), identity, name.uid);
        let slot = EndpointSlot(self.endpoint_slots.intern(&name, is_gone, assign));
        slots.see(slot, endpoint.condition, endpoint.drain, spec.drain_timeout);
        Endpoint { address: endpoint.address, slot }
    }

    /// Takes back what a Service had, except slots that `next` goes on using.
    fn withdraw(&mut self, old: &Owned, next: Option<&ServiceSpec>) {
        for key in &old.frontends {
            self.unclaim(*key, &old.spec.name);
        }
        let keep = next.map(slots_of).unwrap_or_default();
        let place = |(port, endpoint): &UsedSlot| (Arc::clone(port), endpoint.map(|it| it.0));
        let mut places = None;
        for (port, endpoint) in slots_of(&old.spec).difference(&keep) {
            let Some((address, uid)) = *endpoint else {
                self.port_slots.retire(port);
                continue;
            };
            let name = EndpointName { port: Arc::clone(port), address, uid };
            if let Some(slot) = self.endpoint_slots.retire(&name) {
                let places = places.get_or_insert_with(|| keep.iter().map(place).collect::<AHashSet<_>>());
                self.slots.leave(EndpointSlot(slot));
                let is_replaced = places.contains(&(Arc::clone(port), Some(address)));
                self.holders.leaves(&name, EndpointSlot(slot), is_replaced, &self.slots);
            }
        }
    }

    /// Frontends outside the ranges that the host sends our way as a whole.
    fn outside<'k>(&self, keys: &'k [FrontendKey]) -> impl Iterator<Item = &'k FrontendKey> {
        let node = Arc::clone(&self.table.node);
        keys.iter().filter(move |key| match key {
            FrontendKey::Address(ip, ..) => !node.in_service_range(*ip),
            FrontendKey::NodePort(..) => node.spec().beside,
        })
    }

    fn claim(&mut self, seniority: &Seniority, frontend: Arc<Frontend>) {
        let key = frontend.key;
        // Nearly always the only one.
        let claims = self.claims.entry(key).or_insert_with(|| Vec::with_capacity(1));
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

/// A Service port, or one of its endpoints.
type UsedSlot = (Arc<PortName>, Option<(SocketAddr, Uid)>);

/// Every slot a Service uses: its ports and their endpoints, in a list or not.
fn slots_of(spec: &ServiceSpec) -> AHashSet<UsedSlot> {
    let mut slots = AHashSet::new();
    for port in &spec.ports {
        let name = Arc::new(port_name(&spec.name, &port.name, port.protocol));
        slots.extend(endpoints_of(port).map(|endpoint| (Arc::clone(&name), Some((endpoint.address, endpoint.uid)))));
        slots.insert((name, None));
    }
    slots
}

/// The endpoints that the slices name, and those that are in a list only.
fn endpoints_of(port: &PortSpec) -> impl Iterator<Item = EndpointSpec> {
    let named: AHashSet<SocketAddr> = port.endpoints.iter().map(|endpoint| endpoint.address).collect();
    let listed = port.cluster.addresses.iter().chain(&port.local.addresses);
    let only_listed =
        listed.filter(move |address| !named.contains(address)).map(|address| EndpointSpec::ready(*address));
    port.endpoints.iter().copied().chain(only_listed)
}

/// The endpoints that new flows may get, sorted.
fn listed(ports: &[Arc<ServicePort>]) -> Box<[EndpointSlot]> {
    let lists = ports.iter().flat_map(|port| [&port.cluster.list, &port.local.list]);
    let mut slots: Vec<EndpointSlot> = lists.flat_map(|list| list.iter().map(|endpoint| endpoint.slot)).collect();
    slots.sort_unstable();
    slots.dedup();
    slots.into()
}

fn pick(endpoints: &AHashMap<SocketAddr, Endpoint>, list: &EndpointList) -> Endpoints {
    let list_of = list.addresses.iter().filter_map(|address| endpoints.get(address).cloned()).collect();
    Endpoints { list: list_of, why: Arc::clone(&list.why) }
}

fn port_name(service: &ServiceName, port: &str, protocol: Protocol) -> PortName {
    PortName { service: service.clone(), port: port.into(), protocol }
}

fn endpoint_name(port: Arc<PortName>, endpoint: &EndpointSpec) -> EndpointName {
    EndpointName { port, address: endpoint.address, uid: endpoint.uid }
}
