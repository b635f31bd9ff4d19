//! Traffic policies (KEP-2086): which endpoints a policy allows, and whether the Service has any at all.

use k8s_openapi::api::core::v1::ServiceSpec;
use sluice_dataplane::table::{EndpointList, TrafficPolicy};

use super::draining;
use super::endpoints::Merged;
use super::problems::Problems;
use super::topology::Topology;
use crate::node::NodeFacts;

/// Both policies of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policies {
    pub(super) internal: TrafficPolicy,
    pub(super) external: TrafficPolicy,
}

/// The endpoint lists of a Service port. A list that no policy asks for is empty.
pub(super) struct Lists {
    pub(super) cluster: EndpointList,
    pub(super) local: EndpointList,
    pub(super) has_any: bool,
}

impl Policies {
    pub(super) fn new(spec: &ServiceSpec, problems: &mut Problems<'_>) -> Self {
        let internal = read(spec.internal_traffic_policy.as_deref(), "spec.internalTrafficPolicy", problems);
        let external = read(spec.external_traffic_policy.as_deref(), "spec.externalTrafficPolicy", problems);
        let is_external = match spec.type_.as_deref() {
            Some("NodePort" | "LoadBalancer") => true,
            None | Some("" | "ClusterIP") => spec.external_ips.as_ref().is_some_and(|addresses| !addresses.is_empty()),
            Some(other) => {
                let message = format!("{other:?} is not known: use ClusterIP, NodePort, LoadBalancer or ExternalName");
                problems.error("spec.type", message);
                false
            }
        };
        Self { internal, external: if is_external { external } else { TrafficPolicy::Cluster } }
    }

    /// The lists. `reaches_outside`: the port has a frontend besides the ClusterIP.
    pub(super) fn lists(&self, endpoints: &[Merged<'_, '_>], node: &NodeFacts, reaches_outside: bool) -> Lists {
        // Under external policy Local, clients in the cluster get the cluster's endpoints.
        let uses_cluster = self.internal == TrafficPolicy::Cluster || reaches_outside;
        let uses_local =
            self.internal == TrafficPolicy::Local || (self.external == TrafficPolicy::Local && reaches_outside);
        Lists {
            cluster: if uses_cluster { cluster(endpoints, node) } else { EndpointList::default() },
            local: if uses_local { local(endpoints) } else { EndpointList::default() },
            has_any: endpoints.iter().any(|endpoint| endpoint.of.ready || endpoint.of.drains()),
        }
    }
}

/// The ready endpoints that hints mean for us; where none is ready, those that drain.
fn cluster(endpoints: &[Merged<'_, '_>], node: &NodeFacts) -> EndpointList {
    let topology = Topology::of(endpoints, node);
    let is_meant = |endpoint: &&Merged<'_, '_>| topology.is_none_or(|topology| topology.admits(endpoint, node));
    let ready = || endpoints.iter().filter(|endpoint| endpoint.of.ready);
    let addresses: Vec<_> = ready().filter(is_meant).map(|endpoint| endpoint.address).collect();
    if addresses.is_empty() {
        return draining::fallback(endpoints.iter(), "").unwrap_or_else(|| nothing(endpoints.len(), ""));
    }
    let (count, total) = (addresses.len(), endpoints.len());
    let why = match topology {
        Some(topology) => format!(
            "hints: {count} of {} {} for {}",
            counted(ready().count(), "ready endpoint"),
            is_or_are(count),
            topology.target(node)
        ),
        None => format!("{count} of {} {} ready", counted(total, "endpoint"), is_or_are(count)),
    };
    EndpointList { addresses, why }
}

/// The ready endpoints on this node; where none is ready here, those here that drain, whatever there is elsewhere.
fn local(endpoints: &[Merged<'_, '_>]) -> EndpointList {
    const HERE: &str = " on this node";
    let here = || endpoints.iter().filter(|endpoint| endpoint.of.local);
    let addresses: Vec<_> = here().filter(|endpoint| endpoint.of.ready).map(|endpoint| endpoint.address).collect();
    let (count, of_node, total) = (addresses.len(), here().count(), endpoints.len());
    if count == 0 && of_node > 0 {
        return draining::fallback(here(), HERE).unwrap_or_else(|| nothing(of_node, HERE));
    }
    let why = match (count, of_node, total) {
        (0, _, 0) => nothing(0, "").why,
        (0, ..) => format!("0 of {}{HERE}", counted(total, "endpoint")),
        (count, of_node, _) if count < of_node => {
            format!("{count} of {}{HERE} {} ready", counted(of_node, "endpoint"), is_or_are(count))
        }
        (count, ..) => format!("{count} of {}{HERE}", counted(total, "endpoint")),
    };
    EndpointList { addresses, why }
}

fn nothing(total: usize, place: &str) -> EndpointList {
    let why = match total {
        0 => "there are no endpoints".to_owned(),
        total => format!("0 of {}{place} are ready", counted(total, "endpoint")),
    };
    EndpointList { addresses: Vec::new(), why }
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn is_or_are(count: usize) -> &'static str {
    if count == 1 { "is" } else { "are" }
}

fn read(text: Option<&str>, field: &str, problems: &mut Problems<'_>) -> TrafficPolicy {
    match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            problems.error(field, format!("{other:?} is neither Cluster nor Local: Cluster is used"));
            TrafficPolicy::Cluster
        }
    }
}
