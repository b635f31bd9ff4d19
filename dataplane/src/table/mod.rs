//! The routing table: an immutable snapshot of every frontend, its Service port and its usable endpoints.
//!
//! Built by [`TableBuilder`] off the packet path, published through `arc_swap::ArcSwap`, never changed after that.

mod build;
mod directory;
mod ejection;
mod event;
mod holders;
mod identity;
pub mod lifecycle;
mod slots;
mod spec;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

pub use build::{Conflict, TableBuilder};
pub(crate) use directory::{Directory, EndpointEntry, PortEntry, Standing};
pub(crate) use ejection::FULL_WEIGHT;
pub use event::{LifeChange, LifeEvent};
pub use identity::{EndpointName, PortName};
pub use lifecycle::{Condition, Deadline, DrainTimeout, Life};
pub use slots::{EndpointCounters, EndpointSlot, Failure, PortCounters, PortSlot, PortTotals, Slots, Totals};
pub use spec::{
    Balancing, EndpointList, EndpointSpec, NodeSpec, PortSpec, ServiceName, ServiceSpec, TrafficPolicy, Uid,
};

use crate::net::{Family, Protocol};

/// How a client reaches a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp = 0,
    /// `spec.ports[].nodePort` on a node address.
    NodePort = 1,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer = 2,
    /// `spec.externalIPs`.
    ExternalIp = 3,
}

impl FrontendKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::ClusterIp, Self::NodePort, Self::LoadBalancer, Self::ExternalIp];

    /// Name in metrics, JSON and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "clusterip",
            Self::NodePort => "nodeport",
            Self::LoadBalancer => "loadbalancer",
            Self::ExternalIp => "externalip",
        }
    }
}

/// What a frontend is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKey {
    /// An address of its own.
    Address(IpAddr, Protocol, u16),
    /// A node port, on every node-port address of the family.
    NodePort(Family, Protocol, u16),
}

impl std::fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(ip, protocol, port) => write!(f, "{} {protocol}", SocketAddr::new(*ip, *port)),
            Self::NodePort(family, protocol, port) => write!(f, "node port {port} {protocol} ({family})"),
        }
    }
}

/// One frontend: what a client dials, and the Service port behind it.
#[derive(Debug)]
pub struct Frontend {
    /// What it is found by.
    pub key: FrontendKey,
    /// Kind.
    pub kind: FrontendKind,
    /// The Service port that answers.
    pub port: Arc<ServicePort>,
}

/// An endpoint as new flows see it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Address and port.
    pub address: SocketAddr,
    /// Where its counters and its live-flow count are.
    pub slot: EndpointSlot,
}

/// The endpoints that a policy allows, and why these.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// Usable endpoints.
    pub list: Arc<[Endpoint]>,
    /// The rule that made the list.
    pub why: Arc<str>,
}

/// One port of one Service in one family.
#[derive(Debug)]
pub struct ServicePort {
    /// Namespace and name of the Service.
    pub service: ServiceName,
    /// Port name, empty when unnamed.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Service port number.
    pub number: u16,
    /// Family.
    pub family: Family,
    /// Where its counters are; shared by the families of one port.
    pub slot: PortSlot,
    /// `loadBalancerSourceRanges` of this family; empty = unfiltered.
    pub source_ranges: Vec<IpNet>,
    /// Load-balancer addresses that pass the ranges as sources.
    pub source_range_vips: Vec<IpAddr>,
    /// Policy for the ClusterIP.
    pub internal_policy: TrafficPolicy,
    /// Policy for every other frontend.
    pub external_policy: TrafficPolicy,
    /// ClientIP affinity with its timeout.
    pub affinity: Option<Duration>,
    /// Endpoint selection.
    pub balancing: Balancing,
    /// A new connection that its endpoint does not take is tried at another.
    pub retry: bool,
    /// How long a new connection waits for a first endpoint.
    pub hold: Option<Duration>,
    /// Endpoints under policy Cluster.
    pub cluster: Endpoints,
    /// Endpoints under policy Local.
    pub local: Endpoints,
    /// Some endpoint could serve, somewhere in the cluster.
    pub has_any_endpoint: bool,
}

impl ServicePort {
    /// The policy of a kind of frontend, and the endpoints that it allows to clients outside.
    pub fn policy(&self, kind: FrontendKind) -> (TrafficPolicy, &Endpoints) {
        let policy = match kind {
            FrontendKind::ClusterIp => self.internal_policy,
            FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => self.external_policy,
        };
        match policy {
            TrafficPolicy::Cluster => (policy, &self.cluster),
            TrafficPolicy::Local => (policy, &self.local),
        }
    }
}

/// What the table knows of the node.
#[derive(Debug, Default)]
pub struct Node {
    addresses: ahash::AHashSet<IpAddr>,
    node_port_addresses: ahash::AHashSet<IpAddr>,
    spec: NodeSpec,
}

impl Node {
    fn new(spec: NodeSpec) -> Self {
        Self {
            addresses: spec.addresses.iter().copied().collect(),
            node_port_addresses: spec.node_port_addresses.iter().copied().collect(),
            spec,
        }
    }

    /// The facts this was made of.
    pub fn spec(&self) -> &NodeSpec {
        &self.spec
    }

    /// Whether the address is one of the node's own.
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address) || address.is_loopback()
    }

    /// Whether node ports answer on the address when `client` asks.
    pub fn serves_node_ports(&self, address: IpAddr, client: IpAddr) -> bool {
        self.node_port_addresses.contains(&address)
            || (self.is_local(client) && self.spec.node_port_loopback.iter().any(|range| range.contains(&address)))
    }

    /// Whether pods of the cluster can be told from other sources in this family.
    pub fn detects_pods(&self, family: Family) -> bool {
        self.spec.cluster_cidrs.iter().any(|range| Family::of(range.addr()) == family)
    }

    /// Whether the source is a pod of the cluster: inside the family's first range, as kube-proxy's ClusterCIDR detector.
    pub fn is_pod(&self, source: IpAddr) -> bool {
        let mut ranges = self.spec.cluster_cidrs.iter();
        ranges.find(|range| Family::of(range.addr()) == Family::of(source)).is_some_and(|range| range.contains(&source))
    }

    /// Whether the address belongs to a Service range.
    pub fn in_service_range(&self, address: IpAddr) -> bool {
        self.spec.service_cidrs.iter().any(|range| range.contains(&address))
    }
}

/// Immutable snapshot of everything a new flow's decision needs. Clones share all that did not change.
#[derive(Clone, Debug, Default)]
pub struct RoutingTable {
    generation: u64,
    frontends: imbl::GenericHashMap<FrontendKey, Arc<Frontend>, ahash::RandomState, imbl::shared_ptr::DefaultSharedPtr>,
    /// ClusterIPs with the number of their frontends, to refuse what is no port of theirs.
    cluster_ips: imbl::GenericHashMap<IpAddr, u32, ahash::RandomState, imbl::shared_ptr::DefaultSharedPtr>,
    node: Arc<Node>,
    host_version: u64,
}

impl RoutingTable {
    /// Number of this snapshot; grows with each one built.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What the table knows of the node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Grows when addresses of frontends outside the Service ranges, or facts of the node, change: what the host must send
    /// our way depends on nothing else, so that most tables need no look at all frontends.
    pub fn host_version(&self) -> u64 {
        self.host_version
    }

    /// The frontend that answers `client` at this destination; an exact address beats a node port.
    pub fn frontend(&self, client: IpAddr, destination: SocketAddr, protocol: Protocol) -> Option<&Arc<Frontend>> {
        let (address, port) = (destination.ip(), destination.port());
        self.frontends.get(&FrontendKey::Address(address, protocol, port)).or_else(|| {
            let key = FrontendKey::NodePort(Family::of(address), protocol, port);
            self.frontends.get(&key).filter(|_| self.node.serves_node_ports(address, client))
        })
    }

    /// Whether the address is the ClusterIP of a Service that is served.
    pub fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.cluster_ips.contains_key(&address)
    }

    /// Whether an endpoint is a frontend of ours, or nothing but a ClusterIP: its flows would come back, so it gets none.
    pub fn leads_back(&self, endpoint: SocketAddr, protocol: Protocol) -> bool {
        self.is_cluster_ip(endpoint.ip()) || self.frontend(endpoint.ip(), endpoint, protocol).is_some()
    }

    /// Every frontend, in no order.
    pub fn frontends(&self) -> impl Iterator<Item = &Arc<Frontend>> {
        self.frontends.values()
    }

    /// Number of frontends.
    pub fn len(&self) -> usize {
        self.frontends.len()
    }

    /// Whether nothing is served.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty()
    }
}

#[cfg(test)]
mod tests;
