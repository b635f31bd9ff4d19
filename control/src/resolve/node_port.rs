//! Node ports of a Service. On which addresses they answer is the node's matter: [`crate::node`].

use ahash::AHashSet;
use sluice_dataplane::net::Protocol;

use super::problems::Problems;
use crate::config::PortRange;

/// Node ports that the Service has so far.
pub(super) struct NodePorts {
    range: PortRange,
    taken: AHashSet<(u16, Protocol)>,
}

impl NodePorts {
    pub(super) fn new(range: PortRange) -> Self {
        Self { range, taken: AHashSet::new() }
    }

    /// The node port, when there is one that is valid and not another port's. The Service's type does not matter.
    pub(super) fn take(
        &mut self,
        declared: Option<i32>,
        protocol: Protocol,
        field: impl Fn() -> String,
        problems: &mut Problems<'_>,
    ) -> Option<u16> {
        let declared = declared.filter(|port| *port != 0)?;
        let Ok(port) = u16::try_from(declared) else {
            problems.error(field(), format!("{declared} is no port: use 1 to 65535"));
            return None;
        };
        if !self.taken.insert((port, protocol)) {
            problems.error(field(), format!("{port} ({protocol}) is the node port of an earlier port"));
            return None;
        }
        if !self.range.range().contains(&port) {
            problems.warning(
                field(),
                format!("{port} is outside nodePortRange {}: widen that, or packets to it go past", self.range),
            );
        }
        Some(port)
    }
}
