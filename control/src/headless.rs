//! Virtual headless Services, and the Service whose endpoint is our responder: what they are to the packet path.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ahash::AHashMap;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_dataplane::net::{Family, Protocol};
use sluice_dataplane::table::{EndpointList, EndpointSpec, PortSpec, ServiceName, ServiceSpec};

use crate::config::{Dns, Headless};
use crate::local::allocator::{Allocator, Holder};
use crate::local::frontends::candidates;
use crate::object::HEADLESS_LABEL;
use crate::problem::Problem;
use crate::resolve::names::is_headless;
use crate::store::Store;

/// `plain` or `virtual`.
const ANNOTATION: &str = "sluice.dev/headless";

/// Addresses of virtual headless Services: derived from their names, the same on every node and after every restart unless
/// two want one.
#[derive(Debug)]
pub struct VirtualAddresses {
    ranges: Vec<IpNet>,
    default: Headless,
    pool: Allocator<IpAddr>,
    held: AHashMap<ServiceName, Vec<IpAddr>>,
    problems: AHashMap<ServiceName, Problem>,
}

impl VirtualAddresses {
    /// Nobody has one yet.
    #[must_use]
    pub fn new(config: &Dns) -> Self {
        let (ranges, default) = (config.virtual_cidrs.clone(), config.headless);
        Self { ranges, default, pool: Allocator::default(), held: AHashMap::new(), problems: AHashMap::new() }
    }

    /// Looks at a Service again.
    pub fn update(&mut self, name: &ServiceName, store: &Store) {
        self.held.remove(name);
        self.problems.remove(name);
        let families = match store.service(name) {
            Some(service) => self.families(name, &service.object, store),
            None => Vec::new(),
        };
        let parts: Vec<String> = families.iter().map(Family::to_string).collect();
        self.pool.keep_only(name, &parts);
        let mut addresses = Vec::new();
        for (family, part) in families.into_iter().zip(parts) {
            let holder = Holder { service: name.clone(), part };
            let ranges = self.ranges.iter().filter(|range| Family::of(range.addr()) == family);
            let all = ranges.flat_map(|range| candidates(&holder, *range));
            addresses.extend(self.pool.allocate(holder.clone(), all));
        }
        if !addresses.is_empty() {
            self.held.insert(name.clone(), addresses);
        }
    }

    /// Addresses of a Service that has some.
    #[must_use]
    pub fn of(&self, name: &ServiceName) -> &[IpAddr] {
        self.held.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    /// What is wrong with annotations.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values()
    }

    /// Families in which a Service is to have an address.
    fn families(&mut self, name: &ServiceName, service: &Service, store: &Store) -> Vec<Family> {
        let Some(spec) = service.spec.as_ref().filter(|spec| is_headless(spec)) else { return Vec::new() };
        let annotation = service.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION));
        let mode = match annotation.map(String::as_str) {
            None => self.default,
            Some("plain") => Headless::Plain,
            Some("virtual") => Headless::Virtual,
            Some(other) => {
                let message = format!("{other:?} is not known: use plain or virtual");
                let problem = Problem::error(format!("metadata.annotations[{ANNOTATION}]"), message);
                self.problems.insert(name.clone(), problem.about(format!("Service {name}")));
                self.default
            }
        };
        let has_ports = spec.ports.as_ref().is_some_and(|ports| !ports.is_empty())
            || store.slices(name).any(|slice| slice.object.ports.as_ref().is_some_and(|ports| !ports.is_empty()));
        if mode == Headless::Plain || !has_ports {
            return Vec::new();
        }
        let declared: Vec<&str> = spec.ip_families.iter().flatten().map(String::as_str).collect();
        let is_wanted = |family: &Family| match &declared[..] {
            [] => {
                let known = family.to_string();
                *family == Family::V4 || store.slices(name).any(|slice| slice.object.address_type == known)
            }
            declared => declared.contains(&&*family.to_string()),
        };
        let has_range = |family: &Family| self.ranges.iter().any(|range| Family::of(range.addr()) == *family);
        Family::BOTH.into_iter().filter(|family| is_wanted(family) && has_range(family)).collect()
    }
}

/// A headless Service with addresses as an ordinary one, and its slices as an ordinary one's.
#[must_use]
pub fn as_ordinary(
    service: &Service,
    slices: &[Arc<EndpointSlice>],
    addresses: &[IpAddr],
) -> (Service, Vec<EndpointSlice>) {
    let mut service = service.clone();
    let spec = service.spec.get_or_insert_default();
    let text: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    spec.cluster_ip = text.first().cloned();
    spec.cluster_ips = Some(text);
    spec.ip_families = Some(addresses.iter().map(|address| Family::of(*address).to_string()).collect());
    spec.type_ = Some("ClusterIP".to_owned());
    if spec.ports.as_ref().is_none_or(Vec::is_empty) {
        let mut ports: Vec<ServicePort> = Vec::new();
        for port in slices.iter().flat_map(|slice| slice.ports.iter().flatten()) {
            let Some(number) = port.port else { continue };
            if ports.iter().all(|known| known.name != port.name || known.protocol != port.protocol) {
                let (name, protocol) = (port.name.clone(), port.protocol.clone());
                ports.push(ServicePort { name, protocol, port: number, ..ServicePort::default() });
            }
        }
        spec.ports = Some(ports);
    }
    service.metadata.labels.iter_mut().for_each(|labels| drop(labels.remove(HEADLESS_LABEL)));
    let ordinary = |slice: &Arc<EndpointSlice>| {
        let mut slice = (**slice).clone();
        slice.metadata.labels.iter_mut().for_each(|labels| drop(labels.remove(HEADLESS_LABEL)));
        slice
    };
    (service, slices.iter().map(ordinary).collect())
}

/// Makes the responder the one endpoint of a Service, in the families and protocols in which it answers.
pub fn serve_names(spec: &mut ServiceSpec, listen: &[SocketAddr]) {
    for port in &mut spec.ports {
        let own = listen.iter().find(|address| Family::of(address.ip()) == port.family);
        let own = own.filter(|_| matches!(port.protocol, Protocol::Tcp | Protocol::Udp)).copied();
        let list = |why: &str| EndpointList { addresses: own.into_iter().collect(), why: why.into() };
        port.cluster = list("names are answered on this node");
        port.local = list("names are answered on this node");
        port.endpoints = own.into_iter().map(EndpointSpec::ready).collect();
        port.has_any_endpoint = own.is_some();
    }
}

/// Serves the ports of the endpoints too: clients of a headless Service dial those.
pub fn serve_target_ports(spec: &mut ServiceSpec) {
    let mut more: Vec<PortSpec> = Vec::new();
    for port in &spec.ports {
        let mut targets: Vec<u16> = port.endpoints.iter().map(|endpoint| endpoint.address.port()).collect();
        targets.sort_unstable();
        targets.dedup();
        for target in targets {
            let same = |other: &PortSpec| {
                other.family == port.family && other.protocol == port.protocol && other.number == target
            };
            if !spec.ports.iter().chain(&more).any(same) {
                more.push(PortSpec { name: format!("{}@{target}", port.name), number: target, ..port.clone() });
            }
        }
    }
    spec.ports.extend(more);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};
    use sluice_dataplane::net::Protocol;
    use sluice_dataplane::table::Slots;

    use crate::config::{Config, Dns};
    use crate::object::Object;
    use crate::problem::Origin;
    use crate::publish::Publisher;
    use crate::source::{Change, Update};

    use super::*;

    fn publisher(dns: Dns, objects: &[Value]) -> Publisher {
        let config = Config { dns: Some(dns), local_controllers: false, ..Config::default() };
        let mut publisher = Publisher::new(config, vec!["192.168.0.2".parse().unwrap()], Arc::new(Slots::new(1)));
        let object = |value: &Value| match value["kind"].as_str() {
            Some("Service") => Object::Service(Arc::new(serde_json::from_value(value.clone()).unwrap())),
            _ => Object::EndpointSlice(Arc::new(serde_json::from_value(value.clone()).unwrap())),
        };
        let origin = || Origin::File { path: Path::new("a.yaml").into(), document: 1 };
        let changes = objects.iter().map(|value| Change::Apply(object(value), origin())).collect();
        publisher.update(Update { changes, ..Update::default() });
        publisher
    }

    fn objects(annotation: Value) -> Vec<Value> {
        let labels = json!({"kubernetes.io/service-name": "db", "service.kubernetes.io/headless": ""});
        vec![
            json!({"kind": "Service", "metadata": {"namespace": "ns", "name": "db", "annotations": {ANNOTATION: annotation}},
                "spec": {"clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": ["IPv4"],
                    "ports": [{"name": "sql", "port": 5432, "targetPort": 15432, "protocol": "TCP"}]}}),
            json!({"kind": "EndpointSlice", "metadata": {"namespace": "ns", "name": "db-1", "labels": labels},
                "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.0.1"]}, {"addresses": ["10.244.0.2"]}],
                "ports": [{"name": "sql", "port": 15432, "protocol": "TCP"}]}),
        ]
    }

    #[test]
    fn a_virtual_service_has_frontends_and_a_plain_one_has_none() {
        for (annotation, default, frontends, problems) in [
            ("virtual", Headless::Plain, 2, 0),
            ("plain", Headless::Virtual, 0, 0),
            ("both", Headless::Virtual, 2, 1),
            ("both", Headless::Plain, 0, 1),
        ] {
            let dns = Dns { headless: default, ..Dns::default() };
            let mut publisher = publisher(dns, &objects(json!(annotation)));
            let table = publisher.table();
            assert_eq!((table.len(), publisher.problems().len()), (frontends, problems), "{annotation} {default:?}");
            for port in table.frontends().map(|frontend| &frontend.port) {
                assert!(matches!(port.number, 5432 | 15432) && port.cluster.list.len() == 2, "{port:?}");
            }
        }
    }

    #[test]
    fn the_address_follows_from_the_name() {
        let address = || {
            let publisher = publisher(Dns::default(), &objects(json!("virtual")));
            publisher.builder().services().next().unwrap().ports[0].cluster_ip
        };
        let range: IpNet = "240.241.0.0/16".parse().unwrap();
        assert_eq!(address(), address());
        assert!(range.contains(&address()));
    }

    #[test]
    fn the_responder_stands_behind_the_service_that_is_named() {
        let kube_dns = json!({"kind": "Service", "metadata": {"namespace": "kube-system", "name": "kube-dns"},
            "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "tcp", "port": 53, "protocol": "TCP"},
                {"name": "sctp", "port": 53, "protocol": "SCTP"}]}});
        let dns = Dns { service: Some("kube-system/kube-dns".to_owned()), ..Dns::default() };
        let mut publisher = publisher(dns, &[kube_dns]);
        for port in publisher.table().frontends().map(|frontend| &frontend.port) {
            let endpoints: Vec<String> = port.cluster.list.iter().map(|it| it.address.to_string()).collect();
            let expected: &[&str] = if port.protocol == Protocol::Sctp { &[] } else { &["169.254.20.10:53"] };
            assert_eq!(endpoints, expected, "{}", port.protocol);
        }
    }
}
