//! What happens to a new flow, said a second time: from the written rules of kube-proxy and `docs/differences.md`, over plain
//! JSON, loop by loop and without any index. Nothing here is taken from the code that it is compared with.

mod endpoints;
mod read;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use read::{age, belongs, contains, ip, is_link_local, is_routable, is_served, list, range, text};
use serde_json::Value;

/// A configuration and complete manifests.
#[derive(Clone, Debug)]
pub struct World {
    /// Keys of SluiceConfiguration; `localControllers` is off.
    pub config: Value,
    /// Objects.
    pub objects: Vec<Value>,
}

/// A new flow.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Source address.
    pub client: IpAddr,
    /// What it dials.
    pub to: SocketAddr,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
}

/// What happens to it, as in the conformance cases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// `forward`, `reject`, `drop` or `pass`.
    pub outcome: &'static str,
    /// All that the flow may be sent to, sorted as text.
    pub endpoints: Vec<String>,
    /// The source is replaced, whichever endpoint it is.
    pub masquerade: bool,
}

/// The rules over one world.
pub struct Naive {
    node_name: String,
    zone: String,
    /// The node's own addresses but loopback.
    node: Vec<IpAddr>,
    primary: Vec<IpAddr>,
    pods: Vec<IpNet>,
    node_port_addresses: Vec<String>,
    masquerade_all: bool,
    service_ranges: Vec<IpNet>,
    /// The oldest Service first.
    ports: Vec<Port>,
}

/// A port of a Service in one family.
struct Port {
    service: usize,
    name: String,
    protocol: String,
    number: u64,
    cluster_ip: IpAddr,
    vips: Vec<IpAddr>,
    externals: Vec<IpAddr>,
    node_port: u64,
    ranges: Vec<IpNet>,
    internal_local: bool,
    external_local: bool,
    /// clusterEps and localEps of section 3.
    cluster: Vec<SocketAddr>,
    local: Vec<SocketAddr>,
    has_any: bool,
}

impl Naive {
    /// Reads a world.
    #[must_use]
    pub fn new(world: &World) -> Self {
        let config = &world.config;
        let node_name = text(&config["nodeName"]).to_owned();
        let of_kind = |kind: &'static str| world.objects.iter().filter(move |object| object["kind"] == kind);
        let none = Value::Null;
        let node = of_kind("Node").find(|node| node["metadata"]["name"] == node_name.as_str()).unwrap_or(&none);
        let addresses = |kind: &str| -> Vec<IpAddr> {
            let of_kind = list(&node["status"]["addresses"]).filter(|address| address["type"] == kind);
            of_kind.filter_map(|address| ip(text(&address["address"]))).collect()
        };
        let own = [addresses("InternalIP"), addresses("ExternalIP")].concat();
        let first = |v6: bool| own.iter().copied().find(|address| address.is_ipv6() == v6);
        let pod_ranges = match &node["spec"]["podCIDRs"] {
            Value::Array(ranges) => ranges.clone(),
            _ => vec![node["spec"]["podCIDR"].clone()],
        };
        let declared = match &config["clusterCIDRs"] {
            Value::Array(ranges) => ranges.clone(),
            _ => pod_ranges,
        };
        let declared: Vec<IpNet> = declared.iter().filter_map(|value| range(text(value))).collect();
        let first_range = |v6: bool| declared.iter().copied().find(|range| range.addr().is_ipv6() == v6);
        let mut service_ranges: Vec<IpNet> =
            list(&config["serviceCIDRs"]).filter_map(|value| range(text(value))).collect();
        for object in of_kind("ServiceCIDR") {
            service_ranges.extend(list(&object["spec"]["cidrs"]).filter_map(|value| range(text(value))));
        }
        let proxy = text(&config["serviceProxyName"]);
        if !proxy.is_empty() {
            // The rest of the ranges is the other service proxy's.
            service_ranges.clear();
        }
        let mut node_port_addresses: Vec<String> =
            list(&config["nodePortAddresses"]).map(|entry| text(entry).to_owned()).collect();
        if node_port_addresses.is_empty() {
            node_port_addresses.push("primary".to_owned());
        }
        let mut naive = Self {
            zone: text(&node["metadata"]["labels"]["topology.kubernetes.io/zone"]).to_owned(),
            primary: [false, true].into_iter().filter_map(first).collect(),
            pods: [false, true].into_iter().filter_map(first_range).collect(),
            node: own.iter().copied().filter(|address| !address.is_loopback()).collect(),
            masquerade_all: config["masqueradeAll"] == true,
            node_name,
            node_port_addresses,
            service_ranges,
            ports: Vec::new(),
        };
        let mut services: Vec<&Value> = of_kind("Service").filter(|service| is_served(service, proxy)).collect();
        services.sort_by_key(|service| age(service));
        let mut slices: Vec<&Value> = of_kind("EndpointSlice").collect();
        slices.sort_by_key(|slice| age(slice));
        for (index, service) in services.iter().enumerate() {
            for v6 in [false, true] {
                naive.add_service(index, service, v6);
            }
            let of_service: Vec<&Value> = slices.iter().copied().filter(|slice| belongs(slice, service)).collect();
            for at in 0..naive.ports.len() {
                if naive.ports[at].service == index {
                    naive.add_endpoints(at, &of_service);
                }
            }
        }
        naive
    }

    /// What happens to a new flow.
    #[must_use]
    pub fn decide(&self, flow: &Flow) -> Answer {
        let plain = |outcome| Answer { outcome, endpoints: Vec::new(), masquerade: false };
        let address = flow.to.ip();
        let Some((port, is_node_port)) = self.frontend(flow.client, flow.to, flow.protocol) else {
            // Section 7: other ports of a ClusterIP, and addresses of the Service range that are none.
            if self.is_cluster_ip(address) {
                return plain("reject");
            }
            return plain(if contains(&self.service_ranges, address) { "drop" } else { "pass" });
        };
        let is_cluster_ip = !is_node_port && port.cluster_ip == address;
        // Section 5.
        if !is_node_port && !is_cluster_ip && port.vips.contains(&address) && !port.ranges.is_empty() {
            let node_is_inside = self.primary.iter().any(|primary| contains(&port.ranges, *primary));
            let passes = contains(&port.ranges, flow.client) || (node_is_inside && port.vips.contains(&flow.client));
            if !passes {
                return plain("drop");
            }
        }
        if !port.has_any {
            return plain("reject");
        }
        // Sections 3, 4 and 6.
        let is_pod = contains(&self.pods, flow.client);
        let pods_are_known = self.pods.iter().any(|range| range.addr().is_ipv6() == address.is_ipv6());
        let (list, masquerade) = if is_cluster_ip {
            let list = if port.internal_local { &port.local } else { &port.cluster };
            (list, self.masquerade_all || (pods_are_known && !is_pod))
        } else if !port.external_local {
            (&port.cluster, true)
        } else if is_pod {
            (&port.cluster, false)
        } else if self.is_own(flow.client) {
            (&port.cluster, true)
        } else {
            (&port.local, false)
        };
        let usable: Vec<&SocketAddr> = list
            .iter()
            .filter(|endpoint| !self.is_cluster_ip(endpoint.ip()))
            .filter(|endpoint| self.frontend(endpoint.ip(), **endpoint, flow.protocol).is_none())
            .collect();
        if usable.is_empty() {
            return plain("drop");
        }
        let hairpin = usable.iter().all(|endpoint| endpoint.ip() == flow.client);
        let mut endpoints: Vec<String> = usable.into_iter().map(ToString::to_string).collect();
        endpoints.sort();
        Answer { outcome: "forward", endpoints, masquerade: masquerade || hairpin }
    }

    /// The port that answers, and whether by its node port. The oldest Service wins; an exact address beats a node port.
    fn frontend(&self, client: IpAddr, to: SocketAddr, protocol: &str) -> Option<(&Port, bool)> {
        let (address, number) = (to.ip(), u64::from(to.port()));
        let mut alike = self.ports.iter().filter(|port| port.protocol == protocol);
        let exact = alike.clone().find(|port| port.number == number && port.addresses().any(|own| own == address));
        exact.map(|port| (port, false)).or_else(|| {
            let same_family = |port: &&Port| port.cluster_ip.is_ipv6() == address.is_ipv6();
            let port = alike.find(|port| same_family(port) && port.node_port == number)?;
            self.serves_node_ports(address, client).then_some((port, true))
        })
    }

    /// The ClusterIP of a port that is served on it.
    fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.ports.iter().any(|port| {
            let to = SocketAddr::new(address, port.number as u16);
            port.cluster_ip == address
                && self.frontend(address, to, &port.protocol).is_some_and(|(winner, _)| std::ptr::eq(winner, port))
        })
    }

    /// An address of this node.
    fn is_own(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.node.contains(&address)
    }

    /// Section 4, nodePortAddresses.
    fn serves_node_ports(&self, address: IpAddr, client: IpAddr) -> bool {
        let mut of_family = 0;
        for entry in &self.node_port_addresses {
            let serves = match entry.as_str() {
                "primary" => self.primary.contains(&address),
                "all" => self.node.contains(&address),
                "localhost" => address.is_loopback() && self.is_own(client),
                entry => match range(entry) {
                    Some(range) if range.addr().is_ipv6() == address.is_ipv6() => {
                        range.contains(&address) && self.node.contains(&address)
                    }
                    _ => continue,
                },
            };
            of_family += 1;
            if serves {
                return true;
            }
        }
        of_family == 0 && self.node.contains(&address)
    }

    /// Sections 1 and 4: the ports of a Service in a family, without endpoints.
    fn add_service(&mut self, index: usize, service: &Value, v6: bool) {
        let spec = &service["spec"];
        let family = if v6 { "IPv6" } else { "IPv4" };
        let families: Vec<&Value> = list(&spec["ipFamilies"]).collect();
        let written = if families.is_empty() {
            text(&spec["clusterIP"])
        } else {
            let at = families.iter().position(|declared| **declared == family);
            at.map_or("", |at| text(&spec["clusterIPs"][at]))
        };
        let of_family = |address: &IpAddr| address.is_ipv6() == v6 && is_routable(*address);
        let Some(cluster_ip) = ip(written).filter(of_family) else { return };
        let externals: Vec<IpAddr> = list(&spec["externalIPs"])
            .filter_map(|value| ip(text(value)))
            .filter(|address| of_family(address) && !is_link_local(*address))
            .collect();
        let ingress = list(&service["status"]["loadBalancer"]["ingress"]);
        let vips: Vec<IpAddr> = ingress
            .filter(|ingress| ingress["ipMode"].is_null() || ingress["ipMode"] == "VIP")
            .filter_map(|ingress| ip(text(&ingress["ip"])))
            .filter(of_family)
            .collect();
        let ranges: Vec<IpNet> = list(&spec["loadBalancerSourceRanges"])
            .filter_map(|value| range(text(value).trim()))
            .filter(|range| range.addr().is_ipv6() == v6)
            .collect();
        let kind = spec["type"].as_str().unwrap_or("ClusterIP");
        let may_be_local = kind != "ClusterIP" || list(&spec["externalIPs"]).count() > 0;
        for value in list(&spec["ports"]) {
            let (name, protocol) = (text(&value["name"]), value["protocol"].as_str().unwrap_or("TCP"));
            let number = value["port"].as_u64().unwrap_or(0);
            let earlier = self.ports.iter().any(|port| {
                let same = port.service == index && port.cluster_ip.is_ipv6() == v6 && port.protocol == protocol;
                same && (port.name == name || port.number == number)
            });
            if earlier || number == 0 || number > 65535 {
                continue;
            }
            self.ports.push(Port {
                service: index,
                name: name.to_owned(),
                protocol: protocol.to_owned(),
                number,
                cluster_ip,
                vips: vips.clone(),
                externals: externals.clone(),
                // 0 matches nothing that can be dialled.
                node_port: value["nodePort"].as_u64().unwrap_or(0),
                ranges: ranges.clone(),
                internal_local: spec["internalTrafficPolicy"] == "Local",
                external_local: spec["externalTrafficPolicy"] == "Local" && may_be_local,
                cluster: Vec::new(),
                local: Vec::new(),
                has_any: false,
            });
        }
    }
}

impl Port {
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.cluster_ip).chain(self.vips.iter().copied()).chain(self.externals.iter().copied())
    }
}
