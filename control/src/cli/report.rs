//! What `sluice check` reports: every Service with its frontends and endpoints, and every problem.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use k8s_openapi::api::core::v1::{Service, ServiceSpec as ServiceFields};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::{PortSpec, ServiceName};

use crate::problem::{Origin, Problem, Severity};
use crate::publish::Publisher;

/// Everything that manifests say.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub(super) services: Vec<ServiceReport>,
    pub(super) problems: Vec<Problem>,
    pub(super) skipped: BTreeMap<String, u64>,
    pub(super) errors: usize,
    pub(super) warnings: usize,
}

/// One Service.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceReport {
    pub(super) service: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) made_up: Vec<&'static str>,
    /// Why it has no frontends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) note: Option<String>,
    pub(super) ports: Vec<PortReport>,
    pub(super) origin: Origin,
}

/// One port of a Service in one family.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PortReport {
    pub(super) name: String,
    pub(super) port: i32,
    pub(super) protocol: String,
    pub(super) family: Option<Family>,
    pub(super) frontends: Vec<FrontendReport>,
    pub(super) endpoints: Option<EndpointsReport>,
}

/// One frontend.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FrontendReport {
    /// The field of the Service that it comes from.
    pub(super) field: &'static str,
    /// Address and port; of a node port only `:port`.
    pub(super) address: String,
}

/// Endpoints of a port.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointsReport {
    pub(super) ready: usize,
    pub(super) total: usize,
    pub(super) addresses: Vec<String>,
}

impl Report {
    pub(super) fn new(publisher: &Publisher) -> Self {
        let problems = publisher.problems();
        let errors = problems.iter().filter(|problem| problem.severity == Severity::Error).count();
        let specs: BTreeMap<_, _> = publisher.builder().services().map(|spec| (&spec.name, &spec.ports)).collect();
        let services: BTreeMap<_, _> = publisher.store().services().collect();
        let services = services.into_iter().map(|(name, stored)| {
            let slices: Vec<&EndpointSlice> = publisher.store().slices(name).map(|slice| &*slice.object).collect();
            let ports = specs.get(name).map(|ports| ports.as_slice());
            let made_up = publisher.made_up(name).to_vec();
            ServiceReport::new(name, &stored.object, ports, &slices, made_up, stored.origin.clone())
        });
        let services = services.collect();
        let warnings = problems.len() - errors;
        Self { services, problems, skipped: publisher.skipped().clone(), errors, warnings }
    }

    /// With what an administrator may want to know besides.
    pub(super) fn with_advice(mut self, advice: Vec<Problem>) -> Self {
        self.warnings += advice.len();
        self.problems.extend(advice);
        self.problems.sort();
        self
    }

    /// One line.
    pub(super) fn summary(&self) -> String {
        let ports = self.services.iter().flat_map(|service| &service.ports);
        let frontends: usize = ports.map(|port| port.frontends.len()).sum();
        let count = |number: usize, word: &str| format!("{number} {word}{}", if number == 1 { "" } else { "s" });
        let (services, skipped) = (self.services.len(), self.skipped.values().sum::<u64>());
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        let parts = [
            count(services, "Service"),
            count(frontends, "frontend"),
            count(self.errors, "error"),
            count(self.warnings, "warning"),
            format!("{} of other kinds", count(skipped, "object")),
        ];
        parts.join(", ")
    }
}

impl ServiceReport {
    fn new(
        name: &ServiceName,
        service: &Service,
        served: Option<&[PortSpec]>,
        slices: &[&EndpointSlice],
        made_up: Vec<&'static str>,
        origin: Origin,
    ) -> Self {
        let empty = ServiceFields::default();
        let spec = service.spec.as_ref().unwrap_or(&empty);
        let kind = spec.type_.clone().unwrap_or_else(|| "ClusterIP".to_owned());
        let is_headless = spec.cluster_ip.as_deref() == Some("None");
        let note = match (&*kind, &spec.external_name) {
            ("ExternalName", Some(target)) => Some(format!("alias of {target}")),
            _ if is_headless => Some("headless".to_owned()),
            _ if served.is_none() => Some("not served".to_owned()),
            _ => None,
        };
        let ports = match served {
            Some(ports) => ports.iter().map(|port| PortReport::served(port, slices)).collect(),
            None => declared_ports(spec, slices),
        };
        Self { service: name.to_string(), kind, made_up, note, ports, origin }
    }

    pub(super) fn is_made_up(&self, field: &str) -> bool {
        self.made_up.contains(&field)
    }
}

/// Ports of a Service that is not served, in each of its families.
fn declared_ports(spec: &ServiceFields, slices: &[&EndpointSlice]) -> Vec<PortReport> {
    let is_named = |family: &Family| spec.ip_families.iter().flatten().any(|name| *name == family.to_string());
    let ports = spec.ports.iter().flatten().flat_map(|port| {
        Family::BOTH.into_iter().filter(is_named).map(move |family| {
            let name = port.name.clone().unwrap_or_default();
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            let endpoints = Some(EndpointsReport::new(slices, family, &name, &protocol));
            PortReport { name, port: port.port, protocol, family: Some(family), frontends: Vec::new(), endpoints }
        })
    });
    ports.collect()
}

impl PortReport {
    fn served(port: &PortSpec, slices: &[&EndpointSlice]) -> Self {
        let at = |field, address| FrontendReport { field, address: SocketAddr::new(address, port.number).to_string() };
        let mut frontends = vec![at("clusterIP", port.cluster_ip)];
        frontends
            .extend(port.node_port.map(|number| FrontendReport { field: "nodePort", address: format!(":{number}") }));
        frontends.extend(port.load_balancer_ips.iter().map(|address| at("loadBalancer", *address)));
        frontends.extend(port.external_ips.iter().map(|address| at("externalIPs", *address)));
        let protocol = port.protocol.to_string();
        let endpoints = Some(EndpointsReport::new(slices, port.family, &port.name, &protocol));
        let number = i32::from(port.number);
        Self { name: port.name.clone(), port: number, protocol, family: Some(port.family), frontends, endpoints }
    }

    /// `http 80/TCP`.
    pub(super) fn title(&self) -> String {
        match (self.port, &*self.name) {
            (0, _) => "-".to_owned(),
            (port, "") => format!("{port}/{}", self.protocol),
            (port, name) => format!("{name} {port}/{}", self.protocol),
        }
    }
}

impl EndpointsReport {
    fn new(slices: &[&EndpointSlice], family: Family, port: &str, protocol: &str) -> Self {
        let (mut all, mut ready) = (BTreeSet::new(), BTreeSet::new());
        for slice in slices.iter().filter(|slice| slice.address_type == family.to_string()) {
            let numbers = slice.ports.iter().flatten().filter(|candidate| {
                candidate.name.as_deref().unwrap_or_default() == port
                    && candidate.protocol.as_deref().unwrap_or("TCP") == protocol
            });
            for number in numbers.filter_map(|candidate| u16::try_from(candidate.port?).ok()) {
                for endpoint in slice.endpoints.iter().flatten() {
                    let address = endpoint.addresses.first().and_then(|address| address.parse().ok());
                    let Some(address) = address.map(|address| SocketAddr::new(address, number)) else { continue };
                    all.insert(address);
                    if endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false) {
                        ready.insert(address);
                    }
                }
            }
        }
        let addresses = all.iter().map(SocketAddr::to_string).collect();
        Self { ready: ready.len(), total: all.len(), addresses }
    }
}
