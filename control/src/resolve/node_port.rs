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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::problem::Severity;
    use crate::resolve::testing::{resolved, service};

    #[test]
    fn node_ports_are_valid_and_one_ports_own() {
        for (number, served, severity) in [
            (json!(30080), Some(30080), None),
            (json!(0), None, None),
            (json!(null), None, None),
            (json!(3001), Some(3001), Some(Severity::Warning)),
            (json!(-1), None, Some(Severity::Error)),
            (json!(65536), None, Some(Severity::Error)),
        ] {
            let found = resolved(&service(json!({"ports": [{"name": "http", "port": 80, "nodePort": number}]})), &[]);
            let severity_found = found.problems.first().map(|problem| problem.severity);
            assert_eq!((found.spec.unwrap().ports[0].node_port, severity_found), (served, severity), "{number}");
        }
        let ports = json!([
            {"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81, "nodePort": 30080},
            {"name": "c", "port": 80, "protocol": "UDP", "nodePort": 30080},
        ]);
        let found = resolved(&service(json!({"ports": ports})), &[]);
        let served: Vec<_> = found.spec.unwrap().ports.iter().map(|port| port.node_port).collect();
        assert_eq!((served, found.problems.len()), (vec![Some(30080), None, Some(30080)], 1));
    }
}
