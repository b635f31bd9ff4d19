//! What the daemon serves, as lists for people and programs. The JSON is versioned: fields are added, never changed.

use std::net::{IpAddr, SocketAddr};

use ahash::AHashMap;
use serde::{Deserialize, Serialize};
use sluice_dataplane::net::Direction;
use sluice_dataplane::packet_path::now_ms;
use sluice_dataplane::table::{Deadline, EndpointName, FrontendKey, PortSlot, PortSpec, ServiceSpec};

use crate::problem::Problem;
use crate::state::State;

/// A versioned list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct List<T> {
    /// `sluice.dev/v1alpha1`.
    pub api_version: String,
    /// Kind of the list.
    pub kind: String,
    /// Generation of the routing table that was in force.
    pub generation: u64,
    /// What is listed.
    pub items: Vec<T>,
}

/// One Service port, all families together.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    /// Namespace.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Port name, empty when unnamed.
    pub port_name: String,
    /// Protocol.
    pub protocol: String,
    /// Service port number.
    pub port: u16,
    /// ClusterIPs.
    pub cluster_ips: Vec<IpAddr>,
    /// Node port.
    pub node_port: Option<u16>,
    /// Load-balancer and external addresses.
    pub external_ips: Vec<IpAddr>,
    /// Endpoints that new flows may get under policy Cluster, and on this node.
    pub endpoints: usize,
    /// Endpoints under policy Local.
    pub local_endpoints: usize,
    /// Fields that local controllers made up.
    pub made_up: Vec<String>,
    /// Flows opened so far.
    pub opened: u64,
    /// Flows now.
    pub active: u64,
    /// Flows refused so far.
    pub rejected: u64,
    /// Flows dropped by a rule so far.
    pub dropped: u64,
    /// Bytes from clients to endpoints so far.
    pub bytes_in: u64,
    /// Bytes from endpoints to clients so far.
    pub bytes_out: u64,
}

/// One endpoint of one Service port.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    /// Namespace.
    pub namespace: String,
    /// Service.
    pub service: String,
    /// Port name, empty when unnamed.
    pub port_name: String,
    /// Protocol.
    pub protocol: String,
    /// Address and port.
    pub address: SocketAddr,
    /// `ready`, `not-ready`, `terminating`, `draining` or `gone`.
    pub state: String,
    /// Seconds until the flows of an endpoint that drains are cut.
    pub deadline_seconds: Option<u64>,
    /// Seconds for which it gets no new flows because too many failed.
    pub ejected_seconds: Option<u64>,
    /// Gets new flows under policy Cluster.
    pub cluster: bool,
    /// Gets new flows under policy Local.
    pub local: bool,
    /// Flows opened so far.
    pub opened: u64,
    /// Flows now.
    pub active: u64,
    /// Bytes from clients so far.
    pub bytes_in: u64,
    /// Bytes to clients so far.
    pub bytes_out: u64,
    /// Packets from clients so far.
    pub packets_in: u64,
    /// Packets to clients so far.
    pub packets_out: u64,
}

/// One frontend.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendView {
    /// `clusterip`, `nodeport`, `loadbalancer` or `externalip`.
    pub kind: String,
    /// Address; for a node port those of the node it answers on.
    pub addresses: Vec<IpAddr>,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: String,
    /// Namespace.
    pub namespace: String,
    /// Service.
    pub service: String,
    /// Port name, empty when unnamed.
    pub port_name: String,
    /// Traffic policy.
    pub policy: String,
    /// Endpoints that new flows may get.
    pub endpoints: Vec<SocketAddr>,
    /// How the list came about.
    pub why: String,
}

/// One flow.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowEntry {
    /// Protocol.
    pub protocol: String,
    /// Client.
    pub client: SocketAddr,
    /// Frontend that was dialled.
    pub frontend: SocketAddr,
    /// Kind of that frontend.
    pub kind: String,
    /// Endpoint.
    pub endpoint: SocketAddr,
    /// Source that the endpoint sees when it is not the client.
    pub masquerade: Option<SocketAddr>,
    /// Namespace; empty when the Service is gone.
    pub namespace: String,
    /// Service; empty when it is gone.
    pub service: String,
    /// Port name.
    pub port_name: String,
    /// State.
    pub state: String,
    /// Seconds since it opened.
    pub age_seconds: u32,
    /// Milliseconds since its last packet.
    pub idle_ms: u32,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
}

const IN: usize = Direction::Request as usize;
const OUT: usize = Direction::Reply as usize;

fn list<T>(state: &State, kind: &str, items: Vec<T>) -> List<T> {
    let generation = state.shared.table().generation();
    List { api_version: "sluice.dev/v1alpha1".to_owned(), kind: format!("{kind}List"), generation, items }
}

/// Every Service port.
pub fn services(state: &State) -> List<ServiceView> {
    let publisher = state.publisher();
    let slots = &state.shared.slots;
    let mut active = AHashMap::<_, u64>::new();
    for (EndpointName { port, .. }, slot) in publisher.builder().endpoints() {
        *active.entry((&port.service, &*port.port, port.protocol)).or_default() += u64::from(slots.active(slot));
    }
    let mut items = Vec::new();
    for spec in publisher.builder().services() {
        for ports in by_port(spec) {
            let first = ports[0];
            let slot = publisher.builder().port_slot(&spec.name, &first.name, first.protocol).unwrap_or_default();
            let totals = slots.port_totals(slot);
            items.push(ServiceView {
                namespace: spec.name.namespace.to_string(),
                name: spec.name.name.to_string(),
                port_name: first.name.clone(),
                protocol: first.protocol.to_string(),
                port: first.number,
                cluster_ips: ports.iter().map(|port| port.cluster_ip).collect(),
                node_port: first.node_port,
                external_ips: ports
                    .iter()
                    .flat_map(|port| port.load_balancer_ips.iter().chain(&port.external_ips))
                    .copied()
                    .collect(),
                endpoints: ports.iter().map(|port| port.cluster.addresses.len()).sum(),
                local_endpoints: ports.iter().map(|port| port.local.addresses.len()).sum(),
                made_up: publisher.made_up(&spec.name).iter().map(|field| (*field).to_owned()).collect(),
                opened: totals.opened.iter().sum(),
                active: active.get(&(&spec.name, &*first.name, first.protocol)).copied().unwrap_or(0),
                rejected: totals.rejected,
                dropped: totals.dropped,
                bytes_in: totals.bytes[IN],
                bytes_out: totals.bytes[OUT],
            });
        }
    }
    items.sort_by(|a, b| {
        (&a.namespace, &a.name, a.port, &a.protocol).cmp(&(&b.namespace, &b.name, b.port, &b.protocol))
    });
    list(state, "Service", items)
}

/// The ports of a Service, the families of one port together.
pub(super) fn by_port(spec: &ServiceSpec) -> Vec<Vec<&PortSpec>> {
    let mut ports: Vec<Vec<&PortSpec>> = Vec::new();
    for port in &spec.ports {
        let same = |other: &&mut Vec<&PortSpec>| other[0].name == port.name && other[0].protocol == port.protocol;
        match ports.iter_mut().find(same) {
            Some(known) => known.push(port),
            None => ports.push(vec![port]),
        }
    }
    ports
}

/// Every endpoint of each Service port: those in the slices, and those that left and still have flows.
pub fn endpoints(state: &State) -> List<EndpointView> {
    let publisher = state.publisher();
    let (builder, slots, now_ms) = (publisher.builder(), &state.shared.slots, now_ms());
    let mut lists = AHashMap::new();
    for spec in builder.services() {
        for port in &spec.ports {
            let mut note = |addresses: &[SocketAddr], list: usize| {
                for address in addresses {
                    let key = (&spec.name, &*port.name, port.protocol, *address);
                    lists.entry(key).or_insert([false; 2])[list] = true;
                }
            };
            note(&port.cluster.addresses, 0);
            note(&port.local.addresses, 1);
        }
    }
    let mut items = Vec::new();
    for (name, slot) in builder.endpoints() {
        let EndpointName { port, address, .. } = name;
        let (Some(life), active) = (slots.life(slot), slots.active(slot)) else { continue };
        let is_here = builder.endpoint_slot(&port.service, &port.port, port.protocol, *address) == Some(slot);
        if !is_here && active == 0 {
            continue;
        }
        let [cluster, local] = lists
            .get(&(&port.service, &*port.port, port.protocol, *address))
            .copied()
            .filter(|_| is_here)
            .unwrap_or_default();
        let seconds_until =
            |until: u64| until.checked_sub(now_ms).filter(|left| *left > 0).map(|left| left.div_ceil(1000));
        let deadline_seconds = match life.deadline() {
            Some(Deadline::At(at)) => seconds_until(at).or(Some(0)),
            Some(Deadline::In(more)) => Some(more.div_ceil(1000)),
            Some(Deadline::Never) | None => None,
        };
        let totals = slots.endpoint_totals(slot);
        items.push(EndpointView {
            namespace: port.service.namespace.to_string(),
            service: port.service.name.to_string(),
            port_name: port.port.to_string(),
            protocol: port.protocol.to_string(),
            address: *address,
            state: life.name().to_owned(),
            deadline_seconds,
            ejected_seconds: slots.ejected_until(slot).and_then(seconds_until),
            cluster,
            local,
            opened: totals.opened,
            active: active.into(),
            bytes_in: totals.bytes[IN],
            bytes_out: totals.bytes[OUT],
            packets_in: totals.packets[IN],
            packets_out: totals.packets[OUT],
        });
    }
    items.sort_by(|a, b| {
        (&a.namespace, &a.service, &a.port_name, &a.protocol, a.address).cmp(&(
            &b.namespace,
            &b.service,
            &b.port_name,
            &b.protocol,
            b.address,
        ))
    });
    list(state, "Endpoint", items)
}

/// Every frontend.
pub fn frontends(state: &State) -> List<FrontendView> {
    list(state, "Frontend", frontends_of(&state.shared.table()))
}

/// Every frontend of a table.
#[must_use]
pub fn frontends_of(table: &sluice_dataplane::table::RoutingTable) -> Vec<FrontendView> {
    let mut items: Vec<FrontendView> = table
        .frontends()
        .map(|frontend| {
            let port = &frontend.port;
            let (addresses, number, protocol) = match frontend.key {
                FrontendKey::Address(address, protocol, number) => (vec![address], number, protocol),
                FrontendKey::NodePort(family, protocol, number) => {
                    let mut addresses = table.node().spec().node_port_addresses.clone();
                    addresses.retain(|address| sluice_dataplane::net::Family::of(*address) == family);
                    (addresses, number, protocol)
                }
            };
            let (policy, endpoints) = port.policy(frontend.kind);
            FrontendView {
                kind: frontend.kind.name().to_owned(),
                addresses,
                port: number,
                protocol: protocol.to_string(),
                namespace: port.service.namespace.to_string(),
                service: port.service.name.to_string(),
                port_name: port.name.to_string(),
                policy: format!("{policy:?}"),
                endpoints: endpoints.list.iter().map(|endpoint| endpoint.address).collect(),
                why: endpoints.why.to_string(),
            }
        })
        .collect();
    let order = |view: &FrontendView| {
        (
            view.namespace.clone(),
            view.service.clone(),
            view.port_name.clone(),
            view.kind.clone(),
            view.addresses.clone(),
            view.port,
            view.protocol.clone(),
        )
    };
    items.sort_by_cached_key(order);
    items
}

/// Every flow.
pub fn flows(state: &State) -> List<FlowEntry> {
    let names: AHashMap<PortSlot, (String, String, String)> = {
        let publisher = state.publisher();
        let ports = publisher.builder().services().flat_map(|spec| spec.ports.iter().map(move |port| (spec, port)));
        ports
            .filter_map(|(spec, port)| {
                let slot = publisher.builder().port_slot(&spec.name, &port.name, port.protocol)?;
                Some((slot, (spec.name.namespace.to_string(), spec.name.name.to_string(), port.name.clone())))
            })
            .collect()
    };
    let items = state.shared.flows().map(|flow| {
        let (namespace, service, port_name) = names.get(&flow.port_slot).cloned().unwrap_or_default();
        FlowEntry {
            protocol: flow.protocol.to_string(),
            client: flow.client,
            frontend: flow.frontend,
            kind: flow.kind.name().to_owned(),
            endpoint: flow.endpoint,
            masquerade: flow.masquerade,
            namespace,
            service,
            port_name,
            state: flow.state.to_owned(),
            age_seconds: flow.age_seconds,
            idle_ms: flow.idle_ms,
            bytes_in: flow.bytes[IN],
            bytes_out: flow.bytes[OUT],
        }
    });
    list(state, "Flow", items.collect())
}

/// Everything that is wrong now.
pub fn problems(state: &State) -> List<Problem> {
    let mut problems = state.publisher().problems();
    problems.extend(state.health_problems.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter().cloned());
    problems.sort();
    list(state, "Problem", problems)
}
