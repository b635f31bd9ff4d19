//! A node in a network namespace of the calling thread's own.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use sluice_dataplane::net::Protocol;
use sluice_dataplane::packet_path::{PacketPath, Settings, Shared, Tun};
use sluice_dataplane::table::{
    Balancing, Condition, EndpointSpec, NodeSpec, PortSpec, ServiceName, ServiceSpec, TableBuilder, Uid,
};

pub(crate) const VIPS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
pub(crate) const PODS: [&str; 2] = ["10.244.1.1", "fd00:244::1"];
const NODES: [&str; 2] = ["192.168.99.1", "fd00:99::1"];
const QUEUES: usize = 2;

/// Moves the calling thread into a namespace of its own. Not without the privilege.
pub(crate) fn enter() -> bool {
    let able = std::path::Path::new("/dev/net/tun").exists() && unshare(CloneFlags::CLONE_NEWNET).is_ok();
    if !able {
        eprintln!("not tested: needs CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun");
        return false;
    }
    ip("link set lo up");
    for pod in PODS {
        ip(&format!("addr add {pod} dev lo"));
    }
    // An endpoint that never answers, and one that cannot be reached.
    ip("route add blackhole 10.244.9.0/24");
    ip("route add unreachable 10.244.8.0/24");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    true
}

/// Brings what is for us to the link. Masqueraded sources are routed there too, so no rule is needed.
pub(crate) fn route_to_link() {
    ip("link set sluice0 up");
    for [vip, node] in [[VIPS[0], NODES[0]], [VIPS[1], NODES[1]]] {
        ip(&format!("route add {vip} dev sluice0"));
        ip(&format!("route add {node} dev sluice0"));
    }
}

pub(crate) fn open_tun() -> Tun {
    Tun::open("sluice0", QUEUES).unwrap()
}

pub(crate) fn settings() -> Settings {
    Settings {
        workers: QUEUES,
        flow_capacity: 4096,
        masquerade_addresses: NODES.map(|node| node.parse().unwrap()).to_vec(),
        seed: 1,
        ..Settings::default()
    }
}

/// The packet path, in this process.
pub(crate) struct Lab {
    pub(crate) shared: Arc<Shared>,
    pub(crate) builder: TableBuilder,
    path: Option<PacketPath>,
}

impl Lab {
    /// Nothing without the privilege to make one.
    pub(crate) fn new() -> Option<Self> {
        if !enter() {
            return None;
        }
        let (tun, mut lab) = (open_tun(), Self::over(Shared::new(settings())));
        route_to_link();
        lab.start(tun);
        Some(lab)
    }

    pub(crate) fn over(shared: Arc<Shared>) -> Self {
        let mut builder = TableBuilder::new(Arc::clone(&shared.slots));
        builder.set_node(NodeSpec { masquerade_all: true, ..NodeSpec::default() });
        Self { shared, builder, path: None }
    }

    pub(crate) fn start(&mut self, tun: Tun) {
        self.path = Some(PacketPath::start(tun, Arc::clone(&self.shared)).unwrap());
    }

    pub(crate) fn is_running(&self) -> bool {
        self.path.as_ref().is_some_and(PacketPath::is_running)
    }

    /// Serves port 80 of `vip` on these endpoints.
    pub(crate) fn serve(&mut self, vip: &str, endpoints: &[EndpointSpec]) {
        let cluster_ip = SocketAddr::new(vip.parse().unwrap(), 80);
        let port = PortSpec {
            balancing: Balancing::RoundRobin,
            ..PortSpec::plain(Protocol::Tcp, cluster_ip, endpoints.to_vec())
        };
        self.builder.set(ServiceSpec { name: ServiceName::new("ns", vip), created: None, ports: vec![port] });
        self.shared.publish(self.builder.build());
    }

    /// What a Pod that ends looks like: terminating, then not there.
    pub(crate) fn end(&mut self, vip: &str, endpoint: EndpointSpec) -> Instant {
        self.serve(vip, &[EndpointSpec { condition: Condition::Terminating { serving: true }, ..endpoint }]);
        self.serve(vip, &[]);
        Instant::now()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            path.stop();
        }
    }
}

pub(crate) fn ip(arguments: &str) {
    let family = if arguments.contains("fd00:") { "-6" } else { "-4" };
    let output = Command::new("ip").arg(family).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn endpoint(address: SocketAddr) -> EndpointSpec {
    EndpointSpec { uid: Uid::of("pod-1"), ..EndpointSpec::ready(address) }
}

pub(crate) fn connect(vip: &str) -> TcpStream {
    let stream = TcpStream::connect_timeout(&at(vip, 80), Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

pub(crate) fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}
