//! Flows of endpoints that leave: which go on, which end, and how.

use std::net::SocketAddr;

use super::harness::{CLIENT, FRONTEND, Path, is_reset, segment, socket, tcp, udp};
use crate::net::Protocol;
use crate::table::{Condition, Deadline, EndpointSpec, Uid};

const POD: &str = "10.244.1.1:8080";
const OTHER: &str = "10.244.1.2:8080";
const TERMINATING: Condition = Condition::Terminating { serving: true };

fn endpoint(address: &str, uid: u64, condition: Condition) -> EndpointSpec {
    EndpointSpec { uid: Uid(uid), condition, ..EndpointSpec::ready(socket(address)) }
}

/// A connection whose client has sent 100 bytes and whose endpoint has sent 500, all acknowledged.
fn talk(path: &mut Path, client: &str) -> SocketAddr {
    let (client, frontend) = (socket(client), socket(FRONTEND));
    path.send(segment(client, frontend, "S", 7_000, 0)).unwrap();
    let (seen, pod) = (client, socket(POD));
    path.send(segment(pod, seen, "SA", 90_000, 7_001)).unwrap();
    path.send(segment(client, frontend, "A", 7_001, 90_001)).unwrap();
    path.send(segment(pod, seen, "A", 90_001, 7_101)).unwrap();
    path.send(segment(client, frontend, "A", 7_101, 90_501)).unwrap();
    client
}

#[test]
fn a_terminating_endpoint_that_leaves_resets_both_ends_with_the_numbers_they_expect() {
    let mut path = Path::new(16);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, Condition::Ready)]);
    let client = talk(&mut path, CLIENT);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, TERMINATING), endpoint(OTHER, 2, Condition::Ready)]);
    assert_eq!(path.keep(), []);
    let more = path.send(segment(client, socket(FRONTEND), "A", 7_101, 90_501));
    assert_eq!(more.unwrap().1, socket(POD), "it goes on while the endpoint terminates");
    talk(&mut path, "10.244.0.9:40001"); // goes to OTHER, whose answers come from POD: never established
    path.serve_all(Protocol::Tcp, vec![endpoint(OTHER, 2, Condition::Ready)]);
    path.send(segment(client, socket(FRONTEND), "A", 7_101, 90_501));
    let sent = path.keep();
    let [(from, to, first), (back_from, back_to, second)] = sent[..] else { panic!("{sent:?}") };
    assert_eq!((from, to), (socket(FRONTEND), client));
    assert!(first.rst);
    assert_eq!((first.sequence, first.acknowledgement), (90_501, 7_101));
    assert_eq!((back_from, back_to), (client, socket(POD)));
    assert_eq!((second.sequence, second.acknowledgement), (7_101, 90_501));
    assert!(second.rst);
    assert_eq!(path.keep(), [], "once");
    assert_eq!((path.shared.ended().terminated, path.shared.ended().deadline), (1, 0));
}

/// From the change on, before the keeper comes round.
#[test]
fn not_a_byte_reaches_a_reused_address() {
    let mut path = Path::new(16);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, Condition::Ready)]);
    let client = talk(&mut path, CLIENT);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, TERMINATING)]);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 2, Condition::Ready)]);
    for round in 0..2 {
        let (from, to, packet, _) = path.send(segment(client, socket(FRONTEND), "A", 7_101, 90_501)).unwrap();
        assert_eq!((from, to), (socket(FRONTEND), client), "round {round}");
        assert!(is_reset(&packet));
        let (from, to, packet, _) = path.send(segment(socket(POD), client, "A", 90_501, 7_101)).unwrap();
        assert_eq!((from, to), (client, socket(POD)));
        assert!(is_reset(&packet), "a challenge is answered");
        assert!(path.tcp(CLIENT, FRONTEND, "R").is_none());
        assert_eq!(path.keep().len(), if round == 0 { 2 } else { 0 });
    }
    // The client's port is used again: a connection of its own, to the new Pod.
    path.connect(CLIENT, FRONTEND);
    assert_eq!(path.states(), ["established"]);
}

#[test]
fn an_endpoint_that_leaves_without_terminating_drains_until_its_deadline() {
    let mut path = Path::new(16);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, Condition::Ready)]);
    talk(&mut path, CLIENT);
    for back in [true, false] {
        path.serve_all(Protocol::Tcp, vec![]);
        assert_eq!(path.keep(), []);
        path.now_ms += 59_999;
        assert_eq!(path.keep(), []);
        assert_eq!(path.tcp(CLIENT, FRONTEND, "A").unwrap().1, socket(POD));
        assert!(is_reset(&path.tcp("10.244.0.9:2", FRONTEND, "S").unwrap().2), "nothing new");
        if back {
            path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, Condition::Ready)]);
        }
        path.now_ms += 1;
        assert_eq!(path.keep().len(), if back { 0 } else { 2 });
    }
    assert_eq!(path.shared.ended().deadline, 1);
}

#[test]
fn a_drain_by_hand_ends_at_its_deadline() {
    let mut path = Path::new(16);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, Condition::Ready)]);
    talk(&mut path, CLIENT);
    let deadline = Deadline::At(path.now_ms + 30_000);
    let drained = EndpointSpec { drain: Some(deadline), ..endpoint(POD, 1, Condition::Ready) };
    path.serve_all(Protocol::Tcp, vec![drained, endpoint(OTHER, 2, Condition::Ready)]);
    assert_eq!(path.tcp("10.244.0.9:2", FRONTEND, "S").unwrap().1, socket(OTHER));
    assert_eq!(path.keep(), []);
    path.now_ms += 30_000;
    assert_eq!(path.keep().len(), 2);
}

#[test]
fn half_open_connections_end_too_and_unanswered_ones_may_ask_again() {
    let mut path = Path::new(16);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, TERMINATING), endpoint(OTHER, 2, Condition::Ready)]);
    path.serve_all(Protocol::Tcp, vec![endpoint(OTHER, 2, TERMINATING), endpoint(POD, 1, Condition::Ready)]);
    path.send(segment(socket(CLIENT), socket(FRONTEND), "S", 7_000, 0)).unwrap();
    let answered = socket("10.244.0.9:2");
    path.send(segment(answered, socket(FRONTEND), "S", 8_000, 0)).unwrap();
    path.send(segment(socket(POD), answered, "SA", 90_000, 8_001)).unwrap();
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, TERMINATING)]);
    path.serve_all(Protocol::Tcp, vec![]);
    let sent = path.keep();
    assert_eq!(sent.len(), 2);
    for (_, to, tcp) in sent {
        let expected = if to == answered { (90_001, 8_001) } else { (8_001, 90_001) };
        assert!(tcp.rst && tcp.ack);
        assert_eq!((tcp.sequence, tcp.acknowledgement), expected, "to {to}");
    }
    path.serve_all(Protocol::Tcp, vec![endpoint(OTHER, 2, Condition::Ready)]);
    let again = path.send(segment(socket(CLIENT), socket(FRONTEND), "S", 7_000, 0)).unwrap();
    assert_eq!(again.1, socket(OTHER));
}

#[test]
fn datagrams_are_forgotten() {
    let mut path = Path::new(16);
    path.serve_all(Protocol::Udp, vec![endpoint(POD, 1, Condition::Ready)]);
    path.send(udp(CLIENT, FRONTEND)).unwrap();
    path.serve_all(Protocol::Udp, vec![endpoint(POD, 1, TERMINATING)]);
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, socket(POD), "it still serves");
    path.serve_all(Protocol::Udp, vec![endpoint(OTHER, 2, Condition::Ready)]);
    assert_eq!(path.keep(), []);
    assert_eq!(path.states(), [""; 0]);
    assert_eq!(path.shared.ended().forgotten, 1);
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, socket(OTHER));
}

/// What logs and metrics are made of.
#[test]
fn lives_are_told() {
    use std::time::Duration;

    use crate::table::LifeChange::{Became, Drained};
    let mut path = Path::new(16);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, Condition::Ready)]);
    let (_, slot) = path.builder.endpoints().next().unwrap();
    talk(&mut path, CLIENT);
    path.serve_all(Protocol::Tcp, vec![]);
    path.keep();
    assert_eq!(path.shared.slots.leaving(), [slot]);
    assert_eq!(path.shared.slots.drains_since(slot), Some(path.now_ms));
    assert_eq!(path.shared.slots.life(slot).unwrap().deadline(), Some(Deadline::At(path.now_ms + 60_000)));
    path.now_ms += 5_000;
    path.tcp(CLIENT, FRONTEND, "FA").unwrap();
    path.send(tcp(socket(POD), socket(CLIENT), "FA")).unwrap();
    path.keep();
    path.keep();
    let told: Vec<_> = path.shared.slots.take_events().into_iter().map(|event| (event.change, event.flows)).collect();
    let [(Became(ready), 0), (Became(left), 1), (Drained { after }, 0)] = told[..] else { panic!("{told:?}") };
    assert_eq!((ready.name(), left.name(), after), ("ready", "draining", Duration::from_secs(5)));
    assert_eq!(path.shared.slots.take_events(), []);
    // One that had no flows has none to lose: only its life is news.
    path.serve_all(Protocol::Tcp, vec![endpoint(OTHER, 2, TERMINATING)]);
    path.keep();
    path.keep();
    let told: Vec<_> = path.shared.slots.take_events().into_iter().map(|event| event.change.reason()).collect();
    assert_eq!(told, ["terminating"]);
}

#[test]
fn many_flows_end_in_bounded_rounds() {
    let mut path = Path::new(10_000);
    path.serve_all(Protocol::Tcp, vec![endpoint(POD, 1, TERMINATING), endpoint(OTHER, 2, Condition::Ready)]);
    for port in 1..=9_000 {
        let client = SocketAddr::from(([10, 244, 0, 9], port));
        let pod = path.send(tcp(client, socket(FRONTEND), "S")).unwrap().1;
        path.send(tcp(pod, client, "SA")).unwrap();
    }
    path.serve_all(Protocol::Tcp, vec![endpoint(OTHER, 2, TERMINATING)]);
    path.serve_all(Protocol::Tcp, vec![]);
    let (mut rounds, mut sent) = (1, 0);
    while path.keeper.round(path.now_ms, &mut |_| sent += 1) {
        rounds += 1;
    }
    assert_eq!((rounds, sent), (3, 18_000));
}
