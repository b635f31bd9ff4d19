//! Which Services are ours, their ClusterIPs by family, their ports and external addresses.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use sluice_dataplane::net::{Family, Protocol};

use super::Rules;
use super::node_port;
use super::problems::Problems;
use crate::address;
use crate::object::{PROXY_NAME_LABEL, label};

/// A port of the Service that can be served.
pub(super) struct ServicePort<'s> {
    pub(super) name: &'s str,
    pub(super) protocol: Protocol,
    pub(super) number: u16,
    pub(super) node_port: Option<u16>,
}

/// Whether the Service is this proxy's (KEP-2447), and one that is balanced at all: no ExternalName, not headless.
pub(super) fn is_ours(service: &Service, rules: &Rules) -> bool {
    let proxy = label(&service.metadata, PROXY_NAME_LABEL);
    // With the label, whatever its value, it is somebody else's by default.
    let is_for_us = match proxy {
        None => rules.service_proxy_name.is_empty(),
        Some(name) => !name.is_empty() && name == rules.service_proxy_name,
    };
    let spec = service.spec.as_ref();
    let is_external_name = spec.is_some_and(|spec| spec.type_.as_deref() == Some("ExternalName"));
    let is_headless = spec.is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None"));
    is_for_us && !is_external_name && !is_headless
}

/// The ClusterIP of each family: that of the entry of `ipFamilies`; without any, `clusterIP` alone counts.
pub(super) fn cluster_ips(spec: &ServiceSpec, problems: &mut Problems<'_>) -> Vec<(Family, IpAddr)> {
    let first = spec.cluster_ip.as_deref().unwrap_or_default();
    if first.is_empty() {
        problems.warning("spec.clusterIP", "is empty: nothing is served until the Service has one");
        return Vec::new();
    }
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let listed: Vec<&str> = match spec.cluster_ips.as_deref().unwrap_or_default() {
        [] => vec![first],
        listed => listed.iter().map(String::as_str).collect(),
    };
    let mut found = Vec::with_capacity(2);
    if families.is_empty() {
        match read(first) {
            Ok(address) => found.push((Family::of(address), address)),
            Err(reason) => problems.error("spec.clusterIP", reason),
        }
        return found;
    }
    for (index, name) in families.iter().enumerate() {
        let family = match name.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => {
                problems.error(format!("spec.ipFamilies[{index}]"), format!("{other:?} is neither IPv4 nor IPv6"));
                continue;
            }
        };
        let field = || format!("spec.clusterIPs[{index}]");
        let Some(text) = listed.get(index) else {
            problems.warning(field(), format!("is missing: the Service is not served in {family}"));
            continue;
        };
        match read(text) {
            Ok(address) if Family::of(address) != family => {
                problems.error(field(), format!("{text} is not {family}, which spec.ipFamilies[{index}] asks for"));
            }
            Ok(_) if found.iter().any(|(other, _)| *other == family) => {
                problems.error(format!("spec.ipFamilies[{index}]"), format!("{family} is there twice"));
            }
            Ok(address) => found.push((family, address)),
            Err(reason) => problems.error(field(), reason),
        }
    }
    found
}

/// The ports that can be served. Of two that want one name or one number, the first does.
pub(super) fn ports<'s>(spec: &'s ServiceSpec, rules: &Rules, problems: &mut Problems<'_>) -> Vec<ServicePort<'s>> {
    let declared = spec.ports.as_deref().unwrap_or_default();
    if declared.is_empty() {
        problems.warning("spec.ports", "is empty: nothing is served");
    }
    let mut ports: Vec<ServicePort<'s>> = Vec::with_capacity(declared.len());
    let (mut names, mut numbers) = (ahash::AHashSet::new(), ahash::AHashSet::new());
    let mut node_ports = node_port::NodePorts::new(rules.node_port_range);
    for (index, port) in declared.iter().enumerate() {
        let name = port.name.as_deref().unwrap_or_default();
        let field = |field: &str| format!("spec.ports[{index}].{field}");
        let protocol = match protocol(port.protocol.as_deref()) {
            Ok(protocol) => protocol,
            Err(reason) => {
                problems.error(field("protocol"), reason);
                continue;
            }
        };
        let Some(number) = u16::try_from(port.port).ok().filter(|number| *number != 0) else {
            problems.error(field("port"), format!("{} is no port: use 1 to 65535", port.port));
            continue;
        };
        // A port that is left out takes neither from a later one.
        if names.contains(&(name, protocol)) {
            problems.error(field("name"), format!("{name:?} ({protocol}) is the name of an earlier port"));
            continue;
        }
        if !numbers.insert((number, protocol)) {
            problems.error(field("port"), format!("{number} ({protocol}) is the number of an earlier port"));
            continue;
        }
        names.insert((name, protocol));
        let node_port = node_ports.take(port.node_port, protocol, || field("nodePort"), problems);
        ports.push(ServicePort { name, protocol, number, node_port });
    }
    ports
}

/// External addresses of both families. What cannot be read, or cannot be anybody's, is left out.
pub(super) fn external_ips(spec: &ServiceSpec, problems: &mut Problems<'_>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for (index, text) in spec.external_ips.iter().flatten().enumerate() {
        let field = || format!("spec.externalIPs[{index}]");
        match read(text) {
            Ok(address) if address::is_link_local(address) => {
                problems.error(field(), format!("{text} is link-local: no external address can be"));
            }
            Ok(address) if found.contains(&address) => {}
            Ok(address) => found.push(address),
            Err(reason) => problems.error(field(), reason),
        }
    }
    found
}

/// Reads a protocol; none means TCP, as the API server fills in.
pub(super) fn protocol(text: Option<&str>) -> Result<Protocol, String> {
    match text {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!("{other:?} is not TCP, UDP or SCTP")),
    }
}

/// Reads the address of a frontend.
pub(super) fn read(text: &str) -> Result<IpAddr, String> {
    match address::parse(text) {
        None => Err(format!("{text:?} is no IP address")),
        Some(address) if address::is_unroutable(address) => {
            Err(format!("{text} cannot be the address of a Service: it is loopback, multicast or unspecified"))
        }
        Some(address) => Ok(address),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::resolve::Rules;
    use crate::resolve::testing::{fields, port, resolved, resolved_by, rules, service, text};

    #[test]
    fn some_services_are_not_ours() {
        let labelled = |value: &str| {
            let mut web = service(json!({}));
            web["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": value});
            web
        };
        for (web, ours, theirs) in [
            (service(json!({})), true, false),
            (labelled("other"), false, true),
            (labelled("third"), false, false),
            (labelled(""), false, false),
            (service(json!({"type": "ExternalName"})), false, false),
            (service(json!({"clusterIP": "None"})), false, false),
            (service(json!({"clusterIP": ""})), false, false),
        ] {
            let other = Rules { service_proxy_name: "other".to_owned(), ..rules() };
            let served = (resolved(&web, &[]).spec.is_some(), resolved_by(&web, &[], &other).spec.is_some());
            assert_eq!(served, (ours, theirs), "{web}");
        }
    }

    #[test]
    fn a_family_is_served_at_its_own_cluster_ip() {
        let (v4, v6) = ("10.96.0.1", "fd00:96::1");
        for (spec, served, problems) in [
            (json!({"clusterIPs": [v4, v6], "ipFamilies": ["IPv4", "IPv6"]}), &[v4, v6][..], 0),
            (json!({"clusterIP": v6, "clusterIPs": [v6, v4], "ipFamilies": ["IPv6", "IPv4"]}), &[v6, v4], 0),
            (json!({"clusterIPs": [v4], "ipFamilies": ["IPv4"]}), &[v4], 0),
            (json!({"clusterIP": v6}), &[v6], 0),
            // Without families only clusterIP counts; without a list it is the list.
            (json!({"clusterIPs": [v4, v6]}), &[v4], 0),
            (json!({"ipFamilies": ["IPv4"]}), &[v4], 0),
            (json!({"clusterIPs": [v4], "ipFamilies": ["IPv4", "IPv6"]}), &[v4], 1),
            (json!({"clusterIPs": [v4, v6], "ipFamilies": ["IPv6", "IPv4"]}), &[], 2),
            (json!({"clusterIPs": [v4, v6], "ipFamilies": ["IPv4", "IPX"]}), &[v4], 1),
            (json!({"clusterIPs": [v4, "10.96.0.2"], "ipFamilies": ["IPv4", "IPv4"]}), &[v4], 1),
            (json!({"clusterIP": "10.96.000.01"}), &[v4], 0),
            (json!({"clusterIP": "garbage"}), &[], 1),
            (json!({"clusterIP": "224.0.0.1"}), &[], 1),
            (json!({"clusterIP": ""}), &[], 1),
        ] {
            let found = resolved(&service(spec.clone()), &[]);
            let ports = found.spec.iter().flat_map(|spec| &spec.ports);
            let addresses: Vec<String> = ports.map(|port| port.cluster_ip.to_string()).collect();
            assert_eq!((addresses, found.problems.len()), (text(served), problems), "{spec}: {:?}", found.problems);
        }
    }

    #[test]
    fn ports_that_cannot_be_served_are_named() {
        let ports = json!([
            {"name": "a", "port": 80}, {"name": "b", "port": 0}, {"name": "c", "port": 65536}, {"name": "d", "port": -1},
            {"name": "e", "port": 81, "protocol": "tcp"}, {"name": "a", "port": 82}, {"name": "g", "port": 80},
            {"name": "a", "port": 80, "protocol": "UDP"}, {"name": "i", "port": 83, "protocol": "SCTP"}, {"name": "g", "port": 84},
        ]);
        let found = resolved(&service(json!({"ports": ports})), &[]);
        let bad = ["[1].port", "[2].port", "[3].port", "[4].protocol", "[5].name", "[6].port"];
        assert_eq!(fields(&found), text(&bad.map(|it| format!("Service ns/web: spec.ports{it}"))));
        let spec = found.spec.unwrap();
        let served: Vec<_> =
            spec.ports.iter().map(|port| format!("{} {} {}", port.name, port.number, port.protocol)).collect();
        assert_eq!(served, ["a 80 TCP", "a 80 UDP", "i 83 SCTP", "g 84 TCP"]);
        assert_eq!(fields(&resolved(&service(json!({"ports": []})), &[])), ["Service ns/web: spec.ports"]);
    }

    #[test]
    fn external_addresses_are_read_leniently_by_family() {
        let addresses =
            json!(["198.51.100.01", "2001:db8::1", "198.51.100.1", "x", "0.0.0.0", "169.254.1.1", "fe80::1"]);
        let web = service(json!({"externalIPs": addresses}));
        assert_eq!(text(&port(&web, &[]).external_ips), ["198.51.100.1"]);
        let bad = ["[3]", "[4]", "[5]", "[6]"];
        assert_eq!(fields(&resolved(&web, &[])), text(&bad.map(|it| format!("Service ns/web: spec.externalIPs{it}"))));
    }

    #[test]
    fn a_thousand_ports_are_served() {
        let port = |number: u32| json!({"name": format!("p{number}"), "port": number});
        let ports: Vec<Value> = (1..=1000).map(port).collect();
        let spec = resolved(&service(json!({"ports": ports})), &[]).spec.unwrap();
        assert_eq!(spec.ports.len(), 1000);
    }

    #[test]
    fn the_age_of_a_service_is_kept() {
        let mut web = service(json!({}));
        assert_eq!(resolved(&web, &[]).spec.unwrap().created, None);
        web["metadata"]["creationTimestamp"] = json!("1970-01-01T00:01:00Z");
        assert_eq!(resolved(&web, &[]).spec.unwrap().created, Some(60));
    }
}
