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

/// What a slice says of an endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Name of its Pod.
    pub pod: String,
    /// uid of its Pod, when the slice tells it.
    pub uid: Option<String>,
    /// Its addresses, of one or both families.
    pub addresses: Vec<IpAddr>,
    /// `ready`.
    pub ready: bool,
    /// `serving`.
    pub serving: bool,
    /// `terminating`.
    pub terminating: bool,
}

impl Endpoint {
    /// One that is ready.
    #[must_use]
    pub fn ready(pod: &str, addresses: &[IpAddr]) -> Self {
        let addresses = addresses.to_vec();
        Self { pod: pod.to_owned(), uid: None, addresses, ready: true, serving: true, terminating: false }
    }

    /// The same, terminating; it still serves.
    #[must_use]
    pub fn terminating(self) -> Self {
        Self { ready: false, terminating: true, ..self }
    }

    /// The same as the Pod with this uid.
    #[must_use]
    pub fn with_uid(self, uid: &str) -> Self {
        Self { uid: Some(uid.to_owned()), ..self }
    }

    fn json(&self, address: &IpAddr) -> Value {
        let mut reference = json!({"kind": "Pod", "namespace": "default", "name": self.pod});
        if let Some(uid) = &self.uid {
            reference["uid"] = json!(uid);
        }
        json!({
            "addresses": [address.to_string()],
            "conditions": {"ready": self.ready, "serving": self.serving, "terminating": self.terminating},
            "nodeName": NODE,
            "targetRef": reference,
        })
    }
}

/// The EndpointSlices of a Service: one for each family that `pods` has, every endpoint ready and on [`NODE`].
#[must_use]
pub fn slices(service: &str, pods: &[(String, Vec<IpAddr>)]) -> Vec<Value> {
    let endpoints: Vec<Endpoint> = pods.iter().map(|(pod, addresses)| Endpoint::ready(pod, addresses)).collect();
    slices_of(service, &endpoints)
}

/// The EndpointSlices of a Service with these endpoints, all on [`NODE`].
#[must_use]
pub fn slices_of(service: &str, endpoints: &[Endpoint]) -> Vec<Value> {
    [("IPv4", true), ("IPv6", false)]
        .into_iter()
        .map(|(family, is_v4)| {
            let endpoints: Vec<Value> = endpoints
                .iter()
                .flat_map(|endpoint| endpoint.addresses.iter().map(move |address| (endpoint, address)))
                .filter(|(_, address)| address.is_ipv4() == is_v4)
                .map(|(endpoint, address)| endpoint.json(address))
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
