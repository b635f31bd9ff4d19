//! Endpoints: slices merged into one list for each Service port. Joined by port name and protocol; the number is the
//! slice's, never `targetPort`. Of each endpoint only the first address counts.

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};

use ahash::{AHashMap, AHashSet};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use sluice_dataplane::net::{Family, Protocol};
use sluice_dataplane::table::{Condition, EndpointSpec, Uid};

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
    /// Its address is also one of the Service's frontends, or has node ports: with the wrong port it is a loop.
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

impl Merged<'_, '_> {
    /// What the packet path is told of the endpoint. Who it is, is its Pod's uid: the same address may be another Pod's by
    /// tomorrow. Without that, its slice's: as long as the slice is there, and names the address, it is the same. One that is terminating is so even where it counts as ready (`publishNotReadyAddresses`): when it leaves
    /// its slices, it is gone.
    pub(super) fn spec(&self) -> EndpointSpec {
        let Candidate { ready, serving, terminating, endpoint, .. } = *self.of;
        let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref());
        let of_slice = self.slice.metadata.uid.as_deref();
        EndpointSpec {
            address: self.address,
            uid: uid.map(Uid::of).or_else(|| of_slice.map(Uid::of_slice)).unwrap_or_default(),
            condition: match (ready, terminating) {
                (_, true) => Condition::Terminating { serving },
                (true, false) => Condition::Ready,
                (false, false) => Condition::NotReady { serving },
            },
            drain: None,
        }
    }
}

/// What the Service answers on itself: an endpoint there would lead back to it.
pub(super) struct OwnFrontends<'o> {
    pub(super) cluster_ip: IpAddr,
    /// Load-balancer and external addresses of the family.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: &'o [ServicePort<'o>],
    pub(super) node_port_addresses: &'o [IpAddr],
}

impl OwnFrontends<'_> {
    fn contains(&self, endpoint: SocketAddr, wanted: Protocol) -> bool {
        let mut ports = self.ports.iter().filter(|port| port.protocol == wanted);
        if self.addresses.contains(&endpoint.ip()) && ports.clone().any(|port| port.number == endpoint.port()) {
            return true;
        }
        self.node_port_addresses.contains(&endpoint.ip()) && ports.any(|port| port.node_port == Some(endpoint.port()))
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
                    may_loop: own.addresses.contains(&address)
                        || (has_node_port && own.node_port_addresses.contains(&address)),
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
                if candidate.may_loop && own.contains(address, wanted) {
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
                        // A terminating Pod's address may be another Pod's by now: the one that lives counts. Of two
                        // that live, the older slice's does, and in one slice the last.
                        let in_one_slice = std::ptr::eq(first.slice, *slice);
                        if !candidate.terminating && (first.of.terminating || in_one_slice) {
                            report_difference(&next, first, problems);
                            *first = next;
                        } else {
                            report_difference(first, &next, problems);
                        }
                    }
                }
            }
        }
        merged
    }
}

/// Reports an entry that says of an endpoint what another, which counts, does not; a terminating one beside a live one is an
/// ordinary sight.
fn report_difference(counts: &Merged<'_, '_>, hidden: &Merged<'_, '_>, problems: &mut Problems<'_>) {
    let (one, other) = (counts.of, hidden.of);
    let facts = |it: &Candidate<'_>| (it.ready, it.serving, it.terminating, it.local);
    if one.terminating != other.terminating
        || (facts(one) == facts(other) && one.endpoint.hints == other.endpoint.hints)
    {
        return;
    }
    let field = format!("endpoints[{}]", other.index);
    let place = format!("{}, endpoints[{}]", counts.slice.metadata.name.as_deref().unwrap_or_default(), one.index);
    problems.slice_warning(
        hidden.slice,
        field,
        format!("{} is described differently by {place}, which counts", hidden.address),
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
