//! Where is measured: namespaces of its own for each peer, so that no peer's rules or threads are in another's way.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Result, ensure};
use ipnet::{IpNet, Ipv4Net};
use serde::Serialize;
use sluice_bench::netns::{NetNs, is_privileged};
use sluice_bench::plain_server::PlainServer;
use sluice_bench::serve::listen_tcp;
use sluice_bench::topology::{Pod, Topology, TopologyConfig};

/// Which client dials what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// An outside client, the node port.
    Masquerade,
    /// A client in a Pod, the ClusterIP.
    Preserve,
}

impl Mode {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Masquerade => "masquerade (client outside, node port)",
            Self::Preserve => "preserve (client in a Pod, ClusterIP)",
        }
    }
}

/// TCP port of every Pod.
pub(crate) const POD_PORT: u16 = 8080;
/// Addresses of Pods.
pub(crate) const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// Addresses of each client: more than Pods, so that the ports to one target are no more scarce than those to all Pods.
const SOURCES: u8 = 4;
/// First address of the client in a Pod.
const CLIENT_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 250);
/// Where the Service is dialled inside the cluster.
pub(crate) const CLUSTER_IP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);
/// Where the Service is dialled on the node.
pub(crate) const NODE_PORT: u16 = 30010;

/// The environment lacks something.
#[derive(Debug)]
pub(crate) struct Lacking(pub(crate) Cow<'static, str>);

impl std::fmt::Display for Lacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Lacking {}

/// A node, Pods that serve, and the clients of both modes.
pub(crate) struct Lab {
    pub(crate) topology: Topology,
    client_pod: Pod,
    pub(crate) pods: Vec<Pod>,
    servers: Vec<PlainServer>,
}

impl Lab {
    /// With Pods that serve.
    pub(crate) fn new(pods: u8) -> Result<Self> {
        let mut lab = Self::bare()?;
        for number in 1..=pods {
            let pod = lab.add_pod(number)?;
            lab.servers.push(PlainServer::start(pod.ns.run(|| listen_tcp(POD_PORT))?, 1)?);
            lab.pods.push(pod);
        }
        Ok(lab)
    }

    /// Without any Pod but the client.
    pub(crate) fn bare() -> Result<Self> {
        ensure!(
            is_privileged(),
            Lacking("it makes network namespaces: it needs CAP_SYS_ADMIN and CAP_NET_ADMIN (root)".into())
        );
        let mut config = TopologyConfig::default();
        let more = (1..SOURCES).map(|number| Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 50, 2 + number), 24));
        config.client.extend(more.map(IpNet::from));
        let topology = Topology::new(config)?;
        // A proxy on the node dials Pods from here; above are the ports that Sluice masquerades with.
        topology.node.sysctl("net.ipv4.ip_local_port_range", "10000 60999")?;
        topology.node.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        let [a, b, c, d] = CLIENT_POD.octets();
        let addresses: Vec<IpAddr> = (0..SOURCES).map(|number| Ipv4Addr::new(a, b, c, d + number).into()).collect();
        let client_pod = topology.add_pod("client", &addresses)?;
        Ok(Self { topology, client_pod, pods: Vec::new(), servers: Vec::new() })
    }

    /// A Pod in which nothing serves yet.
    pub(crate) fn add_pod(&self, number: u8) -> Result<Pod> {
        self.topology.add_pod(&format!("web-{number}"), &[Ipv4Addr::new(10, 244, 0, number).into()])
    }

    /// From where the load comes.
    pub(crate) fn client(&self, mode: Mode) -> &NetNs {
        match mode {
            Mode::Masquerade => &self.topology.client,
            Mode::Preserve => &self.client_pod.ns,
        }
    }

    /// The addresses of that client.
    pub(crate) fn sources(&self, mode: Mode) -> Vec<IpAddr> {
        match mode {
            Mode::Masquerade => self.topology.config.client.iter().map(IpNet::addr).filter(IpAddr::is_ipv4).collect(),
            Mode::Preserve => self.client_pod.addresses.clone(),
        }
    }

    /// The client in a Pod.
    pub(crate) fn client_pod(&self) -> &NetNs {
        &self.client_pod.ns
    }

    /// Address of the client in a Pod.
    pub(crate) fn client_address(&self) -> IpAddr {
        CLIENT_POD.into()
    }

    /// The Pods' addresses and ports.
    pub(crate) fn endpoints(&self) -> Vec<SocketAddr> {
        self.pods.iter().flat_map(|pod| &pod.addresses).map(|address| SocketAddr::new(*address, POD_PORT)).collect()
    }

    /// The node's address.
    pub(crate) fn node_address(&self) -> IpAddr {
        self.topology.node_address(true).expect("the default topology has IPv4")
    }

    /// Where a client of this mode dials the Service.
    pub(crate) fn service(&self, mode: Mode) -> SocketAddr {
        match mode {
            Mode::Masquerade => self.node_port(),
            Mode::Preserve => CLUSTER_IP,
        }
    }

    /// The node port of the Service.
    pub(crate) fn node_port(&self) -> SocketAddr {
        SocketAddr::new(self.node_address(), NODE_PORT)
    }

    /// Conntrack of the node forgets finished connections soon, so that long runs do not fill it. Does nothing as long as
    /// no rule of the node needs conntrack.
    pub(crate) fn forget_finished_connections(&self) {
        let name = "net.netfilter.nf_conntrack_tcp_timeout_time_wait";
        // The parameter is there only where conntrack is.
        drop(self.topology.node.sysctl(name, "10"));
    }
}
