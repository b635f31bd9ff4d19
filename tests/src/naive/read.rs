//! JSON read as Kubernetes reads it, and what counts of it (section 1).

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

/// Section 1.
pub(super) fn is_served(service: &Value, proxy: &str) -> bool {
    let spec = &service["spec"];
    let label = &service["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"];
    let is_ours = if proxy.is_empty() { label.is_null() } else { *label == proxy };
    is_ours && spec["type"] != "ExternalName" && !matches!(text(&spec["clusterIP"]), "" | "None")
}

pub(super) fn belongs(slice: &Value, service: &Value) -> bool {
    let labels = &slice["metadata"]["labels"];
    labels["service.kubernetes.io/headless"].is_null()
        && labels["kubernetes.io/service-name"] == service["metadata"]["name"]
        && slice["metadata"]["namespace"] == service["metadata"]["namespace"]
}

/// The older object first, those without age last; then by name.
pub(super) fn age(object: &Value) -> (bool, String, String, String) {
    let metadata = &object["metadata"];
    let created = text(&metadata["creationTimestamp"]).to_owned();
    (created.is_empty(), created, text(&metadata["namespace"]).to_owned(), text(&metadata["name"]).to_owned())
}

pub(super) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> + Clone {
    value.as_array().into_iter().flatten()
}

pub(super) fn contains(ranges: &[IpNet], address: IpAddr) -> bool {
    ranges.iter().any(|range| range.contains(&address))
}

pub(super) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

pub(super) fn is_routable(address: IpAddr) -> bool {
    !(address.is_loopback() || address.is_multicast() || address.is_unspecified())
}

pub(super) fn is_endpoint(address: IpAddr) -> bool {
    is_routable(address) && !is_link_local(address)
}

/// An address as Kubernetes reads it: leading zeros do not matter, IPv4 in IPv6 is IPv4.
pub(super) fn ip(text: &str) -> Option<IpAddr> {
    let parts: Vec<&str> = text.split('.').collect();
    if parts.len() == 4 && !text.contains(':') {
        let plain: Vec<String> =
            parts.iter().map(|part| part.parse::<u8>().ok().map(|part| part.to_string())).collect::<Option<_>>()?;
        return plain.join(".").parse().ok();
    }
    text.parse().ok().map(|address: IpAddr| address.to_canonical())
}

pub(super) fn range(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    let range = IpNet::new(ip(address)?, length.parse().ok()?).ok()?;
    Some(range.trunc())
}
