//! Topology hints (KEP-2433, 4444, 3015). Only the hints in slices are read; `trafficDistribution`, annotations and the
//! zones of endpoints are the EndpointSlice controller's matter.

use super::endpoints::Merged;
use crate::node::NodeFacts;

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
