//! Load-balancer addresses (`ipMode`, KEP-1860) and `loadBalancerSourceRanges`.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ServiceSpec, ServiceStatus};
use sluice_dataplane::table::TrafficPolicy;

use super::frontends::read;
use super::problems::Problems;
use crate::address;
use crate::node::NodeFacts;

/// The addresses that the node answers for the load balancer. With `ipMode: Proxy` it must not: packets are to go through
/// the load balancer itself. The Service's type does not matter.
pub(super) fn vips(status: Option<&ServiceStatus>, problems: &mut Problems<'_>) -> Vec<IpAddr> {
    let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let mut found = Vec::new();
    for (index, entry) in ingress.into_iter().flatten().enumerate() {
        let field = |field: &str| format!("status.loadBalancer.ingress[{index}].{field}");
        let Some(text) = entry.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        match entry.ip_mode.as_deref() {
            None | Some("VIP") => {}
            Some("Proxy") => continue,
            Some(other) => {
                problems.error(field("ipMode"), format!("{other:?} is neither VIP nor Proxy: not served"));
                continue;
            }
        }
        match read(text) {
            Ok(address) if found.contains(&address) => {}
            Ok(address) => found.push(address),
            Err(reason) => problems.error(field("ip"), reason),
        }
    }
    found
}

/// Ranges of both families.
pub(super) fn source_ranges(spec: &ServiceSpec, problems: &mut Problems<'_>) -> Vec<IpNet> {
    let mut found = Vec::new();
    for (index, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match address::parse_range(text) {
            Some(range) => found.push(range),
            None => problems.error(
                format!("spec.loadBalancerSourceRanges[{index}]"),
                format!("{text:?} is no range: it admits nobody, and where no range of a family is left, everybody is admitted"),
            ),
        }
    }
    found
}

/// Whether sources equal to the load-balancer addresses pass too. Where such an address is also one of the node's own, the
/// node's packets to it come from it; so they pass if the node may.
pub(super) fn admit_vips(ranges: &[IpNet], node: &NodeFacts) -> bool {
    ranges.iter().any(|range| node.primary.iter().any(|address| range.contains(address)))
}

/// The port on which load balancers ask about the node: for type LoadBalancer with external policy Local.
pub(super) fn health_check_port(spec: &ServiceSpec, external: TrafficPolicy) -> Option<u16> {
    let wanted = spec.type_.as_deref() == Some("LoadBalancer") && external == TrafficPolicy::Local;
    let port = spec.health_check_node_port.filter(|_| wanted)?;
    u16::try_from(port).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::resolve::testing::{fields, port, resolved, service, text};

    #[test]
    fn only_addresses_that_are_not_the_load_balancers_own_are_served() {
        let mut web = service(json!({}));
        web["status"]["loadBalancer"]["ingress"] = json!([
            {"ip": "192.0.2.1"}, {"ip": "192.0.2.02", "ipMode": "VIP"}, {"ip": "192.0.2.3", "ipMode": "Proxy"},
            {"hostname": "example.org"}, {"ip": ""}, {"ip": "2001:db8::1"}, {"ip": "192.0.2.1"},
            {"ip": "192.0.2.4", "ipMode": "Fancy"}, {"ip": "lb"}, {"ip": "127.0.0.1"},
        ]);
        let found = resolved(&web, &[]);
        let bad = ["[7].ipMode", "[8].ip", "[9].ip"];
        assert_eq!(fields(&found), text(&bad.map(|it| format!("Service ns/web: status.loadBalancer.ingress{it}"))));
        assert_eq!(text(&found.spec.unwrap().ports[0].load_balancer_ips), ["192.0.2.1", "192.0.2.2"]);
    }

    #[test]
    fn ranges_are_of_one_family_and_admit_the_addresses_when_they_admit_the_node() {
        for (ranges, kept, admit) in [
            (json!([]), &[][..], false),
            (json!(["203.0.113.0/24"]), &["203.0.113.0/24"], false),
            (json!([" 192.168.000.9/24 ", "203.0.113.0/24"]), &["192.168.0.0/24", "203.0.113.0/24"], true),
            // The node's second address does not count.
            (json!(["192.168.0.3/32"]), &["192.168.0.3/32"], false),
            (json!(["fd00:1::/64"]), &[], false),
        ] {
            let port = port(&service(json!({"loadBalancerSourceRanges": ranges})), &[]);
            assert_eq!((text(&port.source_ranges), port.source_ranges_admit_vips), (text(kept), admit), "{ranges}");
        }
        let found = resolved(&service(json!({"loadBalancerSourceRanges": ["203.0.113.0"]})), &[]);
        assert_eq!(fields(&found), ["Service ns/web: spec.loadBalancerSourceRanges[0]"]);
    }
}
