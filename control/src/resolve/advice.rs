//! What an administrator may want to know of a Service that is served as its objects say: `sluice check` asks, the daemon does not.

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::endpoints::{Candidates, OwnFrontends, in_force};
use super::problems::Problems;
use super::topology::Topology;
use super::{Rules, frontends};
use crate::node::NodeFacts;
use crate::object::name_of;
use crate::problem::Problem;

/// Warnings about one Service: it selects nothing, nothing of it is ready, a port joins with no slice, hints do not count and
/// why, its ClusterIP is in no Service range.
#[must_use]
pub fn advise<'s>(
    service: &Service,
    slices: impl IntoIterator<Item = &'s EndpointSlice>,
    node: &NodeFacts,
    rules: &Rules,
) -> Vec<Problem> {
    let (name, Some(spec)) = (name_of(&service.metadata), &service.spec) else { return Vec::new() };
    if !frontends::is_ours(service, rules) {
        return Vec::new();
    }
    // What is wrong, rather than odd, has been said.
    let (mut said, mut advice) = (Problems::new(&name), Problems::new(&name));
    let slices = in_force(slices);
    let ports = frontends::ports(spec, rules, &mut said);
    if slices.iter().all(|slice| slice.endpoints.as_deref().unwrap_or_default().is_empty()) {
        let has_selector = spec.selector.as_ref().is_some_and(|selector| !selector.is_empty());
        let message = if has_selector {
            "selects nothing: no EndpointSlice of it has an endpoint"
        } else {
            "is missing, and no EndpointSlice of it has an endpoint"
        };
        advice.warning("spec.selector", message);
        return advice.into_list();
    }
    let mut has_hints = false;
    for (family, cluster_ip) in frontends::cluster_ips(spec, &mut said) {
        if !rules.service_cidrs.is_empty() && !rules.service_cidrs.iter().any(|range| range.contains(&cluster_ip)) {
            advice.warning("spec.clusterIPs", format!("{cluster_ip} is in no Service range"));
        }
        let own = OwnFrontends { cluster_ip, addresses: Vec::new(), ports: &ports, node_port_addresses: &[] };
        let candidates = Candidates::new(&slices, family, node, rules, &own, &mut said);
        for port in &ports {
            let endpoints = candidates.of_port(port.name, port.protocol, &own, &mut said);
            let what = format!("port {:?} ({})", port.name, port.protocol);
            if endpoints.is_empty() {
                let message = format!("no EndpointSlice has a {what} with {family} endpoints");
                advice.warning("spec.ports", message);
            } else if !endpoints.iter().any(|endpoint| endpoint.of.ready) {
                let message = format!("{what}: none of its {} {family} endpoints is ready", endpoints.len());
                advice.warning("spec.ports", message);
            } else if let Some(reason) = Topology::why_ignored(&endpoints, node) {
                advice.warning("endpoints", format!("{what}: hints of {family} endpoints do not count: {reason}"));
            }
            has_hints |= endpoints.iter().any(|endpoint| endpoint.of.endpoint.hints.is_some());
        }
    }
    if let (Some(distribution), false) = (&spec.traffic_distribution, has_hints) {
        let message =
            format!("{distribution} is asked for, but no endpoint has a hint: the EndpointSlice controller set none");
        advice.warning("spec.trafficDistribution", message);
    }
    advice.into_list()
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use serde_json::{Value, json};

    use super::*;
    use crate::resolve::testing::{node, rules, service, slice_of};

    fn advice(service: &Value, slices: &[Value], ranges: &[&str]) -> Vec<String> {
        let service: Service = serde_json::from_value(service.clone()).unwrap();
        let slices: Vec<EndpointSlice> =
            slices.iter().map(|slice| serde_json::from_value(slice.clone()).unwrap()).collect();
        let ranges: Vec<IpNet> = ranges.iter().map(|range| range.parse().unwrap()).collect();
        let rules = Rules { service_cidrs: ranges, ..rules() };
        advise(&service, &slices, &node(), &rules)
            .iter()
            .map(|problem| format!("{}: {}", problem.field, problem.message))
            .collect()
    }

    #[test]
    fn a_service_that_is_well_needs_no_advice() {
        let slices = [slice_of(&["10.0.0.1 zone=a", "10.0.0.2 zone=b"])];
        assert_eq!(advice(&service(json!({"selector": {"a": "b"}})), &slices, &["10.96.0.0/16"]), [""; 0]);
        assert_eq!(advice(&service(json!({"type": "ExternalName"})), &[], &[]), [""; 0]);
    }

    #[test]
    fn what_is_odd_is_said_with_the_reason() {
        let selects = json!({"selector": {"a": "b"}});
        let hints = |endpoints: &[&str]| vec![slice_of(endpoints)];
        let other_port = {
            let mut slice = slice_of(&["10.0.0.1"]);
            slice["ports"][0]["name"] = json!("other");
            slice
        };
        for (spec, slices, range, wanted) in [
            (
                &selects,
                vec![],
                "10.96.0.0/16",
                "spec.selector: selects nothing: no EndpointSlice of it has an endpoint",
            ),
            (
                &selects,
                hints(&[]),
                "10.96.0.0/16",
                "spec.selector: selects nothing: no EndpointSlice of it has an endpoint",
            ),
            (
                &json!({}),
                vec![],
                "10.96.0.0/16",
                "spec.selector: is missing, and no EndpointSlice of it has an endpoint",
            ),
            (&selects, hints(&["10.0.0.1"]), "10.97.0.0/16", "spec.clusterIPs: 10.96.0.1 is in no Service range"),
            (
                &selects,
                hints(&["10.0.0.1 unready"]),
                "10.96.0.0/16",
                "port \"http\" (TCP): none of its 1 IPv4 endpoints is ready",
            ),
            (
                &selects,
                vec![other_port],
                "10.96.0.0/16",
                "no EndpointSlice has a port \"http\" (TCP) with IPv4 endpoints",
            ),
            (
                &selects,
                hints(&["10.0.0.1 zone=a", "10.0.0.2"]),
                "10.96.0.0/16",
                "hints of IPv4 endpoints do not count: 1 of 2 ready endpoints has no zone hint: 10.0.0.2:8080",
            ),
            (
                &selects,
                hints(&["10.0.0.1 zone=c", "10.0.0.2 zone=b"]),
                "10.96.0.0/16",
                "hints of IPv4 endpoints do not count: none is for zone a",
            ),
            (
                &json!({"trafficDistribution": "PreferSameZone"}),
                hints(&["10.0.0.1"]),
                "10.96.0.0/16",
                "spec.trafficDistribution: PreferSameZone is asked for, but no endpoint has a hint",
            ),
        ] {
            let found = advice(&service(spec.clone()), &slices, &[range]);
            assert!(found.len() == 1 && found[0].contains(wanted), "{found:?} instead of {wanted}");
        }
    }
}
