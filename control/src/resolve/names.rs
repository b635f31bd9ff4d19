//! Names: one Service and its EndpointSlices as DNS has them. Here only `ready` counts, and every address of an endpoint;
//! ports are the slices' for endpoints, the Service's for its own addresses.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use sluice_dataplane::dns::{NamedEndpoint, NamedPort, NamedService, Stands};
use sluice_dataplane::table::ServiceName;

use crate::address;

/// Longest label (RFC 1035 §2.3.4).
const LONGEST_LABEL: usize = 63;

/// The names of a Service. Nothing when there is neither a Service nor a slice. `instead`: addresses that a headless
/// Service's name answers in place of its endpoints. `pod_names`: an endpoint without a host name is called as its Pod.
#[must_use]
pub fn names<'s>(
    name: &ServiceName,
    service: Option<&Service>,
    slices: impl IntoIterator<Item = &'s EndpointSlice>,
    instead: Vec<IpAddr>,
    pod_names: bool,
) -> Option<NamedService> {
    let (mut endpoints, mut has_slice) = (Vec::new(), false);
    for slice in slices {
        has_slice = true;
        if !matches!(&*slice.address_type, "IPv4" | "IPv6") {
            continue;
        }
        let ports: Arc<[NamedPort]> = slice_ports(slice).into();
        for endpoint in slice.endpoints.iter().flatten().filter(|endpoint| is_ready(endpoint)) {
            for address in endpoint.addresses.iter().filter_map(|text| address::parse(text)) {
                let (label, ports) = (label(endpoint, address, pod_names), Arc::clone(&ports));
                endpoints.push(NamedEndpoint { label: label.into(), address, ports });
            }
        }
    }
    let stands = match service {
        Some(service) => stands(service.spec.as_ref(), instead),
        None if has_slice => Stands::Nothing,
        None => return None,
    };
    Some(NamedService { name: name.clone(), stands, endpoints })
}

/// Addresses by which a Pod can be named; none once it has ended, or is about to.
#[must_use]
pub fn pod_addresses(pod: &Pod) -> Vec<IpAddr> {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
    if pod.metadata.deletion_timestamp.is_some() || matches!(phase, "Succeeded" | "Failed" | "Unknown") {
        return Vec::new();
    }
    let one = status.and_then(|status| status.pod_ip.as_deref());
    let all = status.into_iter().flat_map(|status| status.pod_ips.iter().flatten()).map(|it| it.ip.as_str());
    let mut addresses: Vec<IpAddr> = one.into_iter().chain(all).filter_map(address::parse).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Whether a Service has no address of its own.
#[must_use]
pub fn is_headless(spec: &ServiceSpec) -> bool {
    let first = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).next();
    first.is_some_and(|address| address == "None") && spec.type_.as_deref() != Some("ExternalName")
}

fn stands(spec: Option<&ServiceSpec>, instead: Vec<IpAddr>) -> Stands {
    let Some(spec) = spec else { return Stands::Nothing };
    if spec.type_.as_deref() == Some("ExternalName") {
        return Stands::Name(spec.external_name.clone().unwrap_or_default());
    }
    if is_headless(spec) {
        return Stands::Endpoints { instead };
    }
    let several = spec.cluster_ips.iter().flatten();
    let one = spec.cluster_ip.iter().filter(|_| spec.cluster_ips.as_ref().is_none_or(Vec::is_empty));
    let addresses = several.chain(one).filter_map(|text| address::parse(text)).collect();
    let ports = spec
        .ports
        .iter()
        .flatten()
        .map(|port| named(port.name.as_deref(), port.protocol.as_deref(), u16::try_from(port.port).ok()));
    Stands::Addresses { addresses, ports: or_none(ports.collect()) }
}

fn slice_ports(slice: &EndpointSlice) -> Vec<NamedPort> {
    let ports = slice.ports.iter().flatten().map(|port| {
        let number = port.port.and_then(|port| u16::try_from(port).ok());
        named(port.name.as_deref(), port.protocol.as_deref(), number)
    });
    or_none(ports.collect())
}

fn named(name: Option<&str>, protocol: Option<&str>, number: Option<u16>) -> NamedPort {
    let lower = |text: &str| text.to_ascii_lowercase().into_boxed_str();
    NamedPort { name: lower(name.unwrap_or_default()), protocol: lower(protocol.unwrap_or("TCP")), number }
}

fn or_none(ports: Vec<NamedPort>) -> Vec<NamedPort> {
    if ports.is_empty() { vec![NamedPort::none()] } else { ports }
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
}

/// Host name, or else the Pod's where that is wanted, or else the address with dashes.
fn label(endpoint: &Endpoint, address: IpAddr, pod_names: bool) -> String {
    if let Some(hostname) = endpoint.hostname.as_deref().filter(|hostname| !hostname.is_empty()) {
        return hostname.to_owned();
    }
    let pod = endpoint.target_ref.as_ref().and_then(|target| target.name.as_deref());
    if let Some(pod) = pod.filter(|pod| pod_names && (1..=LONGEST_LABEL).contains(&pod.len())) {
        return pod.to_owned();
    }
    let mut label = address.to_string().replace(['.', ':'], "-");
    if label.ends_with('-') {
        label.push('0');
    }
    label
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_endpoint_is_called_by_host_name_pod_or_address() {
        let pod = json!({"kind": "Pod", "name": "web-pod"});
        let long = json!({"kind": "Pod", "name": "x".repeat(64)});
        for (endpoint, address, pod_names, expected) in [
            (json!({"hostname": "h", "targetRef": pod}), "10.0.0.1", true, "h"),
            (json!({"targetRef": pod}), "10.0.0.1", true, "web-pod"),
            (json!({"targetRef": pod}), "10.0.0.1", false, "10-0-0-1"),
            (json!({"targetRef": long}), "10.0.0.1", true, "10-0-0-1"),
            (json!({"hostname": ""}), "5678:abcd::1", false, "5678-abcd--1"),
            (json!({}), "fd00:1::", false, "fd00-1--0"),
            (json!({}), "::1", false, "--1"),
        ] {
            let mut endpoint = endpoint;
            endpoint["addresses"] = json!([address]);
            let endpoint: Endpoint = serde_json::from_value(endpoint).unwrap();
            assert_eq!(label(&endpoint, address.parse().unwrap(), pod_names), expected);
        }
    }

    #[test]
    fn pods_that_end_have_no_address() {
        let pod = |value| pod_addresses(&serde_json::from_value::<Pod>(value).unwrap()).len();
        let status =
            json!({"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]});
        assert_eq!(pod(json!({"metadata": {}, "status": status})), 2);
        assert_eq!(pod(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": status})), 0);
        assert_eq!(pod(json!({"metadata": {}, "status": {"phase": "Succeeded", "podIP": "10.0.0.1"}})), 0);
        assert_eq!(pod(json!({"metadata": {}})), 0);
    }
}
