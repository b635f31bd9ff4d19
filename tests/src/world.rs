//! Random Services, EndpointSlices and labels of a Node, as an API server accepts them, that are made, changed and deleted.
//!
//! The same seed makes the same objects in the same order. Addresses and node ports follow from a Service's number, so that what
//! could be dialled is known without asking.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use fastrand::Rng;
use serde_json::{Value, json};

use crate::lab::{ENDPOINT, elsewhere, external, load_balancer, pod_address};
use crate::manifests::NODE;

/// Label of a Node's zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";
/// Zones that Nodes and hints name.
pub const ZONES: [&str; 3] = ["zone-a", "zone-b", "zone-c"];
/// Ports of Services: name, protocol, number.
const PORTS: [(&str, &str, u16); 5] =
    [("http", "TCP", 80), ("dns", "UDP", 80), ("alt", "TCP", 81), ("quic", "UDP", 81), ("more", "TCP", 82)];

/// What is at the API server, as far as we made it.
pub struct World {
    rng: Rng,
    /// Most Services, and most slices of one.
    size: u8,
    /// Services by number.
    services: BTreeMap<u8, Value>,
    /// Slices by name.
    slices: BTreeMap<String, Value>,
    next_slice: u32,
    /// Zone of the Node, when it has one.
    zone: Option<&'static str>,
}

/// A change that is to be made.
#[derive(Debug)]
pub enum Change {
    /// A new object; its status too, where it has one.
    Create(Value),
    /// Another in its place.
    Replace(Value),
    /// None in its place.
    Delete(Value),
    /// The Node's zone.
    Zone(Option<&'static str>),
}

impl World {
    /// Nothing yet; at most so many Services.
    #[must_use]
    pub fn new(seed: u64, size: u8) -> Self {
        let (services, slices) = (BTreeMap::new(), BTreeMap::new());
        Self { rng: Rng::with_seed(seed), size, services, slices, next_slice: 0, zone: Some(ZONES[0]) }
    }

    /// The next change; `apply` makes it, or says that the API server refused it.
    pub fn step(&mut self, mut apply: impl FnMut(&Change) -> Result<bool>) -> Result<bool> {
        let change = self.change();
        let accepted = apply(&change)?;
        if accepted {
            self.take(change);
        }
        Ok(accepted)
    }

    /// The Node's zone.
    #[must_use]
    pub fn zone(&self) -> Option<&'static str> {
        self.zone
    }

    /// Objects there are: Services, then slices.
    pub fn objects(&self) -> impl Iterator<Item = &Value> {
        self.services.values().chain(self.slices.values())
    }

    /// How many Services and slices there are.
    #[must_use]
    pub fn len(&self) -> (usize, usize) {
        (self.services.len(), self.slices.len())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    /// All that could be dialled with Services of these numbers and the node at these addresses: more than is served.
    #[must_use]
    pub fn destinations(&self, node: [IpAddr; 2]) -> Vec<(SocketAddr, &'static str)> {
        let mut found = Vec::new();
        for number in 1..=self.size {
            for v4 in [true, false] {
                let addresses = [cluster_ip(number, v4), load_balancer(number, v4), external(number, v4)];
                let mut ports: Vec<SocketAddr> =
                    addresses.iter().flat_map(|ip| (80..84).map(|port| SocketAddr::new(*ip, port))).collect();
                ports.extend((0..3).map(|at| SocketAddr::new(node[usize::from(!v4)], node_port(number, at))));
                found.extend(ports.into_iter().flat_map(|to| [(to, "tcp"), (to, "udp")]));
            }
        }
        for ip in [node[0], node[1], elsewhere(2, true), elsewhere(2, false)] {
            found
                .extend((80..83).flat_map(|port| ["tcp", "udp"].map(|protocol| (SocketAddr::new(ip, port), protocol))));
        }
        found
    }

    fn change(&mut self) -> Change {
        let number = self.rng.u8(1..=self.size);
        let service = self.services.get(&number).cloned();
        match (self.rng.u8(0..20), service) {
            (0, _) => Change::Zone((self.rng.u8(0..4) > 0).then(|| ZONES[self.rng.usize(..ZONES.len())])),
            (_, None) => Change::Create(self.service(number, None)),
            (1, Some(service)) => Change::Delete(service),
            (2..6, Some(service)) => Change::Replace(self.service(number, Some(&service))),
            _ => self.change_slice(number),
        }
    }

    fn take(&mut self, change: Change) {
        let number =
            |service: &Value| service["metadata"]["labels"]["number"].as_str().and_then(|text| text.parse().ok());
        match change {
            Change::Zone(zone) => self.zone = zone,
            Change::Create(object) | Change::Replace(object) => match number(&object) {
                Some(number) => drop(self.services.insert(number, object)),
                None => drop(self.slices.insert(name(&object).to_owned(), object)),
            },
            Change::Delete(object) => match number(&object) {
                Some(number) => drop(self.services.remove(&number)),
                None => drop(self.slices.remove(name(&object))),
            },
        }
    }

    fn flip(&mut self, one_in: u8) -> bool {
        self.rng.u8(0..one_in) == 0
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.rng.usize(..of.len())].clone()
    }

    /// A Service of this number, in the place of another, if there is one: it keeps what cannot be changed.
    fn service(&mut self, number: u8, old: Option<&Value>) -> Value {
        let headless = match old {
            Some(old) => old["spec"]["clusterIP"] == "None",
            None => self.flip(20),
        };
        let first_is_v4 = match old {
            Some(old) => old["spec"]["ipFamilies"][0] != "IPv6",
            None => !self.flip(4),
        };
        let families: Vec<bool> = if self.flip(3) { vec![first_is_v4] } else { vec![first_is_v4, !first_is_v4] };
        let kind = if headless {
            "ClusterIP"
        } else {
            self.one_of(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"])
        };
        let mut spec = json!({
            "type": kind,
            "ipFamilies": families.iter().map(|v4| family(*v4)).collect::<Vec<_>>(),
            "ipFamilyPolicy": if families.len() == 2 { "RequireDualStack" } else { "SingleStack" },
            "internalTrafficPolicy": self.one_of(&["Cluster", "Cluster", "Local"]),
            "publishNotReadyAddresses": self.flip(4),
        });
        let addresses: Vec<String> = families.iter().map(|v4| cluster_ip(number, *v4).to_string()).collect();
        spec["clusterIPs"] = if headless { json!(["None"]) } else { json!(addresses) };
        spec["clusterIP"] = spec["clusterIPs"][0].clone();
        if self.flip(4) {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": self.one_of(&[60, 10_800])}});
        }
        if self.flip(4) {
            spec["trafficDistribution"] = json!(self.one_of(&["PreferClose", "PreferSameZone", "PreferSameNode"]));
        }
        // Its own, one that others may claim too, or the node's.
        let pool = self.rng.u8(0..6);
        let external = |v4: &bool| match (pool, *v4) {
            (0, v4) => elsewhere(2, v4),
            (1, true) => IpAddr::from([192, 168, 50, 1]),
            (1, false) => IpAddr::from([0xfd00, 0x50, 0, 0, 0, 0, 0, 1]),
            (_, v4) => external(number, v4),
        };
        let externals: Vec<String> = families.iter().map(|v4| external(v4).to_string()).collect();
        let has_externals = !headless && self.flip(3);
        if has_externals {
            spec["externalIPs"] = json!(externals);
        }
        if kind != "ClusterIP" || has_externals {
            spec["externalTrafficPolicy"] = json!(self.one_of(&["Cluster", "Local"]));
        }
        if kind == "LoadBalancer" && self.flip(3) {
            // The client outside, Pods, the node's network; and nobody.
            let all = ["192.168.50.2/32", "10.244.0.0/16", "192.168.50.0/24", "203.0.113.0/24"];
            let v6 = ["fd00:50::2/128", "fd00:10:244::/64", "fd00:50::/64", "2001:db8::/32"];
            let ranges = [self.one_of(&all), self.one_of(&v6), self.one_of(&all)];
            let count = self.rng.usize(1..=3);
            spec["loadBalancerSourceRanges"] = json!(ranges[..count]);
        }
        let has_node_ports = kind == "NodePort" || (kind == "LoadBalancer" && !self.flip(4));
        if kind == "LoadBalancer" {
            spec["allocateLoadBalancerNodePorts"] = json!(has_node_ports);
        }
        spec["ports"] = self.ports(number, has_node_ports);
        let mut labels = json!({"number": number.to_string()});
        if self.flip(12) {
            labels["service.kubernetes.io/service-proxy-name"] = json!("another");
        }
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "default", "name": format!("s{number}"), "labels": labels},
            "spec": spec,
        });
        let ingress = if kind == "LoadBalancer" { self.ingress(number, &families) } else { json!([]) };
        service["status"] = json!({"loadBalancer": {"ingress": ingress}});
        service
    }

    fn ports(&mut self, number: u8, has_node_ports: bool) -> Value {
        let count = self.rng.usize(1..=3);
        let first = self.rng.usize(..PORTS.len());
        let port = |at: usize| {
            let (name, protocol, port) = PORTS[(first + at) % PORTS.len()];
            let mut port = json!({"name": name, "protocol": protocol, "port": port, "targetPort": ENDPOINT});
            if at == 0 && count == 1 && number.is_multiple_of(4) {
                port["name"] = json!("");
            }
            if has_node_ports {
                port["nodePort"] = json!(node_port(number, at as u16));
            }
            port
        };
        (0..count).map(port).collect()
    }

    fn ingress(&mut self, number: u8, families: &[bool]) -> Value {
        let mode = self.one_of(&[json!("VIP"), json!("VIP"), json!("Proxy"), Value::Null]);
        let mut ingress: Vec<Value> = families
            .iter()
            .map(|v4| {
                let mut ingress = json!({"ip": load_balancer(number, *v4).to_string()});
                if !mode.is_null() {
                    ingress["ipMode"] = mode.clone();
                }
                ingress
            })
            .collect();
        if self.flip(6) {
            ingress[0] = json!({"hostname": "lb.example"});
        }
        json!(ingress)
    }

    fn change_slice(&mut self, number: u8) -> Change {
        let service = format!("s{number}");
        let of = |slice: &Value| slice["metadata"]["labels"]["kubernetes.io/service-name"] == service.as_str();
        let names: Vec<String> =
            self.slices.values().filter(|slice| of(slice)).map(|slice| name(slice).to_owned()).collect();
        if names.is_empty() || (names.len() < 6 && self.flip(3)) {
            self.next_slice += 1;
            return Change::Create(self.slice(number, &format!("s{number}-{}", self.next_slice), None));
        }
        let name = self.one_of(&names);
        let old = self.slices[&name].clone();
        if self.flip(5) { Change::Delete(old) } else { Change::Replace(self.slice(number, &name, Some(&old))) }
    }

    fn slice(&mut self, number: u8, name: &str, old: Option<&Value>) -> Value {
        let v4 = match old {
            Some(old) => old["addressType"] == "IPv4",
            None => self.rng.bool(),
        };
        let port = self.one_of(&[ENDPOINT, ENDPOINT, ENDPOINT + 1]);
        let mut ports: Vec<Value> = Vec::new();
        for (name, protocol, _) in PORTS {
            if !self.flip(5) {
                ports.push(json!({"name": name, "protocol": protocol, "port": port}));
            }
        }
        if number.is_multiple_of(4) {
            let protocol = self.one_of(&["TCP", "UDP"]);
            ports.push(json!({"name": "", "protocol": protocol, "port": port}));
        }
        // Whether hints are there is a matter of all endpoints; now and then one has none.
        let (zones, nodes) = (self.flip(2), self.flip(4));
        let mut endpoints = Vec::new();
        for pod in 1..=5 {
            // Seldom in two slices: what is undefined of that is left out of comparisons.
            let elsewhere = self.has_endpoint(&format!("s{number}-"), name, &pod_address(pod, v4).to_string());
            if self.flip(2) && (!elsewhere || self.flip(20)) {
                endpoints.push(self.endpoint(pod, v4, zones, nodes));
            }
        }
        let mut labels = json!({"kubernetes.io/service-name": format!("s{number}")});
        // A slice stays with its Service: kube-proxy would keep it in both (docs/differences.md).
        match old {
            Some(old) => {
                labels["kubernetes.io/service-name"] = old["metadata"]["labels"]["kubernetes.io/service-name"].clone()
            }
            None if self.flip(20) => {
                labels["kubernetes.io/service-name"] = json!(format!("s{}", self.rng.u8(1..=self.size)))
            }
            None => {}
        }
        if self.flip(20) {
            labels["service.kubernetes.io/headless"] = json!("");
        }
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family(v4),
            "metadata": {"namespace": "default", "name": name, "labels": labels}, "endpoints": endpoints, "ports": ports,
        })
    }

    /// Whether a slice whose name begins so, but another one, has this address.
    fn has_endpoint(&self, start: &str, but: &str, address: &str) -> bool {
        let has = |slice: &Value| {
            slice["endpoints"].as_array().is_some_and(|all| all.iter().any(|it| it["addresses"][0] == address))
        };
        self.slices.iter().any(|(name, slice)| name.starts_with(start) && name != but && has(slice))
    }

    fn endpoint(&mut self, pod: u8, v4: bool, zones: bool, nodes: bool) -> Value {
        let mut endpoint = json!({"addresses": [pod_address(pod, v4).to_string()], "conditions": {}});
        match pod {
            3 => endpoint["nodeName"] = json!("node-2"),
            4 => {}
            _ => endpoint["nodeName"] = json!(NODE),
        }
        let states = [(true, true, false), (true, true, false), (true, true, false), (false, true, true)];
        let others = [(false, true, false), (false, false, false), (false, false, true), (true, true, true)];
        let (ready, serving, terminating) = if self.flip(4) { self.one_of(&others) } else { self.one_of(&states) };
        // What is not said has a meaning too.
        if !ready || !self.flip(3) {
            endpoint["conditions"]["ready"] = json!(ready);
        }
        if !serving || ready != serving || !self.flip(3) {
            endpoint["conditions"]["serving"] = json!(serving);
        }
        if terminating || !self.flip(3) {
            endpoint["conditions"]["terminating"] = json!(terminating);
        }
        if zones && !self.flip(12) {
            let name = self.one_of(&ZONES);
            endpoint["hints"]["forZones"] = json!([{"name": name}]);
        }
        if nodes && !self.flip(12) {
            let name = self.one_of(&[NODE, "node-2"]);
            endpoint["hints"]["forNodes"] = json!([{"name": name}]);
        }
        endpoint
    }
}

/// The name of an object.
#[must_use]
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

fn family(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}

/// Node port of the port at this place of a Service: of the range that the API server leaves to those who ask.
fn node_port(number: u8, at: u16) -> u16 {
    30_000 + 3 * u16::from(number) + at
}

/// ClusterIP of Service `number`: in a range as small as API servers have for IPv6.
#[must_use]
pub fn cluster_ip(number: u8, v4: bool) -> IpAddr {
    if v4 { [10, 96, 1, number].into() } else { [0xfd00, 0x96, 0, 0, 0, 0, 0, 0x100 + u16::from(number)].into() }
}
