//! Datagrams longer than a link takes, which come and go in pieces.
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::json;
use sluice_bench::netns::NetNs;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::SOON;
use sluice_tests::lab::{Lab, PORT, cluster_ip, endpoint, node_port, pod_address, service, slices};
use sluice_tests::probe::Background;

const ECHO: u16 = 9292;
const WAIT: Duration = Duration::from_millis(500);

/// Sends back what comes.
fn echo(ns: &NetNs, address: IpAddr) -> Background {
    let socket = ns.run(|| Ok(UdpSocket::bind((address, ECHO))?)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    Background::start(move || {
        let mut datagram = [0; 65_536];
        if let Ok((length, from)) = socket.recv_from(&mut datagram) {
            drop(socket.send_to(&datagram[..length], from));
        }
    })
    .unwrap()
}

/// Whether the datagram came back whole, in time. What is lost is sent again.
fn comes_back(to: SocketAddr, length: usize) -> anyhow::Result<bool> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    let sent: Vec<u8> = (0..length).map(|at| (at * 31 / 7) as u8).collect();
    let mut found = [0; 65_536];
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        socket.send(&sent)?;
        match socket.recv(&mut found) {
            Ok(length) => return Ok(found[..length] == sent),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

#[test]
fn long_datagrams_come_and_go_whole() {
    if !can_run_in_namespaces("datagrams in pieces") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let objects = [vec![service(1, "web", json!({}))], slices("web", ECHO, &[endpoint(1, json!({}))])].concat();
    lab.cluster.write("web.json", &objects).unwrap();
    lab.cluster.start().unwrap();
    for v4 in [true, false] {
        let _echo = echo(lab.pod(1), pod_address(1, v4));
        let node = lab.cluster.topology.node_address(v4).unwrap();
        for to in [SocketAddr::new(cluster_ip(1, v4), PORT), SocketAddr::new(node, node_port(1))] {
            // With its own address from a Pod to a ClusterIP, masqueraded otherwise.
            for client in ["pod", "node", "outside"] {
                for length in [1400, 2000, 9000, 60_000] {
                    let whole = lab.client(client).unwrap().run(|| comes_back(to, length)).unwrap();
                    assert!(whole, "{client} to {to}: {length} bytes\n{}", lab.cluster.admin("/metrics").unwrap());
                }
            }
        }
    }
}
