//! Which objects does a daemon serve: the Service that is dialled, and as many others as wanted.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use crate::lab::{CLUSTER_CIDR, CLUSTER_IP, Lab, NODE_PORT, POD_PORT};

/// Name of the node.
pub(crate) const NODE: &str = "node-1";
/// Name of the Service that is dialled.
pub(crate) const WEB: &str = "web";
/// Where ClusterIPs are.
pub(crate) const SERVICE_CIDR: &str = "10.96.0.0/12";
/// Where the Service `silent` is dialled, on ports from 1 up to this.
pub(crate) const SILENT_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 11));
/// Ports of it.
pub(crate) const SILENT_PORTS: u16 = 20;
/// Its port in Pods.
pub(crate) const SILENT_POD_PORT: u16 = 8081;
/// Services in a file of the others: not one huge file, not one for each.
const PER_FILE: usize = 500;
/// Most of the others that can be dialled.
const DIALLED: usize = 1000;

pub(crate) fn node(lab: &Lab) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
        "spec": {"podCIDR": CLUSTER_CIDR, "podCIDRs": [CLUSTER_CIDR]},
        "status": {"addresses": [{"type": "InternalIP", "address": lab.node_address().to_string()}]},
    })
}

/// The Service that is dialled.
pub(crate) fn web() -> Value {
    service(WEB, CLUSTER_IP.ip(), Some(NODE_PORT))
}

pub(crate) fn service(name: &str, cluster_ip: IpAddr, node_port: Option<u16>) -> Value {
    let mut port = json!({"name": "http", "protocol": "TCP", "port": CLUSTER_IP.port(), "targetPort": POD_PORT});
    if let Some(node_port) = node_port {
        port["nodePort"] = json!(node_port);
    }
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
        "spec": {
            "type": if node_port.is_some() { "NodePort" } else { "ClusterIP" },
            "clusterIP": cluster_ip.to_string(), "clusterIPs": [cluster_ip.to_string()],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "ports": [port],
        },
    })
}

/// What an EndpointSlice says of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Ready,
    /// On its way out: still serving what it has.
    Terminating,
}

/// An endpoint's address and condition.
pub(crate) type Endpoint = (IpAddr, Condition);

/// The only slice of a Service.
pub(crate) fn slice(service: &str, endpoints: &[Endpoint]) -> Value {
    let endpoint = |(address, condition): &Endpoint| {
        let ready = *condition == Condition::Ready;
        // Who it is: without a uid, an endpoint that was away is another when it is back.
        let pod = format!("pod-{address}");
        json!({"addresses": [address.to_string()], "nodeName": NODE,
            "conditions": {"ready": ready, "serving": true, "terminating": !ready},
            "targetRef": {"kind": "Pod", "namespace": "default", "name": pod, "uid": pod}})
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "namespace": "default", "name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service},
        },
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "protocol": "TCP", "port": POD_PORT}],
    })
}

/// A Service for connections on which nothing will ever happen, with ports from 1 up.
pub(crate) fn silent(endpoints: &[Endpoint]) -> Value {
    let (mut service, mut slice) = (service("silent", SILENT_IP, None), slice("silent", endpoints));
    let ports = 1..=SILENT_PORTS;
    let port =
        |port: u16| json!({"name": format!("p{port}"), "protocol": "TCP", "port": port, "targetPort": SILENT_POD_PORT});
    service["spec"]["ports"] = ports.clone().map(port).collect();
    let port = |port: u16| json!({"name": format!("p{port}"), "protocol": "TCP", "port": SILENT_POD_PORT});
    slice["ports"] = ports.map(port).collect();
    list(&[service, slice])
}

/// All of these, ready.
pub(crate) fn ready(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<Endpoint> {
    addresses.into_iter().map(|address| (address, Condition::Ready)).collect()
}

/// As a file holds them.
pub(crate) fn list(objects: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "items": objects})
}

/// Services beside the one that is dialled, with so many endpoints in all. A thousand of them (all, where there are fewer)
/// have `pods` as their endpoints, if there are any, so that they can be dialled; the others' endpoints do not exist.
#[derive(Default)]
pub(crate) struct Others {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    pub(crate) pods: Vec<IpAddr>,
    /// So many of them have their slice in a file of its own, to be rewritten.
    pub(crate) loose: usize,
}

impl Others {
    /// Whether a Service can be dialled.
    fn is_dialled(&self, index: usize) -> bool {
        !self.pods.is_empty() && index.is_multiple_of((self.services / DIALLED).max(1))
    }

    /// Where those that can be dialled are.
    pub(crate) fn dialled(&self) -> Vec<SocketAddr> {
        let addresses = (0..self.services).filter(|index| self.is_dialled(*index)).map(cluster_ip);
        addresses.map(|address| SocketAddr::new(address, CLUSTER_IP.port())).collect()
    }

    /// Their files: names and contents.
    pub(crate) fn files(&self) -> impl Iterator<Item = (String, Value)> + '_ {
        let together = (0..self.services).step_by(PER_FILE).map(|first| {
            let indices = first..self.services.min(first + PER_FILE);
            let services = indices.clone().map(|index| service(&name(index), cluster_ip(index), node_port(index)));
            let slices = indices.filter(|index| *index >= self.loose).map(|index| self.slice(index, 0));
            (format!("others-{first:06}.json"), list(&services.chain(slices).collect::<Vec<_>>()))
        });
        together.chain((0..self.loose.min(self.services)).map(|index| self.loose_file(index, 0)))
    }

    /// The file with one slice alone.
    pub(crate) fn loose_file(&self, index: usize, shift: usize) -> (String, Value) {
        (format!("other-{index}.json"), self.slice(index, shift))
    }

    /// The slice of one of them; `shift` gives it other endpoints.
    fn slice(&self, index: usize, shift: usize) -> Value {
        if self.is_dialled(index) {
            return slice(&name(index), &ready(self.pods.iter().copied()));
        }
        let at = |index: usize| index * self.endpoints / self.services;
        let addresses = (at(index)..at(index + 1)).map(|number| below([10, 128, 0, 0], number + shift));
        slice(&name(index), &ready(addresses))
    }
}

fn name(index: usize) -> String {
    format!("other-{index}")
}

pub(crate) fn cluster_ip(index: usize) -> IpAddr {
    // The Service that is dialled is below these.
    below([10, 96, 1, 0], index)
}

/// One in ten, as long as there are any.
fn node_port(index: usize) -> Option<u16> {
    let port = u16::try_from(index / 10).ok().filter(|number| index.is_multiple_of(10) && *number < 2000)?;
    Some(30100 + port)
}

fn below(first: [u8; 4], number: usize) -> IpAddr {
    Ipv4Addr::from(u32::from_be_bytes(first).wrapping_add(number as u32)).into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn others_are_as_many_as_wanted_and_all_different() {
        let pods = vec![Ipv4Addr::new(10, 244, 0, 1).into()];
        let others = Others { services: 2500, endpoints: 12_000, pods, loose: 2 };
        let files: Vec<Value> = others.files().map(|(_, file)| file).collect();
        assert_eq!(files.len(), 5 + 2);
        let items = |file: &'_ Value| file["items"].as_array().cloned().unwrap_or_else(|| vec![file.clone()]);
        let objects: Vec<Value> = files.iter().flat_map(items).collect();
        let unique = |pointer: &str| {
            objects.iter().filter_map(|object| object.pointer(pointer)?.as_str()).collect::<BTreeSet<_>>().len()
        };
        assert_eq!((objects.len(), unique("/spec/clusterIP")), (5000, 2500));
        let node_ports: BTreeSet<i64> =
            objects.iter().filter_map(|object| object.pointer("/spec/ports/0/nodePort")?.as_i64()).collect();
        assert_eq!(node_ports.len(), 250);
        assert!(!node_ports.contains(&NODE_PORT.into()));
        assert_eq!(others.dialled().len(), 1250);
        assert_ne!(others.slice(1, 0), others.slice(1, 1));
    }
}
