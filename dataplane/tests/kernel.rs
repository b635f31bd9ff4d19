//! The packet path against the kernel's own sockets: a namespace with a TUN link, clients and endpoints in it.
#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "the tests measure time")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use sluice_dataplane::net::{Family, Protocol};
use sluice_dataplane::packet_path::{PacketPath, Settings, Shared, Tun};
use sluice_dataplane::table::{
    Balancing, Condition, EndpointList, EndpointSpec, NodeSpec, PortSpec, ServiceName, ServiceSpec, TableBuilder, Uid,
};

const VIPS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const PODS: [&str; 2] = ["10.244.1.1", "fd00:244::1"];
const NODES: [&str; 2] = ["192.168.99.1", "fd00:99::1"];

/// A node in a namespace of the calling thread's own. Masqueraded sources are routed to the TUN, so no rule is needed.
struct Lab {
    shared: Arc<Shared>,
    builder: TableBuilder,
    path: Option<PacketPath>,
}

impl Lab {
    /// Nothing without the privilege to make one.
    fn new() -> Option<Self> {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("not tested: needs CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun");
            return None;
        }
        ip("link set lo up");
        for pod in PODS {
            ip(&format!("addr add {pod} dev lo"));
        }
        // An endpoint that never answers.
        ip("route add blackhole 10.244.9.0/24");
        ip("route add unreachable 10.244.8.0/24");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let settings = Settings {
            workers: 2,
            flow_capacity: 4096,
            masquerade_addresses: NODES.map(|node| node.parse().unwrap()).to_vec(),
            masquerade_ports: 61000..=65534,
            seed: 1,
            ..Settings::default()
        };
        let shared = Shared::new(settings);
        let mut builder = TableBuilder::new(Arc::clone(&shared.slots));
        builder.set_node(NodeSpec { masquerade_all: true, ..NodeSpec::default() });
        let tun = Tun::open("sluice0", 2).unwrap();
        ip("link set sluice0 up");
        for [vip, node] in [[VIPS[0], NODES[0]], [VIPS[1], NODES[1]]] {
            ip(&format!("route add {vip} dev sluice0"));
            ip(&format!("route add {node} dev sluice0"));
        }
        let path = PacketPath::start(tun, Arc::clone(&shared)).unwrap();
        Some(Self { shared, builder, path: Some(path) })
    }

    /// Serves port 80 of `vip` on these endpoints.
    fn serve(&mut self, vip: &str, endpoints: &[EndpointSpec]) {
        let cluster_ip: IpAddr = vip.parse().unwrap();
        let ready = endpoints.iter().filter(|endpoint| endpoint.condition == Condition::Ready);
        let list = EndpointList { addresses: ready.map(|endpoint| endpoint.address).collect(), why: String::new() };
        let port = PortSpec {
            name: String::new(),
            protocol: Protocol::Tcp,
            number: 80,
            family: Family::of(cluster_ip),
            cluster_ip,
            node_port: None,
            load_balancer_ips: Vec::new(),
            external_ips: Vec::new(),
            source_ranges: Vec::new(),
            source_ranges_admit_vips: false,
            internal_policy: Default::default(),
            external_policy: Default::default(),
            affinity: None,
            balancing: Balancing::RoundRobin,
            has_any_endpoint: !list.addresses.is_empty(),
            cluster: list,
            local: EndpointList::default(),
            endpoints: endpoints.to_vec(),
            retry: true,
            drain_timeout: Default::default(),
        };
        self.builder.set(ServiceSpec { name: ServiceName::new("ns", vip), created: None, ports: vec![port] });
        self.shared.publish(self.builder.build());
    }

    /// What a Pod that ends looks like: terminating, then not there.
    fn end(&mut self, vip: &str, endpoint: EndpointSpec) -> Instant {
        self.serve(vip, &[EndpointSpec { condition: Condition::Terminating { serving: true }, ..endpoint }]);
        self.serve(vip, &[]);
        Instant::now()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.path.take().expect("taken only here").stop();
    }
}

fn ip(arguments: &str) {
    let family = if arguments.contains("fd00:") { "-6" } else { "-4" };
    let output = Command::new("ip").arg(family).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn endpoint(address: SocketAddr) -> EndpointSpec {
    EndpointSpec { uid: Uid::of("pod-1"), ..EndpointSpec::ready(address) }
}

fn connect(vip: &str) -> TcpStream {
    let stream = TcpStream::connect_timeout(&format_socket(vip, 80), Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

fn format_socket(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Reads until the end, which must be a reset, and says how long after `since` it came.
fn reset_after(stream: &mut TcpStream, since: Instant) -> Duration {
    let error = loop {
        match stream.read(&mut [0; 65536]) {
            Ok(0) => panic!("an orderly end"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    since.elapsed()
}

#[test]
fn both_ends_learn_at_once_that_an_endpoint_is_gone() {
    let Some(mut lab) = Lab::new() else { return };
    for (vip, pod) in VIPS.into_iter().zip(PODS) {
        let listener = TcpListener::bind(format_socket(pod, 0)).unwrap();
        let endpoint = endpoint(listener.local_addr().unwrap());
        lab.serve(vip, &[endpoint]);
        // Who has ever sent something: nobody, the client, the endpoint, both; and one that sends without a pause.
        let (mut ends, mut busy) = (Vec::new(), Vec::new());
        for case in 0..5 {
            let (mut client, mut server) = (connect(vip), listener.accept().unwrap().0);
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            if case == 1 || case == 3 {
                client.write_all(b"question").unwrap();
                server.read_exact(&mut [0; 8]).unwrap();
            }
            if case == 2 || case == 3 {
                server.write_all(b"answer").unwrap();
                client.read_exact(&mut [0; 6]).unwrap();
            }
            if case == 4 {
                // Its error is told once, to whoever asks first.
                let mut sender = server.try_clone().unwrap();
                busy.push(std::thread::spawn(move || {
                    loop {
                        if let Err(error) = sender.write_all(&[7; 100_000]) {
                            break (error.kind(), Instant::now());
                        }
                    }
                }));
                client.read_exact(&mut [0; 1_000_000]).unwrap();
            }
            ends.push((client, (case != 4).then_some(server)));
        }
        std::thread::sleep(Duration::from_millis(300));
        let since = lab.end(vip, endpoint);
        let mut slowest = Duration::ZERO;
        for (client, server) in &mut ends {
            slowest = slowest.max(reset_after(client, since));
            if let Some(server) = server {
                slowest = slowest.max(reset_after(server, since));
            }
        }
        for thread in busy {
            let (error, at) = thread.join().unwrap();
            assert_eq!(error, ErrorKind::ConnectionReset);
            slowest = slowest.max(at - since);
        }
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
        eprintln!("{vip}: all reset within {slowest:?}");
    }
    // Packet threads answer at once; the keeper, who counts, comes round some milliseconds later.
    let since = Instant::now();
    while lab.shared.ended().terminated < 10 && since.elapsed() < Duration::from_secs(1) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(lab.shared.ended().terminated, 10);
}

#[test]
fn a_client_that_waits_for_an_answer_learns_it_too() {
    let Some(mut lab) = Lab::new() else { return };
    let endpoint = endpoint("10.244.9.9:80".parse().unwrap());
    lab.serve(VIPS[0], &[endpoint]);
    let target = format_socket(VIPS[0], 80);
    let client = std::thread::spawn(move || TcpStream::connect_timeout(&target, Duration::from_secs(5)));
    std::thread::sleep(Duration::from_millis(100));
    let since = lab.end(VIPS[0], endpoint);
    let error = client.join().unwrap().expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
}

/// Two of three endpoints do not take connections; the third does. Nobody notices, but for the one that must be waited for.
#[test]
fn new_connections_find_the_endpoint_that_takes_them() {
    let Some(mut lab) = Lab::new() else { return };
    let listener = TcpListener::bind(format_socket(PODS[0], 0)).unwrap();
    let good = EndpointSpec::ready(listener.local_addr().unwrap());
    let cases = [("10.244.1.1:9", 0, 100), ("10.244.8.8:80", 1, 100), ("10.244.9.9:80", 2, 2_000)];
    for (bad, failure, most_ms) in cases {
        lab.serve(VIPS[0], &[EndpointSpec::ready(bad.parse().unwrap()), good]);
        let slot = lab.builder.port_slot(&ServiceName::new("ns", VIPS[0]), "", Protocol::Tcp).unwrap();
        let before = lab.shared.slots.port_totals(slot);
        for _ in 0..2 {
            let since = Instant::now();
            let mut client = connect(VIPS[0]);
            let took = since.elapsed();
            assert!(took < Duration::from_millis(most_ms), "{bad}: {took:?}");
            client.write_all(b"question").unwrap();
            listener.accept().unwrap().0.read_exact(&mut [0; 8]).unwrap();
        }
        let totals = lab.shared.slots.port_totals(slot);
        let moved = totals.retried - before.retried;
        assert!((1..=2).contains(&moved), "{bad}: {moved}");
        assert_eq!(totals.failed[failure], moved, "{bad}");
    }
}
