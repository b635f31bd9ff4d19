//! The step of a packet thread, packet by packet, without a kernel.

mod drain;
mod fragments;
mod harness;
mod hold;
mod random;
mod restart;
mod retry;

use std::net::SocketAddr;
use std::time::Duration;

use harness::{CLIENT, FRONTEND, NODE, Path, is_reset, socket, tcp, udp};

use crate::net::Protocol;
use crate::packet::view::Transport;
use crate::table::ServiceName;
use crate::table::ServiceSpec;

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
fn only_packets_that_connection_tracking_need_not_see_may_go_by_a_link() {
    let mut path = Path::new(16);
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    for (client, to, request_may) in [(CLIENT, FRONTEND, false), ("8.8.8.8:999", "192.168.0.1:30080", true)] {
        let (seen, endpoint, ..) = path.tcp(client, to, "S").unwrap();
        let onward = |path: &Path| path.worker.onward().map(crate::flow::Address::ip);
        assert_eq!(onward(&path), request_may.then_some(endpoint.ip()), "{client}");
        path.send(tcp(endpoint, seen, "SA")).unwrap();
        assert_eq!(onward(&path), Some(socket(client).ip()));
        // Nothing of it stays for the next packet, which is none of ours.
        path.tcp("8.8.8.8:1", "9.9.9.9:2", "S").unwrap();
        assert_eq!(onward(&path), None);
    }
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
