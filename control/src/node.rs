//! Facts of the node this runs on, from its Node object and, where there is none, from the host's interfaces.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::NodeSpec;

use crate::address;
use crate::config::{Config, NodePortAddress};
use crate::object::{ZONE_LABEL, label};

/// The taint by which the cluster autoscaler announces that a node goes.
const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// What the rules need to know of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name, as `nodeName` in EndpointSlices and Pods.
    pub name: String,
    /// Its zone.
    pub zone: Option<String>,
    /// Its first address of each family: what `primary` means, and what masquerade uses.
    pub primary: Vec<IpAddr>,
    /// Every address of its own but loopback.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Load balancers may send here: the Node is neither being deleted nor about to be removed by the autoscaler.
    pub eligible: bool,
}

impl NodeFacts {
    /// Facts of the node called `name`. `interfaces`: the host's addresses, empty where only files count.
    #[must_use]
    pub fn new(name: &str, node: Option<&Node>, interfaces: &[IpAddr]) -> Self {
        let status = node.and_then(|node| node.status.as_ref()).and_then(|status| status.addresses.as_ref());
        let of_type = |wanted: &str| {
            let addresses = status.into_iter().flatten().filter(move |address| address.type_ == wanted);
            addresses.filter_map(|address| address::parse(&address.address)).collect::<Vec<IpAddr>>()
        };
        // Internal addresses first, as kube-proxy's GetNodeHostIPs.
        let declared: Vec<IpAddr> = [of_type("InternalIP"), of_type("ExternalIP")].concat();
        let known = if declared.is_empty() { interfaces } else { &declared };
        let first = |family| known.iter().copied().find(|address| Family::of(*address) == family);
        let primary = Family::BOTH.into_iter().filter_map(first).collect();
        let mut addresses = declared.clone();
        addresses.extend(interfaces);
        addresses.retain(|address| !address.is_loopback());
        addresses.sort_unstable();
        addresses.dedup();
        let spec = node.and_then(|node| node.spec.as_ref());
        let pod_cidrs = spec.and_then(|spec| spec.pod_cidrs.clone().or_else(|| Some(vec![spec.pod_cidr.clone()?])));
        let is_leaving = node.is_some_and(|node| node.metadata.deletion_timestamp.is_some())
            || spec.is_some_and(|spec| spec.taints.iter().flatten().any(|taint| taint.key == AUTOSCALER_TAINT));
        Self {
            name: name.to_owned(),
            zone: node.and_then(|node| label(&node.metadata, ZONE_LABEL)).map(str::to_owned),
            primary,
            addresses,
            pod_cidrs: pod_cidrs.into_iter().flatten().filter_map(|range| address::parse_range(&range)).collect(),
            eligible: !is_leaving,
        }
    }

    /// What the table must know. `service_cidrs`: all ranges in force; beside another service proxy they are not ours alone.
    #[must_use]
    pub fn spec(&self, config: &Config, service_cidrs: Vec<IpNet>) -> NodeSpec {
        let node_port_addresses = Family::BOTH.into_iter().flat_map(|family| self.node_port_addresses(config, family));
        let beside = !config.service_proxy_name.is_empty();
        NodeSpec {
            addresses: self.addresses.clone(),
            node_port_addresses: node_port_addresses.collect(),
            node_port_loopback: node_port_loopback(config),
            cluster_cidrs: config.cluster_cidrs.clone().unwrap_or_else(|| self.pod_cidrs.clone()),
            service_cidrs: if beside { Vec::new() } else { service_cidrs },
            masquerade_all: config.masquerade_all,
            beside,
        }
    }

    /// A family that no entry speaks of is served on all its addresses, as in kube-proxy.
    fn node_port_addresses(&self, config: &Config, family: Family) -> Vec<IpAddr> {
        let entries = &config.node_port_addresses;
        let concerns = |entry: &NodePortAddress| match entry {
            NodePortAddress::Primary => self.primary.iter().any(|address| Family::of(*address) == family),
            NodePortAddress::All | NodePortAddress::Localhost => true,
            NodePortAddress::Range(range) => Family::of(range.addr()) == family,
        };
        let selects = |entry: &NodePortAddress, address: &IpAddr| match entry {
            NodePortAddress::Primary => self.primary.contains(address),
            NodePortAddress::All => true,
            NodePortAddress::Localhost => false,
            NodePortAddress::Range(range) => range.contains(address),
        };
        let all = !entries.iter().any(concerns);
        let of_family = self.addresses.iter().filter(|address| Family::of(**address) == family);
        of_family.filter(|address| all || entries.iter().any(|entry| selects(entry, address))).copied().collect()
    }
}

/// Loopback ranges on which node ports answer. Only the word `localhost` asks for them: a CIDR, even one inside loopback,
/// matches no loopback address, as in kube-proxy's nftables mode.
fn node_port_loopback(config: &Config) -> Vec<IpNet> {
    let constant = |text: &str| text.parse::<IpNet>().expect("a constant range");
    let ranges = config.node_port_addresses.iter().flat_map(|entry| match entry {
        NodePortAddress::Localhost => vec![constant("127.0.0.0/8"), constant("::1/128")],
        NodePortAddress::Primary | NodePortAddress::All | NodePortAddress::Range(_) => Vec::new(),
    });
    ranges.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn facts(addresses: &[(&str, &str)], interfaces: &[&str]) -> NodeFacts {
        let addresses: Vec<Value> =
            addresses.iter().map(|(type_, address)| json!({"type": type_, "address": address})).collect();
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "me"}, "status": {"addresses": addresses}})).unwrap();
        let interfaces: Vec<IpAddr> = interfaces.iter().map(|address| address.parse().unwrap()).collect();
        NodeFacts::new("me", Some(&node), &interfaces)
    }

    fn text(addresses: &[impl ToString]) -> String {
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn primary_is_the_first_internal_address_of_each_family_then_external_then_the_hosts() {
        for (addresses, interfaces, primary) in [
            (
                &[("ExternalIP", "198.51.100.1"), ("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2")][..],
                &[][..],
                "10.0.0.1",
            ),
            (&[("InternalIP", "fd00::1"), ("InternalIP", "10.0.0.1")], &["10.9.9.9"], "10.0.0.1 fd00::1"),
            (&[("InternalIP", "10.0.0.1"), ("ExternalIP", "2001:db8::1")], &[], "10.0.0.1 2001:db8::1"),
            (&[("InternalIP", "010.00.0.1"), ("Hostname", "me"), ("InternalIP", "x")], &[], "10.0.0.1"),
            (&[], &["10.9.9.9", "fd00::9"], "10.9.9.9 fd00::9"),
            (&[], &[], ""),
        ] {
            assert_eq!(text(&facts(addresses, interfaces).primary), primary, "{addresses:?} {interfaces:?}");
        }
    }

    #[test]
    fn node_ports_answer_on_the_addresses_that_are_named() {
        let both = [
            ("InternalIP", "10.0.0.1"),
            ("InternalIP", "10.0.0.2"),
            ("InternalIP", "fd00::1"),
            ("InternalIP", "fd00::2"),
        ];
        let only_v4 = [("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2")];
        let loopback = "127.0.0.0/8 ::1/128";
        for (addresses, entries, served, on_loopback) in [
            (&both[..], &["primary"][..], "10.0.0.1 fd00::1", ""),
            // A family that no entry speaks of is served everywhere.
            (&only_v4, &["primary"], "10.0.0.1 fd00::7", ""),
            (&both, &["10.0.0.2/32"], "10.0.0.2 fd00::1 fd00::2 fd00::7", ""),
            (&both, &["primary", "10.0.0.2/32"], "10.0.0.1 10.0.0.2 fd00::1", ""),
            (&both, &["all"], "10.0.0.1 10.0.0.2 fd00::1 fd00::2 fd00::7", ""),
            (&both, &["0.0.0.0/0", "fd00::2/128"], "10.0.0.1 10.0.0.2 fd00::2", ""),
            (&both, &["localhost"], "", loopback),
            (&both, &["primary", "localhost"], "10.0.0.1 fd00::1", loopback),
            (&both, &["127.0.0.0/8", "::1/128"], "", ""),
            (&both, &["172.16.0.0/12"], "fd00::1 fd00::2 fd00::7", ""),
        ] {
            let facts = facts(addresses, &["127.0.0.1", "::1", "fd00::7"]);
            let node_port_addresses = entries.iter().map(|entry| entry.parse().unwrap()).collect();
            let spec = facts.spec(&Config { node_port_addresses, ..Config::default() }, Vec::new());
            assert_eq!(text(&spec.node_port_addresses), served, "{entries:?}");
            assert_eq!(text(&spec.node_port_loopback), on_loopback, "{entries:?}");
        }
    }
}
