//! Objects of a large cluster, as a source gives them.

use std::path::Path;

use anyhow::Result;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use sluice_control::config::Config;
use sluice_control::object::Object;
use sluice_control::problem::Origin;
use sluice_control::source::Change;
use sluice_dataplane::packet_path::Settings;

/// So many Services with so many endpoints, each in the one slice of its Service.
pub(crate) struct Cluster {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
}

impl Cluster {
    /// The slice of a Service. Each round gives its first endpoint another address.
    pub(crate) fn slice(&self, index: usize, round: usize) -> Result<EndpointSlice> {
        let (first, end) = (index * self.endpoints / self.services, (index + 1) * self.endpoints / self.services);
        let endpoint = |number: usize| -> Value {
            let moved = if number == first { round * 7 % 500_000 + self.endpoints } else { number };
            json!({"addresses": [address(10, 128, moved)], "nodeName": format!("node-{}", number % 1000), "zone": "a",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": format!("team-{}", index % 100), "name": format!("pod-{number}"), "uid": format!("uid-{number}")}})
        };
        let endpoints: Vec<Value> = (first..end).map(endpoint).collect();
        let object = json!({
            "metadata": {"namespace": format!("team-{}", index % 100), "name": format!("service-{index}-x7k2p"),
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"kubernetes.io/service-name": format!("service-{index}")}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "metrics", "protocol": "TCP", "port": 9090}],
        });
        Ok(serde_json::from_value(object)?)
    }
}

pub(crate) fn config() -> Result<Config> {
    Ok(Config {
        node_name: Some("node-1".to_owned()),
        local_controllers: false,
        service_cidrs: Some(vec!["10.96.0.0/12".parse()?]),
        cluster_cidrs: Some(vec!["10.128.0.0/9".parse()?]),
        ..Config::default()
    })
}

pub(crate) fn settings() -> Result<Settings> {
    Ok(Settings {
        workers: 2,
        flow_capacity: 1,
        masquerade_addresses: vec!["192.168.0.2".parse()?],
        masquerade_ports: 61000..=65534,
        seed: 1,
        ..Settings::default()
    })
}

pub(crate) fn apply(object: Object) -> Change {
    Change::Apply(object, Origin::File { path: Path::new("scale.yaml").into(), document: 1 })
}

/// One in ten has a node port, one in a hundred a load-balancer address, one in twenty two ports.
pub(crate) fn service(index: usize) -> Result<Service> {
    let mut ports = vec![json!({"name": "http", "protocol": "TCP", "port": 80})];
    if index % 20 == 5 {
        ports.push(json!({"name": "metrics", "protocol": "TCP", "port": 9090}));
    }
    let mut kind = "ClusterIP";
    if index.is_multiple_of(10) && index / 10 < 2700 {
        kind = "NodePort";
        ports[0]["nodePort"] = json!(30000 + index / 10);
    }
    let status = if index.is_multiple_of(100) {
        json!({"loadBalancer": {"ingress": [{"ip": address(198, 18, index / 100)}]}})
    } else {
        json!({})
    };
    let ip = address(10, 96, index + 1);
    let object = json!({
        "metadata": {"namespace": format!("team-{}", index % 100), "name": format!("service-{index}"),
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": format!("app-{index}")}},
        "spec": {"type": kind, "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": ports,
            "selector": {"app": format!("app-{index}")}},
        "status": status,
    });
    Ok(serde_json::from_value(object)?)
}

/// The address so far behind the first of a range.
fn address(a: u8, b: u8, number: usize) -> String {
    let address = u32::from_be_bytes([a, b, 0, 0]) + number as u32;
    std::net::Ipv4Addr::from(address).to_string()
}
