//! The rules by real packets: for every line of `packets.txt`, over every protocol and family, who is reached and whom he
//! sees, or how the flow ends.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use sluice_bench::client::Failure;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::SOON;
use sluice_tests::lab::{
    ENDPOINT, Lab, PORT, cluster_ip, elsewhere, endpoint, external, load_balancer, node_port, second_address, service,
    slices,
};
use sluice_tests::probe::{Protocol, ask};

/// How long nothing may come before we believe that nothing will. What must come may take as long as [`SOON`].
const SILENCE: Duration = Duration::from_millis(400);
/// A node port that no Service has.
const FREE_NODE_PORT: u16 = 32_000;
/// Threads of each kind of client. Flows to one address are tried by one thread: an ICMP error about a raw packet reaches
/// every raw socket that talks to that address.
const THREADS: usize = 8;

#[test]
fn every_rule_holds_for_every_protocol_and_family() {
    if !can_run_in_namespaces("Service rules by real packets") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let services = services();
    let numbers: BTreeMap<String, u8> =
        services.iter().enumerate().map(|(index, (name, ..))| (name.clone(), index as u8 + 1)).collect();
    for (name, spec, status, endpoints) in &services {
        let mut service = service(numbers[name], name, spec.clone());
        if !status.is_null() {
            service["status"] = status.clone();
        }
        let endpoints = endpoints.iter().flat_map(|(port, endpoints)| slices(name, *port, endpoints));
        lab.cluster.write(&format!("{name}.json"), &[vec![service], endpoints.collect()].concat()).unwrap();
    }
    lab.serve_in_pod(2, "2b", ENDPOINT + 1).unwrap();
    let nodes = [true, false].map(|v4| lab.cluster.topology.node_address(v4).unwrap());
    let node = move |v4: bool| nodes[usize::from(!v4)];
    let (cluster, v4_only) = (node_port(numbers["cluster"]), node_port(numbers["only-v4"]));
    let host = [true, false]
        .map(|v4| [(second_address(v4), cluster), (node(v4), ENDPOINT), (node(v4), FREE_NODE_PORT)])
        .concat();
    lab.serve_on_node(&[host, vec![(node(false), v4_only)]].concat()).unwrap();
    lab.cluster.start().unwrap();

    let flows = flows(include_str!("packets.txt"), &numbers, node);
    let mut groups: BTreeMap<(&str, IpAddr), Vec<&Flow>> = BTreeMap::new();
    for flow in &flows {
        groups.entry((flow.client, flow.to.ip())).or_default().push(flow);
    }
    let (wrong, groups) = (Mutex::new(Vec::new()), Mutex::new(groups));
    let next = |client: &str| {
        let mut groups = groups.lock().unwrap();
        let key = groups.keys().find(|(kind, _)| *kind == client).copied();
        key.and_then(|key| groups.remove(&key))
    };
    let try_all = &|client: &str| {
        lab.client(client).unwrap().enter().unwrap();
        while let Some(group) = next(client) {
            let found: Vec<String> = group.iter().filter_map(|flow| flow.difference(&nodes)).collect();
            wrong.lock().unwrap().extend(found);
        }
    };
    std::thread::scope(|scope| {
        for client in ["pod", "node", "outside"] {
            (0..THREADS).for_each(|_| drop(scope.spawn(move || try_all(client))));
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} flows:\n{}", wrong.len(), flows.len(), wrong.join("\n"));
    for outcome in ["forward", "reject", "drop", "pass"] {
        let count = flows.iter().filter(|flow| flow.expect.outcome() == outcome).count();
        println!("{outcome}: {count} flows");
    }
    assert!(flows.len() >= 400, "{} flows", flows.len());
    // Silence means that Sluice dropped them, not that they were lost on the way.
    let dropped = lab.cluster.metric("sluice_drops_total{reason=\"rule\"").unwrap();
    let drops = flows.iter().filter(|flow| matches!(flow.expect, Expect::Drop)).count();
    assert!(dropped >= drops as f64, "{dropped} packets dropped by rules, at least {drops} were to be");
}

type Services = Vec<(String, Value, Value, Vec<(u16, Vec<(u8, Value)>)>)>;

/// Name, `spec`, `status` when it is not the usual one, and endpoints by the port of their slices.
fn services() -> Services {
    let ready = |number| endpoint(number, json!({}));
    let hinted = |number, zones: &[&str], nodes: &[&str]| {
        let names = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
        endpoint(number, json!({"hints": {"forZones": names(zones), "forNodes": names(nodes)}}))
    };
    let leaving = |number, serving| {
        endpoint(number, json!({"conditions": {"ready": false, "serving": serving, "terminating": true}}))
    };
    let local = || json!({"externalTrafficPolicy": "Local"});
    let all_local = || json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"});
    let ranges = |ranges: [&str; 2]| json!({"loadBalancerSourceRanges": ranges});
    let outside = ["192.168.50.2/32", "fd00:50::2/128"];
    let ingress = [true, false].map(|v4| json!({"ip": elsewhere(1, v4).to_string(), "ipMode": "Proxy"}));
    let proxy = json!({"loadBalancer": {"ingress": ingress}});
    let ports = ["TCP", "UDP", "SCTP"].map(|it| json!({"name": it.to_lowercase(), "protocol": it, "port": 7080}));
    let own = json!({"externalIPs": ["192.168.50.1", "fd00:50::1"], "ports": ports});
    let v4_only = json!({"ipFamilies": ["IPv4"], "clusterIPs": ["10.96.1.22"], "clusterIP": "10.96.1.22"});
    let v6_first = json!({
        "ipFamilies": ["IPv6", "IPv4"], "clusterIP": "fd00:96::1:17", "clusterIPs": ["fd00:96::1:17", "10.96.1.23"],
    });
    let addresses = [true, false].map(|v4| elsewhere(2, v4).to_string());
    let shared = json!({"externalIPs": addresses});
    let unready = endpoint(1, json!({"conditions": {"ready": false, "serving": false, "terminating": false}}));
    let rows = [
        ("cluster", json!({}), vec![ready(1), ready(3)]),
        ("local", local(), vec![ready(1), ready(3)]),
        ("internal-local", json!({"internalTrafficPolicy": "Local"}), vec![ready(2), ready(3)]),
        ("local-elsewhere", all_local(), vec![ready(3)]),
        ("nothing", json!({}), vec![]),
        ("nothing-local", all_local(), vec![]),
        ("unready", json!({}), vec![unready]),
        ("ranges", ranges(outside), vec![ready(1)]),
        ("ranges-closed", ranges(["203.0.113.0/24", "fd00:203::/64"]), vec![ready(1)]),
        ("ranges-nothing", ranges(outside), vec![]),
        ("proxied", json!({}), vec![ready(2)]),
        (
            "zones",
            json!({}),
            vec![hinted(1, &["zone-a"], &[]), hinted(3, &["zone-b"], &[]), hinted(4, &["zone-a"], &[])],
        ),
        (
            "nodes",
            json!({}),
            vec![
                hinted(2, &["zone-b"], &["node-1"]),
                hinted(3, &["zone-a"], &["node-2"]),
                hinted(4, &["zone-b"], &["node-1"]),
            ],
        ),
        ("zones-incomplete", json!({}), vec![hinted(1, &["zone-a"], &[]), ready(3), hinted(4, &["zone-b"], &[])]),
        ("zones-of-others", json!({}), vec![hinted(3, &["zone-b"], &[]), hinted(4, &["zone-c"], &[])]),
        ("zones-local", local(), vec![hinted(1, &["zone-b"], &[]), hinted(3, &["zone-a"], &[])]),
        ("terminating", json!({}), vec![leaving(1, true), leaving(3, true)]),
        ("terminating-here", local(), vec![leaving(1, true), ready(3)]),
        ("terminating-done", json!({}), vec![leaving(1, false), leaving(3, false)]),
        ("hairpin", json!({}), vec![ready(5)]),
        ("hairpin-local", local(), vec![ready(5)]),
        ("only-v4", v4_only, vec![ready(1)]),
        ("v6-first", v6_first, vec![ready(2)]),
        ("shared", shared, vec![ready(2)]),
        ("own-address", own, vec![ready(1)]),
        ("named", json!({}), vec![ready(1)]),
    ];
    let full = |(name, spec, endpoints): (&str, Value, Vec<(u8, Value)>)| {
        let status = if name == "proxied" { proxy.clone() } else { Value::Null };
        let mut slices = vec![(ENDPOINT, endpoints)];
        if name == "named" {
            slices.push((ENDPOINT + 1, vec![ready(2)]));
        }
        (name.to_owned(), spec, status, slices)
    };
    rows.into_iter().map(full).collect()
}

struct Flow {
    /// Line of the file, and what the Service and frontend are called.
    about: String,
    client: &'static str,
    protocol: Protocol,
    to: SocketAddr,
    expect: Expect,
}

#[derive(Clone, Debug)]
enum Expect {
    Answers { by: BTreeSet<String>, source: String, pass: bool },
    Reject,
    Drop,
}

impl Expect {
    fn outcome(&self) -> &'static str {
        match self {
            Self::Answers { pass: false, .. } => "forward",
            Self::Answers { pass: true, .. } => "pass",
            Self::Reject => "reject",
            Self::Drop => "drop",
        }
    }

    fn parse(words: &[&str]) -> Option<Self> {
        match words {
            ["reject"] => Some(Self::Reject),
            ["drop"] => Some(Self::Drop),
            [outcome @ ("forward" | "pass"), names @ .., "as", source @ ("own" | "node")] => {
                let by = names.iter().filter(|name| **name != "to").map(|name| (*name).to_owned()).collect();
                Some(Self::Answers { by, source: (*source).to_owned(), pass: *outcome == "pass" })
            }
            _ => None,
        }
    }
}

impl Flow {
    /// What happened instead of what was to happen.
    fn difference(&self, nodes: &[IpAddr]) -> Option<String> {
        let Expect::Answers { by, source, .. } = &self.expect else {
            let wait = if matches!(self.expect, Expect::Drop) { SILENCE } else { SOON };
            let want = if matches!(self.expect, Expect::Drop) { Failure::Timeout } else { Failure::Refused };
            let found = ask(self.protocol, self.to, wait);
            return (found.as_ref().err() != Some(&want)).then(|| format!("{self}: {found:?}"));
        };
        let mut reached = BTreeSet::new();
        // An endpoint that must not be reached has this many chances; one that must, more.
        for attempt in 0.. {
            if attempt >= 4 * by.len() && (reached == *by || attempt >= 20 * by.len()) {
                break;
            }
            let answer = match ask(self.protocol, self.to, SOON) {
                Ok(answer) => answer,
                Err(failure) => return Some(format!("{self}: {failure}")),
            };
            let as_itself = answer.seen == answer.own;
            let is_right = if source == "node" { nodes.contains(&answer.seen.ip()) } else { as_itself };
            if !is_right || !by.contains(&answer.by) {
                return Some(format!("{self}: {answer:?}"));
            }
            reached.insert(answer.by);
        }
        (reached != *by).then(|| format!("{self}: reached only {reached:?}"))
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} to {} {}: expected {:?}", self.about, self.client, self.to, self.protocol, self.expect)
    }
}

/// The flows of all lines.
fn flows(text: &str, numbers: &BTreeMap<String, u8>, node: impl Fn(bool) -> IpAddr) -> Vec<Flow> {
    let mut flows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [service, frontends, clients, expect @ ..] = &*words else { panic!("line {}: {line}", index + 1) };
        let expect = Expect::parse(expect).unwrap_or_else(|| panic!("line {}: {line}", index + 1));
        let (service, families) = match service.split_once('/') {
            Some((service, family)) => (service, vec![family == "v4"]),
            None => (*service, vec![true, false]),
        };
        for frontend in frontends.split(',') {
            for client in clients.split(',') {
                let client = ["pod", "node", "outside"].into_iter().find(|kind| *kind == client).unwrap();
                for (v4, protocol) in families
                    .iter()
                    .flat_map(|v4| [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(move |protocol| (*v4, protocol)))
                {
                    let to = frontend_address(frontend, numbers[service], v4, node(v4));
                    if client == "node" && protocol == Protocol::Sctp && to.ip() == node(v4) {
                        continue;
                    }
                    flows.push(Flow {
                        about: format!("packets.txt:{}: {service}: {frontend}", index + 1),
                        client,
                        protocol,
                        to,
                        expect: expect.clone(),
                    });
                }
            }
        }
    }
    flows
}

fn frontend_address(frontend: &str, number: u8, v4: bool, node: IpAddr) -> SocketAddr {
    let (ip, port) = match frontend {
        "clusterip" => (cluster_ip(number, v4), PORT),
        "nodeport" => (node, node_port(number)),
        "loadbalancer" => (load_balancer(number, v4), PORT),
        "external" => (external(number, v4), PORT),
        "wrong-port" => (cluster_ip(number, v4), PORT + 1),
        "second-address" => (second_address(v4), node_port(number)),
        "unallocated" => (cluster_ip(250, v4), PORT),
        "proxy" => (elsewhere(1, v4), PORT),
        "shared" => (elsewhere(2, v4), PORT),
        "shared-other-port" => (elsewhere(2, v4), ENDPOINT),
        "free-node-port" => (node, FREE_NODE_PORT),
        "own" => (node, 7080),
        "own-other-port" => (node, ENDPOINT),
        other => panic!("{other:?} is no frontend"),
    };
    SocketAddr::new(ip, port)
}
