//! Where is one peer measured: namespaces of its own, so that no peer's rules or threads are in another's way.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use sluice_bench::netns::NetNs;
use sluice_bench::plain_server::PlainServer;
use sluice_bench::serve::listen_tcp;
use sluice_bench::topology::{Pod, Topology, TopologyConfig};

use super::Mode;

/// TCP port of every Pod.
pub(super) const POD_PORT: u16 = 8080;
/// Addresses of Pods.
pub(super) const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// Where the Service is dialled inside the cluster.
pub(super) const CLUSTER_IP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);
/// Where the Service is dialled on the node.
pub(super) const NODE_PORT: u16 = 30010;

/// A node, Pods that serve, and the clients of both modes.
pub(super) struct Lab {
    pub(super) topology: Topology,
    client_pod: Pod,
    pods: Vec<Pod>,
    _servers: Vec<PlainServer>,
}

impl Lab {
    pub(super) fn new(pods: u8) -> Result<Self> {
        let topology = Topology::new(TopologyConfig::default())?;
        // A proxy on the node dials Pods from here; above are the ports that Sluice masquerades with.
        topology.node.sysctl("net.ipv4.ip_local_port_range", "10000 60999")?;
        topology.node.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        let pod = |name: &str, host| topology.add_pod(name, &[Ipv4Addr::new(10, 244, 0, host).into()]);
        let client_pod = pod("client", 250)?;
        let pods: Vec<Pod> = (1..=pods).map(|number| pod(&format!("web-{number}"), number)).collect::<Result<_>>()?;
        let serve = |pod: &Pod| PlainServer::start(pod.ns.run(|| listen_tcp(POD_PORT))?, 1);
        let servers = pods.iter().map(serve).collect::<Result<_>>()?;
        Ok(Self { topology, client_pod, pods, _servers: servers })
    }

    /// From where the load comes.
    pub(super) fn client(&self, mode: Mode) -> &NetNs {
        match mode {
            Mode::Masquerade => &self.topology.client,
            Mode::Preserve => &self.client_pod.ns,
        }
    }

    /// The Pods' addresses and ports.
    pub(super) fn endpoints(&self) -> Vec<SocketAddr> {
        self.pods.iter().flat_map(|pod| &pod.addresses).map(|address| SocketAddr::new(*address, POD_PORT)).collect()
    }

    /// The node's address.
    pub(super) fn node_address(&self) -> IpAddr {
        self.topology.node_address(true).expect("the default topology has IPv4")
    }

    /// Where a client of this mode dials the Service.
    pub(super) fn service(&self, mode: Mode) -> SocketAddr {
        match mode {
            Mode::Masquerade => self.node_port(),
            Mode::Preserve => CLUSTER_IP,
        }
    }

    /// The node port of the Service.
    pub(super) fn node_port(&self) -> SocketAddr {
        SocketAddr::new(self.node_address(), NODE_PORT)
    }

    /// Conntrack of the node forgets finished connections soon, so that long runs do not fill it. Does nothing as long as
    /// no rule of the node needs conntrack.
    pub(super) fn forget_finished_connections(&self) {
        let name = "net.netfilter.nf_conntrack_tcp_timeout_time_wait";
        // The parameter is there only where conntrack is.
        drop(self.topology.node.sysctl(name, "10"));
    }
}
