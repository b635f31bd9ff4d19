//! EndpointSlices from Pods, as the EndpointSlice controller builds them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::ServiceName;
use xxhash_rust::xxh3::xxh3_64;

use super::defaults::{is_headless, type_of};
use crate::object::{HEADLESS_LABEL, SERVICE_NAME_LABEL};

/// Endpoints in a slice, as the controller's default.
const SLICE_SIZE: usize = 100;
const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGED_BY: &str = "local-controllers.sluice.dev";

/// The labels that make a Pod an endpoint of a Service; nothing when Pods do not decide about its endpoints.
pub(super) fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    let spec = service.spec.as_ref()?;
    spec.selector.as_ref().filter(|selector| !selector.is_empty() && type_of(spec) != "ExternalName")
}

/// Whether a Pod has all labels of a selector.
pub(super) fn selects(selector: &BTreeMap<String, String>, pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    selector.iter().all(|(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value)))
}

/// Whether anything could be sent to a Pod.
pub(super) fn is_reachable(pod: &Pod) -> bool {
    let is_over = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !matches!(is_over, Some("Succeeded" | "Failed"))
        && Family::BOTH.iter().any(|family| address(pod, *family).is_some())
}

/// Builds the slices of a Service, complete with families, by name. `pods`: those selected, in order of names. `zone`: a
/// Node's zone. Without endpoints a family has one slice without any.
pub(super) fn build<'p>(
    name: &ServiceName,
    service: &Service,
    pods: impl IntoIterator<Item = &'p Pod>,
    zone: impl Fn(&str) -> Option<String>,
) -> BTreeMap<String, EndpointSlice> {
    let Some(spec) = &service.spec else { return BTreeMap::new() };
    let pods: Vec<&Pod> = pods.into_iter().filter(|pod| is_reachable(pod)).collect();
    let families = spec.ip_families.iter().flatten();
    let families = families.filter_map(|text| Family::BOTH.into_iter().find(|family| family.to_string() == *text));
    let mut slices = BTreeMap::new();
    for family in families {
        let mut by_ports: Vec<(Vec<EndpointPort>, Vec<Endpoint>)> = Vec::new();
        for pod in &pods {
            let Some(address) = address(pod, family) else { continue };
            let ports = ports(spec.ports.as_deref().unwrap_or_default(), pod);
            let endpoint = endpoint(name, service, pod, address, &zone);
            match by_ports.iter_mut().find(|(known, _)| *known == ports) {
                Some((_, endpoints)) => endpoints.push(endpoint),
                None => by_ports.push((ports, vec![endpoint])),
            }
        }
        if by_ports.is_empty() {
            by_ports.push(Default::default());
        }
        for (ports, endpoints) in by_ports {
            let chunks = endpoints.chunks(SLICE_SIZE).map(<[_]>::to_vec).chain(endpoints.is_empty().then(Vec::new));
            for (number, endpoints) in chunks.enumerate() {
                let slice = slice(name, is_headless(spec), family, ports.clone(), endpoints, number);
                slices.insert(slice.metadata.name.clone().unwrap_or_default(), slice);
            }
        }
    }
    slices
}

fn slice(
    service: &ServiceName,
    is_headless: bool,
    family: Family,
    ports: Vec<EndpointPort>,
    endpoints: Vec<Endpoint>,
    number: usize,
) -> EndpointSlice {
    let mut labels = BTreeMap::from([
        (SERVICE_NAME_LABEL.to_owned(), service.name.to_string()),
        (MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned()),
    ]);
    if is_headless {
        labels.insert(HEADLESS_LABEL.to_owned(), String::new());
    }
    // Slices of one Service differ by family, ports and number; the name says all three.
    let port_text: String =
        ports.iter().map(|port| format!("{:?}/{:?}/{:?};", port.name, port.protocol, port.port)).collect();
    let hash = xxh3_64(port_text.as_bytes()) & 0xff_ffff;
    let name = format!("{}-{}-{hash:06x}-{number}", service.name, family.to_string().to_lowercase());
    EndpointSlice {
        address_type: family.to_string(),
        endpoints: Some(endpoints),
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(service.namespace.to_string()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        ports: Some(ports),
    }
}

/// The Service's ports as this Pod has them. A named target port that it has not is left out.
fn ports(ports: &[ServicePort], pod: &Pod) -> Vec<EndpointPort> {
    let ports = ports.iter().filter_map(|port| {
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        let number = match &port.target_port {
            None => port.port,
            Some(IntOrString::Int(number)) => *number,
            Some(IntOrString::String(name)) => container_port(pod, name, &protocol)?,
        };
        let name = Some(port.name.clone().unwrap_or_default());
        Some(EndpointPort {
            app_protocol: port.app_protocol.clone(),
            name,
            port: Some(number),
            protocol: Some(protocol),
        })
    });
    ports.collect()
}

fn container_port(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    // Init containers that keep running are sidecars (KEP-753).
    let is_sidecar = |container: &&Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let mut named = ports.filter(|port| port.name.as_deref() == Some(name));
    named.find(|port| port.protocol.as_deref().unwrap_or("TCP") == protocol).map(|port| port.container_port)
}

fn endpoint(
    name: &ServiceName,
    service: &Service,
    pod: &Pod,
    address: IpAddr,
    zone: impl Fn(&str) -> Option<String>,
) -> Endpoint {
    let (spec, metadata) = (pod.spec.as_ref(), &pod.metadata);
    let service_spec = service.spec.as_ref();
    let is_terminating = metadata.deletion_timestamp.is_some();
    let is_serving = is_pod_ready(pod);
    let publishes_all = service_spec.is_some_and(|spec| spec.publish_not_ready_addresses == Some(true));
    let is_ready = publishes_all || (is_serving && !is_terminating);
    let node_name = spec.and_then(|spec| spec.node_name.clone()).filter(|node| !node.is_empty());
    let zone = node_name.as_deref().and_then(zone);
    let is_in_subdomain = spec.is_some_and(|spec| spec.subdomain.as_deref() == Some(&*name.name));
    let hostname = spec.and_then(|spec| spec.hostname.clone()).filter(|host| is_in_subdomain && !host.is_empty());
    let distribution = service_spec.and_then(|spec| spec.traffic_distribution.as_deref()).filter(|_| is_ready);
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(is_ready),
            serving: Some(is_serving),
            terminating: Some(is_terminating),
        }),
        deprecated_topology: None,
        hints: hints(distribution, node_name.as_deref(), zone.as_deref()),
        hostname,
        node_name,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: metadata.name.clone(),
            namespace: metadata.namespace.clone(),
            uid: metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        zone,
    }
}

/// Hints by trafficDistribution (KEP-4444, KEP-3015). Without a zone there is none: then the data plane does without hints.
fn hints(distribution: Option<&str>, node: Option<&str>, zone: Option<&str>) -> Option<EndpointHints> {
    let for_zones = || zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    let for_nodes = || node.map(|node| vec![ForNode { name: node.to_owned() }]);
    let hints = match distribution? {
        "PreferClose" | "PreferSameZone" => EndpointHints { for_nodes: None, for_zones: for_zones() },
        "PreferSameNode" => EndpointHints { for_nodes: for_nodes(), for_zones: for_zones() },
        _ => return None,
    };
    (hints.for_nodes.is_some() || hints.for_zones.is_some()).then_some(hints)
}

fn is_pod_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.filter(|condition| condition.type_ == "Ready").any(|condition| condition.status == "True")
}

fn address(pod: &Pod, family: Family) -> Option<IpAddr> {
    let status = pod.status.as_ref()?;
    let all = status.pod_ips.iter().flatten().map(|ip| &ip.ip).chain(&status.pod_ip);
    all.filter_map(|ip| ip.parse().ok()).find(|ip| Family::of(*ip) == family)
}

#[cfg(test)]
mod tests;
