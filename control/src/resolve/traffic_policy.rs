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
        let has_any = endpoints.iter().any(|endpoint| endpoint.of.ready || endpoint.of.drains());
        let list = |is_used: bool, make: &dyn Fn() -> EndpointList| match (is_used, has_any) {
            (false, _) => EndpointList::default(),
            (true, false) => nothing(endpoints.len()),
            (true, true) => make(),
        };
        let cluster = list(uses_cluster, &|| cluster(endpoints, node));
        Lists { cluster, local: list(uses_local, &|| local(endpoints)), has_any }
    }
}

/// The ready endpoints that hints mean for us; where none is ready, those that drain.
fn cluster(endpoints: &[Merged<'_, '_>], node: &NodeFacts) -> EndpointList {
    let topology = Topology::of(endpoints, node);
    let is_meant = |endpoint: &&Merged<'_, '_>| topology.is_none_or(|topology| topology.admits(endpoint, node));
    let ready = || endpoints.iter().filter(|endpoint| endpoint.of.ready);
    let addresses: Vec<_> = ready().filter(is_meant).map(|endpoint| endpoint.address).collect();
    let why = match topology {
        _ if addresses.is_empty() => return draining::fallback(endpoints.iter(), ""),
        Some(topology) => {
            let (all, verb) = of(addresses.len(), ready().count(), "ready endpoint");
            format!("hints: {all} {verb} for {}", topology.target(node))
        }
        None => are_ready(addresses.len(), endpoints.len(), ""),
    };
    EndpointList { addresses, why: why.into() }
}

/// The ready endpoints on this node; where none is ready here, those here that drain, whatever there is elsewhere.
fn local(endpoints: &[Merged<'_, '_>]) -> EndpointList {
    const HERE: &str = " on this node";
    let here = || endpoints.iter().filter(|endpoint| endpoint.of.local);
    let addresses: Vec<_> = here().filter(|endpoint| endpoint.of.ready).map(|endpoint| endpoint.address).collect();
    if addresses.is_empty() && here().any(|endpoint| endpoint.of.drains()) {
        return draining::fallback(here(), HERE);
    }
    let why = match (addresses.len(), here().count()) {
        (count, of_node) if count < of_node => are_ready(count, of_node, HERE),
        (count, _) => of(count, endpoints.len(), "endpoint").0 + HERE,
    };
    EndpointList { addresses, why: why.into() }
}

fn nothing(total: usize) -> EndpointList {
    let why = if total == 0 { "there are no endpoints".to_owned() } else { are_ready(0, total, "") };
    EndpointList { addresses: Vec::new(), why: why.into() }
}

fn are_ready(count: usize, total: usize, place: &str) -> String {
    let (all, verb) = of(count, total, "endpoint");
    format!("{all}{place} {verb} ready")
}

/// "2 of 3 endpoints" and the verb to go on with.
fn of(count: usize, total: usize, noun: &str) -> (String, &'static str) {
    let plural = if total == 1 { "" } else { "s" };
    let verb = if count == 1 || total == 1 { "is" } else { "are" };
    (format!("{count} of {total} {noun}{plural}"), verb)
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

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sluice_dataplane::table::TrafficPolicy::{Cluster, Local};

    use crate::resolve::testing::{fields, port, resolved, service, slice_of, text};

    #[test]
    fn the_external_policy_counts_where_something_is_external() {
        for (spec, external) in [
            (json!({"externalTrafficPolicy": "Local"}), Cluster),
            (json!({"externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.1"]}), Local),
            (json!({"externalTrafficPolicy": "Local", "externalIPs": ["garbage"]}), Local),
            (json!({"externalTrafficPolicy": "Local", "type": "NodePort"}), Local),
            (json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer"}), Local),
            (json!({"externalTrafficPolicy": "Cluster", "type": "LoadBalancer"}), Cluster),
            (json!({"type": "LoadBalancer"}), Cluster),
        ] {
            let port = port(&service(spec.clone()), &[]);
            assert_eq!((port.internal_policy, port.external_policy), (Cluster, external), "{spec}");
        }
    }

    #[test]
    fn a_list_is_made_only_for_a_policy_that_asks_for_it() {
        let slices = [slice_of(&["10.0.0.1 here", "10.0.0.2"])];
        let external = json!(["198.51.100.1"]);
        for (spec, cluster, local) in [
            (json!({}), 2, 0),
            (json!({"internalTrafficPolicy": "Local"}), 0, 1),
            (json!({"internalTrafficPolicy": "Local", "externalIPs": external}), 2, 1),
            (json!({"externalTrafficPolicy": "Local", "externalIPs": external}), 2, 1),
            (json!({"externalTrafficPolicy": "Local", "type": "LoadBalancer"}), 2, 0),
        ] {
            let port = port(&service(spec.clone()), &slices);
            assert_eq!((port.cluster.addresses.len(), port.local.addresses.len()), (cluster, local), "{spec}");
        }
    }

    #[test]
    fn the_reason_of_a_local_list_has_the_numbers() {
        let web = service(json!({"internalTrafficPolicy": "Local"}));
        for (endpoints, chosen, why) in [
            (&["10.0.0.1 here", "10.0.0.2", "10.0.0.3"][..], 1, "1 of 3 endpoints on this node"),
            (&["10.0.0.1 here", "10.0.0.2 here unready"], 1, "1 of 2 endpoints on this node is ready"),
            (&["10.0.0.1 here unready", "10.0.0.2"], 0, "0 of 1 endpoint on this node is ready"),
            (&["10.0.0.1", "10.0.0.2"], 0, "0 of 2 endpoints on this node"),
            (&["10.0.0.1 unready", "10.0.0.2 unready"], 0, "0 of 2 endpoints are ready"),
            (&[], 0, "there are no endpoints"),
        ] {
            let list = port(&web, &[slice_of(endpoints)]).local;
            assert_eq!((list.addresses.len(), &*list.why), (chosen, why), "{endpoints:?}");
        }
    }

    #[test]
    fn unknown_policies_are_reported_and_mean_cluster() {
        let web =
            service(json!({"internalTrafficPolicy": "local", "externalTrafficPolicy": "Nearest", "type": "Fancy"}));
        let found = resolved(&web, &[]);
        let names = ["spec.externalTrafficPolicy", "spec.internalTrafficPolicy", "spec.type"];
        assert_eq!(fields(&found), text(&names.map(|name| format!("Service ns/web: {name}"))));
        let port = &found.spec.unwrap().ports[0];
        assert_eq!((port.internal_policy, port.external_policy), (Cluster, Cluster));
    }
}
