//! Topology hints (KEP-2433, 4444, 3015). Only the hints in slices are read; `trafficDistribution`, annotations and the
//! zones of endpoints are the EndpointSlice controller's matter.

use super::endpoints::Merged;
use crate::node::NodeFacts;
use crate::object::ZONE_LABEL;

/// By which hints endpoints are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Topology {
    /// Those for this node.
    Node,
    /// Those for this node's zone.
    Zone,
}

impl Topology {
    /// Hints count when every ready endpoint has one of a kind and at least one names this node or its zone. Node hints go
    /// before zone hints.
    pub(super) fn of(endpoints: &[Merged<'_, '_>], node: &NodeFacts) -> Option<Self> {
        [Self::Node, Self::Zone].into_iter().find(|topology| {
            let mut some_match = false;
            for endpoint in endpoints.iter().filter(|endpoint| endpoint.of.ready) {
                match topology.hint(endpoint, node) {
                    None => return false,
                    Some(matches) => some_match |= matches,
                }
            }
            some_match
        })
    }

    /// Whether the endpoint is meant for here.
    pub(super) fn admits(self, endpoint: &Merged<'_, '_>, node: &NodeFacts) -> bool {
        self.hint(endpoint, node).unwrap_or(false)
    }

    /// Why hints that are there do not count.
    pub(super) fn why_ignored(endpoints: &[Merged<'_, '_>], node: &NodeFacts) -> Option<String> {
        if Self::of(endpoints, node).is_some() {
            return None;
        }
        let ready = || endpoints.iter().filter(|endpoint| endpoint.of.ready);
        // Hints for zones are what counts last.
        let kinds = [(Self::Zone, "zone"), (Self::Node, "node")];
        let is_there = |kind: &Self| ready().any(|endpoint| kind.hint(endpoint, node).is_some());
        let (kind, noun) = kinds.into_iter().find(|(kind, _)| is_there(kind))?;
        let mut without = ready().filter(|endpoint| kind.hint(endpoint, node).is_none());
        Some(match without.next() {
            Some(first) => {
                let (count, all) = (without.count() + 1, ready().count());
                let verb = if count == 1 { "has" } else { "have" };
                format!("{count} of {all} ready endpoints {verb} no {noun} hint: {}", first.address)
            }
            None if kind == Self::Zone && node.zone.is_none() => format!("the Node has no label {ZONE_LABEL}"),
            None => format!("none is for {}", kind.target(node)),
        })
    }

    /// What hints are about, for people.
    pub(super) fn target(self, node: &NodeFacts) -> String {
        match self {
            Self::Node => format!("node {}", node.name),
            Self::Zone => format!("zone {}", node.zone.as_deref().unwrap_or_default()),
        }
    }

    /// Whether the endpoint's hints of this kind name us; nothing when it has none.
    fn hint(self, endpoint: &Merged<'_, '_>, node: &NodeFacts) -> Option<bool> {
        let hints = endpoint.of.endpoint.hints.as_ref()?;
        match self {
            Self::Node => {
                let nodes = hints.for_nodes.as_deref().filter(|nodes| !nodes.is_empty())?;
                Some(nodes.iter().any(|hint| hint.name == node.name))
            }
            Self::Zone => {
                let zones = hints.for_zones.as_deref().filter(|zones| !zones.is_empty())?;
                Some(zones.iter().any(|hint| Some(hint.name.as_str()) == node.zone.as_deref()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::resolve::testing::{port, service, slice_of, text};

    #[test]
    fn hints_count_when_every_ready_endpoint_has_one_and_one_is_for_us() {
        for (endpoints, chosen, why) in [
            (
                &["10.0.0.1 zone=a", "10.0.0.2 zone=b"][..],
                &["10.0.0.1:8080"][..],
                "hints: 1 of 2 ready endpoints is for zone a",
            ),
            (&["10.0.0.1 zone=a", "10.0.0.2"], &["10.0.0.1:8080", "10.0.0.2:8080"], "2 of 2 endpoints are ready"),
            (
                &["10.0.0.1 zone=b", "10.0.0.2 zone=c"],
                &["10.0.0.1:8080", "10.0.0.2:8080"],
                "2 of 2 endpoints are ready",
            ),
            (
                &["10.0.0.1 node=me zone=b", "10.0.0.2 node=other zone=a"],
                &["10.0.0.1:8080"],
                "hints: 1 of 2 ready endpoints is for node me",
            ),
            (
                &["10.0.0.1 node=me zone=b", "10.0.0.2 zone=a"],
                &["10.0.0.2:8080"],
                "hints: 1 of 2 ready endpoints is for zone a",
            ),
            (
                &["10.0.0.1 node=x zone=b", "10.0.0.2 node=y zone=a"],
                &["10.0.0.2:8080"],
                "hints: 1 of 2 ready endpoints is for zone a",
            ),
            // An endpoint that is not ready neither needs a hint nor makes one count.
            (
                &["10.0.0.1 zone=a", "10.0.0.2 unready"],
                &["10.0.0.1:8080"],
                "hints: 1 of 1 ready endpoint is for zone a",
            ),
            (&["10.0.0.1 zone=a unready", "10.0.0.2 zone=b"], &["10.0.0.2:8080"], "1 of 2 endpoints is ready"),
        ] {
            let list = port(&service(json!({})), &[slice_of(endpoints)]).cluster;
            assert_eq!((text(&list.addresses), &*list.why), (text(chosen), why), "{endpoints:?}");
        }
    }

    #[test]
    fn hints_never_apply_to_local_lists_or_to_draining_endpoints() {
        let slices = [slice_of(&["10.0.0.1 here zone=b", "10.0.0.2 here zone=a", "10.0.0.3 zone=a"])];
        let local = port(&service(json!({"internalTrafficPolicy": "Local"})), &slices).local;
        assert_eq!(text(&local.addresses), ["10.0.0.1:8080", "10.0.0.2:8080"]);
        let draining = [slice_of(&["10.0.0.1 zone=b unready terminating", "10.0.0.2 zone=a unready terminating"])];
        assert_eq!(port(&service(json!({})), &draining).cluster.addresses.len(), 2);
    }

    #[test]
    fn only_hints_in_slices_are_read() {
        let mut web = service(json!({"trafficDistribution": "PreferSameZone"}));
        web["metadata"]["annotations"] = json!({"service.kubernetes.io/topology-mode": "Auto"});
        let mut slice = slice_of(&["10.0.0.1", "10.0.0.2"]);
        slice["endpoints"][0]["zone"] = json!("a");
        assert_eq!(port(&web, &[slice]).cluster.addresses.len(), 2);
    }
}
