//! ClusterIPs and node ports where a Service leaves them open.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use sluice_dataplane::net::Family;
use sluice_dataplane::table::ServiceName;

use super::allocator::{Allocator, Holder, probe};
use super::defaults::{is_headless, type_of};
use crate::config::{Config, PortRange};
use crate::problem::Problem;

const HEALTH_CHECK: &str = "healthCheckNodePort";

/// The pools that frontends come from.
#[derive(Debug)]
pub(super) struct Frontends {
    ranges: Vec<IpNet>,
    port_range: PortRange,
    pub(super) addresses: Allocator<IpAddr>,
    pub(super) ports: Allocator<u16>,
}

impl Frontends {
    pub(super) fn new(config: &Config) -> Self {
        let (addresses, ports) = (Allocator::default(), Allocator::default());
        Self { ranges: config.service_cidrs(), port_range: config.node_port_range, addresses, ports }
    }

    /// Takes note of what a Service has explicitly, gives back what it no longer needs, and says who has to move.
    pub(super) fn claim(&mut self, name: &ServiceName, service: Option<&Service>) -> Vec<ServiceName> {
        let empty = ServiceSpec::default();
        let spec = service.map(|service| service.spec.as_ref().unwrap_or(&empty));
        let mut losers = self.addresses.claim(name, spec.map(explicit_addresses).unwrap_or_default());
        losers.extend(self.ports.claim(name, spec.map(explicit_ports).unwrap_or_default()));
        let families = spec.map(|spec| self.open_families(spec)).unwrap_or_default();
        self.addresses.keep_only(name, &families.iter().map(Family::to_string).collect::<Vec<_>>());
        self.ports.keep_only(name, &spec.map(open_ports).unwrap_or_default());
        losers
    }

    /// Hands out again what a Service had in an earlier run.
    pub(super) fn restore(&mut self, name: &ServiceName, service: &Service) {
        let Some(spec) = &service.spec else { return };
        let holder = |part: String| Holder { service: name.clone(), part };
        for family in self.open_families(spec) {
            let ranges = &self.ranges;
            let is_in_range = |address| ranges.iter().any(|range| range.contains(&address));
            self.addresses.restore(&holder(family.to_string()), is_in_range);
        }
        for part in open_ports(spec) {
            let range = self.port_range.range();
            self.ports.restore(&holder(part), |port| range.contains(&port));
        }
    }

    /// Fills in what is open. Returns the names of the fields it made up, and what it could not.
    pub(super) fn fill(&mut self, name: &ServiceName, service: &mut Service) -> (Vec<&'static str>, Vec<Problem>) {
        let spec = service.spec.get_or_insert_default();
        let (mut made_up, mut problems) = (Vec::new(), Vec::new());
        self.fill_addresses(name, spec, &mut made_up, &mut problems);
        self.fill_ports(name, spec, &mut made_up, &mut problems);
        (made_up, problems)
    }

    fn fill_addresses(
        &mut self,
        name: &ServiceName,
        spec: &mut ServiceSpec,
        made_up: &mut Vec<&'static str>,
        problems: &mut Vec<Problem>,
    ) {
        if type_of(spec) == "ExternalName" {
            return;
        }
        let wanted = self.families(spec);
        if is_dual(spec, "RequireDualStack") && wanted.len() < 2 {
            problems
                .push(Problem::error("spec.ipFamilyPolicy", "RequireDualStack needs serviceCIDRs of both families"));
        }
        spec.ip_family_policy
            .get_or_insert_with(|| if wanted.len() > 1 { "RequireDualStack" } else { "SingleStack" }.to_owned());
        if is_headless(spec) {
            spec.cluster_ip = Some("None".to_owned());
            spec.cluster_ips = Some(vec!["None".to_owned()]);
            spec.ip_families.get_or_insert_with(|| wanted.iter().map(Family::to_string).collect());
            return;
        }
        if !addresses_parse(spec) {
            // Resolution says what is wrong with them.
            return;
        }
        let explicit = explicit_addresses(spec);
        let mut addresses = Vec::new();
        for family in wanted {
            let given = explicit.iter().find(|address| Family::of(**address) == family).copied();
            let address = given.or_else(|| {
                let holder = Holder { service: name.clone(), part: family.to_string() };
                let ranges = self.ranges.iter().filter(|range| Family::of(range.addr()) == family);
                self.addresses.allocate(holder.clone(), ranges.flat_map(|range| candidates(&holder, *range)))
            });
            match address {
                Some(address) => addresses.push(address),
                None => problems.push(self.exhausted(family)),
            }
            if given.is_none() && address.is_some() && !made_up.contains(&"clusterIP") {
                made_up.push("clusterIP");
            }
        }
        if let Some(first) = addresses.first() {
            spec.cluster_ip = Some(first.to_string());
            spec.ip_families = Some(addresses.iter().map(|address| Family::of(*address).to_string()).collect());
            spec.cluster_ips = Some(addresses.iter().map(IpAddr::to_string).collect());
        }
    }

    fn fill_ports(
        &mut self,
        name: &ServiceName,
        spec: &mut ServiceSpec,
        made_up: &mut Vec<&'static str>,
        problems: &mut Vec<Problem>,
    ) {
        let range = self.port_range;
        let size = u128::from(range.last - range.first) + 1;
        let mut allocate = |part: String, field: String| {
            let holder = Holder { service: name.clone(), part };
            let candidates = probe(&holder, size).map(|offset| range.first + u16::try_from(offset).unwrap_or_default());
            let port = self.ports.allocate(holder, candidates);
            if port.is_none() {
                problems.push(Problem::error(field, format!("no free node port is left in {range}")));
            }
            port.map(i32::from)
        };
        let open = open_ports(spec);
        let parts = port_parts(spec);
        for (index, port) in spec.ports.iter_mut().flatten().enumerate() {
            if open.contains(&parts[index]) {
                port.node_port = allocate(parts[index].clone(), format!("spec.ports[{index}].nodePort"));
                if port.node_port.is_some() && !made_up.contains(&"nodePort") {
                    made_up.push("nodePort");
                }
            }
        }
        if open.iter().any(|part| part == HEALTH_CHECK) {
            spec.health_check_node_port = allocate(HEALTH_CHECK.to_owned(), format!("spec.{HEALTH_CHECK}"));
            if spec.health_check_node_port.is_some() {
                made_up.push(HEALTH_CHECK);
            }
        }
    }

    fn exhausted(&self, family: Family) -> Problem {
        let ranges = self.ranges.iter().filter(|range| Family::of(range.addr()) == family);
        let ranges: Vec<String> = ranges.map(IpNet::to_string).collect();
        Problem::error(
            "spec.clusterIP",
            match &ranges[..] {
                [] => format!("no {family} address can be made up: serviceCIDRs has no {family} range"),
                ranges => format!("no free {family} address is left in {}", ranges.join(", ")),
            },
        )
    }

    /// Families that a Service has or shall have, the primary one first.
    fn families(&self, spec: &ServiceSpec) -> Vec<Family> {
        let mut families = Vec::new();
        let mut add = |family| {
            if !families.contains(&family) {
                families.push(family);
            }
        };
        addresses(spec).filter_map(|ip| ip.parse().ok()).map(Family::of).for_each(&mut add);
        spec.ip_families.iter().flatten().filter_map(|name| family_named(name)).for_each(&mut add);
        let known = || self.ranges.iter().map(|range| Family::of(range.addr()));
        if families.is_empty() {
            families.extend(known().next().or(Some(Family::V4)));
        }
        if is_dual(spec, "PreferDualStack") || is_dual(spec, "RequireDualStack") {
            for family in known() {
                if !families.contains(&family) {
                    families.push(family);
                }
            }
        }
        if is_dual(spec, "SingleStack") {
            families.truncate(1);
        }
        families
    }

    /// Families in which an address has to be made up.
    fn open_families(&self, spec: &ServiceSpec) -> Vec<Family> {
        if type_of(spec) == "ExternalName" || is_headless(spec) || !addresses_parse(spec) {
            return Vec::new();
        }
        let explicit = explicit_addresses(spec);
        let mut families = self.families(spec);
        families.retain(|family| !explicit.iter().any(|address| Family::of(*address) == *family));
        families
    }
}

fn family_named(name: &str) -> Option<Family> {
    Family::BOTH.into_iter().find(|family| family.to_string() == name)
}

fn is_dual(spec: &ServiceSpec, policy: &str) -> bool {
    spec.ip_family_policy.as_deref() == Some(policy)
}

/// ClusterIPs as written, `None` among them.
fn addresses(spec: &ServiceSpec) -> impl Iterator<Item = &str> {
    let all = spec.cluster_ip.iter().chain(spec.cluster_ips.iter().flatten());
    all.map(String::as_str).filter(|ip| !ip.is_empty())
}

fn addresses_parse(spec: &ServiceSpec) -> bool {
    addresses(spec).all(|ip| ip.parse::<IpAddr>().is_ok())
}

fn explicit_addresses(spec: &ServiceSpec) -> BTreeSet<IpAddr> {
    addresses(spec).filter_map(|ip| ip.parse().ok()).collect()
}

fn explicit_ports(spec: &ServiceSpec) -> BTreeSet<u16> {
    let ports = spec.ports.iter().flatten().filter_map(|port| port.node_port);
    ports
        .chain(spec.health_check_node_port)
        .filter_map(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
        .collect()
}

/// What each port is called in the pool: its name, with a number where names are not unique.
fn port_parts(spec: &ServiceSpec) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for port in spec.ports.iter().flatten() {
        let name = port.name.clone().unwrap_or_default();
        let numbered = (1..).map(|number| format!("{name}#{number}"));
        let part = std::iter::once(name.clone()).chain(numbered).find(|part| !parts.contains(part));
        parts.extend(part);
    }
    parts
}

/// Parts for which a node port has to be made up.
fn open_ports(spec: &ServiceSpec) -> Vec<String> {
    let is_balancer = type_of(spec) == "LoadBalancer";
    let mut open = Vec::new();
    if type_of(spec) == "NodePort" || (is_balancer && spec.allocate_load_balancer_node_ports != Some(false)) {
        let ports = spec.ports.iter().flatten().zip(port_parts(spec));
        open.extend(ports.filter(|(port, _)| port.node_port.unwrap_or(0) == 0).map(|(_, part)| part));
    }
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    if is_balancer && is_local && spec.health_check_node_port.unwrap_or(0) == 0 {
        open.push(HEALTH_CHECK.to_owned());
    }
    open
}

/// Addresses of a range but its first and, for IPv4, its last.
pub(crate) fn candidates(holder: &Holder, range: IpNet) -> impl Iterator<Item = IpAddr> + use<> {
    let (first, last) = match range {
        IpNet::V4(range) => (u128::from(u32::from(range.network())) + 1, u128::from(u32::from(range.broadcast()))),
        IpNet::V6(range) => {
            let last = u128::from(range.broadcast());
            (u128::from(range.network()).saturating_add(1), last.saturating_add(1))
        }
    };
    probe(holder, last.saturating_sub(first)).map(move |offset| match range {
        IpNet::V4(_) => IpAddr::V4(Ipv4Addr::from(u32::try_from(first + offset).unwrap_or_default())),
        IpNet::V6(_) => IpAddr::V6(Ipv6Addr::from(first + offset)),
    })
}
