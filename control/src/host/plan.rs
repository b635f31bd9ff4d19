//! Which packets are to come to the TUN link: a pure function of the routing table and the configuration.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use sluice_dataplane::net::{Family, Protocol};
use sluice_dataplane::table::{FrontendKey, RoutingTable};

use crate::config::{Config, PacketPath, PortRange};

/// What packets are to come to the TUN link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Families that are served.
    pub families: Vec<Family>,
    /// The address in each family that stands in for clients, and that own packets to Services leave with.
    pub primary: Vec<IpAddr>,
    /// Addresses, or loopback ranges, on which the node-port range is ours.
    pub node_port_addresses: BTreeSet<IpNet>,
    /// Node ports.
    pub node_ports: Option<PortRange>,
    /// Source ports of masqueraded flows.
    pub masquerade_ports: Option<PortRange>,
    /// Service addresses and ranges that are none of the node's own addresses.
    pub services: BTreeSet<IpNet>,
    /// Single frontends on addresses of the node itself: the rest of such an address stays the node's.
    pub own_frontends: BTreeSet<(IpAddr, Protocol, u16)>,
    /// Addresses where names are answered. Those that no link of the host has are put on ours.
    pub names: BTreeSet<IpAddr>,
    /// Packets are taken at the links already, where they may be.
    pub at_links: bool,
}

impl Plan {
    /// The plan for a table. `masquerade`: the address in each family that stands in for clients.
    #[must_use]
    pub fn new(table: &RoutingTable, config: &Config, masquerade: &[IpAddr]) -> Self {
        let node = table.node();
        let families: Vec<Family> = masquerade.iter().map(|address| Family::of(*address)).collect();
        let served = |address: &IpAddr| families.contains(&Family::of(*address));
        // The kernel takes no packet to ::1 from a link but loopback: a listener serves those.
        let loopback = node.spec().node_port_loopback.iter().filter(|range| range.addr().is_ipv4());
        let addresses = node.spec().node_port_addresses.iter().map(|address| IpNet::from(*address));
        let mut plan = Self {
            primary: masquerade.to_vec(),
            node_port_addresses: addresses.chain(loopback.copied()).filter(|range| served(&range.addr())).collect(),
            node_ports: (!node.spec().beside).then_some(config.node_port_range),
            masquerade_ports: Some(config.masquerade_ports),
            services: node.spec().service_cidrs.iter().filter(|range| served(&range.addr())).copied().collect(),
            own_frontends: BTreeSet::new(),
            names: config.dns.iter().flat_map(|dns| &dns.listen).map(SocketAddr::ip).collect(),
            families: families.clone(),
            at_links: config.packet_path != PacketPath::Kernel,
        };
        for frontend in table.frontends() {
            let (address, protocol, port) = match frontend.key {
                FrontendKey::Address(address, protocol, port) => (address, protocol, port),
                FrontendKey::NodePort(family, protocol, port) if node.spec().beside => {
                    let addresses = plan.node_port_addresses.iter().map(IpNet::addr);
                    let of_family = addresses.filter(|address| Family::of(*address) == family);
                    plan.own_frontends.extend(of_family.map(|address| (address, protocol, port)));
                    continue;
                }
                FrontendKey::NodePort(..) => continue,
            };
            if !served(&address) || node.in_service_range(address) {
                continue;
            }
            if node.is_local(address) {
                plan.own_frontends.insert((address, protocol, port));
            } else {
                plan.services.insert(address.into());
            }
        }
        plan
    }

    /// Whether packets to there come to us.
    pub(super) fn takes(&self, protocol: Protocol, to: SocketAddr) -> bool {
        let address = to.ip();
        let in_range = |range: &IpNet| range.prefix_len() < range.max_prefix_len() && range.contains(&address);
        let is_node_port = || {
            self.node_ports.is_some_and(|ports| ports.range().contains(&to.port()))
                && self.node_port_addresses.iter().any(|range| range.contains(&address))
        };
        self.services.contains(&address.into())
            || self.services.iter().any(in_range)
            || self.own_frontends.contains(&(address, protocol, to.port()))
            || is_node_port()
    }

    /// Addresses of the node of which some ports are ours, whatever Services there are.
    pub(super) fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let mut addresses: BTreeSet<IpAddr> = self.primary.iter().copied().collect();
        addresses.extend(self.node_port_addresses.iter().map(IpNet::addr));
        addresses.into_iter()
    }

    /// These ports: node ports, and those of masqueraded flows.
    pub(super) fn own_ports(&self, address: IpAddr) -> Vec<PortRange> {
        let has_node_ports = self.node_port_addresses.iter().any(|range| range.contains(&address));
        let masquerade = self.masquerade_ports.filter(|_| self.primary.contains(&address));
        [self.node_ports.filter(|_| has_node_ports), masquerade].into_iter().flatten().collect()
    }

    /// The primary address of a family.
    pub(super) fn primary(&self, family: Family) -> Option<IpAddr> {
        self.primary.iter().copied().find(|address| Family::of(*address) == family)
    }
}
