//! The step of a packet thread, packet by packet, without a kernel.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use etherparse::PacketBuilder;

use super::{Action, Settings, Shared, Worker};
use crate::net::{Family, Protocol};
use crate::packet::view::{Packet, Transport};
use crate::packet::vnet;
use crate::table::{EndpointList, NodeSpec, PortSpec, ServiceName, ServiceSpec, TableBuilder};

const CLIENT: &str = "10.244.0.9:40000";
const FRONTEND: &str = "10.96.0.10:80";
const NODE: &str = "192.168.0.1";

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// One packet thread with its table; time moves only when told.
struct Path {
    shared: Arc<Shared>,
    worker: Worker,
    builder: TableBuilder,
    affinity: Option<Duration>,
    now_ms: u64,
}

impl Path {
    fn new(flow_capacity: usize) -> Self {
        let settings = Settings {
            workers: 1,
            flow_capacity,
            masquerade_addresses: vec![NODE.parse().unwrap(), "fd00::1".parse().unwrap()],
            masquerade_ports: 61000..=61003,
            seed: 1,
        };
        let shared = Shared::new(settings);
        let mut builder = TableBuilder::new(Arc::clone(&shared.slots));
        builder.set_node(NodeSpec {
            addresses: vec![NODE.parse().unwrap()],
            node_port_addresses: vec![NODE.parse().unwrap()],
            cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
            ..NodeSpec::default()
        });
        Self { worker: Worker::new(Arc::clone(&shared), 0), shared, builder, affinity: None, now_ms: 1_000_000 }
    }

    /// Publishes one Service `FRONTEND` with node port 30080 on these endpoints.
    fn serve(&mut self, protocol: Protocol, endpoints: &[&str]) {
        let addresses: Vec<SocketAddr> = endpoints.iter().map(|text| socket(text)).collect();
        let list = EndpointList { addresses: addresses.clone(), why: String::new() };
        let port = PortSpec {
            name: String::new(),
            protocol,
            number: 80,
            family: Family::V4,
            cluster_ip: socket(FRONTEND).ip(),
            node_port: Some(30080),
            load_balancer_ips: Vec::new(),
            external_ips: Vec::new(),
            source_ranges: Vec::new(),
            source_ranges_admit_vips: false,
            internal_policy: Default::default(),
            external_policy: Default::default(),
            affinity: self.affinity,
            balancing: Default::default(),
            cluster: list,
            local: EndpointList::default(),
            has_any_endpoint: !endpoints.is_empty(),
            serving: addresses,
        };
        self.builder.set(ServiceSpec { name: ServiceName::new("a", "b"), created: None, ports: vec![port] });
        self.shared.publish(self.builder.build());
    }

    /// Sends a packet; what comes back as (source, destination, packet, bytes).
    fn send(&mut self, mut frame: Vec<u8>) -> Option<(SocketAddr, SocketAddr, Packet, Vec<u8>)> {
        let bytes = match self.worker.handle(&mut frame, self.now_ms) {
            Action::Send => frame,
            Action::Answer(length) => self.worker.answer(length).to_vec(),
            Action::Discard => return None,
        };
        let bytes = bytes[vnet::LEN..].to_vec();
        let packet = Packet::parse(&bytes).unwrap();
        let at = |ip: IpAddr, port| SocketAddr::new(ip, port);
        let source = at(packet.source.ip(), packet.source_port);
        Some((source, at(packet.destination.ip(), packet.destination_port), packet, bytes))
    }

    fn tcp(&mut self, from: &str, to: &str, flags: &str) -> Option<(SocketAddr, SocketAddr, Packet, Vec<u8>)> {
        self.send(tcp(socket(from), socket(to), flags))
    }

    /// Opens a connection from `from` and returns (source that the endpoint sees, endpoint).
    fn connect(&mut self, from: &str, to: &str) -> (SocketAddr, SocketAddr) {
        let (seen, endpoint, ..) = self.tcp(from, to, "S").expect("the SYN is forwarded");
        let (frontend, client, ..) = self.send(tcp(endpoint, seen, "SA")).expect("the SYN-ACK is forwarded");
        assert_eq!((frontend, client), (socket(to), socket(from)));
        let (again, same, ..) = self.tcp(from, to, "A").expect("the ACK is forwarded");
        assert_eq!((again, same), (seen, endpoint));
        (seen, endpoint)
    }

    fn states(&self) -> Vec<&'static str> {
        self.shared.flows.views(self.now_ms).map(|flow| flow.state).collect()
    }
}

fn ip(from: SocketAddr, to: SocketAddr) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => panic!("mixed families"),
    }
}

fn tcp(from: SocketAddr, to: SocketAddr, flags: &str) -> Vec<u8> {
    let mut step = ip(from, to).tcp(from.port(), to.port(), 1000, 64000);
    for flag in flags.chars() {
        step = match flag {
            'S' => step.syn(),
            'A' => step.ack(1000),
            'F' => step.fin(),
            'R' => step.rst(),
            _ => panic!("unknown flag {flag}"),
        };
    }
    let mut frame = vec![0; vnet::LEN];
    step.write(&mut frame, b"").unwrap();
    frame
}

fn udp(from: &str, to: &str) -> Vec<u8> {
    let mut frame = vec![0; vnet::LEN];
    let (from, to) = (socket(from), socket(to));
    ip(from, to).udp(from.port(), to.port()).write(&mut frame, b"question").unwrap();
    frame
}

fn is_reset(packet: &Packet) -> bool {
    matches!(packet.transport, Transport::Tcp(tcp) if tcp.rst)
}

#[test]
fn a_pod_keeps_its_address_and_the_connection_its_endpoint() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080", "10.244.1.2:8080"]);
    let (seen, endpoint) = path.connect(CLIENT, FRONTEND);
    assert_eq!(seen, socket(CLIENT));
    assert_eq!(path.states(), ["established"]);
    path.serve(Protocol::Tcp, &["10.244.1.3:8080"]);
    assert_eq!(path.tcp(CLIENT, FRONTEND, "A").unwrap().1, endpoint, "a table change moves no connection");
    assert_eq!(path.connect("10.244.0.9:40001", FRONTEND).1, socket("10.244.1.3:8080"));
}

#[test]
fn others_are_masqueraded_and_so_is_an_endpoint_that_reaches_itself() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    for (from, to) in [("8.8.8.8:999", FRONTEND), ("8.8.8.8:999", "192.168.0.1:30080"), ("10.244.1.1:5", FRONTEND)] {
        let (seen, _) = path.connect(from, to);
        assert_eq!(seen.ip().to_string(), NODE, "{from} to {to}");
        assert!((61000..=61003).contains(&seen.port()));
    }
    // The range has one port left, then none.
    path.connect("8.8.8.8:1000", FRONTEND);
    assert!(path.tcp("8.8.8.8:1001", FRONTEND, "S").is_none());
    assert!(path.shared.drops().contains(&("no_masquerade_port", 1)));
}

#[test]
fn a_client_port_in_use_towards_the_only_endpoint_is_masqueraded() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    let mut port = path.builder.services().next().unwrap().ports[0].clone();
    (port.cluster_ip, port.node_port) = ("10.96.0.11".parse().unwrap(), None);
    path.builder.set(ServiceSpec { name: ServiceName::new("a", "twin"), created: None, ports: vec![port] });
    path.shared.publish(path.builder.build());
    assert_eq!(path.connect(CLIENT, FRONTEND).0, socket(CLIENT));
    assert_eq!(path.connect(CLIENT, "10.96.0.11:80").0.ip().to_string(), NODE);
}

#[test]
fn refusals() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &[]);
    let (from, to, packet, _) = path.tcp(CLIENT, FRONTEND, "S").unwrap();
    assert_eq!((from, to), (socket(FRONTEND), socket(CLIENT)));
    assert!(is_reset(&packet), "no endpoint");
    assert!(is_reset(&path.tcp(CLIENT, "10.96.0.10:81", "S").unwrap().2), "no such port");
    assert!(path.tcp(CLIENT, "10.96.0.10:81", "R").is_none(), "no answer to a RST");
    assert!(path.tcp(CLIENT, "10.96.9.9:80", "S").is_none(), "unallocated");
    let (.., packet, bytes) = path.send(udp(CLIENT, FRONTEND)).unwrap();
    assert_eq!(packet.transport, Transport::Icmp(3));
    assert_eq!(bytes[packet.transport_at + 1], 3, "port unreachable");
    let (from, to, ..) = path.tcp(CLIENT, "192.168.0.1:30999", "S").unwrap();
    assert_eq!((from, to), (socket(CLIENT), socket("192.168.0.1:30999")), "not ours: passed as it is");
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    assert!(is_reset(&path.tcp(CLIENT, FRONTEND, "A").unwrap().2), "the middle of an unknown connection");
}

#[test]
fn a_syn_on_a_finished_connection_is_a_new_one() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    let (seen, endpoint) = path.connect(CLIENT, FRONTEND);
    path.serve(Protocol::Tcp, &["10.244.1.2:8080"]);
    path.tcp(CLIENT, FRONTEND, "FA").unwrap();
    assert_eq!(path.states(), ["half-closed"]);
    path.send(tcp(endpoint, seen, "FA")).unwrap();
    assert_eq!(path.states(), ["closing"]);
    assert_eq!(path.tcp(CLIENT, FRONTEND, "A").unwrap().1, endpoint, "the last ACK finds its way");
    assert_eq!(path.connect(CLIENT, FRONTEND).1, socket("10.244.1.2:8080"));
}

#[test]
fn a_datagram_never_goes_to_an_endpoint_that_is_gone() {
    let mut path = Path::new(16);
    path.serve(Protocol::Udp, &["10.244.1.1:53"]);
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, socket("10.244.1.1:53"));
    path.serve(Protocol::Udp, &["10.244.1.2:53"]);
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, socket("10.244.1.2:53"));
    path.serve(Protocol::Udp, &["10.244.1.1:53", "10.244.1.2:53"]);
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, socket("10.244.1.2:53"), "a healthy one stays");
}

#[test]
fn affinity_slides_with_each_flow_and_ends_with_its_endpoint() {
    let mut path = Path::new(64);
    path.affinity = Some(Duration::from_secs(10));
    let endpoints = ["10.244.1.1:8080", "10.244.1.2:8080", "10.244.1.3:8080"];
    path.serve(Protocol::Tcp, &endpoints);
    let mut port = 1;
    let mut next = |path: &mut Path| {
        port += 1;
        path.connect(&format!("10.244.0.9:{port}"), FRONTEND).1
    };
    let first = next(&mut path);
    for _ in 0..5 {
        path.now_ms += 9_000;
        assert_eq!(next(&mut path), first);
    }
    let others: Vec<&str> = endpoints.into_iter().filter(|endpoint| socket(endpoint) != first).collect();
    path.serve(Protocol::Tcp, &others);
    let second = next(&mut path);
    assert_ne!(second, first);
    path.serve(Protocol::Tcp, &endpoints);
    assert_eq!(next(&mut path), second, "the old endpoint is forgotten");
    path.now_ms += 11_000;
    let fresh: std::collections::HashSet<SocketAddr> = (0..8)
        .map(|_| {
            path.now_ms += 11_000;
            next(&mut path)
        })
        .collect();
    assert!(fresh.len() > 1, "after the timeout the choice is free");
}

#[test]
fn silence_ends_a_flow_by_its_state() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    path.connect(CLIENT, FRONTEND);
    path.tcp("10.244.0.9:40001", FRONTEND, "S").unwrap();
    path.now_ms += 61_000;
    path.shared.flows.sweep(path.now_ms, 16);
    assert_eq!(path.states(), ["established"]);
    path.now_ms += 24 * 3600 * 1000;
    path.shared.flows.sweep(path.now_ms, 16);
    assert_eq!(path.states(), [""; 0]);
    assert_eq!(path.shared.slots.active(crate::table::EndpointSlot(1)), 0);
}

#[test]
fn a_full_table_refuses_rather_than_forget_a_connection() {
    let mut path = Path::new(2);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    path.connect("10.244.0.9:1", FRONTEND);
    path.connect("10.244.0.9:2", FRONTEND);
    assert!(path.tcp("10.244.0.9:3", FRONTEND, "S").is_none());
    assert!(path.shared.drops().contains(&("flow_table_full", 1)));
    path.tcp("10.244.0.9:1", FRONTEND, "R").unwrap();
    path.connect("10.244.0.9:3", FRONTEND);
    assert_eq!(path.shared.evictions(), 1, "the finished one made room");
}

#[test]
fn garbage_is_counted_and_harmless() {
    let (mut path, mut rng) = (Path::new(16), fastrand::Rng::with_seed(3));
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    let whole = [tcp(socket(CLIENT), socket(FRONTEND), "S"), udp(CLIENT, FRONTEND), udp("[fd00::2]:1", "[fd00::3]:2")];
    for round in 0..30_000 {
        let mut frame = whole[round % 3].clone();
        frame.truncate(rng.usize(..=frame.len()));
        for _ in 0..rng.usize(..4) {
            if let Some(at) = (!frame.is_empty()).then(|| rng.usize(..frame.len())) {
                frame[at] = rng.u8(..);
            }
        }
        path.worker.handle(&mut frame, path.now_ms);
    }
    let malformed: u64 =
        path.shared.drops().iter().filter(|drop| drop.0.starts_with("malformed")).map(|drop| drop.1).sum();
    assert!(malformed > 10_000);
}

#[test]
fn an_endpoint_that_is_a_frontend_gets_no_flow() {
    let mut path = Path::new(100);
    path.serve(Protocol::Tcp, &["192.168.0.1:30080", "10.244.1.1:8080", "10.96.0.10:81"]);
    for port in 40000..40020 {
        assert_eq!(path.connect(&format!("10.244.0.9:{port}"), FRONTEND).1, socket("10.244.1.1:8080"));
    }
    path.serve(Protocol::Tcp, &["192.168.0.1:30080"]);
    assert!(path.tcp("10.244.0.9:50000", FRONTEND, "S").is_none());
    assert_eq!(path.shared.drops[0].get(super::drops::Drop::Loop), 1);
    // On the same address another port is an endpoint like any other.
    path.serve(Protocol::Tcp, &["192.168.0.1:8080"]);
    assert_eq!(path.connect("10.244.0.9:50001", FRONTEND).1, socket("192.168.0.1:8080"));
}
