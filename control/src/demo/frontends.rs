//! What can be dialled, from where, and what is to come of it: complete Services and EndpointSlices to frontends. Pure.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_bench::client::Target;
use sluice_dataplane::net::{Family, Protocol};
use sluice_dataplane::table::{FrontendKind, ServiceName};

use crate::object::{PROXY_NAME_LABEL, label, name_of, service_of};

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum From {
    /// In a Pod.
    Pod,
    /// Outside the cluster.
    Outside,
}

/// What is to come of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Expect {
    /// An endpoint answers.
    Answer,
    /// Refused at once: the Service has no endpoint.
    Refusal,
}

/// A Service port, as the report groups connections.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortKey {
    /// The Service.
    pub(super) service: ServiceName,
    /// Its port.
    pub(super) port: u16,
    /// Its protocol.
    pub(super) protocol: Protocol,
    /// Its name; may be empty.
    pub(super) name: String,
}

/// One thing to dial, over and over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    /// The Service port.
    pub(super) port: PortKey,
    /// What kind of frontend.
    pub(super) kind: FrontendKind,
    /// Its address.
    pub(super) address: SocketAddr,
    /// Who dials it.
    pub(super) from: From,
    /// What is to come of it.
    pub(super) expect: Expect,
    /// A client stays with its endpoint (`sessionAffinity: ClientIP`).
    pub(super) is_sticky: bool,
}

impl Lane {
    /// As the clients take it.
    #[must_use]
    pub(super) fn target(&self) -> Target {
        match self.port.protocol {
            Protocol::Udp => Target::Udp(self.address),
            Protocol::Tcp | Protocol::Sctp => Target::Http(self.address),
        }
    }
}

/// What the lanes depend on besides objects.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// The node's addresses, for node ports.
    pub(super) node: Vec<IpAddr>,
    /// The outside client's addresses, for source ranges.
    pub(super) outside: Vec<IpAddr>,
    /// Families that can be dialled.
    pub(super) families: Vec<Family>,
}

/// Everything to dial, and in words what is not.
#[derive(Clone, Debug, Default)]
pub(super) struct Frontends {
    /// In the order of Services and ports.
    pub(super) lanes: Vec<Lane>,
    /// What is not dialled, and why.
    pub(super) notes: Vec<String>,
}

/// All frontends of complete Services.
#[must_use]
pub(super) fn frontends(services: &[&Service], slices: &[&EndpointSlice], around: &Surroundings) -> Frontends {
    let mut found = Frontends::default();
    for service in services {
        let name = name_of(&service.metadata);
        let Some(spec) = &service.spec else { continue };
        match not_dialled(service, spec) {
            Some(why) => found.notes.push(format!("{name}: {why}")),
            None => add_service(&mut found, service, spec, &name, slices, around),
        }
    }
    found
}

fn not_dialled(service: &Service, spec: &ServiceSpec) -> Option<String> {
    if spec.type_.as_deref() == Some("ExternalName") {
        return Some("ExternalName is a matter of DNS: nothing to balance".to_owned());
    }
    if let Some(proxy) = label(&service.metadata, PROXY_NAME_LABEL) {
        return Some(format!("left to the proxy {proxy:?} by its label"));
    }
    match spec.cluster_ip.as_deref() {
        Some("None") => {
            Some("headless: its clients ask DNS for the Pods' own addresses; nothing to balance".to_owned())
        }
        None | Some("") => Some("has no ClusterIP: not served".to_owned()),
        Some(_) => None,
    }
}

fn add_service(
    found: &mut Frontends,
    service: &Service,
    spec: &ServiceSpec,
    name: &ServiceName,
    slices: &[&EndpointSlice],
    around: &Surroundings,
) {
    let own: Vec<&EndpointSlice> =
        slices.iter().copied().filter(|slice| service_of(slice).as_ref() == Some(name)).collect();
    let is_sticky = spec.session_affinity.as_deref() == Some("ClientIP");
    for port in spec.ports.iter().flatten() {
        let protocol: Protocol = match port.protocol.as_deref().unwrap_or("TCP").parse() {
            Ok(Protocol::Sctp) => {
                found.notes.push(format!("{name} port {}: SCTP is not dialled", port.port));
                continue;
            }
            Ok(protocol) => protocol,
            Err(error) => {
                found.notes.push(format!("{name} port {}: {error}", port.port));
                continue;
            }
        };
        let Ok(number) = u16::try_from(port.port) else { continue };
        let key =
            PortKey { service: name.clone(), port: number, protocol, name: port.name.clone().unwrap_or_default() };
        for family in served_families(spec, around) {
            let expect = expectation(&own, port, protocol, family);
            for (kind, address, from) in addresses(service, spec, port, number, family, around) {
                if kind == FrontendKind::LoadBalancer && !is_admitted(spec, family, around) {
                    found.notes.push(format!("{name}: {address} admits other sources only: not dialled"));
                    continue;
                }
                found.lanes.push(Lane { port: key.clone(), kind, address, from, expect, is_sticky });
            }
        }
    }
}

/// Families in which the Service has a ClusterIP: in others it has no frontend at all.
fn served_families(spec: &ServiceSpec, around: &Surroundings) -> Vec<Family> {
    let ips = cluster_ips(spec);
    around.families.iter().copied().filter(|family| ips.iter().any(|ip| Family::of(*ip) == *family)).collect()
}

fn cluster_ips(spec: &ServiceSpec) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.iter().flatten();
    let mut ips: Vec<IpAddr> = listed.chain(&spec.cluster_ip).filter_map(|ip| ip.parse().ok()).collect();
    ips.sort_unstable();
    ips.dedup();
    ips
}

fn addresses(
    service: &Service,
    spec: &ServiceSpec,
    port: &ServicePort,
    number: u16,
    family: Family,
    around: &Surroundings,
) -> Vec<(FrontendKind, SocketAddr, From)> {
    let of_family = |ip: &IpAddr| Family::of(*ip) == family;
    let mut found = Vec::new();
    for ip in cluster_ips(spec).into_iter().filter(of_family) {
        found.push((FrontendKind::ClusterIp, SocketAddr::new(ip, number), From::Pod));
    }
    if let Some(node_port @ 1..) = port.node_port.and_then(|port| u16::try_from(port).ok()) {
        for ip in around.node.iter().copied().filter(of_family) {
            found.push((FrontendKind::NodePort, SocketAddr::new(ip, node_port), From::Outside));
        }
    }
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    for ingress in status.and_then(|status| status.ingress.as_ref()).into_iter().flatten() {
        // With ipMode Proxy the load balancer itself is dialled, and there is none here (KEP-1860).
        let is_vip = ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP");
        let ip = ingress.ip.as_ref().and_then(|ip| ip.parse().ok()).filter(of_family);
        if let Some(ip) = ip.filter(|_| is_vip) {
            found.push((FrontendKind::LoadBalancer, SocketAddr::new(ip, number), From::Outside));
        }
    }
    for ip in spec.external_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).filter(of_family) {
        found.push((FrontendKind::ExternalIp, SocketAddr::new(ip, number), From::Outside));
    }
    found
}

/// Whether the outside client may dial load-balancer addresses of the family.
fn is_admitted(spec: &ServiceSpec, family: Family, around: &Surroundings) -> bool {
    let ranges = spec.load_balancer_source_ranges.iter().flatten().filter_map(|range| range.trim().parse().ok());
    let ranges: Vec<IpNet> = ranges.filter(|range: &IpNet| Family::of(range.addr()) == family).collect();
    let inside = |ip: &IpAddr| ranges.iter().any(|range| range.contains(ip));
    ranges.is_empty() || around.outside.iter().filter(|ip| Family::of(**ip) == family).any(inside)
}

fn expectation(slices: &[&EndpointSlice], port: &ServicePort, protocol: Protocol, family: Family) -> Expect {
    let wanted = port.name.as_deref().unwrap_or_default();
    let has_port = |slice: &EndpointSlice| {
        slice.ports.iter().flatten().any(|port| {
            port.port.is_some()
                && port.name.as_deref().unwrap_or_default() == wanted
                && port.protocol.as_deref().unwrap_or("TCP") == protocol.name()
        })
    };
    let has_ready = |slice: &EndpointSlice| {
        slice
            .endpoints
            .iter()
            .flatten()
            .any(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true))
    };
    let family = family.to_string();
    let serves = slices.iter().any(|slice| slice.address_type == family && has_port(slice) && has_ready(slice));
    if serves { Expect::Answer } else { Expect::Refusal }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(spec: Value, ingress: Value) -> Service {
        let value = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "n", "name": "s"},
            "spec": spec, "status": {"loadBalancer": {"ingress": ingress}},
        });
        serde_json::from_value(value).unwrap()
    }

    fn slice(family: &str, port: &str, ready: bool) -> EndpointSlice {
        let value = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {"namespace": "n", "name": format!("s-{family}"), "labels": {"kubernetes.io/service-name": "s"}},
            "endpoints": [{"addresses": ["10.244.0.1"], "conditions": {"ready": ready}}],
            "ports": [{"name": port, "protocol": "TCP", "port": 8080}],
        });
        serde_json::from_value(value).unwrap()
    }

    fn around() -> Surroundings {
        Surroundings {
            node: vec!["192.168.50.1".parse().unwrap(), "fd00:50::1".parse().unwrap()],
            outside: vec!["192.168.50.2".parse().unwrap(), "fd00:50::2".parse().unwrap()],
            families: Family::BOTH.to_vec(),
        }
    }

    fn dialled(service: &Service, slices: &[EndpointSlice]) -> (Vec<String>, Vec<String>) {
        let slices: Vec<&EndpointSlice> = slices.iter().collect();
        let found = frontends(&[service], &slices, &around());
        let line = |lane: &Lane| format!("{} {} {:?} {:?}", lane.kind.name(), lane.address, lane.from, lane.expect);
        (found.lanes.iter().map(line).collect(), found.notes)
    }

    #[test]
    fn every_frontend_of_both_families_is_dialled() {
        let spec = json!({
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"],
            "externalIPs": ["203.0.113.9"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        });
        let ingress = json!([{"ip": "172.31.0.1"}, {"ip": "172.31.0.2", "ipMode": "Proxy"}, {"hostname": "x"}]);
        let (lanes, notes) =
            dialled(&service(spec, ingress), &[slice("IPv4", "http", true), slice("IPv6", "http", false)]);
        assert_eq!(
            lanes,
            [
                "clusterip 10.96.0.1:80 Pod Answer",
                "nodeport 192.168.50.1:30080 Outside Answer",
                "loadbalancer 172.31.0.1:80 Outside Answer",
                "externalip 203.0.113.9:80 Outside Answer",
                "clusterip [fd00:96::1]:80 Pod Refusal",
                "nodeport [fd00:50::1]:30080 Outside Refusal",
            ]
        );
        assert_eq!(notes, [""; 0]);
    }

    #[test]
    fn a_family_without_cluster_ip_has_no_node_port() {
        let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80, "nodePort": 30080}]});
        let (lanes, _) = dialled(&service(spec, json!([])), &[slice("IPv4", "other", true)]);
        assert_eq!(lanes, ["clusterip 10.96.0.1:80 Pod Refusal", "nodeport 192.168.50.1:30080 Outside Refusal"]);
    }

    #[test]
    fn what_is_not_dialled_is_said() {
        let port = json!([{"port": 80}]);
        for (spec, word) in [
            (json!({"clusterIP": "None", "ports": port}), "headless"),
            (json!({"type": "ExternalName", "externalName": "x", "ports": port}), "ExternalName"),
            (json!({"ports": port}), "no ClusterIP"),
            (json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80, "protocol": "SCTP"}]}), "SCTP"),
        ] {
            let (lanes, notes) = dialled(&service(spec, json!([])), &[]);
            assert_eq!(lanes, [""; 0]);
            assert!(notes.len() == 1 && notes[0].contains(word), "{word}: {notes:?}");
        }
    }

    #[test]
    fn source_ranges_keep_the_client_from_load_balancers_of_their_family_only() {
        let spec = json!({
            "clusterIPs": ["10.96.0.1", "fd00:96::1"], "clusterIP": "10.96.0.1", "ports": [{"port": 80}],
            "loadBalancerSourceRanges": [" 198.51.100.0/24"],
        });
        let (lanes, notes) = dialled(&service(spec, json!([{"ip": "172.31.0.1"}, {"ip": "fd00:31::1"}])), &[]);
        assert!(lanes.iter().any(|lane| lane.contains("fd00:31::1")), "{lanes:?}");
        assert!(!lanes.iter().any(|lane| lane.contains("172.31.0.1")), "{lanes:?}");
        assert!(notes[0].contains("172.31.0.1"), "{notes:?}");
    }
}
