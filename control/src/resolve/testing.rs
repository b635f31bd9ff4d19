//! Objects for the tables of tests: JSON in, a resolved Service out.

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use sluice_dataplane::table::{Balancing, PortSpec};

use super::{Resolved, Rules, resolve};
use crate::config::PortRange;
use crate::node::NodeFacts;

/// The node of all tables.
pub(super) fn node() -> NodeFacts {
    let address = |text: &str| text.parse().unwrap();
    NodeFacts {
        name: "me".to_owned(),
        zone: Some("a".to_owned()),
        primary: vec![address("192.168.0.2"), address("fd00:1::2")],
        addresses: vec![address("192.168.0.2"), address("192.168.0.3"), address("fd00:1::2")],
        ..NodeFacts::default()
    }
}

pub(super) fn rules() -> Rules {
    Rules {
        retry: true,
        drain_timeout: sluice_dataplane::table::DrainTimeout::default(),
        service_proxy_name: String::new(),
        balancing: Balancing::LeastConnections,
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        node_port_addresses: node().addresses,
        node_port_range: PortRange::new(30000, 32767),
        fill_in_defaults: false,
    }
}

/// A Service with one port, changed by `spec`.
pub(super) fn service(spec: Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "ns", "name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]},
    });
    for (key, value) in spec.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    service
}

/// An IPv4 slice of it, with port http 8080.
pub(super) fn slice(name: &str, endpoints: &[Value]) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "ns", "name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080}],
    })
}

/// An endpoint in words: its address, then any of `here`, `unready`, `unserving`, `terminating`, `zone=…`, `node=…`.
pub(super) fn endpoint(words: &str) -> Value {
    let mut words = words.split_whitespace();
    let mut endpoint = json!({"addresses": [words.next().unwrap()], "conditions": {}});
    for word in words {
        match word.split_once('=') {
            Some(("zone", zone)) => endpoint["hints"]["forZones"] = json!([{"name": zone}]),
            Some(("node", node)) => endpoint["hints"]["forNodes"] = json!([{"name": node}]),
            _ => match word {
                "here" => endpoint["nodeName"] = json!("me"),
                "unready" => endpoint["conditions"]["ready"] = json!(false),
                "unserving" => endpoint["conditions"]["serving"] = json!(false),
                "terminating" => endpoint["conditions"]["terminating"] = json!(true),
                other => panic!("{other} says nothing of an endpoint"),
            },
        }
    }
    endpoint
}

/// A slice of endpoints in words.
pub(super) fn slice_of(endpoints: &[&str]) -> Value {
    slice("web-1", &endpoints.iter().map(|words| endpoint(words)).collect::<Vec<_>>())
}

pub(super) fn resolved_by(service: &Value, slices: &[Value], rules: &Rules) -> Resolved {
    let service: Service = serde_json::from_value(service.clone()).unwrap();
    let slices: Vec<EndpointSlice> =
        slices.iter().map(|slice| serde_json::from_value(slice.clone()).unwrap()).collect();
    resolve(&service, &slices, &node(), rules)
}

pub(super) fn resolved(service: &Value, slices: &[Value]) -> Resolved {
    resolved_by(service, slices, &rules())
}

/// The only port of a Service that is served.
pub(super) fn port(service: &Value, slices: &[Value]) -> PortSpec {
    let mut ports = resolved(service, slices).spec.expect("it is served").ports;
    assert_eq!(ports.len(), 1, "{ports:?}");
    ports.remove(0)
}

/// Each problem as `object: field`.
pub(super) fn fields(resolved: &Resolved) -> Vec<String> {
    let field = |problem: &crate::problem::Problem| {
        format!("{}: {}", problem.object.as_deref().unwrap_or_default(), problem.field)
    };
    resolved.problems.iter().map(field).collect()
}

/// Addresses as text.
pub(super) fn text(addresses: &[impl ToString]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}
