//! What a name is: lookups in the zone, whatever type of records is asked for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::{Name, RData};

use super::answer::Record;
use super::labels::Labels;
use super::service::{Compiled, RecordSet};
use super::spec::{PodNames, Stands};
use super::zone::Zone;

/// What a name is.
pub(super) enum Found<'z> {
    /// It does not exist.
    Nothing,
    /// It exists, and has no records.
    Empty,
    Set(&'z RecordSet),
    Made(RecordSet),
    Alias(&'z str),
    Address(IpAddr),
    /// The responder itself.
    Own,
    Version,
}

impl Zone {
    /// Names of an address: the Service whose ClusterIP it is, or else those of endpoints.
    pub(super) fn reverse(&self, address: IpAddr) -> Vec<Record> {
        let name = |labels: &[&str]| {
            let name = Name::from_labels(labels.iter().map(|label| label.as_bytes()));
            name.and_then(|name| name.append_domain(&self.settings.primary)).ok()
        };
        let exposed = |service: &&Arc<Compiled>| self.admits(service.spec.name.namespace.as_bytes());
        let mut services = self.cluster_ips.get(&address).into_iter().flat_map(|services| services.iter());
        if let Some(service) = services.find(exposed) {
            let ServiceParts { name: service, namespace } = parts(service);
            let name = name(&[service, namespace, "svc"]);
            return name.map(|name| self.record(RData::PTR(PTR(name)))).into_iter().collect();
        }
        let endpoints = self.endpoints.get(&address).into_iter().flat_map(|endpoints| endpoints.iter());
        let endpoints = endpoints.filter(|(service, _)| exposed(&service)).filter_map(|(service, label)| {
            let ServiceParts { name: service, namespace } = parts(service);
            Some(self.record(RData::PTR(PTR(name(&[label, service, namespace, "svc"])?))))
        });
        endpoints.collect()
    }

    /// What the name is, `left` of whose labels stand before the zone.
    pub(super) fn find(&self, labels: &Labels, left: usize) -> Found<'_> {
        let label = |from_right: usize| labels.get(left - from_right);
        if left == 0 {
            return Found::Empty;
        }
        if labels.is_reverse() {
            return Found::Nothing;
        }
        match (label(1), left) {
            (b"svc" | b"pod", 1) => Found::Empty,
            (b"dns-version", 1) => Found::Version,
            (b"dns", 2) if label(2) == b"ns" => Found::Own,
            (b"svc" | b"pod", _) if !self.exposes(label(2)) => Found::Nothing,
            (b"pod", _) if self.settings.spec.pods == PodNames::Disabled => Found::Nothing,
            (b"svc" | b"pod", 2) => Found::Empty,
            (b"pod", 3) => self.find_pod(label(3), label(2)),
            (b"svc", 3..=5) => match self.service(label(3), label(2)) {
                None => Found::Nothing,
                Some(service) => {
                    let rest: Vec<&[u8]> = (4..=left).map(label).collect();
                    self.find_service(service, &rest)
                }
            },
            _ => Found::Nothing,
        }
    }

    /// What a name of a Service is. `rest`: labels before the Service's, from the right.
    fn find_service<'z>(&self, service: &'z Compiled, rest: &[&[u8]]) -> Found<'z> {
        let stands = &service.spec.stands;
        match (stands, rest) {
            (Stands::Addresses { .. }, _)
                if self.settings.spec.ignore_empty_service && service.endpoints.is_empty() =>
            {
                return Found::Nothing;
            }
            (Stands::Nothing, _) => return Found::Nothing,
            (Stands::Name(name), []) if name.parse::<IpAddr>().is_err() && !name.is_empty() => {
                return Found::Alias(name);
            }
            (Stands::Name(_), _) => return Found::Nothing,
            (Stands::Addresses { addresses, .. }, []) if addresses.is_empty() => return Found::Empty,
            (Stands::Addresses { .. } | Stands::Endpoints { .. }, _) => {}
        }
        match rest {
            [] => {
                let instead = matches!(stands, Stands::Endpoints { instead } if !instead.is_empty());
                if service.all.is_empty && !instead { Found::Nothing } else { Found::Set(&service.all) }
            }
            [endpoint] => match service.endpoint(endpoint) {
                set if set.is_empty => Found::Nothing,
                set => Found::Made(set),
            },
            [protocol, port, ..] => {
                let bare = |label: &'_ [u8]| label.strip_prefix(b"_").map(<[u8]>::to_vec).unwrap_or(label.to_vec());
                service.port(&bare(port), &bare(protocol)).map_or(Found::Nothing, Found::Set)
            }
        }
    }

    /// An address written with dashes.
    fn find_pod(&self, label: &[u8], namespace: &[u8]) -> Found<'_> {
        let Ok(text) = std::str::from_utf8(label) else { return Found::Nothing };
        let is_v4 = text.bytes().filter(|byte| *byte == b'-').count() == 3 && !text.contains("--");
        let address = match is_v4 {
            true => text.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4),
            false => text.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6),
        };
        let Ok(address) = address else { return Found::Nothing };
        let is_there = match self.settings.spec.pods {
            PodNames::Disabled => false,
            PodNames::Insecure => true,
            PodNames::Verified => {
                self.pods.get(&address).is_some_and(|namespaces| namespaces.iter().any(|other| **other == *namespace))
            }
        };
        if is_there { Found::Address(address) } else { Found::Nothing }
    }

    /// Services whose endpoint the responder is, with the names and addresses of each; or none.
    pub(super) fn own_names(&self, origin: &Name) -> Vec<(Name, IpAddr)> {
        let listen = &self.settings.spec.listen;
        let mut names = Vec::new();
        let mut found = false;
        let name = |labels: &[&str]| {
            Name::from_labels(labels.iter().map(|label| label.as_bytes()))
                .and_then(|name| name.append_domain(origin))
                .ok()
        };
        for (service, _) in listen.iter().filter_map(|own| self.endpoints.get(own)).flat_map(|services| services.iter())
        {
            found = true;
            let ServiceParts { name: service_name, namespace } = parts(service);
            match &service.spec.stands {
                Stands::Addresses { addresses, .. } => {
                    let whole = name(&[service_name, namespace, "svc"]);
                    names
                        .extend(whole.into_iter().flat_map(|name| addresses.iter().map(move |ip| (name.clone(), *ip))));
                }
                Stands::Endpoints { .. } => {
                    names.extend(service.endpoints.iter().filter_map(|entry| {
                        Some((name(&[&entry.label, service_name, namespace, "svc"])?, entry.address))
                    }))
                }
                Stands::Name(_) | Stands::Nothing => {}
            }
        }
        if !found && let Some(whole) = name(&["ns", "dns"]) {
            names.extend(listen.iter().map(|own| (whole.clone(), *own)));
        }
        names.sort();
        names.dedup();
        names
    }
}

struct ServiceParts<'s> {
    name: &'s str,
    namespace: &'s str,
}

fn parts(service: &Compiled) -> ServiceParts<'_> {
    ServiceParts { name: &service.spec.name.name, namespace: &service.spec.name.namespace }
}
