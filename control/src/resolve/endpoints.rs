//! Endpoints: slices merged into one list for each Service port. Joined by port name and protocol; the number is the
//! slice's, never `targetPort`. Of each endpoint only the first address counts.

use std::net::{IpAddr, SocketAddr};

use ahash::{AHashMap, AHashSet};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use sluice_dataplane::net::{Family, Protocol};

use super::Rules;
use super::frontends::{ServicePort, protocol};
use super::problems::Problems;
use crate::address;
use crate::node::NodeFacts;
use crate::object::{HEADLESS_LABEL, label};

/// An entry of a slice that may serve, whatever the port.
#[derive(Debug)]
pub(super) struct Candidate<'s> {
    address: IpAddr,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// On this node.
    pub(super) local: bool,
    pub(super) endpoint: &'s Endpoint,
    index: usize,
    /// Its address is also one of the Service's frontends, or of the node: with the wrong port it is a loop.
    may_loop: bool,
}

impl Candidate<'_> {
    /// It may take new flows where none is ready (KEP-1669).
    pub(super) fn drains(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }
}

/// An endpoint of a Service port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Merged<'c, 's> {
    pub(super) address: SocketAddr,
    pub(super) of: &'c Candidate<'s>,
    slice: &'s EndpointSlice,
}

/// What the Service answers on itself: an endpoint there would lead back to it.
pub(super) struct OwnFrontends<'o> {
    pub(super) cluster_ip: IpAddr,
    /// Load-balancer and external addresses of the family.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: &'o [ServicePort<'o>],
}

impl OwnFrontends<'_> {
    fn contains(&self, endpoint: SocketAddr, wanted: Protocol, node: &NodeFacts) -> bool {
        let mut ports = self.ports.iter().filter(|port| port.protocol == wanted);
        if self.addresses.contains(&endpoint.ip()) && ports.clone().any(|port| port.number == endpoint.port()) {
            return true;
        }
        node.addresses.contains(&endpoint.ip()) && ports.any(|port| port.node_port == Some(endpoint.port()))
    }
}

/// The slices that count, the oldest first: of two differing duplicates the older object's wins. Those of headless
/// Services never do.
pub(super) fn in_force<'s>(slices: impl IntoIterator<Item = &'s EndpointSlice>) -> Vec<&'s EndpointSlice> {
    let mut slices: Vec<_> =
        slices.into_iter().filter(|slice| label(&slice.metadata, HEADLESS_LABEL).is_none()).collect();
    let created = |slice: &EndpointSlice| slice.metadata.creation_timestamp.as_ref().map(|time| time.0);
    slices.sort_by_key(|slice| (created(slice).is_none(), created(slice)));
    slices
}

/// Reports slices that no family can use.
pub(super) fn report_types(slices: &[&EndpointSlice], problems: &mut Problems<'_>) {
    for slice in slices {
        match slice.address_type.as_str() {
            "IPv4" | "IPv6" => {}
            "FQDN" => problems.slice_warning(slice, "addressType", "FQDN endpoints are not served: use IPv4 or IPv6"),
            other => problems.slice_error(slice, "addressType", format!("{other:?} is neither IPv4 nor IPv6")),
        }
    }
}

/// All usable entries of the slices of one family.
pub(super) struct Candidates<'s> {
    slices: Vec<Slice<'s>>,
}

struct Slice<'s> {
    slice: &'s EndpointSlice,
    ports: Vec<(&'s str, Protocol, u16)>,
    candidates: Vec<Candidate<'s>>,
}

impl<'s> Candidates<'s> {
    pub(super) fn new(
        slices: &[&'s EndpointSlice],
        family: Family,
        node: &NodeFacts,
        rules: &Rules,
        own: &OwnFrontends<'_>,
        problems: &mut Problems<'_>,
    ) -> Self {
        let of_family = slices.iter().filter(|slice| match family {
            Family::V4 => slice.address_type == "IPv4",
            Family::V6 => slice.address_type == "IPv6",
        });
        let has_node_port = own.ports.iter().any(|port| port.node_port.is_some());
        let read = |slice: &&'s EndpointSlice| {
            let entries = slice.endpoints.as_deref().unwrap_or_default();
            let mut candidates = Vec::with_capacity(entries.len());
            for (index, endpoint) in entries.iter().enumerate() {
                let address = match first_address(endpoint, family, rules, own) {
                    Ok(address) => address,
                    Err((field, reason)) => {
                        problems.slice_error(slice, format!("endpoints[{index}].{field}"), reason);
                        continue;
                    }
                };
                let condition = |read: fn(&_) -> Option<bool>| endpoint.conditions.as_ref().and_then(read);
                candidates.push(Candidate {
                    address,
                    ready: condition(|conditions| conditions.ready).unwrap_or(true),
                    serving: condition(|conditions| conditions.serving).unwrap_or(true),
                    terminating: condition(|conditions| conditions.terminating).unwrap_or(false),
                    local: endpoint.node_name.as_deref() == Some(node.name.as_str()),
                    endpoint,
                    index,
                    may_loop: own.addresses.contains(&address) || (has_node_port && node.addresses.contains(&address)),
                });
            }
            Slice { slice, ports: slice_ports(slice, rules, problems), candidates }
        };
        Self { slices: of_family.map(read).collect() }
    }

    /// Distinct addresses of ready endpoints on this node, whatever their port.
    pub(super) fn local_ready(&self) -> usize {
        let slices = self.slices.iter().filter(|slice| !slice.ports.is_empty());
        let counts = |candidate: &&Candidate<'_>| candidate.local && candidate.ready;
        let here: AHashSet<IpAddr> =
            slices.flat_map(|slice| &slice.candidates).filter(counts).map(|candidate| candidate.address).collect();
        here.len()
    }

    /// The endpoints of a Service port, each once, in the order of the slices.
    pub(super) fn of_port(
        &self,
        name: &str,
        wanted: Protocol,
        own: &OwnFrontends<'_>,
        node: &NodeFacts,
        problems: &mut Problems<'_>,
    ) -> Vec<Merged<'_, 's>> {
        let joins = |(port, protocol, _): &&(&str, Protocol, u16)| *port == name && *protocol == wanted;
        let most = self.slices.iter().map(|slice| slice.candidates.len()).sum();
        let mut merged: Vec<Merged<'_, 's>> = Vec::with_capacity(most);
        let mut known: AHashMap<SocketAddr, usize> = AHashMap::with_capacity(most);
        for Slice { slice, ports, candidates } in &self.slices {
            for (candidate, (.., number)) in
                ports.iter().filter(joins).flat_map(|port| candidates.iter().map(move |candidate| (candidate, port)))
            {
                let address = SocketAddr::new(candidate.address, *number);
                if candidate.may_loop && own.contains(address, wanted, node) {
                    let field = format!("endpoints[{}].addresses[0]", candidate.index);
                    problems.slice_error(slice, field, format!("{address} is a frontend of the same Service: a loop"));
                    continue;
                }
                let next = Merged { address, of: candidate, slice };
                match known.entry(address) {
                    std::collections::hash_map::Entry::Vacant(entry) => {
                        entry.insert(merged.len());
                        merged.push(next);
                    }
                    std::collections::hash_map::Entry::Occupied(entry) => {
                        let first = &mut merged[*entry.get()];
                        report_difference(first, &next, problems);
                        // A terminating Pod's address may be another Pod's by now: the one that lives counts.
                        if first.of.terminating && !candidate.terminating {
                            *first = next;
                        }
                    }
                }
            }
        }
        merged
    }
}

/// Whether two entries for one endpoint say the same; a terminating one beside a live one is an ordinary sight.
fn report_difference(first: &Merged<'_, '_>, second: &Merged<'_, '_>, problems: &mut Problems<'_>) {
    let (one, other) = (first.of, second.of);
    let facts = |it: &Candidate<'_>| (it.ready, it.serving, it.terminating, it.local);
    if one.terminating != other.terminating
        || (facts(one) == facts(other) && one.endpoint.hints == other.endpoint.hints)
    {
        return;
    }
    let field = format!("endpoints[{}]", second.of.index);
    let place = format!("{}, endpoints[{}]", first.slice.metadata.name.as_deref().unwrap_or_default(), one.index);
    problems.slice_warning(
        second.slice,
        field,
        format!("{} is described differently by {place}, which counts", second.address),
    );
}

/// The one address that counts, or the field and what is wrong with it.
fn first_address(
    endpoint: &Endpoint,
    family: Family,
    rules: &Rules,
    own: &OwnFrontends<'_>,
) -> Result<IpAddr, (&'static str, String)> {
    const FIELD: &str = "addresses[0]";
    let text = endpoint.addresses.first().ok_or(("addresses", "is empty".to_owned()))?;
    let address = address::parse(text).ok_or_else(|| (FIELD, format!("{text:?} is no IP address")))?;
    let refuse = |reason: &str| Err((FIELD, format!("{text} {reason}")));
    if Family::of(address) != family {
        refuse(&format!("is not {family}, as the slice's addressType says"))
    } else if address::is_unroutable(address) || address::is_link_local(address) {
        refuse("cannot be an endpoint: it is loopback, link-local, multicast or unspecified")
    } else if address == own.cluster_ip {
        refuse("is the Service's own ClusterIP: a loop")
    } else if rules.service_cidrs.iter().any(|range| range.contains(&address)) {
        refuse("is inside a Service range: a Service cannot be the endpoint of a Service")
    } else {
        Ok(address)
    }
}

/// The ports that can be joined with.
fn slice_ports<'s>(
    slice: &'s EndpointSlice,
    rules: &Rules,
    problems: &mut Problems<'_>,
) -> Vec<(&'s str, Protocol, u16)> {
    let declared = slice.ports.as_deref().unwrap_or_default();
    let mut ports = Vec::with_capacity(declared.len());
    for (index, port) in declared.iter().enumerate() {
        let mut refuse = |field: &str, reason: String| {
            problems.slice_error(slice, format!("ports[{index}].{field}"), reason);
        };
        let name = match port.name.as_deref() {
            Some(name) => name,
            None if rules.fill_in_defaults => "",
            None => {
                refuse("name", "is missing: the port is not used; the name of an unnamed port is \"\"".to_owned());
                continue;
            }
        };
        let number = match port.port {
            None => Err("is missing, which means all ports: not supported, the port is not used".to_owned()),
            Some(number) => u16::try_from(number)
                .ok()
                .filter(|number| *number != 0)
                .ok_or_else(|| format!("{number} is no port: use 1 to 65535")),
        };
        match (number, protocol(port.protocol.as_deref())) {
            (Ok(number), Ok(protocol)) => ports.push((name, protocol, number)),
            (Err(reason), _) => refuse("port", reason),
            (_, Err(reason)) => refuse("protocol", reason),
        }
    }
    ports
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::resolve::Rules;
    use crate::resolve::testing::{
        endpoint, fields, port, resolved, resolved_by, rules, service, slice, slice_of, text,
    };

    fn cluster(slices: &[Value]) -> Vec<String> {
        text(&port(&service(json!({})), slices).cluster.addresses)
    }

    fn with(slice: &Value, pointer: &str, value: Value) -> Value {
        let mut slice = slice.clone();
        *slice.pointer_mut(pointer).unwrap() = value;
        slice
    }

    #[test]
    fn slices_join_by_port_name_and_protocol_with_their_own_numbers() {
        let slice = slice_of(&["10.0.0.1"]);
        let joined = &["10.0.0.1:8080"][..];
        for (ports, addresses, problems) in [
            (json!([{"name": "http", "port": 8080}]), joined, 0),
            (json!([{"name": "http", "port": 8080, "protocol": "TCP"}]), joined, 0),
            (json!([{"name": "http", "port": 8080, "protocol": "UDP"}]), &[], 0),
            (json!([{"name": "other", "port": 80}]), &[], 0),
            (json!([{"name": "", "port": 80}]), &[], 0),
            (json!([{"port": 80}]), &[], 1),
            (json!([{"name": "http"}]), &[], 1),
            (json!([{"name": "http", "port": 0}]), &[], 1),
            (json!([{"name": "http", "port": 70000}]), &[], 1),
            (json!([{"name": "http", "port": 80, "protocol": "QUIC"}]), &[], 1),
            (
                json!([{"name": "http", "port": 8080}, {"name": "http", "port": 8081}]),
                &["10.0.0.1:8080", "10.0.0.1:8081"],
                0,
            ),
            (json!(null), &[], 0),
        ] {
            let slices = [with(&slice, "/ports", ports.clone())];
            assert_eq!(cluster(&slices), text(addresses), "{ports}");
            assert_eq!(resolved(&service(json!({})), &slices).problems.len(), problems, "{ports}");
        }
        // targetPort is the EndpointSlice controller's matter.
        let web = service(json!({"ports": [{"name": "http", "port": 80, "targetPort": 9999}]}));
        assert_eq!(text(&port(&web, &[slice]).cluster.addresses), joined);
    }

    #[test]
    fn a_nameless_port_of_a_slice_is_unnamed_where_defaults_are_filled_in() {
        let web = service(json!({"ports": [{"port": 80}]}));
        let slices = [with(&slice_of(&["10.0.0.1"]), "/ports", json!([{"port": 8080}]))];
        let count = |rules: &Rules| resolved_by(&web, &slices, rules).spec.unwrap().ports[0].cluster.addresses.len();
        assert_eq!(count(&rules()), 0);
        assert_eq!(count(&Rules { fill_in_defaults: true, ..rules() }), 1);
    }

    #[test]
    fn some_slices_do_not_count() {
        let slice = slice_of(&["10.0.0.1"]);
        let mut headless = slice.clone();
        headless["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
        for (slice, problems) in [
            (headless, 0),
            (with(&slice, "/addressType", json!("IPv6")), 0),
            (with(&slice, "/addressType", json!("FQDN")), 1),
            (with(&slice, "/addressType", json!("IPX")), 1),
            (with(&slice, "/endpoints", json!(null)), 0),
        ] {
            let found = resolved(&service(json!({})), std::slice::from_ref(&slice));
            assert_eq!((cluster(&[slice]).len(), found.problems.len()), (0, problems), "{:?}", found.problems);
        }
    }

    #[test]
    fn only_the_first_address_counts_and_must_be_one() {
        let two = json!({"addresses": ["10.0.0.1", "10.0.0.2"]});
        assert_eq!(cluster(&[slice("web-1", &[two])]), ["10.0.0.1:8080"]);
        for bad in [
            "pod",
            "",
            "fd00::1",
            "0.0.0.0",
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "255.255.255.255",
            // Its own ClusterIP, and another address of a Service range.
            "10.96.0.1",
            "10.96.7.7",
        ] {
            let slices = [slice("web-1", &[endpoint("10.0.0.9"), json!({"addresses": [bad]})])];
            assert_eq!(cluster(&slices), ["10.0.0.9:8080"], "{bad}");
            let found = fields(&resolved(&service(json!({})), &slices));
            assert_eq!(found, ["EndpointSlice ns/web-1: endpoints[1].addresses[0]"], "{bad}");
        }
        let found = resolved(&service(json!({})), &[slice("web-1", &[json!({"addresses": []})])]);
        assert_eq!(fields(&found), ["EndpointSlice ns/web-1: endpoints[0].addresses"]);
        assert_eq!(cluster(&[slice_of(&["010.00.0.001"])]), ["10.0.0.1:8080"]);
    }

    #[test]
    fn an_endpoint_on_a_frontend_of_its_own_service_is_a_loop() {
        let spec = json!({
            "type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "x", "port": 8080, "nodePort": 30081}],
            "externalIPs": ["198.51.100.1"],
        });
        for (address, number, served) in [
            ("192.168.0.2", 8080, true),
            ("192.168.0.2", 30080, false),
            ("192.168.0.3", 30081, false),
            ("192.168.0.4", 30080, true),
            ("198.51.100.1", 8080, false),
            ("198.51.100.1", 80, false),
            ("198.51.100.1", 81, true),
        ] {
            let slices = [with(&slice_of(&[address]), "/ports", json!([{"name": "http", "port": number}]))];
            let found = resolved(&service(spec.clone()), &slices);
            let count = found.spec.as_ref().unwrap().ports[0].cluster.addresses.len();
            assert_eq!((count == 1, found.problems.is_empty()), (served, served), "{address}:{number}");
        }
    }

    #[test]
    fn of_duplicates_the_one_that_lives_counts_then_the_older() {
        let gone = "10.0.0.1 unready unserving terminating";
        let (a, b) = (slice_of(&[gone]), slice("web-2", &[endpoint("10.0.0.1")]));
        assert_eq!(cluster(&[a.clone(), b.clone()]), ["10.0.0.1:8080"]);
        assert_eq!(cluster(&[b, a]), ["10.0.0.1:8080"]);
        let aged = |slice: &Value, created: &str| {
            let mut slice = slice.clone();
            slice["metadata"]["creationTimestamp"] = json!(created);
            slice
        };
        let (ready, unready) = (slice_of(&["10.0.0.1"]), slice("web-2", &[endpoint("10.0.0.1 unready")]));
        let (old, young) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        for (slices, count) in [
            ([aged(&ready, old), aged(&unready, young)], 1),
            ([aged(&ready, young), aged(&unready, old)], 0),
            ([ready.clone(), aged(&unready, young)], 0),
            ([ready.clone(), unready.clone()], 1),
        ] {
            assert_eq!(cluster(&slices).len(), count);
            assert_eq!(resolved(&service(json!({})), &slices).problems.len(), 1, "the other is reported");
        }
        let same = [slice_of(&["10.0.0.1", "10.0.0.1"]), slice("web-2", &[endpoint("10.0.0.1")])];
        assert_eq!((cluster(&same).len(), resolved(&service(json!({})), &same).problems.len()), (1, 0));
    }

    #[test]
    fn serving_endpoints_are_known_whatever_list_they_are_in() {
        let slices =
            [slice_of(&["10.0.0.1", "10.0.0.2 unready", "10.0.0.3 unready unserving", "10.0.0.4 terminating unready"])];
        let serving = port(&service(json!({})), &slices).serving;
        assert_eq!(text(&serving), ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.4:8080"]);
    }

    #[test]
    fn five_thousand_endpoints_in_fifty_slices_are_merged() {
        let address = |number: usize| format!("10.1.{}.{}", number / 250, number % 250 + 1);
        let slices: Vec<Value> = (0..50)
            .map(|index| {
                let endpoints: Vec<Value> = (0..100).map(|of| endpoint(&address(index * 100 + of))).collect();
                slice(&format!("web-{index}"), &endpoints)
            })
            .collect();
        let port = port(&service(json!({})), &slices);
        assert_eq!(
            (port.cluster.addresses.len(), port.cluster.why.as_str()),
            (5000, "5000 of 5000 endpoints are ready")
        );
    }
}
