//! What lasts longer than a packet: UDP conversations and ClientIP affinity, when endpoints come and go. And pings.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use serde_json::{Value, json};
use sluice_bench::client::Failure;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::SOON;
use sluice_tests::lab::{
    ENDPOINT, Lab, PORT, cluster_ip, endpoint, external, load_balancer, node_port, pod_address, service, slices,
};
use sluice_tests::probe::{Conversation, Datagrams, Protocol, ask};
use socket2::{Domain, Socket, Type};

/// Endpoints of this file's own: their datagrams are counted.
const COUNTED: u16 = 9090;

/// Publishes the Service `web`, and beside it another that differs each time: so there is always a new table to wait for.
fn publish(lab: &Lab, port: u16, spec: Value, pods: &[u8]) {
    static NEXT: AtomicU8 = AtomicU8::new(100);
    let endpoints: Vec<_> = pods.iter().map(|pod| endpoint(*pod, json!({}))).collect();
    let beside = service(NEXT.fetch_add(1, Relaxed), "beside", json!({}));
    let objects = [vec![service(1, "web", spec), beside], slices("web", port, &endpoints)].concat();
    lab.cluster.write("web.json", &objects).unwrap();
}

/// Publishes and waits until it is in force.
fn change(lab: &Lab, port: u16, spec: Value, pods: &[u8]) {
    let generation = lab.cluster.generation().unwrap();
    publish(lab, port, spec, pods);
    lab.cluster.wait_for_table_after(generation).unwrap();
}

#[test]
fn a_udp_conversation_keeps_its_endpoint_and_leaves_one_that_is_gone() {
    if !can_run_in_namespaces("UDP conversations") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    // Conversations of one round are still open in the next: by their number, its endpoints would be left out.
    lab.cluster.configure("localControllers: false\nbalancing: round-robin\n").unwrap();
    publish(&lab, COUNTED, json!({}), &[1, 2, 3]);
    lab.cluster.start().unwrap();
    for v4 in [true, false] {
        // Masqueraded from outside, with its own address from a Pod.
        for client in ["outside", "pod"] {
            change(&lab, COUNTED, json!({}), &[1, 2, 3]);
            let serve = |pod: u8| {
                Datagrams::start(lab.pod(pod), &pod.to_string(), SocketAddr::new(pod_address(pod, v4), COUNTED))
                    .unwrap()
            };
            let servers = [1, 2, 3].map(serve);
            let to = SocketAddr::new(cluster_ip(1, v4), PORT);
            let open = || Ok(Conversation::new(to)?);
            let conversations: Vec<Conversation> =
                (0..12).map(|_| lab.client(client).unwrap().run(open).unwrap()).collect();
            let ask_all = || -> Vec<String> { conversations.iter().map(|it| it.ask(SOON).unwrap().by).collect() };
            let first = ask_all();
            assert_eq!(BTreeSet::from_iter(&first).len(), 3, "{client} {to}: {first:?}");
            (0..5).for_each(|_| assert_eq!(ask_all(), first, "{client} {to}"));

            change(&lab, COUNTED, json!({}), &[2, 3]);
            let before = servers[0].received();
            let moved = ask_all();
            for (now, was) in moved.iter().zip(&first) {
                assert!(if was == "1" { now != "1" } else { now == was }, "{client} {to}: {first:?}, then {moved:?}");
            }
            assert_eq!(ask_all(), moved, "{client} {to}");
            assert_eq!(servers[0].received(), before, "{client} {to}: not one more to the endpoint that is gone");

            // Nobody is left: refused, and served again when somebody comes back.
            change(&lab, COUNTED, json!({}), &[]);
            for conversation in &conversations {
                assert_eq!(conversation.ask(SOON).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{client} {to}");
            }
            change(&lab, COUNTED, json!({}), &[1]);
            assert!(ask_all().iter().all(|by| by == "1"), "{client} {to}");
        }
    }
}

#[test]
fn client_ip_affinity_holds_on_every_frontend_until_its_endpoint_is_gone() {
    if !can_run_in_namespaces("ClientIP affinity") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let sticky = || json!({"sessionAffinity": "ClientIP"});
    publish(&lab, ENDPOINT, sticky(), &[1, 2, 3, 4]);
    lab.cluster.start().unwrap();
    for v4 in [true, false] {
        let frontends = [
            SocketAddr::new(cluster_ip(1, v4), PORT),
            SocketAddr::new(lab.cluster.topology.node_address(v4).unwrap(), node_port(1)),
            SocketAddr::new(load_balancer(1, v4), PORT),
            SocketAddr::new(external(1, v4), PORT),
        ];
        // Each Service port has an affinity of its own.
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            for client in ["outside", "pod"] {
                change(&lab, ENDPOINT, sticky(), &[1, 2, 3, 4]);
                let all = || -> BTreeSet<String> {
                    let ask_each = |to: &SocketAddr| {
                        let ask_once = || ask(protocol, *to, SOON).map_err(|it| anyhow::anyhow!("{to}: {it}"));
                        lab.client(client).unwrap().run(ask_once).unwrap().by
                    };
                    (0..3).flat_map(|_| frontends.iter().map(ask_each)).collect()
                };
                let first = all();
                assert_eq!(first.len(), 1, "{client} {protocol}: one endpoint for all connections: {first:?}");
                let gone: u8 = first.first().unwrap().parse().unwrap();
                let rest: Vec<u8> = (1..=4).filter(|pod| *pod != gone).collect();
                change(&lab, ENDPOINT, sticky(), &rest);
                let second = all();
                assert_eq!(second.len(), 1, "{client} {protocol}: one other endpoint: {second:?}");
                assert_ne!(second, first, "{client} {protocol}: it is gone");
                change(&lab, ENDPOINT, sticky(), &[1, 2, 3, 4]);
                assert_eq!(all(), second, "{client} {protocol}: what came back is not remembered");
            }
        }
    }
}

#[test]
fn a_ping_to_a_cluster_ip_is_refused_and_to_a_free_address_nothing() {
    if !can_run_in_namespaces("pings to Service addresses") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    publish(&lab, ENDPOINT, json!({}), &[1]);
    lab.cluster.start().unwrap();
    for client in ["pod", "node", "outside"] {
        for v4 in [true, false] {
            let ping = |number, wait| lab.client(client).unwrap().run(|| Ok(ping(cluster_ip(number, v4), wait)));
            assert_eq!(ping(1, SOON).unwrap(), Err(Failure::Refused), "{client} v4 {v4}");
            assert_eq!(ping(250, Duration::from_millis(300)).unwrap(), Err(Failure::Timeout), "{client} v4 {v4}");
        }
    }
    let dropped = lab.cluster.metric("sluice_drops_total{reason=\"rule\"").unwrap();
    assert!(dropped >= 6.0, "{dropped} pings dropped");
}

/// Sends one echo request and waits for what comes back: an echo reply, or an ICMP error about it.
fn ping(to: std::net::IpAddr, wait: Duration) -> Result<(), Failure> {
    let v4 = to.is_ipv4();
    let (domain, protocol, echo) = if v4 { (Domain::IPV4, 1, 8) } else { (Domain::IPV6, 58, 128) };
    let socket = Socket::new(domain, Type::RAW, Some(protocol.into()))?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(wait))?;
    // Identifier 0x1234, number 1; the kernel fills in the checksum of ICMPv6 only.
    let mut request = [echo, 0, 0, 0, 0x12, 0x34, 0, 1];
    if v4 {
        request[2..4].copy_from_slice(&(!0x1a35_u16).to_be_bytes());
    }
    socket.send(&request)?;
    loop {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer)?;
        let icmp = &buffer[if v4 { 20 } else { 0 }..length];
        match (v4, icmp[0], icmp[1]) {
            (true, 3, 3) | (false, 1, 4) => return Err(Failure::Refused),
            (true, 0, _) | (false, 129, _) => return Ok(()),
            _ => {}
        }
    }
}
