//! What happens to a new flow. Packets, and `sluice trace`, all ask here.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::net::{Family, Protocol};
use crate::table::{Endpoint, Endpoints, Frontend, FrontendKind, RoutingTable, TrafficPolicy};

/// The first packet of a flow, as far as a decision needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlow {
    /// Source address.
    pub client: IpAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

/// The decision and the rule behind it.
#[derive(Clone, Copy, Debug)]
pub struct Decision<'t> {
    /// The frontend that was dialled, when there is one.
    pub frontend: Option<&'t Frontend>,
    /// What to do.
    pub verdict: Verdict<'t>,
    /// The rule that decided.
    pub reason: Reason<'t>,
}

/// What to do with a new flow.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'t> {
    /// Send it to one of the endpoints. `masquerade`: the source becomes a node address; it does so anyway for an
    /// endpoint that reaches itself.
    Forward {
        /// Never empty.
        endpoints: &'t [Endpoint],
        /// Replace the source.
        masquerade: bool,
    },
    /// Refuse: RST for TCP, ICMP port unreachable for the rest.
    Reject,
    /// Discard silently.
    Drop,
    /// Not ours: leave the packet as it is.
    Pass,
}

/// The rule that decided; [`fmt::Display`] gives the sentence that `trace` prints, [`Reason::label`] the metric label.
#[derive(Clone, Copy, Debug)]
pub enum Reason<'t> {
    /// The policy's endpoint list.
    Endpoints {
        /// Policy that chose the list.
        policy: &'static str,
        /// The list.
        endpoints: &'t Endpoints,
    },
    /// No endpoint exists anywhere in the cluster.
    NoEndpoints(&'t Endpoints),
    /// Policy Local and no endpoint on this node.
    NoLocalEndpoints {
        /// Policy that chose the list.
        policy: &'static str,
        /// The empty list.
        endpoints: &'t Endpoints,
    },
    /// The source is outside `loadBalancerSourceRanges`.
    SourceRange,
    /// A ClusterIP, but no port of the Service.
    NoSuchPort,
    /// An address of a Service range that no Service has (KEP-1880).
    Unallocated,
    /// No frontend of ours.
    NotOurs,
}

impl Reason<'_> {
    /// Short name, as metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Endpoints { .. } => "forward",
            Self::NoEndpoints(_) => "no_endpoints",
            Self::NoLocalEndpoints { .. } => "no_local_endpoints",
            Self::SourceRange => "source_range",
            Self::NoSuchPort => "no_such_port",
            Self::Unallocated => "unallocated",
            Self::NotOurs => "not_ours",
        }
    }
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoints { policy, endpoints } => write!(f, "{policy}: {}", endpoints.why),
            Self::NoEndpoints(endpoints) => write!(f, "no endpoint in the cluster can serve: {}", endpoints.why),
            Self::NoLocalEndpoints { policy, endpoints } => {
                write!(f, "{policy}: {}, and others only on other nodes", endpoints.why)
            }
            Self::SourceRange => f.write_str("the source is outside loadBalancerSourceRanges"),
            Self::NoSuchPort => f.write_str("a ClusterIP, but the Service has no such port"),
            Self::Unallocated => f.write_str("an address of the Service range that no Service has"),
            Self::NotOurs => f.write_str("no frontend has this destination"),
        }
    }
}

/// Outcome names of `trace -o json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Sent to an endpoint.
    Forward,
    /// Refused.
    Reject,
    /// Discarded.
    Drop,
    /// Left alone.
    Pass,
}

impl Verdict<'_> {
    /// The outcome's name.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Forward { .. } => Outcome::Forward,
            Self::Reject => Outcome::Reject,
            Self::Drop => Outcome::Drop,
            Self::Pass => Outcome::Pass,
        }
    }
}

impl RoutingTable {
    /// Decides about a new flow by the rules of kube-proxy (nftables mode): source ranges, then the frontend's traffic
    /// policy, then whether an endpoint is left.
    pub fn decide(&self, flow: &NewFlow) -> Decision<'_> {
        let Some(frontend) = self.frontend(flow.client, flow.destination, flow.protocol) else {
            let (verdict, reason) = self.decide_address(flow.destination.ip());
            return Decision { frontend: None, verdict, reason };
        };
        let port = &frontend.port;
        let decision = |verdict, reason| Decision { frontend: Some(frontend), verdict, reason };
        if frontend.kind == FrontendKind::LoadBalancer && !admits(flow.client, port) {
            return decision(Verdict::Drop, Reason::SourceRange);
        }
        let (policy, endpoints, masquerade) = self.policy(flow.client, frontend);
        if !endpoints.list.is_empty() {
            let verdict = Verdict::Forward { endpoints: &endpoints.list, masquerade };
            return decision(verdict, Reason::Endpoints { policy, endpoints });
        }
        if port.has_any_endpoint {
            decision(Verdict::Drop, Reason::NoLocalEndpoints { policy, endpoints })
        } else {
            decision(Verdict::Reject, Reason::NoEndpoints(endpoints))
        }
    }

    /// What happens at an address on which no frontend has the port.
    pub fn decide_address(&self, address: IpAddr) -> (Verdict<'_>, Reason<'_>) {
        if self.is_cluster_ip(address) {
            (Verdict::Reject, Reason::NoSuchPort)
        } else if self.node().in_service_range(address) {
            (Verdict::Drop, Reason::Unallocated)
        } else {
            (Verdict::Pass, Reason::NotOurs)
        }
    }

    /// The endpoint list for this client, the policy's name for explanations, and whether the source is replaced.
    fn policy<'t>(&'t self, client: IpAddr, frontend: &'t Frontend) -> (&'static str, &'t Endpoints, bool) {
        let (node, port) = (self.node(), &frontend.port);
        let is_pod = node.is_pod(client);
        if frontend.kind == FrontendKind::ClusterIp {
            let masquerade = node.spec().masquerade_all || (node.detects_pods(Family::of(client)) && !is_pod);
            return match port.internal_policy {
                TrafficPolicy::Cluster => ("internalTrafficPolicy Cluster", &port.cluster, masquerade),
                TrafficPolicy::Local => ("internalTrafficPolicy Local", &port.local, masquerade),
            };
        }
        match port.external_policy {
            TrafficPolicy::Cluster => ("externalTrafficPolicy Cluster", &port.cluster, true),
            // In-cluster clients short-circuit: to them the external address is one more name of the Service.
            TrafficPolicy::Local if is_pod => ("externalTrafficPolicy Local, from a pod", &port.cluster, false),
            TrafficPolicy::Local if node.is_local(client) => {
                ("externalTrafficPolicy Local, from the node", &port.cluster, true)
            }
            TrafficPolicy::Local => ("externalTrafficPolicy Local", &port.local, false),
        }
    }
}

/// Whether `loadBalancerSourceRanges` admits the client.
fn admits(client: IpAddr, port: &crate::table::ServicePort) -> bool {
    port.source_ranges.is_empty()
        || port.source_ranges.iter().any(|range| range.contains(&client))
        || port.source_range_vips.contains(&client)
}
