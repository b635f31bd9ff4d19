//! Connections whose endpoint does not take them.

use std::net::SocketAddr;
use std::time::Duration;

use etherparse::PacketBuilder;

use super::harness::{CLIENT, FRONTEND, Path, is_reset, segment, socket, tcp};
use crate::net::Protocol;
use crate::packet::vnet;
use crate::table::{EndpointSlot, PortSlot};

const PODS: [&str; 3] = ["10.244.1.1:8080", "10.244.1.2:8080", "10.244.1.3:8080"];

fn path(endpoints: &[&str]) -> Path {
    let mut path = Path::new(64);
    path.serve(Protocol::Tcp, endpoints);
    path
}

/// The client's SYN, number 7000; where it goes.
fn syn(path: &mut Path, client: &str) -> (SocketAddr, SocketAddr) {
    let (seen, pod, ..) = path.send(segment(socket(client), socket(FRONTEND), "S", 7_000, 0)).unwrap();
    (seen, pod)
}

/// The endpoint's RST.
fn refusal(pod: SocketAddr, seen: SocketAddr) -> Vec<u8> {
    segment(pod, seen, "RA", 0, 7_001)
}

/// A router's "host unreachable" about the SYN.
fn unreachable(code: u8, pod: SocketAddr, seen: SocketAddr, sequence: u32) -> Vec<u8> {
    let quoted = segment(seen, pod, "S", sequence, 0).split_off(vnet::LEN);
    let SocketAddr::V4(to) = seen else { panic!("IPv4") };
    let mut frame = vec![0; vnet::LEN];
    let step = PacketBuilder::ipv4([10, 244, 1, 254], to.ip().octets(), 64).icmpv4_raw(3, code, [0; 4]);
    step.write(&mut frame, &quoted).unwrap();
    frame
}

fn totals(path: &Path) -> ([u64; 3], u64) {
    let totals = path.shared.slots.port_totals(PortSlot(1));
    (totals.failed, totals.retried)
}

#[test]
fn a_refused_connection_is_opened_elsewhere_twice_then_the_client_learns_it() {
    let mut path = path(&PODS);
    let mut syns = vec![syn(&mut path, CLIENT)];
    for _ in 0..2 {
        let (seen, pod) = *syns.last().unwrap();
        let (again, next, packet, bytes) = path.send(refusal(pod, seen)).expect("the SYN goes to another");
        let straight = segment(again, next, "S", 7_000, 0).split_off(vnet::LEN);
        assert_eq!(bytes[..packet.length], straight, "the SYN as the client made it, checksums too");
        syns.push((again, next));
    }
    let mut pods: Vec<SocketAddr> = syns.iter().map(|(_, pod)| *pod).collect();
    pods.sort();
    assert_eq!(pods, PODS.map(socket));
    let (seen, pod) = syns[2];
    let (from, to, packet, _) = path.send(refusal(pod, seen)).unwrap();
    assert_eq!((from, to), (socket(FRONTEND), socket(CLIENT)));
    assert!(is_reset(&packet));
    assert_eq!(totals(&path), ([3, 0, 0], 2));
    assert_eq!(path.states(), ["closing"]);
}

#[test]
fn a_moved_connection_works() {
    let mut path = path(&PODS[..2]);
    let (seen, pod) = syn(&mut path, CLIENT);
    let (seen, pod, ..) = path.send(refusal(pod, seen)).unwrap();
    let (from, to, ..) = path.send(segment(pod, seen, "SA", 90_000, 7_001)).unwrap();
    assert_eq!((from, to), (socket(FRONTEND), socket(CLIENT)));
    assert_eq!(path.send(segment(socket(CLIENT), socket(FRONTEND), "A", 7_001, 90_001)).unwrap().1, pod);
    assert_eq!(path.states(), ["established"]);
    let active = [1, 2].map(|slot| path.shared.slots.active(EndpointSlot(slot)));
    assert_eq!(active.iter().sum::<u32>(), 1);
}

/// Masqueraded, and with a checksum that the kernel is to finish.
#[test]
fn an_offloaded_syn_is_sent_again_as_it_was() {
    let mut path = path(&PODS[..2]);
    let mut frame = tcp(socket("8.8.8.8:99"), socket(FRONTEND), "S");
    vnet::partial(&mut frame[..vnet::LEN], 20, 16);
    let header = frame[..vnet::LEN].to_vec();
    let (seen, pod, ..) = path.send(frame).unwrap();
    let mut refusal = segment(pod, seen, "RA", 0, 1_001);
    let super::super::Action::Answer(length) = path.worker.handle(&mut refusal, path.now_ms) else { panic!("no SYN") };
    assert_eq!(path.worker.answer(length)[..vnet::LEN], header);
    assert_eq!(path.worker.answer(length).len(), vnet::LEN + 40);
}

#[test]
fn silence_moves_a_connection_with_the_clients_next_syn() {
    let mut path = path(&PODS);
    let mut last = syn(&mut path, CLIENT);
    path.now_ms += 100;
    assert_eq!(syn(&mut path, CLIENT), last, "a duplicate");
    for (wait, moves) in [(1_000, true), (3_000, true), (7_000, false)] {
        path.now_ms += wait;
        let next = syn(&mut path, CLIENT);
        assert_eq!(next.1 != last.1, moves, "after {wait} ms");
        last = next;
    }
    assert_eq!(totals(&path).1, 2);
    path.send(segment(last.1, last.0, "SA", 90_000, 7_001)).unwrap();
    path.now_ms += 1_000;
    assert_eq!(syn(&mut path, CLIENT), last, "its answer was lost on the way");
}

#[test]
fn only_unreachable_hosts_and_ports_move_a_connection() {
    for (code, sequence, moves) in [(1, 7_000, true), (3, 7_000, true), (4, 7_000, false), (1, 6_999, false)] {
        let mut path = path(&PODS[..2]);
        let (seen, pod) = syn(&mut path, CLIENT);
        let (_, to, ..) = path.send(unreachable(code, pod, seen, sequence)).unwrap();
        let other = if pod == socket(PODS[0]) { PODS[1] } else { PODS[0] };
        assert_eq!(to.ip(), socket(if moves { other } else { CLIENT }).ip(), "code {code}, number {sequence}");
        assert_eq!(totals(&path), ([0, u64::from(moves), 0], u64::from(moves)));
    }
}

#[test]
fn what_is_not_moved() {
    type Case = (&'static str, fn(&mut Path), usize, u32);
    let cases: [Case; 4] = [
        ("there is no other endpoint", |_| {}, 1, 7_001),
        ("retry is off", |path| path.retry = false, 2, 7_001),
        ("affinity", |path| path.affinity = Some(Duration::from_secs(60)), 2, 7_001),
        ("it does not acknowledge the SYN", |_| {}, 2, 7_002),
    ];
    for (name, prepare, count, acknowledgement) in cases {
        let mut path = Path::new(64);
        prepare(&mut path);
        path.serve(Protocol::Tcp, &PODS[..count]);
        let (seen, pod) = syn(&mut path, CLIENT);
        let (_, to, packet, _) = path.send(segment(pod, seen, "RA", 0, acknowledgement)).unwrap();
        assert_eq!(to, socket(CLIENT), "{name}");
        assert!(is_reset(&packet));
        assert_eq!(totals(&path).1, 0);
    }
}

#[test]
fn an_endpoint_that_answered_once_is_never_left() {
    let mut path = path(&PODS[..2]);
    let (seen, pod) = syn(&mut path, CLIENT);
    path.send(segment(pod, seen, "SA", 90_000, 7_001)).unwrap();
    assert_eq!(path.send(refusal(pod, seen)).unwrap().1, socket(CLIENT));
}

#[test]
fn affinity_moves_when_its_endpoint_has_left() {
    let mut path = Path::new(64);
    path.affinity = Some(Duration::from_secs(60));
    path.serve(Protocol::Tcp, &PODS[..2]);
    let (seen, pod) = syn(&mut path, CLIENT);
    let other = if pod == socket(PODS[0]) { PODS[1] } else { PODS[0] };
    path.serve(Protocol::Tcp, &[other]);
    assert_eq!(totals(&path).1, 0);
    // With one endpoint in the list, and another one tried, there is something to move to.
    path.serve(Protocol::Tcp, &[other, PODS[2]]);
    assert_ne!(path.send(refusal(pod, seen)).unwrap().1, socket(CLIENT));
}

#[test]
fn an_endpoint_that_refuses_is_ejected_until_its_time_is_over() {
    let mut path = path(&PODS[..2]);
    let to_first = |path: &mut Path, ports: std::ops::Range<u16>| {
        let mut count = 0;
        for port in ports {
            let (seen, pod) = syn(path, &format!("10.244.0.9:{port}"));
            if pod == socket(PODS[0]) {
                count += 1;
                path.send(refusal(pod, seen)).unwrap();
            }
        }
        count
    };
    // It is the idler one, since it keeps no flow: the first five go there, whichever came first.
    assert_eq!(to_first(&mut path, 1..50), 5);
    assert_eq!(path.shared.slots.ejected_until(EndpointSlot(1)), Some(path.now_ms + 30_000));
    path.now_ms += 30_000;
    assert_eq!(to_first(&mut path, 100..150), 5);
    path.now_ms += 60_000;
    path.retry = false;
    path.serve(Protocol::Tcp, &PODS[..2]);
    let (seen, pod) = syn(&mut path, "10.244.0.9:200");
    assert_eq!(pod, socket(PODS[0]));
    path.send(segment(pod, seen, "SA", 90_000, 7_001)).unwrap();
    assert_eq!(path.shared.slots.ejected_until(EndpointSlot(1)), None);
}

/// A connection of the masquerade port ended a moment ago, and the endpoint remembers it.
#[test]
fn a_port_that_the_endpoint_remembers_is_passed_over() {
    let mut path = path(&PODS[..1]);
    let client = "8.8.8.8:999";
    let (seen, pod) = syn(&mut path, client);
    let challenge = |seen| segment(pod, seen, "A", 55, 66);
    let (again, same, packet, bytes) = path.send(challenge(seen)).expect("the SYN goes out from another port");
    assert_eq!((same, again.ip()), (pod, seen.ip()));
    assert_ne!(again.port(), seen.port());
    assert_eq!(bytes[..packet.length], segment(again, pod, "S", 7_000, 0).split_off(vnet::LEN));
    let (from, to, ..) = path.send(segment(pod, again, "SA", 90_000, 7_001)).unwrap();
    assert_eq!((from, to), (socket(FRONTEND), socket(client)));
    assert_eq!(path.send(segment(socket(client), socket(FRONTEND), "A", 7_001, 90_001)).unwrap().0, again);
    assert_eq!(path.states(), ["established"]);
    assert_eq!(path.shared.slots.active(EndpointSlot(1)), 1);
    // A client that kept its own address has only the one port.
    let (seen, pod) = syn(&mut path, CLIENT);
    let (from, to, packet, _) = path.send(segment(pod, seen, "A", 55, 66)).unwrap();
    assert_eq!((from, to), (socket(FRONTEND), socket(CLIENT)));
    assert!(!is_reset(&packet));
}
