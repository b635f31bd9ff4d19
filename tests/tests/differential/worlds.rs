//! Random worlds, small enough that their Services, endpoints and clients meet.

use std::net::{IpAddr, SocketAddr};

use fastrand::Rng;
use serde_json::{Map, Value, json};
use sluice_tests::naive::{Flow, World};

/// Addresses of the node, wherever it has that many.
pub(crate) const NODE: [&str; 5] = ["192.168.0.2", "192.168.0.3", "203.0.113.2", "fd00:192::2", "fd00:192::3"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const NAMES: [&str; 3] = ["", "http", "dns"];
const SERVICES: [&str; 4] = ["a", "b", "c", "d"];

/// A world.
pub(crate) fn world(rng: &mut Rng) -> World {
    let mut objects = vec![node(rng), node_of("other"), node_of("third")];
    objects.retain(|_| rng.u8(..) > 6);
    for cidr in [json!(["10.97.0.0/28"]), json!(["fd00:97::/124", "10.98.0.0/28"])] {
        if one_in(rng, 4) {
            let name = format!("range-{}", objects.len());
            objects
                .push(json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
                "spec": {"cidrs": cidr}}));
        }
    }
    for name in &SERVICES[..rng.usize(1..=SERVICES.len())] {
        let ports = service_ports(rng);
        for index in 0..rng.usize(1..7) {
            objects.push(slice(rng, &format!("{name}-{index}"), name, &ports));
        }
        objects.push(service(rng, name, &ports));
    }
    rng.shuffle(&mut objects);
    World { config: config(rng), objects }
}

/// A flow that has something to do with the world: most dial a frontend.
pub(crate) fn flow(rng: &mut Rng, world: &World) -> Flow {
    let services: Vec<&Value> = world.objects.iter().filter(|object| object["kind"] == "Service").collect();
    let service = pick(rng, &services);
    let ports = service["spec"]["ports"].as_array().map_or(&[][..], Vec::as_slice);
    let port = pick(rng, ports);
    let protocol = PROTOCOLS.into_iter().find(|name| port["protocol"] == *name).unwrap_or("TCP");
    let number = |field: &str| port[field].as_u64().and_then(|number| u16::try_from(number).ok()).unwrap_or(0);
    let node = || NODE.into_iter().chain(["127.0.0.1", "::1"]).map(parsed);
    let (addresses, number): (Vec<IpAddr>, u16) = match rng.u8(..11) {
        0..3 => (written(service.pointer("/spec/clusterIPs")), number("port")),
        3..5 => (written(service.pointer("/spec/externalIPs")), number("port")),
        5..7 => (written(service.pointer("/status/loadBalancer/ingress")), number("port")),
        7..9 => (node().collect(), number("nodePort")),
        _ => (OTHERS.into_iter().map(parsed).chain(node()).collect(), pick(rng, &[80, 81, 53, 30080, 30081, 8080, 9])),
    };
    let cluster_ips = || written(service.pointer("/spec/clusterIPs"));
    let address = rng.choice(addresses).or_else(|| rng.choice(cluster_ips())).unwrap_or_else(|| parsed("8.8.8.8"));
    let number = if number == 0 || one_in(rng, 20) { pick(rng, &[80, 81, 53, 9]) } else { number };
    let protocol = if one_in(rng, 10) { pick(rng, &PROTOCOLS) } else { protocol };
    Flow { client: client(rng, address.is_ipv6()), to: SocketAddr::new(address, number), protocol }
}

/// Addresses in a list of texts, or of objects with an `ip`.
fn written(list: Option<&Value>) -> Vec<IpAddr> {
    let entries = list.and_then(Value::as_array).into_iter().flatten();
    let texts = entries.filter_map(|entry| entry.as_str().or_else(|| entry["ip"].as_str()));
    texts.filter_map(|text| text.parse::<IpAddr>().ok()).map(|address| address.to_canonical()).collect()
}

fn config(rng: &mut Rng) -> Value {
    let mut config = json!({"nodeName": "me", "localControllers": false});
    let mut set = |key: &str, value: Value| config[key] = value;
    match rng.u8(..6) {
        0 => {}
        1 => set("clusterCIDRs", json!([])),
        2 => set("clusterCIDRs", json!(["10.244.0.0/16"])),
        3 => set("clusterCIDRs", json!(["fd00:244::/64", "10.244.0.0/24", "10.244.1.0/24"])),
        // The node's own addresses are inside.
        4 => set("clusterCIDRs", json!(["192.168.0.0/16", "fd00::/16"])),
        _ => set("clusterCIDRs", json!(["10.244.0.0/16", "fd00:244::/64", "fd00:245::/64"])),
    }
    if one_in(rng, 2) {
        set("serviceCIDRs", json!(["10.96.0.0/28", "fd00:96::/124"]));
    }
    let node_port_addresses = [
        json!(["primary"]),
        json!(["all"]),
        json!(["localhost"]),
        json!(["primary", "localhost"]),
        json!(["192.168.0.3/32"]),
        json!(["192.168.0.0/24", "fd00:192::/64"]),
        json!(["203.0.113.0/24", "primary"]),
        json!(["fd00:192::3/128"]),
        json!(["127.0.0.0/8", "::1/128"]),
        json!(["0.0.0.0/0"]),
        json!(["0.0.0.0/0", "::/0", "localhost"]),
        json!(["10.0.0.0/8", "all"]),
    ];
    if one_in(rng, 2) {
        set("nodePortAddresses", pick(rng, &node_port_addresses));
    }
    if one_in(rng, 5) {
        set("masqueradeAll", json!(true));
    }
    if one_in(rng, 12) {
        set("serviceProxyName", json!("sluice"));
    }
    config
}

fn node(rng: &mut Rng) -> Value {
    let mut addresses: Vec<Value> =
        NODE.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    addresses[2]["type"] = json!("ExternalIP");
    addresses.push(json!({"type": "Hostname", "address": "me"}));
    rng.shuffle(&mut addresses);
    addresses.retain(|_| rng.u8(..) > 40);
    let mut node =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "me"}, "status": {"addresses": addresses}});
    match rng.u8(..6) {
        0 => {}
        1 => node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": ""}),
        _ => node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": "east"}),
    }
    match rng.u8(..4) {
        0 => {}
        1 => node["spec"] = json!({"podCIDR": "10.244.0.0/24"}),
        _ => node["spec"] = json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244::/64"]}),
    }
    node
}

fn node_of(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "west"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.9"}]}})
}

fn service_ports(rng: &mut Rng) -> Vec<Value> {
    let mut ports = Vec::new();
    for _ in 0..rng.usize(1..4) {
        let mut port = json!({"port": pick(rng, &[80, 80, 81, 53]), "targetPort": 1});
        put(rng, 4, &mut port, "name", |rng| pick(rng, &NAMES).into());
        put(rng, 4, &mut port, "protocol", |rng| pick(rng, &PROTOCOLS).into());
        put(rng, 2, &mut port, "nodePort", |rng| pick(rng, &[0, 30080, 30080, 30081, 30082]).into());
        ports.push(port);
    }
    ports
}

fn service(rng: &mut Rng, name: &str, ports: &[Value]) -> Value {
    let kind = pick(rng, &["ClusterIP", "ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]);
    let mut spec = json!({"type": if one_in(rng, 25) { "ExternalName" } else { kind }, "ports": ports});
    let ips = [pick(rng, &CLUSTER_IPS_V4), pick(rng, &CLUSTER_IPS_V6)];
    let families: &[usize] = pick(rng, &[&[0], &[1], &[0, 1], &[1, 0], &[0, 1]]);
    let own: Vec<&str> = families.iter().map(|family| ips[*family]).collect();
    spec["clusterIP"] = json!(own[0]);
    // Without ipFamilies only clusterIP counts, whatever stands in clusterIPs.
    spec["clusterIPs"] = json!(own);
    if !one_in(rng, 8) {
        spec["ipFamilies"] = families.iter().map(|family| ["IPv4", "IPv6"][*family]).collect();
    }
    if one_in(rng, 12) {
        spec["clusterIP"] = pick(rng, &[json!("None"), json!(""), Value::Null]);
    }
    put(rng, 3, &mut spec, "internalTrafficPolicy", |rng| pick(rng, &["Cluster", "Local"]).into());
    put(rng, 2, &mut spec, "externalTrafficPolicy", |rng| pick(rng, &["Cluster", "Local"]).into());
    put(rng, 3, &mut spec, "externalIPs", |rng| some(rng, 3, &EXTERNAL_IPS));
    put(rng, 3, &mut spec, "loadBalancerSourceRanges", |rng| some(rng, 3, &SOURCE_RANGES));
    put(rng, 6, &mut spec, "sessionAffinity", |_| "ClientIP".into());
    put(rng, 6, &mut spec, "publishNotReadyAddresses", |rng| rng.bool().into());
    put(rng, 6, &mut spec, "trafficDistribution", |rng| pick(rng, &["PreferClose", "PreferSameNode"]).into());
    let mut metadata = json!({"namespace": "ns", "name": name});
    created(rng, &mut metadata);
    if one_in(rng, 10) {
        metadata["labels"] = json!({"service.kubernetes.io/service-proxy-name": pick(rng, &["sluice", "other", ""])});
    }
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec});
    if one_in(rng, 2) {
        let ingress: Vec<Value> = (0..rng.usize(1..3))
            .map(|_| match rng.u8(..8) {
                0 => json!({"hostname": "lb.example"}),
                1 => json!({"ip": pick(rng, &EXTERNAL_IPS), "ipMode": "Proxy"}),
                2 => json!({"ip": pick(rng, &EXTERNAL_IPS), "ipMode": "VIP"}),
                _ => json!({"ip": pick(rng, &EXTERNAL_IPS)}),
            })
            .collect();
        service["status"] = json!({"loadBalancer": {"ingress": ingress}});
    }
    service
}

fn slice(rng: &mut Rng, name: &str, service: &str, of_service: &[Value]) -> Value {
    let mut labels = Map::new();
    if !one_in(rng, 20) {
        labels.insert("kubernetes.io/service-name".to_owned(), service.into());
    }
    if one_in(rng, 20) {
        labels.insert("service.kubernetes.io/headless".to_owned(), "".into());
    }
    let mut metadata =
        json!({"namespace": if one_in(rng, 25) { "other" } else { "ns" }, "name": name, "labels": labels});
    created(rng, &mut metadata);
    let mut ports = Vec::new();
    for port in of_service {
        if one_in(rng, 8) {
            continue;
        }
        // What the API server fills in.
        let mut port = json!({"name": port["name"].as_str().unwrap_or(""), "protocol": port["protocol"].as_str().unwrap_or("TCP"),
            "port": pick(rng, &[8080, 8080, 8081, 80, 30080])});
        match rng.u8(..24) {
            0 => port["name"] = Value::Null,
            1 => port["port"] = Value::Null,
            2 => port["port"] = json!(0),
            3 => port["name"] = pick(rng, &NAMES).into(),
            4 => port["protocol"] = pick(rng, &PROTOCOLS).into(),
            _ => {}
        }
        ports.push(port);
    }
    let v6 = one_in(rng, 2);
    // Hints are everywhere or on some.
    let hinted = pick(rng, &[0, 0, 2, 9, 10, 10]);
    let endpoints: Vec<Value> = (0..rng.usize(..6)).map(|_| endpoint(rng, v6, hinted)).collect();
    let address_type = if one_in(rng, 25) { "FQDN" } else { ["IPv4", "IPv6"][usize::from(v6)] };
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata, "addressType": address_type,
        "endpoints": endpoints, "ports": ports})
}

fn endpoint(rng: &mut Rng, v6: bool, hinted: u8) -> Value {
    let mut endpoint = json!({"addresses": [endpoint_address(rng, v6), "10.9.9.9"]});
    let conditions = [
        json!({"ready": true, "serving": true, "terminating": false}),
        json!({"ready": false, "serving": false, "terminating": false}),
        json!({"ready": false, "serving": true, "terminating": true}),
        json!({"ready": false, "serving": false, "terminating": true}),
        json!({"ready": true, "serving": true, "terminating": true}),
        json!({"ready": false}),
        json!({"ready": false, "terminating": true}),
        json!({"serving": false}),
        json!({}),
    ];
    match rng.u8(..3) {
        0 => {}
        1 => endpoint["conditions"] = conditions[0].clone(),
        _ => endpoint["conditions"] = pick(rng, &conditions),
    }
    put(rng, 1, &mut endpoint, "nodeName", |rng| pick(rng, &["me", "me", "other", "third"]).into());
    if rng.u8(..10) < hinted {
        let names = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
        let zones: &[&str] = pick(rng, &[&["east"], &["east"], &["west"], &["west", "east"], &[]]);
        let nodes: &[&str] = pick(rng, &[&["me"], &["me", "other"], &["other"], &[]]);
        endpoint["hints"] = match rng.u8(..4) {
            0 => json!({"forZones": names(zones), "forNodes": names(nodes)}),
            1 => json!({"forNodes": names(nodes)}),
            _ => json!({"forZones": names(zones)}),
        };
    }
    endpoint
}

fn endpoint_address(rng: &mut Rng, v6: bool) -> String {
    match (rng.u8(..40), v6) {
        (0, false) => "192.168.0.2".to_owned(),
        (1, false) => pick(rng, &CLUSTER_IPS_V4).to_owned(),
        (2, _) => pick(rng, &EXTERNAL_IPS).to_owned(),
        (3, false) => pick(rng, &["127.0.0.1", "169.254.1.1", "224.0.0.5", "0.0.0.0", "pod"]).to_owned(),
        (4, true) => pick(rng, &["::1", "fe80::1", "ff02::1", "::", "10.244.0.1"]).to_owned(),
        (5, true) => "fd00:192::2".to_owned(),
        (6, true) => pick(rng, &CLUSTER_IPS_V6).to_owned(),
        (_, false) => format!("10.244.{}.{}", rng.u8(..2), rng.u8(1..4)),
        (_, true) => format!("fd00:24{}::{}", rng.u8(4..6), rng.u8(1..4)),
    }
}

fn client(rng: &mut Rng, v6: bool) -> IpAddr {
    let text = match (rng.u8(..8), v6) {
        (0..3, _) => return parsed(&endpoint_address_of(rng, v6)),
        (3..5, false) => pick(rng, &["192.168.0.2", "192.168.0.3", "127.0.0.1", "203.0.113.2"]),
        (3..5, true) => pick(rng, &["fd00:192::2", "fd00:192::3", "::1"]),
        (5, false) => pick(rng, &["198.51.100.1", "198.51.100.2", "10.96.0.1"]),
        (5, true) => pick(rng, &["2001:db8::1", "2001:db8::2", "fd00:96::1"]),
        (_, false) => pick(rng, &["203.0.113.9", "203.0.113.200", "192.168.0.9"]),
        (_, true) => pick(rng, &["2001:db8:ffff::9", "fd00:192::9"]),
    };
    parsed(text)
}

fn endpoint_address_of(rng: &mut Rng, v6: bool) -> String {
    let (subnet, host) = (rng.u8(..2), rng.u8(1..5));
    if v6 { format!("fd00:24{}::{host}", 4 + subnet) } else { format!("10.244.{subnet}.{host}") }
}

/// Other destinations: of Service ranges, of Services here or elsewhere, and of nobody.
const OTHERS: [&str; 14] = [
    "10.96.0.9",
    "10.97.0.1",
    "172.30.0.1",
    "10.96.0.1",
    "198.51.100.1",
    "127.1.2.3",
    "8.8.8.8",
    "10.98.0.1",
    "fd00:96::9",
    "fd00:97::1",
    "fd00:96::1",
    "2001:db8::1",
    "2001:db8:8::8",
    "fd00:172::1",
];
const CLUSTER_IPS_V4: [&str; 8] =
    ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.096.000.4", "172.30.0.1", "172.30.0.2", "10.97.0.1", "10.96.0.5"];
const CLUSTER_IPS_V6: [&str; 6] =
    ["fd00:96::1", "fd00:96::2", "fd00:0096:0::3", "fd00:97::1", "fd00:172::1", "fd00:172::2"];
const EXTERNAL_IPS: [&str; 22] = [
    "198.51.100.1",
    "198.51.100.2",
    "198.51.100.3",
    "198.51.100.1",
    "198.051.100.002",
    "2001:db8::1",
    "2001:db8::2",
    "2001:0db8:0::3",
    "2001:db8::1",
    "::ffff:198.51.100.3",
    "192.168.0.2",
    "192.168.0.3",
    "fd00:192::2",
    "10.96.0.1",
    "10.96.0.9",
    "172.30.0.1",
    "fd00:96::1",
    "127.0.0.1",
    "224.0.0.1",
    "fe80::1",
    "not-an-ip",
    "",
];
const SOURCE_RANGES: [&str; 11] = [
    "203.0.113.0/25",
    " 203.0.113.0/24 ",
    "10.244.0.0/24",
    "192.168.0.0/24",
    "192.168.0.2/32",
    "2001:db8:ffff::/48",
    "fd00:192::/64",
    "fd00:244::/64",
    "203.0.113.9/8",
    "0.0.0.0/0",
    "bad/range",
];

fn created(rng: &mut Rng, metadata: &mut Value) {
    put(rng, 2, metadata, "creationTimestamp", |rng| format!("2026-01-0{}T00:00:00Z", rng.u8(1..4)).into());
}

/// Puts a value in a field, all but one time in `of`, or one time in two where that is 1.
fn put(rng: &mut Rng, of: usize, object: &mut Value, field: &str, value: impl Fn(&mut Rng) -> Value) {
    let is_put = if of == 1 { rng.bool() } else { rng.usize(..of) > 0 };
    if is_put {
        object[field] = value(rng);
    }
}

fn some(rng: &mut Rng, most: usize, of: &[&str]) -> Value {
    (0..rng.usize(1..=most)).map(|_| pick(rng, of)).collect()
}

fn one_in(rng: &mut Rng, of: usize) -> bool {
    rng.usize(..of) == 0
}

fn pick<T: Clone>(rng: &mut Rng, from: &[T]) -> T {
    rng.choice(from).expect("there is something to choose from").clone()
}

fn parsed(text: &str) -> IpAddr {
    text.parse().expect("addresses of clients are written well")
}
