//! What resolution hands to the table: one Service, fully resolved, as plain data.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::lifecycle::{Condition, Deadline, DrainTimeout};
use crate::net::{Family, Protocol};

/// Namespace and name of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ServiceName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl ServiceName {
    /// A name from its two parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Algorithm of endpoint selection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balancing {
    /// Power of two choices on live flow counts.
    #[default]
    LeastConnections,
    /// Each endpoint in turn.
    RoundRobin,
    /// Uniformly random, as kube-proxy.
    Random,
}

/// `internalTrafficPolicy` or `externalTrafficPolicy` (KEP-2086).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum TrafficPolicy {
    /// Endpoints of the whole cluster.
    #[default]
    Cluster,
    /// Endpoints on this node only.
    Local,
}

/// The endpoints that a policy allows for new flows, and how the list came about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointList {
    /// Addresses, without duplicates.
    pub addresses: Vec<SocketAddr>,
    /// The rule that made the list, for `trace`: "2 of 3 endpoints are ready".
    pub why: Arc<str>,
}

/// Who an endpoint is, besides its address: with another uid, the same address is another endpoint. Zero is unknown.
///
/// Of a Pod it says all there is to say. Of a slice, or unknown, it says nothing of an endpoint that was away: that one is
/// another when it is back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Uid(pub u64);

impl Uid {
    const OF_SLICE: u64 = 1 << 63;

    /// The uid of a text such as `targetRef.uid`, the same in every process.
    pub fn of(text: &str) -> Self {
        Self((xxhash_rust::xxh3::xxh3_64(text.as_bytes()) & !Self::OF_SLICE).max(1))
    }

    /// That of an endpoint of which only the slice's uid is known.
    pub fn of_slice(text: &str) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(text.as_bytes()) | Self::OF_SLICE)
    }

    /// Whether it tells who the endpoint is, wherever and whenever it is seen.
    pub fn is_own(self) -> bool {
        self.0 != 0 && self.0 & Self::OF_SLICE == 0
    }
}

/// An endpoint of a Service port and what is known of its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointSpec {
    /// Address and port.
    pub address: SocketAddr,
    /// Who has the address.
    pub uid: Uid,
    /// What the slices say.
    pub condition: Condition,
    /// An operator drains it: when its flows are cut. New flows are for the lists to withhold.
    pub drain: Option<Deadline>,
}

impl EndpointSpec {
    /// A ready endpoint of whom no more is known.
    pub fn ready(address: SocketAddr) -> Self {
        Self { address, uid: Uid::default(), condition: Condition::Ready, drain: None }
    }
}

/// One Service, resolved for this node. Plain data, comparable: equal specs need no new table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSpec {
    /// Namespace and name.
    pub name: ServiceName,
    /// `creationTimestamp` in seconds since the epoch; the older of two Services keeps a contested frontend, none counts as youngest.
    pub created: Option<i64>,
    /// Ports, one entry for each family in which the Service has a ClusterIP.
    pub ports: Vec<PortSpec>,
}

impl ServiceSpec {
    /// Gives back the room that its lists were not filled to: hundreds of bytes of each of many Services.
    pub(super) fn shrink(&mut self) {
        self.ports.shrink_to_fit();
        for port in &mut self.ports {
            port.endpoints.shrink_to_fit();
            port.cluster.addresses.shrink_to_fit();
            port.local.addresses.shrink_to_fit();
        }
    }
}

/// One port of one Service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Port name, empty when unnamed.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Service port number.
    pub number: u16,
    /// Family of every address below.
    pub family: Family,
    /// The ClusterIP.
    pub cluster_ip: IpAddr,
    /// Node port, when there is one.
    pub node_port: Option<u16>,
    /// Load-balancer addresses (`status.loadBalancer.ingress[].ip` with ipMode VIP).
    pub load_balancer_ips: Vec<IpAddr>,
    /// External addresses.
    pub external_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges` of this family; empty = unfiltered.
    pub source_ranges: Vec<IpNet>,
    /// Sources equal to a load-balancer address pass the ranges too (a range contains the node's own address).
    pub source_ranges_admit_vips: bool,
    /// Policy for the ClusterIP.
    pub internal_policy: TrafficPolicy,
    /// Policy for NodePort, load-balancer and external addresses.
    pub external_policy: TrafficPolicy,
    /// ClientIP affinity with its timeout.
    pub affinity: Option<Duration>,
    /// Endpoint selection.
    pub balancing: Balancing,
    /// Endpoints for policy Cluster.
    pub cluster: EndpointList,
    /// Endpoints for policy Local.
    pub local: EndpointList,
    /// Some endpoint is ready, or serving while terminating, anywhere in the cluster.
    pub has_any_endpoint: bool,
    /// Every endpoint that the slices name, whatever lists it is in. One that is in a list only counts as ready.
    pub endpoints: Vec<EndpointSpec>,
    /// A new connection that its endpoint does not take is tried at another.
    pub retry: bool,
    /// How long an endpoint that leaves the slices, without having been terminating, keeps its flows.
    pub drain_timeout: DrainTimeout,
    /// How long a new connection waits for a first endpoint where there is none; none: it is refused at once.
    pub hold: Option<Duration>,
}

impl PortSpec {
    /// An unnamed port behind a ClusterIP alone, for which its ready endpoints stand; all else as where a Service says nothing.
    pub fn plain(protocol: Protocol, cluster_ip: SocketAddr, endpoints: Vec<EndpointSpec>) -> Self {
        let is_ready = |it: &&EndpointSpec| it.condition == Condition::Ready && it.drain.is_none();
        let ready: Vec<SocketAddr> = endpoints.iter().filter(is_ready).map(|endpoint| endpoint.address).collect();
        Self {
            name: String::new(),
            protocol,
            number: cluster_ip.port(),
            family: Family::of(cluster_ip.ip()),
            cluster_ip: cluster_ip.ip(),
            node_port: None,
            load_balancer_ips: Vec::new(),
            external_ips: Vec::new(),
            source_ranges: Vec::new(),
            source_ranges_admit_vips: false,
            internal_policy: TrafficPolicy::default(),
            external_policy: TrafficPolicy::default(),
            affinity: None,
            balancing: Balancing::default(),
            has_any_endpoint: !ready.is_empty(),
            cluster: EndpointList { addresses: ready, why: "".into() },
            local: EndpointList::default(),
            endpoints,
            retry: true,
            drain_timeout: DrainTimeout::default(),
            hold: None,
        }
    }
}

/// What the table must know of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// Every address of the node itself: a client with one of them is the node.
    pub addresses: Vec<IpAddr>,
    /// Addresses on which node ports answer.
    pub node_port_addresses: Vec<IpAddr>,
    /// Loopback ranges on which node ports answer to the node itself (explicitly configured).
    pub node_port_loopback: Vec<IpNet>,
    /// Sources inside are pods of the cluster.
    pub cluster_cidrs: Vec<IpNet>,
    /// Service ranges; their addresses that are no frontend are dropped (KEP-1880).
    pub service_cidrs: Vec<IpNet>,
    /// Masquerade every flow to a ClusterIP.
    pub masquerade_all: bool,
    /// Another service proxy serves here too: the node-port range is not ours alone.
    pub beside: bool,
}
