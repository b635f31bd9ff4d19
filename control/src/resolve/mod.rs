//! Resolution: one Service and its EndpointSlices, as this node sees them, into plain data for the routing table. Pure:
//! no I/O, no clock, and it cannot fail; what is wrong with an object becomes a [`Problem`].

pub mod advice;
mod affinity;
mod annotations;
mod draining;
mod endpoints;
mod frontends;
mod load_balancer;
pub mod names;
mod node_port;
mod problems;
#[cfg(test)]
mod testing;
mod topology;
mod traffic_policy;

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::{Balancing, DrainTimeout, PortSpec, ServiceSpec};

use crate::config::PortRange;
use crate::health_check::HealthCheck;
use crate::node::NodeFacts;
use crate::object::name_of;
use crate::problem::Problem;
use problems::Problems;

/// What of the configuration the rules depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Serve the Services with this `service-proxy-name`; empty: those without the label.
    pub service_proxy_name: String,
    /// Endpoint selection where a Service does not choose.
    pub balancing: Balancing,
    /// Whether a new connection that its endpoint does not take is tried at another, where a Service does not say.
    pub retry: bool,
    /// How long an endpoint that leaves without having been terminating keeps its flows, where a Service does not say.
    pub drain_timeout: DrainTimeout,
    /// All Service ranges in force. No endpoint may be inside: it would be a Service that stands for a Service.
    pub service_cidrs: Vec<IpNet>,
    /// Addresses on which node ports answer. An endpoint there, at a node port of its Service, would be a loop.
    pub node_port_addresses: Vec<IpAddr>,
    /// Node ports outside are not caught by the packet path.
    pub node_port_range: PortRange,
    /// Objects are as people write them: where the API server would fill in a default, so do the rules.
    pub fill_in_defaults: bool,
}

/// What became of a Service.
#[derive(Clone, Debug, Default)]
pub struct Resolved {
    /// What to serve; nothing when the Service is not for us (headless, ExternalName, another proxy's).
    pub spec: Option<ServiceSpec>,
    /// What load balancers may ask about it (`spec.healthCheckNodePort`).
    pub health_check: Option<HealthCheck>,
    /// What is wrong with it or its slices. Objects are named; origins are the caller's to add.
    pub problems: Vec<Problem>,
}

/// Resolves one Service.
#[must_use]
pub fn resolve<'s>(
    service: &Service,
    slices: impl IntoIterator<Item = &'s EndpointSlice>,
    node: &NodeFacts,
    rules: &Rules,
) -> Resolved {
    if !frontends::is_ours(service, rules) {
        return Resolved::default();
    }
    let name = name_of(&service.metadata);
    let mut problems = Problems::new(&name);
    let Some(spec) = &service.spec else {
        problems.error("spec", "is missing");
        return Resolved { problems: problems.into_list(), ..Resolved::default() };
    };
    let cluster_ips = frontends::cluster_ips(spec, &mut problems);
    if cluster_ips.is_empty() {
        return Resolved { problems: problems.into_list(), ..Resolved::default() };
    }
    let service_ports = frontends::ports(spec, rules, &mut problems);
    let external_ips = frontends::external_ips(spec, &mut problems);
    let vips = load_balancer::vips(service.status.as_ref(), &mut problems);
    let source_ranges = load_balancer::source_ranges(spec, &mut problems);
    let policies = traffic_policy::Policies::new(spec, &mut problems);
    let affinity = affinity::timeout(spec, &mut problems);
    let balancing = annotations::balancing(&service.metadata, &mut problems);
    let retry = annotations::retry(&service.metadata, rules.retry, &mut problems);
    let drain_timeout = annotations::drain_timeout(&service.metadata, rules.drain_timeout, &mut problems);
    let hold = annotations::hold(&service.metadata, &mut problems);
    let slices = endpoints::in_force(slices);
    endpoints::report_types(&slices, &mut problems);
    let mut ports = Vec::with_capacity(service_ports.len() * cluster_ips.len());
    let mut local_ready = [None, None];
    for (family, cluster_ip) in cluster_ips {
        let of_family = |addresses: &[IpAddr]| -> Vec<IpAddr> {
            addresses.iter().copied().filter(|address| Family::of(*address) == family).collect()
        };
        let (external_ips, vips) = (of_family(&external_ips), of_family(&vips));
        let ranges: Vec<IpNet> =
            source_ranges.iter().copied().filter(|range| Family::of(range.addr()) == family).collect();
        let own = endpoints::OwnFrontends {
            cluster_ip,
            addresses: vips.iter().chain(&external_ips).copied().collect(),
            ports: &service_ports,
            node_port_addresses: &rules.node_port_addresses,
        };
        let candidates = endpoints::Candidates::new(&slices, family, node, rules, &own, &mut problems);
        local_ready[family as usize] = Some(candidates.local_ready());
        for port in &service_ports {
            let endpoints = candidates.of_port(port.name, port.protocol, &own, &mut problems);
            let reaches_outside = port.node_port.is_some() || !vips.is_empty() || !external_ips.is_empty();
            let lists = policies.lists(&endpoints, node, reaches_outside);
            ports.push(PortSpec {
                name: port.name.to_owned(),
                protocol: port.protocol,
                number: port.number,
                family,
                cluster_ip,
                node_port: port.node_port,
                load_balancer_ips: vips.clone(),
                external_ips: external_ips.clone(),
                source_ranges: ranges.clone(),
                source_ranges_admit_vips: load_balancer::admit_vips(&ranges, node),
                internal_policy: policies.internal,
                external_policy: policies.external,
                affinity,
                balancing: balancing.unwrap_or_else(|| annotations::default_balancing(rules.balancing, port.protocol)),
                cluster: lists.cluster,
                local: lists.local,
                has_any_endpoint: lists.has_any,
                endpoints: endpoints.iter().map(endpoints::Merged::spec).collect(),
                retry,
                drain_timeout,
                hold,
            });
        }
    }
    let created = service.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
    let problems = problems.into_list();
    let health_check = load_balancer::health_check_port(spec, policies.external)
        .map(|port| HealthCheck { port, local_endpoints: local_ready });
    Resolved { spec: Some(ServiceSpec { name, created, ports }), health_check, problems }
}
