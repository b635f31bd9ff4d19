//! Kubernetes objects as a cluster's API would serve them, small enough to read.

use std::net::IpAddr;

use serde_json::{Value, json};

/// Name of the node that the daemon under test is.
pub const NODE: &str = "node-1";

/// The Node object of [`NODE`], pods in 10.244.0.0/16 and fd00:10:244::/64.
#[must_use]
pub fn node(addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip.to_string()})).collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {"podCIDR": "10.244.0.0/16", "podCIDRs": ["10.244.0.0/16", "fd00:10:244::/64"]},
        "status": {"addresses": addresses},
    })
}

/// A dual-stack Service `default/web`: port 80 TCP and 53 UDP, node ports 30080 and 30053, a load-balancer address.
#[must_use]
pub fn service(name: &str, host: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name},
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": format!("10.96.0.{host}"),
            "clusterIPs": [format!("10.96.0.{host}"), format!("fd00:96::{host:x}")],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": [
                {"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080, "nodePort": 30000 + u16::from(host)},
                {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 5353, "nodePort": 30000 + u16::from(host)},
            ],
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": format!("172.31.0.{host}"), "ipMode": "VIP"}, {"ip": format!("fd00:31::{host:x}"), "ipMode": "VIP"},
        ]}},
    })
}

/// The EndpointSlices of a Service: one for each family that `pods` has, every endpoint ready and on [`NODE`].
#[must_use]
pub fn slices(service: &str, pods: &[(String, Vec<IpAddr>)]) -> Vec<Value> {
    [("IPv4", true), ("IPv6", false)]
        .into_iter()
        .map(|(family, is_v4)| {
            let endpoints: Vec<Value> = pods
                .iter()
                .flat_map(|(pod, addresses)| addresses.iter().map(move |address| (pod, address)))
                .filter(|(_, address)| address.is_ipv4() == is_v4)
                .map(|(pod, address)| {
                    json!({
                        "addresses": [address.to_string()],
                        "conditions": {"ready": true, "serving": true, "terminating": false},
                        "nodeName": NODE,
                        "targetRef": {"kind": "Pod", "namespace": "default", "name": pod},
                    })
                })
                .collect();
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {
                    "namespace": "default", "name": format!("{service}-{}", family.to_lowercase()),
                    "labels": {"kubernetes.io/service-name": service},
                },
                "endpoints": endpoints,
                "ports": [
                    {"name": "http", "protocol": "TCP", "port": 8080},
                    {"name": "dns", "protocol": "UDP", "port": 5353},
                ],
            })
        })
        .collect()
}
