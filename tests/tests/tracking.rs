//! What the host's connection tracking thinks of packets of ours: flows do not depend on it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use etherparse::TcpHeader;
use nix::sys::signal::Signal;
use serde_json::json;
use sluice_bench::client::Connection;
use sluice_bench::netns::NetNs;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::lab::{CLIENT_POD, ENDPOINT, Lab, PORT, cluster_ip, endpoint, pod_address, service, slices};
use socket2::{Domain, Protocol, Socket, Type};

/// Whatever the numbers of a connection are, some of these are far ahead of its window.
const SEQUENCES: [u32; 4] = [0, 1 << 30, 1 << 31, 3 << 30];

fn raw(ns: &NetNs, address: IpAddr) -> UdpSocket {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = || {
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
        socket.bind(&SocketAddr::new(address, 0).into())?;
        Ok(UdpSocket::from(socket))
    };
    ns.run(socket).unwrap()
}

/// A data segment; the payload tells it from others.
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32) -> Vec<u8> {
    let payload = marker(sequence);
    let mut header = TcpHeader::new(from.port(), to.port(), sequence, 1024);
    (header.ack, header.acknowledgment_number) = (true, sequence);
    header.checksum = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => header.calc_checksum_ipv4_raw(from.octets(), to.octets(), &payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => header.calc_checksum_ipv6_raw(from.octets(), to.octets(), &payload),
        families => panic!("{families:?}"),
    }
    .unwrap();
    [header.to_bytes().as_slice(), &payload].concat()
}

fn marker(sequence: u32) -> [u8; 8] {
    (u64::from(sequence) << 32 | 0x0bad_5e90).to_be_bytes()
}

/// Who sent the marked segments that arrive here.
fn senders(socket: &UdpSocket) -> BTreeMap<u32, IpAddr> {
    let mut senders = BTreeMap::new();
    let deadline = Instant::now() + SOON;
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    while senders.len() < SEQUENCES.len() && Instant::now() < deadline {
        let mut bytes = [0; 2048];
        let Ok((length, from)) = socket.recv_from(&mut bytes) else { continue };
        let is_marked = |sequence: &u32| bytes[..length].ends_with(&marker(*sequence));
        SEQUENCES.into_iter().find(is_marked).map(|sequence| senders.insert(sequence, from.ip()));
    }
    senders
}

#[test]
fn segments_outside_the_window_come_to_the_client_from_the_address_it_dialled() {
    if !can_run_in_namespaces("segments that connection tracking cannot place") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let objects = [vec![service(1, "web", json!({}))], slices("web", ENDPOINT, &[endpoint(1, json!({}))])].concat();
    lab.cluster.write("web.json", &objects).unwrap();
    lab.cluster.start().unwrap();
    for v4 in [true, false] {
        let (client, to) = (pod_address(CLIENT_POD, v4), SocketAddr::new(cluster_ip(1, v4), PORT));
        let open = || Connection::open(to, SOON).map_err(anyhow::Error::msg);
        let mut connection = lab.pod(CLIENT_POD).run(open).unwrap();
        assert_eq!(connection.get("/").unwrap(), "1");
        let own = connection.local_address().unwrap();
        assert_eq!(own.ip(), client, "a Pod keeps its address: only such flows are tracked");
        let arriving = raw(lab.pod(CLIENT_POD), client);
        let server = SocketAddr::new(pod_address(1, v4), ENDPOINT);
        let injecting = raw(lab.pod(1), server.ip());
        for sequence in SEQUENCES {
            injecting.send_to(&segment(server, own, sequence), SocketAddr::new(client, 0)).unwrap();
        }
        let expected = SEQUENCES.map(|sequence| (sequence, to.ip()));
        assert_eq!(senders(&arriving), BTreeMap::from(expected), "{to}");
        assert_eq!(connection.get("/").unwrap(), "1", "the connection goes on");
    }
}

#[test]
fn tracking_remembers_connections_as_long_as_we_do_while_we_run() {
    if !can_run_in_namespaces("timeouts of connection tracking") {
        return;
    }
    let mut cluster = Cluster::with_web(1).unwrap();
    let path = |name: &str| format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}");
    let node = cluster.topology.node.clone();
    let now = |name| node.run(|| Ok(fs::read_to_string(path(name))?)).unwrap().trim().parse::<u32>().unwrap();
    let set = |name, seconds: u32| node.run(|| Ok(fs::write(path(name), seconds.to_string())?)).unwrap();
    let kernels = now("established");
    assert_eq!(now("close_wait"), 3600, "half-closed flows may be silent so long");
    assert!(kernels > 24 * 3600, "what is long enough stays");
    cluster.stop(Signal::SIGTERM).unwrap();
    assert_eq!((now("close_wait"), now("established")), (60, kernels), "what it was");

    // Killed and started again it still knows what was there before, and what an administrator set meanwhile stays.
    set("close_wait", 77);
    cluster.start().unwrap();
    cluster.stop(Signal::SIGKILL).unwrap();
    cluster.start().unwrap();
    assert_eq!(now("close_wait"), 3600);
    cluster.stop(Signal::SIGTERM).unwrap();
    assert_eq!(now("close_wait"), 77);
    cluster.start().unwrap();
    set("close_wait", 7200);
    cluster.stop(Signal::SIGTERM).unwrap();
    assert_eq!(now("close_wait"), 7200);
}
