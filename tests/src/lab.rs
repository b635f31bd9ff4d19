//! A node whose Services are tried by packets: numbered Pods, the node's own servers and somebody else's, and Services
//! whose addresses follow from a number.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use sluice_bench::link::{LinkConfig, configure};
use sluice_bench::netns::NetNs;
use sluice_bench::serve::PodServer;
use sluice_bench::topology::Pod;

use crate::cluster::Cluster;
use crate::manifests::NODE;
use crate::probe::{Background, Datagrams};
use crate::sctp;

/// Port of every endpoint, for all three protocols.
pub const ENDPOINT: u16 = 8080;
/// Port of every Service, for all three protocols.
pub const PORT: u16 = 80;
/// The Pod that clients "pod" are in; an endpoint of few Services.
pub const CLIENT_POD: u8 = 5;

/// The cluster with its servers.
pub struct Lab {
    /// Node and daemon.
    pub cluster: Cluster,
    pods: Vec<Pod>,
    servers: Vec<Servers>,
}

struct Servers {
    _tcp: PodServer,
    _udp: Vec<Datagrams>,
    _sctp: Vec<Background>,
}

impl Lab {
    /// Pods 1 to 5, and one called "elsewhere" at [`elsewhere`]; no daemon and no Services yet.
    pub fn new() -> Result<Self> {
        let cluster = Cluster::new()?;
        cluster.configure("localControllers: false\nserviceCIDRs: [10.96.0.0/16, 'fd00:96::/64']\n")?;
        let second = [second_address(true), second_address(false)].map(Into::into).to_vec();
        let loopback = LinkConfig { name: "lo".to_owned(), addresses: second, ..LinkConfig::default() };
        configure(&cluster.topology.node, &loopback)?;
        let mut lab = Self { cluster, pods: Vec::new(), servers: Vec::new() };
        for number in 1..=CLIENT_POD {
            let addresses = [pod_address(number, true), pod_address(number, false)];
            lab.pods.push(lab.cluster.topology.add_pod(&number.to_string(), &addresses)?);
            lab.serve_in_pod(number, &number.to_string(), ENDPOINT)?;
        }
        let both = |n| [elsewhere(n, true), elsewhere(n, false)];
        let pod = lab.cluster.topology.add_pod("elsewhere", &[both(1), both(2)].concat())?;
        let servers = [both(1).map(|ip| (ip, PORT)), both(2).map(|ip| (ip, ENDPOINT))].concat();
        lab.serve(&pod.ns, "elsewhere", &servers)?;
        lab.pods.push(pod);
        Ok(lab)
    }

    /// Servers in a Pod, for all protocols, that answer with this name.
    pub fn serve_in_pod(&mut self, number: u8, name: &str, port: u16) -> Result<()> {
        let ns = self.pod(number).clone();
        self.serve(&ns, name, &[true, false].map(|v4| (pod_address(number, v4), port)))
    }

    /// The node's own servers, called "host".
    pub fn serve_on_node(&mut self, servers: &[(IpAddr, u16)]) -> Result<()> {
        let ns = self.cluster.topology.node.clone();
        self.serve(&ns, "host", servers)
    }

    /// HTTP at the ports of any address, datagrams and SCTP at exactly these.
    fn serve(&mut self, ns: &NetNs, name: &str, servers: &[(IpAddr, u16)]) -> Result<()> {
        let ports: BTreeSet<u16> = servers.iter().map(|(_, port)| *port).collect();
        let addresses = || servers.iter().copied().map(SocketAddr::from);
        self.servers.push(Servers {
            _tcp: PodServer::start(ns, name, &Vec::from_iter(ports), &[])?,
            _udp: addresses().map(|address| Datagrams::start(ns, name, address)).collect::<Result<_>>()?,
            _sctp: addresses().map(|address| sctp::serve(ns, name, address)).collect::<Result<_>>()?,
        });
        Ok(())
    }

    /// The namespace of Pod `number`.
    #[must_use]
    pub fn pod(&self, number: u8) -> &NetNs {
        &self.pods[usize::from(number) - 1].ns
    }

    /// The namespace of a kind of client: `pod`, `node` or `outside`.
    pub fn client(&self, kind: &str) -> Result<&NetNs> {
        Ok(match kind {
            "pod" => self.pod(CLIENT_POD),
            "node" => &self.cluster.topology.node,
            "outside" => &self.cluster.topology.client,
            other => bail!("{other:?} is no kind of client"),
        })
    }
}

/// Address of Pod `number`.
#[must_use]
pub fn pod_address(number: u8, v4: bool) -> IpAddr {
    address(v4, &format!("10.244.0.{number}"), &format!("fd00:10:244::{number:x}"))
}

/// An address of the node that is not its first.
#[must_use]
pub fn second_address(v4: bool) -> IpAddr {
    address(v4, "192.168.60.1", "fd00:60::1")
}

/// Addresses of "elsewhere", which is no endpoint: on the first it serves [`PORT`], on the second [`ENDPOINT`].
#[must_use]
pub fn elsewhere(number: u8, v4: bool) -> IpAddr {
    address(v4, &format!("172.31.9.{number}"), &format!("fd00:31::9:{number:x}"))
}

/// ClusterIP of Service `number`.
#[must_use]
pub fn cluster_ip(number: u8, v4: bool) -> IpAddr {
    address(v4, &format!("10.96.1.{number}"), &format!("fd00:96::1:{number:x}"))
}

/// Load-balancer address of Service `number`.
#[must_use]
pub fn load_balancer(number: u8, v4: bool) -> IpAddr {
    address(v4, &format!("172.31.1.{number}"), &format!("fd00:31::1:{number:x}"))
}

/// External address of Service `number`.
#[must_use]
pub fn external(number: u8, v4: bool) -> IpAddr {
    address(v4, &format!("198.51.100.{number}"), &format!("fd00:51::1:{number:x}"))
}

/// Node port of Service `number`.
#[must_use]
pub fn node_port(number: u8) -> u16 {
    31_000 + u16::from(number)
}

fn address(v4: bool, ipv4: &str, ipv6: &str) -> IpAddr {
    (if v4 { ipv4 } else { ipv6 }).parse().expect("made of a constant and a number")
}

/// A dual-stack Service with every kind of frontend on all three protocols, with this in its `spec` besides or instead.
#[must_use]
pub fn service(number: u8, name: &str, spec: Value) -> Value {
    let both = |of: fn(u8, bool) -> IpAddr| [of(number, true).to_string(), of(number, false).to_string()];
    let ports = ["TCP", "UDP", "SCTP"].map(
        |protocol| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": PORT, "nodePort": node_port(number)}),
    );
    let ingress = both(load_balancer).map(|ip| json!({"ip": ip, "ipMode": "VIP"}));
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
        "spec": {
            "type": "LoadBalancer", "clusterIP": cluster_ip(number, true).to_string(), "clusterIPs": both(cluster_ip),
            "ipFamilies": ["IPv4", "IPv6"], "externalIPs": both(external), "ports": ports,
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    });
    merge(&mut service["spec"], spec);
    service
}

/// An endpoint: the Pod of this number, ready; 3 and 4 are on other nodes. This in it besides or instead.
#[must_use]
pub fn endpoint(number: u8, with: Value) -> (u8, Value) {
    let node = match number {
        3 => "node-2",
        4 => "node-3",
        _ => NODE,
    };
    let mut endpoint = json!({"conditions": {"ready": true, "serving": true, "terminating": false}, "nodeName": node});
    merge(&mut endpoint, with);
    (number, endpoint)
}

/// The slices of a Service for both families, with all its ports at this number.
#[must_use]
pub fn slices(service: &str, port: u16, endpoints: &[(u8, Value)]) -> Vec<Value> {
    let slice = |v4: bool| {
        let family = if v4 { "IPv4" } else { "IPv6" };
        let endpoints = endpoints.iter().map(|(number, endpoint)| {
            let mut endpoint = endpoint.clone();
            endpoint["addresses"] = json!([pod_address(*number, v4).to_string()]);
            endpoint
        });
        let ports = ["TCP", "UDP", "SCTP"].map(|it| json!({"name": it.to_lowercase(), "protocol": it, "port": port}));
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "namespace": "default", "name": format!("{service}-{port}-{}", family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": service},
            },
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": ports,
        })
    };
    [true, false].map(slice).to_vec()
}

fn merge(into: &mut Value, from: Value) {
    if let Value::Object(fields) = from {
        fields.into_iter().for_each(|(key, value)| into[key] = value);
    }
}
