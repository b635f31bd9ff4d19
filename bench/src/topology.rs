//! Which machines are played: one node with Pods behind it and a client outside, each in a namespace of its own.
//!
//! ```text
//!  client eth0 ───── eth0 node pod1 ───── eth0 Pod
//!                              pod2 ───── eth0 Pod
//! ```
//! There is no bridge: every Pod is routed by the node (as Calico does it), so that every packet between any two of them,
//! replies included, passes the node's IP layer. A Pod's router is an address that exists nowhere, known to it as a
//! neighbour.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::link::{self, LinkConfig, Mac, Route};
use crate::netns::{NetNs, has_ipv6};

/// The router that every Pod sees, by family.
const POD_ROUTERS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1)), IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1))];

/// Hardware address of the node's end of every Pod link.
const ROUTER_MAC: Mac = [0xee, 0xee, 0xee, 0xee, 0xee, 0xee];

/// Addresses of node and client.
#[derive(Clone, Debug)]
pub struct TopologyConfig {
    /// The node's addresses on the link to the client, with their prefixes.
    pub node: Vec<IpNet>,
    /// The client's addresses on that link.
    pub client: Vec<IpNet>,
}

impl Default for TopologyConfig {
    /// `192.168.50.1/24` and `fd00:50::1/64` for the node, `.2` and `::2` for the client.
    fn default() -> Self {
        let both = |host: u8| {
            vec![
                Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 50, host), 24).into(),
                Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, host.into()), 64).into(),
            ]
        };
        Self { node: both(1), client: both(2) }
    }
}

/// A Pod: a namespace with a link to the node.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Name of the Pod.
    pub name: String,
    /// Its namespace.
    pub ns: NetNs,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Name of the node's end of its link.
    pub node_link: String,
}

/// One node, its Pods, and a client outside.
#[derive(Debug)]
pub struct Topology {
    /// The node's namespace: forwards, and runs the daemon under test.
    pub node: NetNs,
    /// The outside client's namespace: reaches everything through the node.
    pub client: NetNs,
    /// Addresses of both.
    pub config: TopologyConfig,
    pods: Mutex<BTreeMap<String, Pod>>,
    links_made: AtomicU32,
}

impl Topology {
    /// Makes node and client and connects them.
    pub fn new(config: TopologyConfig) -> Result<Self> {
        let node = NetNs::new()?;
        let client = NetNs::new()?;
        for ns in [&node, &client] {
            bring_up_loopback(ns)?;
        }
        for name in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            if has_ipv6() || name.starts_with("net.ipv4") {
                node.sysctl(name, "1")?;
            }
        }
        // Neighbour solicitations for forwarded packets have a link-local source (RFC 4861 §4.3); without one the
        // neighbour is lost as soon as it must be confirmed.
        let link_local = |host| IpNet::from(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, host), 64));
        let end = |addresses: &[IpNet], host, routes| LinkConfig {
            name: "eth0".to_owned(),
            addresses: [addresses, &[link_local(host)]].concat(),
            routes,
            ..LinkConfig::default()
        };
        let client_routes = config.node.iter().map(|node| Route::default_via(node.addr())).collect();
        link::veth(&node, &end(&config.node, 1, Vec::new()), &client, &end(&config.client, 2, client_routes))
            .context("cannot connect node and client")?;
        make_room_for_connections(&client)?;
        Ok(Self { node, client, config, pods: Mutex::default(), links_made: AtomicU32::new(0) })
    }

    /// Makes a Pod with these addresses, reachable from node, client and all other Pods.
    pub fn add_pod(&self, name: &str, addresses: &[IpAddr]) -> Result<Pod> {
        let number = self.links_made.fetch_add(1, Ordering::Relaxed) + 1;
        let pod = Pod {
            name: name.to_owned(),
            ns: NetNs::new()?,
            addresses: addresses.to_vec(),
            node_link: format!("pod{number}"),
        };
        bring_up_loopback(&pod.ns)?;
        let routers =
            POD_ROUTERS.iter().filter(|router| addresses.iter().any(|address| address.is_ipv4() == router.is_ipv4()));
        let pod_end = LinkConfig {
            name: "eth0".to_owned(),
            addresses: addresses.iter().copied().map(IpNet::from).collect(),
            neighbours: routers.clone().map(|router| (*router, ROUTER_MAC)).collect(),
            routes: routers.flat_map(|router| [Route::direct(*router), Route::default_via(*router)]).collect(),
            ..LinkConfig::default()
        };
        let node_end = LinkConfig {
            name: pod.node_link.clone(),
            mac: Some(ROUTER_MAC),
            addresses: vec![Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1), 64).into()],
            routes: addresses
                .iter()
                .map(|address| Route { source: self.node_address(address.is_ipv4()), ..Route::direct(*address) })
                .collect(),
            ..LinkConfig::default()
        };
        link::veth(&self.node, &node_end, &pod.ns, &pod_end).with_context(|| format!("cannot connect Pod {name}"))?;
        make_room_for_connections(&pod.ns)?;
        self.lock_pods().insert(name.to_owned(), pod.clone());
        Ok(pod)
    }

    /// Cuts a Pod off: its link and with it the node's routes to it are gone. `false` if there is none of that name.
    pub fn remove_pod(&self, name: &str) -> Result<bool> {
        let removed = self.lock_pods().remove(name);
        match removed {
            Some(pod) => {
                link::remove(&self.node, &pod.node_link).with_context(|| format!("cannot disconnect Pod {name}"))?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// The Pods there are now, by name.
    #[must_use]
    pub fn pods(&self) -> Vec<Pod> {
        self.lock_pods().values().cloned().collect()
    }

    /// The node's first address of a family.
    #[must_use]
    pub fn node_address(&self, ipv4: bool) -> Option<IpAddr> {
        first(&self.config.node, ipv4)
    }

    /// The client's first address of a family.
    #[must_use]
    pub fn client_address(&self, ipv4: bool) -> Option<IpAddr> {
        first(&self.config.client, ipv4)
    }

    fn lock_pods(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn first(addresses: &[IpNet], ipv4: bool) -> Option<IpAddr> {
    addresses.iter().map(IpNet::addr).find(|address| address.is_ipv4() == ipv4)
}

fn bring_up_loopback(ns: &NetNs) -> Result<()> {
    link::configure(ns, &LinkConfig { name: "lo".to_owned(), ..LinkConfig::default() })
}

/// Lets a namespace open tens of thousands of short connections in a row to one address.
fn make_room_for_connections(ns: &NetNs) -> Result<()> {
    ns.sysctl("net.ipv4.ip_local_port_range", "10000 65535")?;
    ns.sysctl("net.ipv4.tcp_tw_reuse", "1")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::client::{Target, ask};
    use crate::netns::is_privileged;
    use crate::serve::PodServer;
    use std::net::SocketAddr;
    use std::time::Duration;

    #[test]
    fn everybody_reaches_everybody() {
        if !is_privileged() {
            eprintln!("not tested: needs CAP_SYS_ADMIN to make network namespaces");
            return;
        }
        let topology = Topology::new(TopologyConfig::default()).unwrap();
        let pods: Vec<Pod> = (1..=2)
            .map(|n| {
                let addresses = [IpAddr::from([10, 244, 0, n]), format!("fd00:10:244::{n}").parse().unwrap()];
                topology.add_pod(&format!("web-{n}"), &addresses).unwrap()
            })
            .collect();
        let servers: Vec<PodServer> =
            pods.iter().map(|pod| PodServer::start(&pod.ns, &pod.name, &[8080], &[5353]).unwrap()).collect();
        let ask_from = |ns: &NetNs, target: Target| ns.run(|| Ok(ask(target, Duration::from_secs(2)).result)).unwrap();
        for pod in &pods {
            for address in &pod.addresses {
                if address.is_ipv6() && !has_ipv6() {
                    continue;
                }
                for ns in [&topology.node, &topology.client, &pods[0].ns] {
                    for target in
                        [Target::Http(SocketAddr::new(*address, 8080)), Target::Udp(SocketAddr::new(*address, 5353))]
                    {
                        assert_eq!(ask_from(ns, target), Ok(pod.name.clone()), "{target:?}");
                    }
                }
            }
        }
        drop(servers);
        assert!(topology.remove_pod("web-2").unwrap());
        assert!(!topology.remove_pod("web-2").unwrap());
        let gone = Target::Http(SocketAddr::new(pods[1].addresses[0], 8080));
        assert!(ask_from(&topology.client, gone).is_err());
    }
}
