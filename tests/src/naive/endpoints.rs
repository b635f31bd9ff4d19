//! Sections 2 and 3: slices merged, and the two lists of a port.

use std::net::SocketAddr;

use serde_json::Value;

use super::read::{contains, ip, is_endpoint, list, text};
use super::{Naive, Port};

struct Endpoint {
    address: SocketAddr,
    /// The slice that it is from.
    slice: usize,
    ready: bool,
    serving: bool,
    terminating: bool,
    local: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

impl Naive {
    /// Sections 2 and 3.
    pub(super) fn add_endpoints(&mut self, at: usize, slices: &[&Value]) {
        let endpoints = self.merge(&self.ports[at], slices);
        let ready: Vec<&Endpoint> = endpoints.iter().filter(|endpoint| endpoint.ready).collect();
        let draining = |endpoint: &&Endpoint| endpoint.serving && endpoint.terminating;
        let names = |hints: &[String], name: &String| hints.iter().any(|hint| hint == name);
        let by_node = ready.iter().all(|endpoint| !endpoint.nodes.is_empty())
            && ready.iter().any(|endpoint| names(&endpoint.nodes, &self.node_name));
        let by_zone = !self.zone.is_empty()
            && ready.iter().all(|endpoint| !endpoint.zones.is_empty())
            && ready.iter().any(|endpoint| names(&endpoint.zones, &self.zone));
        let matches = |endpoint: &&&Endpoint| match (by_node, by_zone) {
            (true, _) => names(&endpoint.nodes, &self.node_name),
            (false, true) => names(&endpoint.zones, &self.zone),
            (false, false) => true,
        };
        let addresses = |list: Vec<&Endpoint>| list.into_iter().map(|endpoint| endpoint.address).collect::<Vec<_>>();
        let mut cluster = addresses(ready.iter().filter(matches).copied().collect());
        if cluster.is_empty() {
            cluster = addresses(endpoints.iter().filter(draining).collect());
        }
        let mut local = addresses(ready.iter().filter(|endpoint| endpoint.local).copied().collect());
        if local.is_empty() {
            local = addresses(endpoints.iter().filter(draining).filter(|endpoint| endpoint.local).collect());
        }
        let has_any = !ready.is_empty() || endpoints.iter().any(|endpoint| draining(&endpoint));
        let port = &mut self.ports[at];
        (port.cluster, port.local, port.has_any) = (cluster, local, has_any);
    }

    fn merge(&self, port: &Port, slices: &[&Value]) -> Vec<Endpoint> {
        let v6 = port.cluster_ip.is_ipv6();
        let mut merged: Vec<Endpoint> = Vec::new();
        for (index, slice) in slices.iter().enumerate() {
            if slice["addressType"] != if v6 { "IPv6" } else { "IPv4" } {
                continue;
            }
            let joined = list(&slice["ports"]).filter(|value| {
                let protocol = value["protocol"].as_str().unwrap_or("TCP");
                value["name"] == port.name.as_str() && protocol == port.protocol
            });
            let numbers = joined.filter_map(|value| u16::try_from(value["port"].as_u64()?).ok());
            for number in numbers.filter(|number| *number > 0) {
                for value in list(&slice["endpoints"]) {
                    let Some(address) = ip(text(&value["addresses"][0])) else { continue };
                    let address = SocketAddr::new(address, number);
                    if address.is_ipv6() != v6 || !is_endpoint(address.ip()) || self.is_loop(port, address) {
                        continue;
                    }
                    add(&mut merged, self.endpoint(value, address, index));
                }
            }
        }
        merged
    }

    fn endpoint(&self, value: &Value, address: SocketAddr, slice: usize) -> Endpoint {
        let condition = |name: &str, otherwise| value["conditions"][name].as_bool().unwrap_or(otherwise);
        let hints = |name: &str| list(&value["hints"][name]).map(|hint| text(&hint["name"]).to_owned()).collect();
        Endpoint {
            address,
            slice,
            ready: condition("ready", true),
            serving: condition("serving", true),
            terminating: condition("terminating", false),
            local: value["nodeName"] == self.node_name.as_str(),
            zones: hints("forZones"),
            nodes: hints("forNodes"),
        }
    }

    /// An endpoint in a Service range, or one that is a frontend of its own Service, is none.
    fn is_loop(&self, port: &Port, endpoint: SocketAddr) -> bool {
        let (address, number) = (endpoint.ip(), u64::from(endpoint.port()));
        let own = self.ports.iter().filter(|other| other.service == port.service);
        contains(&self.service_ranges, address)
            || own.filter(|other| other.cluster_ip.is_ipv6() == address.is_ipv6()).any(|other| {
                let same = other.protocol == port.protocol;
                other.cluster_ip == address
                    || (same && other.number == number && other.addresses().any(|own| own == address))
                    || (same && other.node_port == number && self.serves_node_ports(address, address))
            })
    }
}

/// Section 2, duplicates: a live endpoint hides a terminating one. Else the older slice wins, and in one slice the last live
/// entry.
fn add(merged: &mut Vec<Endpoint>, new: Endpoint) {
    match merged.iter_mut().find(|old| old.address == new.address) {
        Some(old) if !new.terminating && (old.terminating || old.slice == new.slice) => *old = new,
        Some(_) => {}
        None => merged.push(new),
    }
}
