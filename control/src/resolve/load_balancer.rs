//! Load-balancer addresses (`ipMode`, KEP-1860) and `loadBalancerSourceRanges`.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ServiceSpec, ServiceStatus};

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
