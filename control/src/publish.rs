//! Updates into tables: resolves what an update touched, and only that, and builds the next routing table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ahash::AHashSet;
use k8s_openapi::api::core::v1::Service;
use sluice_dataplane::table::{
    Deadline, EndpointSlot, NodeSpec, RoutingTable, ServiceName, ServiceSpec, Slots, TableBuilder,
};

use crate::address;
use crate::config::Config;
use crate::drains::{Drains, Target};
use crate::headless::VirtualAddresses;
use crate::health_check::HealthCheck;
use crate::local::LocalControllers;
use crate::names::Names;
use crate::node::NodeFacts;
use crate::object::{SERVICE_NAME_LABEL, name_of, service_of};
use crate::problem::{Origin, Problem, Reason};
use crate::resolve::Rules;
use crate::resolve::advice::advise;
use crate::source::Update;
use crate::store::{Store, Stored, Touched};

mod names;

/// Objects, and the tables made of them.
pub struct Publisher {
    config: Config,
    rules: Rules,
    local: Option<LocalControllers>,
    interfaces: Vec<IpAddr>,
    store: Store,
    node: NodeFacts,
    builder: TableBuilder,
    source_problems: Vec<Problem>,
    skipped: BTreeMap<String, u64>,
    service_problems: BTreeMap<ServiceName, Vec<Problem>>,
    health_checks: BTreeMap<ServiceName, HealthCheck>,
    drains: Drains,
    /// The own Node object has been there.
    has_met_node: bool,
    names: Option<Names>,
    virtuals: Option<VirtualAddresses>,
}

impl Publisher {
    /// Without objects. `interfaces`: the host's own addresses, empty where only files count.
    #[must_use]
    pub fn new(config: Config, interfaces: Vec<IpAddr>, slots: Arc<Slots>) -> Self {
        let rules = Rules {
            retry: config.retry,
            drain_timeout: config.drain.timeout,
            service_proxy_name: config.service_proxy_name.clone(),
            balancing: config.balancing,
            service_cidrs: Vec::new(),
            node_port_addresses: Vec::new(),
            node_port_range: config.node_port_range,
            fill_in_defaults: config.local_controllers,
        };
        let mut publisher = Self {
            rules,
            local: config.local_controllers.then(|| LocalControllers::new(&config)),
            interfaces,
            store: Store::default(),
            node: NodeFacts::default(),
            builder: TableBuilder::new(slots),
            source_problems: Vec::new(),
            skipped: BTreeMap::new(),
            service_problems: BTreeMap::new(),
            health_checks: BTreeMap::new(),
            drains: Drains::default(),
            has_met_node: false,
            names: config.dns.as_ref().map(Names::new),
            virtuals: config.dns.as_ref().map(VirtualAddresses::new),
            config,
        };
        publisher.learn_node();
        publisher
    }

    /// Takes in an update. The next table, when it changes anything.
    pub fn update(&mut self, update: Update) -> Option<Arc<RoutingTable>> {
        self.source_problems = update.problems;
        self.skipped = update.skipped;
        let changes = match &mut self.local {
            Some(local) => local.complete(update.changes),
            None => update.changes,
        };
        let touched = if update.is_whole { self.store.replace(changes) } else { self.store.apply(changes) };
        self.update_names(&touched);
        self.resolve(touched).then(|| self.builder.build())
    }

    /// Takes in the first update: all there is. The first table, whatever it holds.
    /// `flows`: where those of an earlier process go.
    pub fn first(&mut self, update: Update, flows: impl Iterator<Item = (IpAddr, EndpointSlot)>) -> Arc<RoutingTable> {
        self.builder.inherit(flows);
        self.update(update);
        self.names.as_mut().map(Names::synced);
        self.builder.synced();
        self.builder.build()
    }

    /// Drains by hand that an earlier process left. Call it before the first update.
    pub fn set_drains(&mut self, drains: Drains) {
        self.drains = drains;
    }

    /// Drains endpoints by hand, or no longer. Returns whether the target was drained before, and the next table when there
    /// is one.
    pub fn set_drain(
        &mut self,
        target: Target,
        until: Option<Deadline>,
    ) -> std::io::Result<(bool, Option<Arc<RoutingTable>>)> {
        let known = self.drains.contains(&target);
        self.drains.set(target, until)?;
        let covers = |spec: &&ServiceSpec| {
            spec.ports.iter().flat_map(|port| &port.endpoints).any(|endpoint| target.covers(endpoint.address))
        };
        let services = self.builder.services().filter(covers).map(|spec| spec.name.clone()).collect();
        let touched = Touched { services, ..Touched::default() };
        Ok((known, self.resolve(touched).then(|| self.builder.build())))
    }

    /// Takes in that the host's addresses are these now. The next table, when it changes anything.
    pub fn set_interfaces(&mut self, interfaces: Vec<IpAddr>) -> Option<Arc<RoutingTable>> {
        self.interfaces = interfaces;
        let touched = Touched { nodes: BTreeSet::from([self.node.name.clone()]), ..Touched::default() };
        self.resolve(touched).then(|| self.builder.build())
    }

    /// The table of what is known now.
    pub fn table(&mut self) -> Arc<RoutingTable> {
        self.builder.build()
    }

    /// The objects.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Facts of the node.
    #[must_use]
    pub fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// What load balancers may ask about, by Service.
    #[must_use]
    pub fn health_checks(&self) -> &BTreeMap<ServiceName, HealthCheck> {
        &self.health_checks
    }

    /// The Services in force and their counters.
    #[must_use]
    pub fn builder(&self) -> &TableBuilder {
        &self.builder
    }

    /// Frees counters nobody uses. Call it now and then.
    pub fn release_idle(&mut self) {
        self.builder.release_idle();
    }

    /// Objects of kinds that are not used, by `apiVersion/kind`.
    #[must_use]
    pub fn skipped(&self) -> &BTreeMap<String, u64> {
        &self.skipped
    }

    /// What of a Service was made up, as of [`LocalControllers::made_up`].
    #[must_use]
    pub fn made_up(&self, name: &ServiceName) -> &[&'static str] {
        self.local.as_ref().map(|local| local.made_up(name)).unwrap_or_default()
    }

    /// The local controllers, to load and save what they made up; none when they are off.
    pub fn local_controllers(&mut self) -> Option<&mut LocalControllers> {
        self.local.as_mut()
    }

    /// Everything that is wrong now, sorted.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = self.source_problems.clone();
        problems.extend(self.local.iter().flat_map(LocalControllers::problems));
        problems.extend(self.service_problems.values().flatten().cloned());
        problems.extend(self.builder.conflicts().iter().map(|conflict| {
            let origin = self.store.service(&conflict.loser).map(|service| &service.origin);
            let message = format!("{} is already taken by the older Service {}", conflict.key, conflict.winner);
            let problem = Problem::error("spec", message).about(format!("Service {}", conflict.loser));
            let problem = problem.because(Reason::AddressConflict);
            origin.map_or(problem.clone(), |origin| problem.from(origin))
        }));
        problems.extend(self.virtuals.iter().flat_map(VirtualAddresses::problems).cloned());
        problems.extend(self.loops());
        // The API's selectors leave out Services whose slices they let in: nobody's mistake.
        let orphans = self.store.slices_without_service().filter(|slice| slice.origin != Origin::Api);
        problems.extend(orphans.map(|slice| {
            let label = format!("metadata.labels[{SERVICE_NAME_LABEL}]");
            let (message, name) = match service_of(&slice.object) {
                Some(service) => (format!("there is no Service {service}"), name_of(&slice.object.metadata)),
                None => ("is missing: the slice belongs to no Service".to_owned(), name_of(&slice.object.metadata)),
            };
            Problem::warning(label, message).about(format!("EndpointSlice {name}")).from(&slice.origin)
        }));
        problems.sort();
        problems.dedup();
        problems
    }

    /// What an administrator may want to know of Services that are served as they say.
    #[must_use]
    pub fn advice(&self) -> Vec<Problem> {
        let of_service = |(name, service): (&ServiceName, &Stored<Service>)| {
            let slices = self.store.slices(name).map(|slice| &*slice.object);
            let advice = advise(&service.object, slices, &self.node, &self.rules);
            advice.into_iter().map(|problem| problem.from(&service.origin)).collect::<Vec<_>>()
        };
        let mut advice: Vec<Problem> = self.store.services().flat_map(of_service).collect();
        advice.sort();
        advice
    }

    /// Endpoints that are frontends of ours. They get no flows.
    fn loops(&self) -> Vec<Problem> {
        let table = self.builder.current();
        // Of a quarter of a million endpoints next to none is worth the lookups in the table.
        let mut suspects: AHashSet<IpAddr> = table.node().spec().node_port_addresses.iter().copied().collect();
        for port in self.builder.services().flat_map(|spec| &spec.ports) {
            suspects.insert(port.cluster_ip);
            suspects.extend(port.load_balancer_ips.iter().chain(&port.external_ips));
        }
        let mut problems = Vec::new();
        for spec in self.builder.services() {
            for port in &spec.ports {
                let endpoints = port.cluster.addresses.iter().chain(&port.local.addresses);
                let endpoints = endpoints.filter(|endpoint| suspects.contains(&endpoint.ip()));
                for endpoint in endpoints.filter(|endpoint| table.leads_back(**endpoint, port.protocol)) {
                    let service = table.frontend(endpoint.ip(), *endpoint, port.protocol).map(|it| &it.port.service);
                    let whose = service.map_or("a ClusterIP".to_owned(), |it| format!("a frontend of Service {it}"));
                    let message = format!("{endpoint} is {whose}: a loop, it gets no traffic");
                    let problem = Problem::error("endpoints", message).about(format!("Service {}", spec.name));
                    let origin = self.store.service(&spec.name).map(|service| &service.origin);
                    problems.push(origin.map_or(problem.clone(), |origin| problem.from(origin)));
                }
            }
        }
        problems
    }

    fn resolve(&mut self, mut touched: Touched) -> bool {
        let mut changed = false;
        if touched.nodes.contains(&self.node.name) || touched.service_cidrs {
            let (facts, spec) = (self.node.clone(), self.builder.node().clone());
            self.learn_node();
            changed |= *self.builder.node() != spec;
            if self.node != facts || self.builder.node().service_cidrs != spec.service_cidrs {
                // Zone, name, addresses and Service ranges decide about every Service's endpoints.
                touched.services.extend(self.store.services().map(|(name, _)| name.clone()));
            }
        }
        for name in touched.services {
            changed |= self.resolve_service(&name);
        }
        changed
    }

    fn resolve_service(&mut self, name: &ServiceName) -> bool {
        let Some(service) = self.store.service(name) else {
            self.service_problems.remove(name);
            self.health_checks.remove(name);
            return self.builder.remove(name);
        };
        let resolved = self.resolved(name, &service.object);
        let origin = |problem: &Problem| {
            let slice = problem.object.as_deref().and_then(|object| object.strip_prefix("EndpointSlice "));
            let mut slices = self.store.slices(name);
            let slice =
                slice.and_then(|wanted| slices.find(|slice| name_of(&slice.object.metadata).to_string() == wanted));
            slice.map_or(&service.origin, |slice| &slice.origin).clone()
        };
        let located = |problem: Problem| {
            let origin = origin(&problem);
            problem.from(&origin)
        };
        let problems: Vec<Problem> = resolved.problems.into_iter().map(located).collect();
        if problems.is_empty() {
            self.service_problems.remove(name);
        } else {
            self.service_problems.insert(name.clone(), problems);
        }
        match resolved.health_check {
            Some(check) => self.health_checks.insert(name.clone(), check),
            None => self.health_checks.remove(name),
        };
        match resolved.spec {
            Some(mut spec) => {
                // The store has this name already.
                spec.name = name.clone();
                self.drains.apply(&mut spec);
                self.builder.set(spec)
            }
            None => self.builder.remove(name),
        }
    }

    fn learn_node(&mut self) {
        let name = self.config.node_name();
        let node = self.store.node(&name).map(|node| &*node.object);
        self.node = NodeFacts::new(&name, node, &self.interfaces);
        self.has_met_node |= node.is_some();
        // Whose Node was deleted is to get no more from load balancers, as one whose Node is being deleted.
        self.node.eligible &= node.is_some() || !self.has_met_node;
        let spec = self.node_spec();
        self.rules.service_cidrs.clone_from(&spec.service_cidrs);
        self.rules.node_port_addresses.clone_from(&spec.node_port_addresses);
        self.builder.set_node(spec);
    }

    fn node_spec(&self) -> NodeSpec {
        let mut ranges = self.config.service_cidrs();
        let declared = self.store.service_cidrs().filter_map(|object| object.object.spec.as_ref()?.cidrs.as_ref());
        ranges.extend(declared.flatten().filter_map(|range| address::parse_range(range)));
        // Virtual addresses are ours: routed as a whole, whoever has them.
        ranges.extend(self.config.dns.iter().flat_map(|dns| &dns.virtual_cidrs));
        ranges.sort_unstable();
        ranges.dedup();
        self.node.spec(&self.config, ranges)
    }
}

#[cfg(test)]
mod tests;
